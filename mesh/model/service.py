"""Services: a name, virtual addresses, ports, and how to choose among endpoints. Values only."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from mesh.model.workload import CidrAddress, GatewayAddress, NamespacedHostname, NetworkAddress


class AppProtocol(enum.Enum):
    """What a port declares to speak."""

    UNKNOWN = 0
    HTTP11 = 1
    HTTP2 = 2
    GRPC = 3
    TCP = 4
    TLS = 5


class IpFamilies(enum.Enum):
    """Which address families a service offers."""

    AUTOMATIC = 0
    IPV4_ONLY = 1
    IPV6_ONLY = 2
    DUAL = 3


class Scope(enum.Enum):
    """One step of locality preference."""

    REGION = 1
    ZONE = 2
    SUBZONE = 3
    NODE = 4
    CLUSTER = 5
    NETWORK = 6


class Mode(enum.Enum):
    """How locality preference is applied."""

    UNSPECIFIED = 0
    STRICT = 1
    FAILOVER = 2
    PASSTHROUGH = 3


class HealthPolicy(enum.Enum):
    """Whether unhealthy endpoints may be chosen."""

    ONLY_HEALTHY = 0
    ALLOW_ALL = 1


class Visibility(enum.Enum):
    """Who may see the service."""

    PUBLIC = 0
    NAMESPACE = 1


@dataclass(frozen=True, slots=True)
class LoadBalancing:
    """How to choose an endpoint."""

    routing_preference: tuple[Scope, ...] = ()
    mode: Mode = Mode.UNSPECIFIED
    health_policy: HealthPolicy = HealthPolicy.ONLY_HEALTHY


@dataclass(frozen=True, slots=True)
class ServicePort:
    """A service port; `target_port` 0 means that each endpoint says its own."""

    service_port: int
    target_port: int = 0
    app_protocol: AppProtocol = AppProtocol.UNKNOWN


@dataclass(frozen=True, slots=True)
class WeightedWaypoint:
    """One of several waypoints, chosen by weight."""

    destination: GatewayAddress
    weight: int


@dataclass(frozen=True, slots=True)
class Service:
    """One service. `ports` maps service port to its description."""

    name: str
    namespace: str
    hostname: str
    addresses: tuple[NetworkAddress, ...] = ()
    cidr_addresses: tuple[CidrAddress, ...] = ()
    ports: Mapping[int, ServicePort] = field(default_factory=dict)
    subject_alt_names: tuple[str, ...] = ()
    waypoint: GatewayAddress | None = None
    weighted_waypoints: tuple[WeightedWaypoint, ...] = ()
    load_balancing: LoadBalancing = LoadBalancing()
    ip_families: IpFamilies = IpFamilies.AUTOMATIC
    canonical: bool = False
    ingress_use_waypoint: bool = False
    visibility: Visibility = Visibility.PUBLIC

    @property
    def key(self) -> NamespacedHostname:
        """`namespace/hostname`."""
        return NamespacedHostname(self.namespace, self.hostname)


def service_key(service: str, domain: str) -> str | None:
    """`namespace/hostname` of what is written so or as a Service's name in DNS; None if the
    namespace cannot be told.
    """
    if "/" in service:
        return service
    parts = service.split(".")
    if parts[2:] in ([], ["svc"]) and len(parts) > 1:
        parts = [*parts[:2], "svc", *domain.split(".")]
    if len(parts) < 4 or parts[2:] != ["svc", *domain.split(".")]:
        return None
    return f"{parts[1]}/{'.'.join(parts)}"
