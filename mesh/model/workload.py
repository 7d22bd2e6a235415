"""Workloads: what the mesh knows of one pod (or other endpoint). Values only.

Addresses are canonical text (`10.0.0.1`, `fd00::1`), parsed once by whoever made the
value. Field for field what `istio.workload.Workload` carries.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

from mesh.identity import DEFAULT_TRUST_DOMAIN, SpiffeId


class TunnelProtocol(enum.Enum):
    """How to reach a workload."""

    NONE = 0
    HBONE = 1


class WorkloadStatus(enum.Enum):
    """Health as the controller reports it."""

    HEALTHY = 0
    UNHEALTHY = 1


class WorkloadType(enum.Enum):
    """The kind of owner, for baggage."""

    DEPLOYMENT = 0
    CRONJOB = 1
    POD = 2
    JOB = 3


class NetworkMode(enum.Enum):
    """Whether the workload has an address of its own."""

    STANDARD = 0
    HOST_NETWORK = 1


@dataclass(frozen=True, slots=True, order=True)
class NetworkAddress:
    """An address within a named network (`""` is the default network)."""

    network: str
    address: str

    def __str__(self) -> str:
        return f"{self.network}/{self.address}"


@dataclass(frozen=True, slots=True, order=True)
class CidrAddress:
    """A prefix within a network; a service may own a whole range."""

    network: str
    prefix: str


@dataclass(frozen=True, slots=True, order=True)
class NamespacedHostname:
    """A service's key: `namespace/hostname`."""

    namespace: str
    hostname: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.hostname}"


@dataclass(frozen=True, slots=True)
class GatewayAddress:
    """Where a waypoint or network gateway is, and its HBONE port."""

    destination: NamespacedHostname | NetworkAddress
    hbone_mtls_port: int


@dataclass(frozen=True, slots=True)
class Locality:
    """Region, zone, subzone; empty means unknown."""

    region: str = ""
    zone: str = ""
    subzone: str = ""


@dataclass(frozen=True, slots=True)
class ApplicationTunnel:
    """A workload that terminates the tunnel itself; `protocol` is NONE or PROXY."""

    protocol: str
    port: int


@functools.lru_cache(maxsize=4096)
def _identity(trust_domain: str, namespace: str, service_account: str) -> SpiffeId:
    # Asked several times for every connection, and judged each time it is made.
    return SpiffeId(trust_domain, namespace, service_account)


@dataclass(frozen=True, slots=True)
class Workload:
    """One endpoint of the mesh.

    `services` maps `namespace/hostname` to {service port: target port}.
    `authorization_policies` are `namespace/name` of selector policies that apply.
    """

    uid: str
    name: str
    namespace: str
    addresses: tuple[str, ...] = ()
    network: str = ""
    tunnel_protocol: TunnelProtocol = TunnelProtocol.NONE
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    service_account: str = "default"
    waypoint: GatewayAddress | None = None
    network_gateway: GatewayAddress | None = None
    node: str = ""
    canonical_name: str = ""
    canonical_revision: str = ""
    workload_type: WorkloadType = WorkloadType.POD
    workload_name: str = ""
    native_tunnel: bool = False
    authorization_policies: tuple[str, ...] = ()
    status: WorkloadStatus = WorkloadStatus.HEALTHY
    cluster_id: str = "Kubernetes"
    hostname: str = ""
    services: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    application_tunnel: ApplicationTunnel | None = None
    locality: Locality = Locality()
    network_mode: NetworkMode = NetworkMode.STANDARD
    capacity: int = 1

    @property
    def identity(self) -> SpiffeId:
        """The SPIFFE ID this workload must present."""
        return _identity(self.trust_domain, self.namespace, self.service_account)
