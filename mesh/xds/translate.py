"""Wire and model: `istio.workload` and `istio.security` resources to values and back.

With its neighbours `translate_policy` and `scalars` the only place that knows both. What waypoints
are told is `traffic`'s, which is loaded where there is some: a node proxy never has it.
Reading is strict: what cannot be understood raises ConfigError, whose text becomes the
NACK's reason; nothing is dropped silently, because a resource read with a part missing is
another resource. Two enumerations are lenient by protocol: an unknown visibility is
PUBLIC, an unknown workload type is POD.

Writing is canonical: equal values have equal bytes, and so equal versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from google.protobuf.message import Message

from mesh.errors import ConfigError
from mesh.identity import DEFAULT_TRUST_DOMAIN
from mesh.model.authorization import Authorization
from mesh.model.service import (
    AppProtocol,
    HealthPolicy,
    IpFamilies,
    LoadBalancing,
    Mode,
    Scope,
    Service,
    ServicePort,
    Visibility,
    WeightedWaypoint,
)
from mesh.model.workload import (
    ApplicationTunnel,
    CidrAddress,
    GatewayAddress,
    Locality,
    NamespacedHostname,
    NetworkAddress,
    NetworkMode,
    TunnelProtocol,
    Workload,
    WorkloadStatus,
    WorkloadType,
)
from mesh.proto import authorization_pb2, workload_pb2
from mesh.xds.scalars import (
    enum_member,
    enum_number,
    ip_bytes,
    ip_text,
    network_from,
    network_parts,
    parse,
    port_number,
)
from mesh.xds.translate_policy import authorization_from_proto, authorization_to_proto

if TYPE_CHECKING:
    from mesh.model.l7_policy import TrafficConfig

ADDRESS_TYPE = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION_TYPE = "type.googleapis.com/istio.security.Authorization"

TRAFFIC_TYPE = "type.googleapis.com/ambit.waypoint.v1.TrafficConfig"

Resource: TypeAlias = "Workload | Service | Authorization | TrafficConfig"

_DEFAULT_SERVICE_ACCOUNT = "default"
_DEFAULT_CLUSTER = "Kubernetes"


def resource_name(resource: Resource) -> str:
    """The xDS resource name: a workload's uid, `namespace/hostname`, `namespace/name`."""
    match resource:
        case Workload():
            return resource.uid
        case Service():
            return str(resource.key)
        case _:
            return resource.key


def encode(resource: Resource) -> bytes:
    """The serialised resource; equal resources give equal bytes. Raises ConfigError."""
    message: Message
    try:
        match resource:
            case Workload():
                message = workload_pb2.Address(workload=workload_to_proto(resource))
            case Service():
                message = workload_pb2.Address(service=service_to_proto(resource))
            case Authorization():
                message = authorization_to_proto(resource)
            case _:
                from mesh.xds.traffic import traffic_to_proto

                message = traffic_to_proto(resource)
        return message.SerializeToString(deterministic=True)
    except ValueError as exc:  # a number out of range, text that is not Unicode
        raise ConfigError(f"{resource_name(resource)!r} cannot be encoded: {exc}") from exc


def decode_address(data: bytes) -> Workload | Service:
    """Read a serialised Address. Raises ConfigError with the reason of a NACK."""
    address = workload_pb2.Address()
    parse(address, data)
    match address.WhichOneof("type"):
        case "workload":
            return workload_from_proto(address.workload)
        case "service":
            return service_from_proto(address.service)
        case _:
            raise ConfigError("an Address holds neither a workload nor a service")


def decode_authorization(data: bytes) -> Authorization:
    """Read a serialised Authorization. Raises ConfigError with the reason of a NACK."""
    message = authorization_pb2.Authorization()
    parse(message, data)
    return authorization_from_proto(message)


def decode_traffic(data: bytes) -> TrafficConfig:
    """Read a serialised TrafficConfig. Raises ConfigError with the reason of a NACK."""
    from mesh.xds.traffic import read_traffic

    return read_traffic(data)


DECODERS: Mapping[str, Callable[[bytes], Resource]] = {
    ADDRESS_TYPE: decode_address,
    AUTHORIZATION_TYPE: decode_authorization,
    TRAFFIC_TYPE: decode_traffic,
}


