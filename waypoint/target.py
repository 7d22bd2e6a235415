"""DECIDES what a tunnel asks for: the Service, or workload, that its CONNECT names. Pure.

Only those that use this waypoint are served. Whoever is called sees our identity, so serving
anything else would lend it to callers whose own would have been refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mesh.errors import Refusal
from mesh.hbone.head import Authority
from mesh.model.service import AppProtocol, Service
from mesh.model.store import Store
from mesh.model.workload import GatewayAddress, NamespacedHostname, NetworkAddress, Workload


@dataclass(frozen=True, slots=True)
class Own:
    """Who we are: our Service's key, network and address. `has_traffic` says whether the
    controller gave us a configuration for a service, `namespace/hostname`.
    """

    service: NamespacedHostname
    network: str
    address: str
    has_traffic: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Target:
    """What is called: a service, or a workload itself; and on which port."""

    port: int
    ip: str
    service: Service | None = None
    workload: Workload | None = None
    protocol: AppProtocol = AppProtocol.UNKNOWN

    @property
    def key(self) -> str:
        """`namespace/hostname` of the service, or empty text."""
        return str(self.service.key) if self.service is not None else ""


def plan_tunnel(authority: Authority, namespace: str, own: Own, store: Store) -> Target | Refusal:
    """The target of a CONNECT by a caller in `namespace`."""
    if not authority.is_ip:
        service = store.service_by_hostname(authority.host, namespace)
        return _service(service, authority, own, store)
    address = NetworkAddress(own.network, authority.host)
    service = store.service_by_vip(address, namespace)
    if service is not None:
        return _service(service, authority, own, store)
    workload = store.workload_by_address(address)
    if workload is None:
        return Refusal("NR", f"{authority} is neither a service nor a workload", http_status=404)
    if workload.waypoint is None or not _is_us(workload.waypoint, own, store):
        return Refusal("NR", f"{workload.uid} does not use this waypoint", http_status=404)
    protocol = AppProtocol.UNKNOWN
    for each in store.services_of(workload):
        for port, target in workload.services.get(str(each.key), {}).items():
            if target == authority.port and port in each.ports:
                protocol = each.ports[port].app_protocol
    return Target(authority.port, authority.host, workload=workload, protocol=protocol)


def _service(
    service: Service | None, authority: Authority, own: Own, store: Store
) -> Target | Refusal:
    if service is None:
        return Refusal("NR", f"{authority} is not a known service", http_status=404)
    uses = [service.waypoint, *(each.destination for each in service.weighted_waypoints)]
    if not own.has_traffic(str(service.key)) and not any(
        each is not None and _is_us(each, own, store) for each in uses
    ):
        return Refusal("NR", f"{service.key} does not use this waypoint", http_status=404)
    described = service.ports.get(authority.port)
    if described is None:
        return Refusal("NR", f"{service.key} has no port {authority.port}", http_status=404)
    ip = authority.host if authority.is_ip else next((a.address for a in service.addresses), "")
    return Target(authority.port, ip, service=service, protocol=described.app_protocol)


def _is_us(gateway: GatewayAddress, own: Own, store: Store) -> bool:
    match gateway.destination:
        case NamespacedHostname() as key:
            return key == own.service
        case NetworkAddress() as address:
            if address.network == own.network and address.address == own.address:
                return True
            service = store.service_by_vip(address, own.service.namespace)
            return service is not None and service.key == own.service
