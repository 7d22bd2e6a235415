"""Pods, services, nodes and endpoint slices -> the mesh's workloads and services. Pure.

One object in, one value out; `istiod_lite.index` decides what to derive again. The rules
are Istio's: a pod is a workload once it has an address and until it has ended; it is
reached through the tunnel only when the node agent says so (the `redirection` annotation);
it is healthy when Ready and not on its way out; a named target port is resolved in each pod.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mesh.cluster.objects import (
    EndpointSlice,
    Metadata,
    Namespace,
    Node,
    Owner,
    Pod,
    Service,
    ServicePort,
    SliceEndpoint,
)
from mesh.identity import DEFAULT_TRUST_DOMAIN
from mesh.model import service as model
from mesh.model.workload import (
    Locality,
    NetworkAddress,
    NetworkMode,
    TunnelProtocol,
    Workload,
    WorkloadStatus,
)

TRAFFIC_DISTRIBUTION = "networking.istio.io/traffic-distribution"
_REGION = "topology.kubernetes.io/region"
_ZONE = "topology.kubernetes.io/zone"
_SUBZONE = "topology.istio.io/subzone"
_CRON_JOB = re.compile(r"(.+)-[0-9]{8,10}")
_NAME_LABELS = ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")
_REVISION_LABELS = (
    "service.istio.io/canonical-revision",
    "app.kubernetes.io/version",
    "version",
)

_NETWORK_FIRST = (model.Scope.NETWORK, model.Scope.REGION, model.Scope.ZONE)
_DISTRIBUTIONS = {
    "PreferClose": _NETWORK_FIRST,
    "PreferSameZone": _NETWORK_FIRST,
    "PreferSameNode": (*_NETWORK_FIRST, model.Scope.SUBZONE, model.Scope.NODE),
}
_APP_PROTOCOLS = {
    "http": model.AppProtocol.HTTP11,
    "http1": model.AppProtocol.HTTP11,
    "http2": model.AppProtocol.HTTP2,
    "kubernetes.io/h2c": model.AppProtocol.HTTP2,
    "kubernetes.io/ws": model.AppProtocol.HTTP11,
    "grpc": model.AppProtocol.GRPC,
    "grpc-web": model.AppProtocol.GRPC,
    "tcp": model.AppProtocol.TCP,
    "tls": model.AppProtocol.TLS,
    "https": model.AppProtocol.TLS,
}


@dataclass(frozen=True, slots=True)
class Mesh:
    """What is the same for every workload of this cluster."""

    cluster_id: str = "Kubernetes"
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    domain: str = "cluster.local"
    network: str = ""
    root_namespace: str = "istio-system"

    def hostname(self, namespace: str, name: str) -> str:
        """The DNS name of a Service."""
        return f"{name}.{namespace}.svc.{self.domain}"

    def service_key(self, namespace: str, name: str) -> str:
        """The resource name of a Service: `namespace/hostname`."""
        return f"{namespace}/{self.hostname(namespace, name)}"

    def pod_uid(self, namespace: str, name: str) -> str:
        """The resource name of a pod's workload; the core group's name is empty."""
        return f"{self.cluster_id}//Pod/{namespace}/{name}"


def pod_workload(
    mesh: Mesh,
    pod: Pod,
    services: Iterable[Service],
    node: Node | None,
    policies: tuple[str, ...] = (),
) -> Workload | None:
    """The workload that a pod is, None while it is none.

    `services` are those of its namespace; `policies` the keys of those that select it.
    """
    if pod.is_terminal or not pod.addresses:
        return None
    is_healthy = pod.is_ready and not pod.is_terminating
    name = workload_name(pod)
    return Workload(
        uid=mesh.pod_uid(pod.namespace, pod.name),
        name=pod.name,
        namespace=pod.namespace,
        addresses=pod.addresses,
        network=mesh.network,
        tunnel_protocol=TunnelProtocol.HBONE if pod.is_captured else TunnelProtocol.NONE,
        trust_domain=mesh.trust_domain,
        service_account=pod.service_account,
        node=pod.node,
        canonical_name=_first(pod.labels, _NAME_LABELS) or name,
        canonical_revision=_first(pod.labels, _REVISION_LABELS) or "latest",
        workload_name=name,
        authorization_policies=policies,
        status=WorkloadStatus.HEALTHY if is_healthy else WorkloadStatus.UNHEALTHY,
        cluster_id=mesh.cluster_id,
        services=_services_of(mesh, pod, services),
        locality=locality_of(node),
        network_mode=(NetworkMode.HOST_NETWORK if pod.host_network else NetworkMode.STANDARD),
    )


def _services_of(
    mesh: Mesh, pod: Pod, services: Iterable[Service]
) -> Mapping[str, Mapping[int, int]]:
    found = {}
    for service in services:
        if is_published(service) and service.selects(pod.labels):
            ports = {
                port.number: target
                for port in tcp_ports(service)
                if (target := target_port(port, pod))
            }
            found[mesh.service_key(service.namespace, service.name)] = ports
    return found


def is_published(service: Service) -> bool:
    """Whether a Service is one of the mesh; an ExternalName is only a DNS alias."""
    return service.type != "ExternalName"


def tcp_ports(service: Service) -> list[ServicePort]:
    """The ports that a mesh of TCP can serve."""
    return [port for port in service.ports if port.protocol == "TCP"]


def target_port(port: ServicePort, pod: Pod) -> int:
    """The pod's port behind a Service's port; 0 if it declares none of that name."""
    if isinstance(port.target, int):
        return port.target
    for each in pod.ports:
        if each.name == port.target and each.protocol == port.protocol:
            return each.number
    return 0


def workload_name(pod: Pod) -> str:
    """The name of what runs the pod: its Deployment, CronJob, …, or the pod itself."""
    named = pod.labels.get("service.istio.io/workload-name")
    if named:
        return named
    match pod.owner:
        case None:
            return pod.name
        case Owner("ReplicaSet", name):
            for label in ("pod-template-hash", "rollouts-pod-template-hash"):
                value = pod.labels.get(label)
                if value and name.endswith(f"-{value}"):
                    return name.removesuffix(f"-{value}")
            return name
        case Owner("ReplicationController", name):
            # OpenShift numbers the controllers of a DeploymentConfig.
            return pod.labels.get("deploymentconfig") or name
        case Owner("Job", name):
            found = _CRON_JOB.fullmatch(name)
            return found.group(1) if found else name
        case Owner(_, name):
            return name


def _first(labels: Mapping[str, str], names: Iterable[str]) -> str:
    return next((labels[name] for name in names if labels.get(name)), "")


def locality_of(node: Node | None) -> Locality:
    """Where a node is, by its labels."""
    if node is None:
        return Locality()
    get = node.labels.get
    return Locality(get(_REGION, ""), get(_ZONE, ""), get(_SUBZONE, ""))


def mesh_service(
    mesh: Mesh, service: Service, namespace: Namespace | None = None
) -> model.Service | None:
    """The mesh's view of a Service; None if it is not one of the mesh.

    A headless one has no address: its endpoints are reached as pods.
    """
    if not is_published(service):
        return None
    ports = {
        port.number: model.ServicePort(
            port.number,
            port.target if isinstance(port.target, int) else 0,
            app_protocol(port.app_protocol, port.name),
        )
        for port in tcp_ports(service)
    }
    return model.Service(
        name=service.name,
        namespace=service.namespace,
        hostname=mesh.hostname(service.namespace, service.name),
        addresses=tuple(NetworkAddress(mesh.network, ip) for ip in service.cluster_ips),
        ports=ports,
        load_balancing=_load_balancing(service, namespace),
        ip_families=_ip_families(service.ip_families),
        canonical=True,
    )


def app_protocol(declared: str, name: str) -> model.AppProtocol:
    """What a port speaks, by its `appProtocol`, else by its name."""
    if declared:
        return _APP_PROTOCOLS.get(declared.lower(), model.AppProtocol.UNKNOWN)
    # `http-web` speaks http by its name; `grpc-web` is a protocol of its own.
    name = name.lower()
    for prefix in (name, name.partition("-")[0]):
        if prefix in _APP_PROTOCOLS:
            return _APP_PROTOCOLS[prefix]
    return model.AppProtocol.UNKNOWN


def _ip_families(families: tuple[str, ...]) -> model.IpFamilies:
    match set(families):
        case found if found == {"IPv4"}:
            return model.IpFamilies.IPV4_ONLY
        case found if found == {"IPv6"}:
            return model.IpFamilies.IPV6_ONLY
        case found if found == {"IPv4", "IPv6"}:
            return model.IpFamilies.DUAL
        case _:
            return model.IpFamilies.AUTOMATIC


def _load_balancing(service: Service, namespace: Namespace | None) -> model.LoadBalancing:
    health = (
        model.HealthPolicy.ALLOW_ALL
        if service.publish_not_ready_addresses
        else model.HealthPolicy.ONLY_HEALTHY
    )
    if service.internal_traffic_policy == "Local":
        return model.LoadBalancing((model.Scope.NODE,), model.Mode.STRICT, health)
    wanted = (
        service.annotations.get(TRAFFIC_DISTRIBUTION)
        or service.traffic_distribution
        or (namespace.annotations.get(TRAFFIC_DISTRIBUTION) if namespace else None)
    )
    scopes = _DISTRIBUTIONS.get(wanted or "")
    if scopes is None:
        return model.LoadBalancing(health_policy=health)
    return model.LoadBalancing(scopes, model.Mode.FAILOVER, health)


def slice_workloads(
    mesh: Mesh,
    endpoints: EndpointSlice,
    service: Service | None,
    node_named: Callable[[str], Node | None],
) -> dict[str, Workload]:
    """Workloads by uid for the endpoints of a slice that no pod stands behind.

    They have no identity of ours: plain TCP, and never the owner of their address.
    """
    if service is None or not is_published(service) or endpoints.address_type == "FQDN":
        return {}
    ports = {
        port.number: endpoints.ports[port.name]
        for port in tcp_ports(service)
        if port.name in endpoints.ports
    }
    found = {}
    for endpoint in endpoints.endpoints:
        if endpoint.target is not None and endpoint.target.kind == "Pod":
            continue
        node = node_named(endpoint.node)
        for address in endpoint.addresses[:1]:
            served = {mesh.service_key(service.namespace, service.name): ports}
            workload = _slice_workload(mesh, endpoints, endpoint, address, node, served)
            found[workload.uid] = workload
    return found


def _slice_workload(
    mesh: Mesh,
    endpoints: EndpointSlice,
    endpoint: SliceEndpoint,
    address: str,
    node: Node | None,
    services: Mapping[str, Mapping[int, int]],
) -> Workload:
    kind = "discovery.k8s.io/EndpointSlice"
    is_healthy = endpoint.is_ready and not endpoint.is_terminating
    locality = locality_of(node)
    if not locality.zone and endpoint.zone:
        locality = Locality(locality.region, endpoint.zone, locality.subzone)
    return Workload(
        uid=f"{mesh.cluster_id}/{kind}/{endpoints.namespace}/{endpoints.name}/{address}",
        name=endpoints.name,
        namespace=endpoints.namespace,
        addresses=(address,),
        network=mesh.network,
        trust_domain=mesh.trust_domain,
        node=endpoint.node,
        canonical_name=endpoints.service,
        canonical_revision="latest",
        workload_name=endpoints.service,
        status=WorkloadStatus.HEALTHY if is_healthy else WorkloadStatus.UNHEALTHY,
        cluster_id=mesh.cluster_id,
        services=services,
        locality=locality,
        network_mode=NetworkMode.HOST_NETWORK,
    )


def nodes_of(view: Metadata | None) -> frozenset[str]:
    """The nodes that an object is about."""
    match view:
        case Pod(node=node):
            return frozenset((node,)) if node else frozenset()
        case EndpointSlice(endpoints=endpoints):
            return frozenset(each.node for each in endpoints if each.node)
        case _:
            return frozenset()


def distribution_of(view: Metadata | None) -> str:
    """What an object says of traffic's distribution by annotation."""
    return view.annotations.get(TRAFFIC_DISTRIBUTION, "") if view else ""