def workload_from_proto(message: workload_pb2.Workload) -> Workload:
    """Raises ConfigError."""
    for service in message.services:
        if "/" not in service:
            raise ConfigError(f"services: {service!r} is not namespace/hostname")
    return Workload(
        uid=message.uid,
        name=message.name,
        namespace=message.namespace,
        addresses=tuple(map(ip_text, message.addresses)),
        network=message.network,
        tunnel_protocol=enum_member(TunnelProtocol, message.tunnel_protocol),
        trust_domain=message.trust_domain or DEFAULT_TRUST_DOMAIN,
        service_account=message.service_account or _DEFAULT_SERVICE_ACCOUNT,
        waypoint=_gateway_from(message.waypoint) if message.HasField("waypoint") else None,
        network_gateway=(
            _gateway_from(message.network_gateway) if message.HasField("network_gateway") else None
        ),
        node=message.node,
        canonical_name=message.canonical_name,
        canonical_revision=message.canonical_revision,
        workload_type=enum_member(WorkloadType, message.workload_type, WorkloadType.POD),
        workload_name=message.workload_name,
        native_tunnel=message.native_tunnel,
        authorization_policies=tuple(message.authorization_policies),
        status=enum_member(WorkloadStatus, message.status),
        cluster_id=message.cluster_id or _DEFAULT_CLUSTER,
        hostname=message.hostname,
        services={
            key: {
                port_number(port.service_port): port_number(port.target_port)
                for port in ports.ports
            }
            for key, ports in message.services.items()
        },
        application_tunnel=_application_tunnel_from(message),
        locality=Locality(message.locality.region, message.locality.zone, message.locality.subzone),
        network_mode=enum_member(NetworkMode, message.network_mode),
        capacity=message.capacity.value if message.HasField("capacity") else 1,
    )


def workload_to_proto(workload: Workload) -> workload_pb2.Workload:
    """Raises ConfigError when an address is not an IP."""
    message = workload_pb2.Workload(
        uid=workload.uid,
        name=workload.name,
        namespace=workload.namespace,
        addresses=map(ip_bytes, workload.addresses),
        network=workload.network,
        tunnel_protocol=enum_number(workload.tunnel_protocol),
        trust_domain="" if workload.trust_domain == DEFAULT_TRUST_DOMAIN else workload.trust_domain,
        service_account=workload.service_account,
        node=workload.node,
        canonical_name=workload.canonical_name,
        canonical_revision=workload.canonical_revision,
        workload_type=enum_number(workload.workload_type),
        workload_name=workload.workload_name,
        native_tunnel=workload.native_tunnel,
        authorization_policies=workload.authorization_policies,
        status=enum_number(workload.status),
        cluster_id=workload.cluster_id,
        hostname=workload.hostname,
        network_mode=enum_number(workload.network_mode),
    )
    if workload.waypoint is not None:
        message.waypoint.CopyFrom(_gateway_to(workload.waypoint))
    if workload.network_gateway is not None:
        message.network_gateway.CopyFrom(_gateway_to(workload.network_gateway))
    for key, ports in workload.services.items():
        message.services[key].ports.extend(
            workload_pb2.Port(service_port=service, target_port=target)
            for service, target in sorted(ports.items())
        )
    if workload.application_tunnel is not None:
        tunnel = workload.application_tunnel
        message.application_tunnel.CopyFrom(
            workload_pb2.ApplicationTunnel(protocol=tunnel.protocol, port=tunnel.port)
        )
    if workload.locality != Locality():
        locality = workload.locality
        message.locality.region = locality.region
        message.locality.zone = locality.zone
        message.locality.subzone = locality.subzone
    if workload.capacity != 1:
        message.capacity.value = workload.capacity
    return message


