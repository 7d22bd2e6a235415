"""ServiceEntry and WorkloadEntry -> the mesh's services and workloads. Pure.

As in Istio: a ServiceEntry is one service for each host; resolution NONE passes through to the
address that was called; a host to be resolved by DNS without endpoints is its own endpoint; a
selector chooses pods and WorkloadEntries of the namespace. A WorkloadEntry is always healthy,
and Kubernetes Services select it as they select a pod. None of them is reached by tunnel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from istiod_lite.workloads import Mesh, app_protocol, is_published, tcp_ports
from mesh.cluster.api import Ref
from mesh.cluster.entries import Endpoint, ServiceEntry, WorkloadEntry
from mesh.cluster.inventory import Inventory
from mesh.cluster.objects import Pod, Service, is_selected
from mesh.model import service as model
from mesh.model.workload import (
    CidrAddress,
    GatewayAddress,
    Locality,
    NetworkAddress,
    NetworkMode,
    Workload,
)

_GROUP = "networking.istio.io"
_PASSTHROUGH = model.LoadBalancing((), model.Mode.PASSTHROUGH, model.HealthPolicy.ALLOW_ALL)


def hosts_of(mesh: Mesh, entry: ServiceEntry, others: Iterable[ServiceEntry]) -> list[str]:
    """The hosts that an entry may speak for: of those of its namespace the oldest does, and
    names of the namespace's Kubernetes Services are theirs.
    """
    own = f".{entry.namespace}.svc.{mesh.domain}"
    age = (entry.created, entry.name)
    taken = {host for each in others if (each.created, each.name) < age for host in each.hosts}
    return [host for host in entry.hosts if not host.endswith(own) and host not in taken]


def resources(
    mesh: Mesh,
    entry: ServiceEntry,
    hosts: Iterable[str],
    allocated: Iterable[tuple[str, str]] = (),
    waypoint: GatewayAddress | None = None,
) -> dict[str, model.Service | Workload]:
    """What a ServiceEntry stands for, by resource name: services for `hosts`, and endpoints.

    `allocated` are further addresses, by host.
    """
    pairs = dict.fromkeys((*entry.assigned, *allocated))
    entry = replace(entry, assigned=tuple(pairs))
    found: dict[str, model.Service | Workload] = {}
    entry = replace(entry, hosts=tuple(hosts))
    for host in entry.hosts:
        service = _service(mesh, entry, host)
        found[str(service.key)] = replace(service, waypoint=waypoint) if waypoint else service
    endpoints = entry.endpoints
    if not endpoints and entry.selector is None and entry.resolution.startswith("DNS"):
        endpoints = tuple(Endpoint(host, is_name=True) for host in entry.hosts)
    for each in endpoints:
        services = {
            f"{entry.namespace}/{host}": _ports(entry, each.ports)
            for host in entry.hosts
            if entry.endpoints or host == each.address
        }
        uid = f"{mesh.cluster_id}/{_GROUP}/ServiceEntry/{entry.namespace}/{entry.name}"
        workload = _workload(mesh, f"{uid}/{each.address}", entry.namespace, entry.name, each)
        found[workload.uid] = replace(workload, services=services)
    return found


def _service(mesh: Mesh, entry: ServiceEntry, host: str) -> model.Service:
    single = [each for each in entry.addresses if "/" not in each]
    single += [address for name, address in entry.assigned if name == host]
    ranges = (each for each in entry.addresses if "/" in each)
    return model.Service(
        name=entry.name,
        namespace=entry.namespace,
        hostname=host,
        addresses=tuple(NetworkAddress(mesh.network, each) for each in single),
        cidr_addresses=tuple(CidrAddress(mesh.network, each) for each in ranges),
        ports={
            port.number: model.ServicePort(
                port.number,
                port.target or port.number,
                app_protocol("", port.protocol or port.name),
            )
            for port in entry.ports
        },
        subject_alt_names=entry.subject_alt_names,
        load_balancing=_PASSTHROUGH if entry.resolution == "NONE" else model.LoadBalancing(),
    )


def _ports(entry: ServiceEntry, named: Mapping[str, int]) -> dict[int, int]:
    """Service port to the endpoint's port."""
    return {p.number: named.get(p.name, p.target or p.number) for p in entry.ports}


def selected_by(
    entries: Iterable[ServiceEntry], labels: Mapping[str, str], named: Mapping[str, int]
) -> dict[str, Mapping[int, int]]:
    """The services of those ServiceEntries that select a workload of these labels."""
    return {
        f"{entry.namespace}/{host}": _ports(entry, named)
        for entry in entries
        if entry.selector and is_selected(entry.selector, labels)
        for host in entry.hosts
    }


def workload_entry(
    mesh: Mesh,
    entry: WorkloadEntry,
    services: Iterable[Service],
    entries: Iterable[ServiceEntry],
) -> Workload:
    """The workload that a WorkloadEntry is; the others are those of its namespace."""
    endpoint, labels = entry.endpoint, entry.all_labels
    uid = f"{mesh.cluster_id}/{_GROUP}/WorkloadEntry/{entry.namespace}/{entry.name}"
    found = dict(selected_by(entries, labels, endpoint.ports))
    for service in services:
        if is_published(service) and service.selects(labels):
            found[mesh.service_key(service.namespace, service.name)] = {
                port.number: endpoint.ports.get(
                    port.name, port.target if isinstance(port.target, int) else port.number
                )
                for port in tcp_ports(service)
            }
    workload = _workload(mesh, uid, entry.namespace, entry.name, endpoint)
    return replace(workload, services=found)


def _workload(mesh: Mesh, uid: str, namespace: str, name: str, endpoint: Endpoint) -> Workload:
    region, _, rest = endpoint.locality.partition("/")
    zone, _, subzone = rest.partition("/")
    labels = endpoint.labels
    is_address = endpoint.address and not endpoint.is_name
    return Workload(
        uid=uid,
        name=name,
        namespace=namespace,
        addresses=(endpoint.address,) if is_address else (),
        hostname=endpoint.address if endpoint.is_name else "",
        network=endpoint.network or mesh.network,
        trust_domain=mesh.trust_domain,
        service_account=endpoint.service_account or "default",
        canonical_name=labels.get("service.istio.io/canonical-name") or labels.get("app") or name,
        canonical_revision=labels.get("version") or "latest",
        workload_name=name,
        cluster_id=mesh.cluster_id,
        locality=Locality(region, zone, subzone),
        network_mode=NetworkMode.HOST_NETWORK,
        capacity=endpoint.weight,
    )


def touched(inventory: Inventory, states: Sequence[ServiceEntry]) -> Iterator[Ref]:
    """What else a change of a ServiceEntry concerns; `states` are it before and after."""
    namespace = states[0].namespace
    hosts = {host for each in states for host in each.hosts}
    for entry in inventory.within(ServiceEntry, namespace):
        if not hosts.isdisjoint(entry.hosts):
            yield entry.ref
    for pod in inventory.within(Pod, namespace):
        if any(each.selector and is_selected(each.selector, pod.labels) for each in states):
            yield pod.ref
    for other in inventory.within(WorkloadEntry, namespace):
        yield other.ref
