"""The Store: everything the controller has told us, indexed the way decisions ask for it.

Workloads by uid, address, hostname and pod name; services by key, virtual address, address
range and hostname; policies by the workload they concern. It is filled by deltas: what is
named is removed, then inserted, and resources come before removals (the rules of Istio's
workload xDS). Endpoints may arrive before their service; they are staged until it comes,
and an updated service keeps the endpoints it has.

Pure: no clock, no I/O, one thread. Who must react to a change asks `Changed`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mesh.model.authorization import Authorization, PolicyScope
from mesh.model.service import Service, Visibility
from mesh.model.workload import (
    NamespacedHostname,
    NetworkAddress,
    NetworkMode,
    TunnelProtocol,
    Workload,
)

_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One workload behind a service; `ports` maps service port to target port."""

    workload: Workload
    ports: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Changed:
    """Names that an update touched, whether the thing exists afterwards or not.

    `workloads` are uids, `services` are `namespace/hostname`, `policies` `namespace/name`.
    Services are named when they themselves changed, not when their endpoints did.
    """

    workloads: frozenset[str] = frozenset()
    services: frozenset[str] = frozenset()
    policies: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.workloads or self.services or self.policies)


def _workload_rank(workload: Workload) -> tuple[bool, bool, str]:
    # Workloads that share an address: a pod wins, then one that speaks HBONE. The uid makes
    # the choice the same on every node.
    return (
        "//Pod/" not in workload.uid,
        workload.tunnel_protocol is not TunnelProtocol.HBONE,
        workload.uid,
    )


class _Services:
    """Services that share one index entry, in a stable order; nearly always one."""

    __slots__ = ("services",)

    def __init__(self) -> None:
        self.services: list[Service] = []

    def add(self, service: Service) -> None:
        self.services.append(service)
        self.services.sort(key=lambda each: (each.namespace, each.hostname))

    def discard(self, key: NamespacedHostname) -> bool:
        """Remove one; returns whether any is left."""
        self.services = [each for each in self.services if each.key != key]
        return bool(self.services)


def is_visible(service: Service, namespace: str) -> bool:
    """Whether a client in `namespace` may see the service at all."""
    return service.visibility is Visibility.PUBLIC or service.namespace == namespace


def best_service(
    candidates: Iterable[Service], namespace: str, preferred_namespace: str = ""
) -> Service | None:
    """Of services with one name or address, the one a client in `namespace` means:
    its own namespace's, else a canonical one, else the preferred namespace's, else the first.
    """
    visible = [each for each in candidates if is_visible(each, namespace)]
    if len(visible) < 2:
        return visible[0] if visible else None
    return min(
        visible,
        key=lambda each: (
            each.namespace != namespace,
            not each.canonical,
            each.namespace != preferred_namespace,
        ),
    )