def service_from_proto(message: workload_pb2.Service) -> Service:
    """Raises ConfigError."""
    addresses, ranges = [], []
    for address in message.addresses:
        if address.HasField("length"):
            ranges.append(
                CidrAddress(address.network, network_from(address.address, address.length))
            )
        else:
            addresses.append(NetworkAddress(address.network, ip_text(address.address)))
    return Service(
        name=message.name,
        namespace=message.namespace,
        hostname=message.hostname,
        addresses=tuple(addresses),
        cidr_addresses=tuple(ranges),
        ports={
            port.service_port: ServicePort(
                port_number(port.service_port),
                port_number(port.target_port),
                enum_member(AppProtocol, port.app_protocol),
            )
            for port in message.ports
        },
        subject_alt_names=tuple(message.subject_alt_names),
        waypoint=_gateway_from(message.waypoint) if message.HasField("waypoint") else None,
        weighted_waypoints=tuple(
            WeightedWaypoint(_gateway_from(entry.destination), entry.weight)
            for entry in message.weighted_waypoints
        ),
        load_balancing=LoadBalancing(
            routing_preference=tuple(
                enum_member(Scope, scope) for scope in message.load_balancing.routing_preference
            ),
            mode=enum_member(Mode, message.load_balancing.mode),
            health_policy=enum_member(HealthPolicy, message.load_balancing.health_policy),
        ),
        ip_families=enum_member(IpFamilies, message.ip_families),
        canonical=message.canonical,
        ingress_use_waypoint=message.ingress_use_waypoint,
        visibility=enum_member(Visibility, message.visibility, Visibility.PUBLIC),
    )


def service_to_proto(service: Service) -> workload_pb2.Service:
    """Raises ConfigError when an address is not an IP."""
    message = workload_pb2.Service(
        name=service.name,
        namespace=service.namespace,
        hostname=service.hostname,
        addresses=[_address_to(address) for address in service.addresses],
        subject_alt_names=service.subject_alt_names,
        ip_families=enum_number(service.ip_families),
        canonical=service.canonical,
        ingress_use_waypoint=service.ingress_use_waypoint,
        visibility=enum_number(service.visibility),
    )
    for cidr in service.cidr_addresses:
        packed, length = network_parts(cidr.prefix)
        message.addresses.add(network=cidr.network, address=packed, length=length)
    for _, port in sorted(service.ports.items()):
        message.ports.add(
            service_port=port.service_port,
            target_port=port.target_port,
            app_protocol=enum_number(port.app_protocol),
        )
    if service.waypoint is not None:
        message.waypoint.CopyFrom(_gateway_to(service.waypoint))
    for weighted in service.weighted_waypoints:
        message.weighted_waypoints.add(
            destination=_gateway_to(weighted.destination), weight=weighted.weight
        )
    if service.load_balancing != LoadBalancing():
        balancing = service.load_balancing
        message.load_balancing.routing_preference.extend(
            enum_number(scope) for scope in balancing.routing_preference
        )
        message.load_balancing.mode = enum_number(balancing.mode)
        message.load_balancing.health_policy = enum_number(balancing.health_policy)
    return message


def _application_tunnel_from(message: workload_pb2.Workload) -> ApplicationTunnel | None:
    if not message.HasField("application_tunnel"):
        return None
    protocols = workload_pb2.ApplicationTunnel.Protocol
    number = message.application_tunnel.protocol
    if number not in protocols.values():
        raise ConfigError(f"unknown application tunnel protocol {number}")
    return ApplicationTunnel(protocols.Name(number), port_number(message.application_tunnel.port))


def _gateway_from(message: workload_pb2.GatewayAddress) -> GatewayAddress:
    port = port_number(message.hbone_mtls_port)
    match message.WhichOneof("destination"):
        case "hostname":
            name = NamespacedHostname(message.hostname.namespace, message.hostname.hostname)
            return GatewayAddress(name, port)
        case "address":
            address = NetworkAddress(message.address.network, ip_text(message.address.address))
            return GatewayAddress(address, port)
        case _:
            raise ConfigError("a gateway address has no destination")


def _gateway_to(gateway: GatewayAddress) -> workload_pb2.GatewayAddress:
    message = workload_pb2.GatewayAddress(hbone_mtls_port=gateway.hbone_mtls_port)
    match gateway.destination:
        case NamespacedHostname(namespace, hostname):
            message.hostname.namespace = namespace
            message.hostname.hostname = hostname
            message.hostname.SetInParent()
        case NetworkAddress():
            message.address.CopyFrom(_address_to(gateway.destination))
    return message


def _address_to(address: NetworkAddress) -> workload_pb2.NetworkAddress:
    return workload_pb2.NetworkAddress(network=address.network, address=ip_bytes(address.address))