class Store:
    """What this proxy knows of the mesh. Lookups return None for what it does not know."""

    def __init__(self) -> None:
        self.version = 0
        """Another number after every change of anything."""
        self.policies_version = 0
        self._workloads: dict[str, Workload] = {}
        self._by_address: dict[NetworkAddress, list[Workload]] = {}
        self._by_pod: dict[tuple[str, str], dict[str, Workload]] = {}
        self._by_workload_hostname: dict[str, dict[str, Workload]] = {}
        self._services: dict[NamespacedHostname, Service] = {}
        self._by_vip: dict[NetworkAddress, _Services] = {}
        self._by_hostname: dict[str, _Services] = {}
        # (network, IP version) -> prefix length -> network number -> services
        self._ranges: dict[tuple[str, int], dict[int, dict[int, _Services]]] = {}
        self._endpoints: dict[str, dict[str, Endpoint]] = {}
        self._endpoint_views: dict[str, tuple[Endpoint, ...]] = {}
        self._policies: dict[str, Authorization] = {}
        self._global_policies: dict[str, Authorization] = {}
        self._namespace_policies: dict[str, dict[str, Authorization]] = {}

    # -- updates ---------------------------------------------------------------------

    def apply_addresses(
        self, updated: Sequence[Workload | Service], removed: Sequence[str]
    ) -> Changed:
        """Insert or replace, then remove by uid or `namespace/hostname`; unknown names are
        ignored. Returns what changed.
        """
        workloads: set[str] = set()
        services: set[str] = set()
        for resource in updated:
            if isinstance(resource, Workload):
                if self._workloads.get(resource.uid) == resource:
                    continue
                self._remove_workload(resource.uid)
                self._insert_workload(resource)
                workloads.add(resource.uid)
            else:
                if self._services.get(resource.key) == resource:
                    continue
                self._remove_service(resource.key)
                self._insert_service(resource)
                services.add(str(resource.key))
        for name in removed:
            if self._remove_workload(name):
                workloads.add(name)
                continue
            namespace, found, hostname = name.partition("/")
            if found and self._remove_service(NamespacedHostname(namespace, hostname)):
                services.add(name)
        if workloads or services:
            self.version += 1
        return Changed(frozenset(workloads), frozenset(services))

    def apply_policies(self, updated: Sequence[Authorization], removed: Sequence[str]) -> Changed:
        """Insert or replace, then remove by `namespace/name`. Returns what changed."""
        policies: set[str] = set()
        for policy in updated:
            if self._policies.get(policy.key) == policy:
                continue
            self._remove_policy(policy.key)
            self._insert_policy(policy)
            policies.add(policy.key)
        for name in removed:
            if self._remove_policy(name):
                policies.add(name)
        if policies:
            self.version += 1
            self.policies_version += 1
        return Changed(policies=frozenset(policies))

    # -- workloads -------------------------------------------------------------------

    def workloads(self) -> Iterator[Workload]:
        """Every workload, in order of arrival."""
        return iter(self._workloads.values())

    def workload_by_uid(self, uid: str) -> Workload | None:
        """The workload of this uid."""
        return self._workloads.get(uid)

    def workload_by_address(self, address: NetworkAddress) -> Workload | None:
        """The workload that owns an address: a pod before anything else that claims it.
        Host-network workloads own none.
        """
        found = self._by_address.get(address)
        return found[0] if found else None

    def workload_by_hostname(self, hostname: str) -> Workload | None:
        """A workload that is known by a DNS name."""
        found = self._by_workload_hostname.get(hostname.lower())
        return next(iter(found.values())) if found else None

    def workload_by_pod(
        self, namespace: str, name: str, service_account: str, node: str = ""
    ) -> Workload | None:
        """The workload that a local pod is: all three must agree, and its node when given."""
        for workload in self._by_pod.get((namespace, name), {}).values():
            if workload.service_account == service_account and node in ("", workload.node):
                return workload
        return None

    # -- services --------------------------------------------------------------------

    def services(self) -> Iterator[Service]:
        """Every service, in order of arrival."""
        return iter(self._services.values())

    def service_by_key(self, key: NamespacedHostname) -> Service | None:
        """The service of this namespace and hostname."""
        return self._services.get(key)

    def services_by_hostname(self, hostname: str) -> Sequence[Service]:
        """Services of this hostname, of all namespaces."""
        found = self._by_hostname.get(hostname.lower())
        return found.services if found else ()

    def service_by_hostname(
        self, hostname: str, client_namespace: str, preferred_namespace: str = ""
    ) -> Service | None:
        """The service that a client in `client_namespace` means by a hostname."""
        candidates = self.services_by_hostname(hostname)
        return best_service(candidates, client_namespace, preferred_namespace)

    def service_by_vip(self, address: NetworkAddress, client_namespace: str) -> Service | None:
        """The service at a virtual address; address ranges are asked only if no visible
        service has that very address.
        """
        found = self._by_vip.get(address)
        if found:
            service = best_service(found.services, client_namespace)
            if service is not None:
                return service
        return self._service_by_range(address, client_namespace) if self._ranges else None

    def endpoints(self, key: NamespacedHostname) -> Sequence[Endpoint]:
        """The endpoints of a known service, healthy or not."""
        if key not in self._services:
            return ()
        name = str(key)
        view = self._endpoint_views.get(name)
        if view is None:
            view = self._endpoint_views[name] = tuple(self._endpoints.get(name, {}).values())
        return view

    def is_endpoint(self, key: NamespacedHostname, uid: str) -> bool:
        """Whether a workload is an endpoint of a known service."""
        return key in self._services and uid in self._endpoints.get(str(key), {})

    def services_of(self, workload: Workload) -> Iterator[Service]:
        """The known services that a workload is an endpoint of."""
        for name in workload.services:
            namespace, _, hostname = name.partition("/")
            service = self._services.get(NamespacedHostname(namespace, hostname))
            if service is not None:
                yield service

    def staged_endpoints(self) -> dict[str, Sequence[str]]:
        """`namespace/hostname` of services not known yet -> uids of endpoints waiting."""
        known = {str(key) for key in self._services}
        return {
            name: tuple(waiting) for name, waiting in self._endpoints.items() if name not in known
        }

    # -- policies --------------------------------------------------------------------

    def policies(self) -> Iterator[Authorization]:
        """Every policy."""
        return iter(self._policies.values())

    def policies_for(self, workload: Workload) -> list[Authorization]:
        """The policies that concern a workload: global ones, its namespace's, and those that
        it names. A name that is not known is skipped.
        """
        found = self._global_policies | self._namespace_policies.get(workload.namespace, {})
        for name in workload.authorization_policies:
            policy = self._policies.get(name)
            if policy is not None:
                found[name] = policy
        return list(found.values())

    # -- the indexes -----------------------------------------------------------------

    def _insert_workload(self, workload: Workload) -> None:
        self._workloads[workload.uid] = workload
        if workload.network_mode is not NetworkMode.HOST_NETWORK:
            for ip in workload.addresses:
                address = NetworkAddress(workload.network, ip)
                sharing = self._by_address.setdefault(address, [])
                sharing.append(workload)
                sharing.sort(key=_workload_rank)
        pod = (workload.namespace, workload.name)
        self._by_pod.setdefault(pod, {})[workload.uid] = workload
        if workload.hostname:
            named = self._by_workload_hostname.setdefault(workload.hostname.lower(), {})
            named[workload.uid] = workload
        for name, ports in workload.services.items():
            self._endpoints.setdefault(name, {})[workload.uid] = Endpoint(workload, ports)
            self._endpoint_views.pop(name, None)

    def _remove_workload(self, uid: str) -> bool:
        workload = self._workloads.pop(uid, None)
        if workload is None:
            return False
        if workload.network_mode is not NetworkMode.HOST_NETWORK:
            for ip in workload.addresses:
                address = NetworkAddress(workload.network, ip)
                left = [each for each in self._by_address.get(address, ()) if each.uid != uid]
                if left:
                    self._by_address[address] = left
                else:
                    self._by_address.pop(address, None)
        _discard(self._by_pod, (workload.namespace, workload.name), uid)
        if workload.hostname:
            _discard(self._by_workload_hostname, workload.hostname.lower(), uid)
        for name in workload.services:
            _discard(self._endpoints, name, uid)
            self._endpoint_views.pop(name, None)
        return True

    def _insert_service(self, service: Service) -> None:
        self._services[service.key] = service
        self._by_hostname.setdefault(service.hostname.lower(), _Services()).add(service)
        for address in service.addresses:
            self._by_vip.setdefault(address, _Services()).add(service)
        for cidr in service.cidr_addresses:
            network = ipaddress.ip_network(cidr.prefix, strict=False)
            lengths = self._ranges.setdefault((cidr.network, network.version), {})
            numbers = lengths.setdefault(network.prefixlen, {})
            numbers.setdefault(int(network.network_address), _Services()).add(service)

    def _remove_service(self, key: NamespacedHostname) -> bool:
        service = self._services.pop(key, None)
        if service is None:
            return False
        _forget(self._by_hostname, service.hostname.lower(), key)
        for address in service.addresses:
            _forget(self._by_vip, address, key)
        for cidr in service.cidr_addresses:
            network = ipaddress.ip_network(cidr.prefix, strict=False)
            where = (cidr.network, network.version)
            lengths = self._ranges.get(where, {})
            numbers = lengths.get(network.prefixlen, {})
            _forget(numbers, int(network.network_address), key)
            if not numbers:
                lengths.pop(network.prefixlen, None)
            if not lengths:
                self._ranges.pop(where, None)
        return True

    def _service_by_range(self, address: NetworkAddress, client_namespace: str) -> Service | None:
        ip = ipaddress.ip_address(address.address)
        lengths = self._ranges.get((address.network, ip.version), {})
        found: list[tuple[bool, int, bool, NamespacedHostname]] = []
        for length, numbers in lengths.items():
            shift = ip.max_prefixlen - length
            sharing = numbers.get(int(ip) >> shift << shift)
            for service in sharing.services if sharing else ():
                if is_visible(service, client_namespace):
                    elsewhere = service.namespace != client_namespace
                    found.append((elsewhere, -length, not service.canonical, service.key))
        return self._services[min(found)[3]] if found else None

    def _insert_policy(self, policy: Authorization) -> None:
        self._policies[policy.key] = policy
        if policy.scope is PolicyScope.GLOBAL:
            self._global_policies[policy.key] = policy
        elif policy.scope is PolicyScope.NAMESPACE:
            self._namespace_policies.setdefault(policy.namespace, {})[policy.key] = policy

    def _remove_policy(self, key: str) -> bool:
        policy = self._policies.pop(key, None)
        if policy is None:
            return False
        self._global_policies.pop(key, None)
        _discard(self._namespace_policies, policy.namespace, key)
        return True


def _discard(index: dict[_K, dict[str, _V]], key: _K, name: str) -> None:
    sharing = index.get(key)
    if sharing is not None:
        sharing.pop(name, None)
        if not sharing:
            del index[key]


def _forget(index: dict[_K, _Services], key: _K, service: NamespacedHostname) -> None:
    sharing = index.get(key)
    if sharing is not None and not sharing.discard(service):
        del index[key]
