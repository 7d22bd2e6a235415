"""What the node proxy was told: every setting, by the names upstream's ztunnel uses.

Values only; `mesh.runtime.config` reads them. Paths are relative to the working directory,
as upstream has it, so one directory per node is enough to run several.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from mesh.errors import ConfigError
from mesh.runtime.config import setting
from mesh.runtime.lifecycle import drain_seconds
from mesh.runtime.tracing import TracingSettings

ISTIOD = "https://istiod.istio-system.svc:15012"
ROOT_FILE = "./var/run/secrets/istio/root-cert.pem"
UNIX = "unix:"
TOKEN_FILE = "./var/run/secrets/tokens/istio-token"  # noqa: S105 - a path, not a token


@dataclass(frozen=True, slots=True)
class ZtunnelConfig(TracingSettings):
    """Settings of one node proxy."""

    xds_address: str = setting(env="XDS_ADDRESS", default=ISTIOD, doc="Where xDS is served.")
    ca_address: str = setting(env="CA_ADDRESS", default=ISTIOD, doc="Where certificates come from.")
    xds_root_ca: str = setting(
        env="XDS_ROOT_CA", default=ROOT_FILE, doc="Root of the xDS server's certificate (a file)."
    )
    ca_root_ca: str = setting(
        env="CA_ROOT_CA", default=ROOT_FILE, doc="Root of the CA server's certificate (a file)."
    )
    auth_token: str = setting(
        env="AUTH_TOKEN", default=TOKEN_FILE, doc="File with our bearer token, read for each call."
    )
    node_name: str = setting(
        env="NODE_NAME",
        default="",
        doc="This node; certificates are fetched ahead for its workloads.",
    )
    network: str = setting(env="NETWORK", default="", doc="The network this node is on.")
    cluster_id: str = setting(
        env=("ISTIO_META_CLUSTER_ID", "CLUSTER_ID"),
        default="Kubernetes",
        doc="The cluster's name at the control plane.",
    )
    cluster_domain: str = setting(
        env="CLUSTER_DOMAIN", default="cluster.local", doc="The cluster's DNS domain."
    )
    trust_domain: str = setting(
        env="TRUST_DOMAIN", default="cluster.local", doc="Trust domain of this proxy itself."
    )
    inpod_uds: str = setting(
        env="INPOD_UDS",
        default="/var/run/ztunnel/ztunnel.sock",
        doc="Unix socket of the node agent (ZDS).",
    )
    pod_name: str = setting(env="POD_NAME", default="ztunnel", doc="Name of this proxy's pod.")
    pod_namespace: str = setting(
        env="POD_NAMESPACE", default="istio-system", doc="Namespace of this proxy's pod."
    )
    service_account: str = setting(
        env="SERVICE_ACCOUNT", default="", doc="Service account of this proxy's pod."
    )
    instance_ip: str = setting(env="INSTANCE_IP", default="1.1.1.1", doc="Address of this proxy.")
    secret_ttl_seconds: float = setting(
        env="SECRET_TTL", default=86400.0, doc="Lifetime to ask for in certificates."
    )
    dns_capture: bool = setting(
        env="ISTIO_META_DNS_CAPTURE", default=True, doc="Answer the pods' captured DNS queries."
    )
    resolv_conf: str = setting(
        env="RESOLV_CONF",
        default="/etc/resolv.conf",
        doc="Names the servers that DNS queries are forwarded to.",
    )
    preferred_namespace: str = setting(
        env="PREFERED_SERVICE_NAMESPACE",
        default="",
        doc="Namespace preferred when several services have one hostname.",
    )
    keeps_source_address: bool = setting(
        env="ENABLE_ORIG_SRC", default=True, doc="Dial applications from the caller's address."
    )
    pool_max_streams: int = setting(
        env="POOL_MAX_STREAMS_PER_CONNECTION", default=100, doc="Tunnels on one connection."
    )
    pool_idle_seconds: float = setting(
        env="POOL_UNUSED_RELEASE_TIMEOUT",
        default=300.0,
        doc="After how long an unused tunnel connection is closed.",
    )
    max_connections_per_pod: int = setting(
        env="MAX_CONNECTIONS_PER_POD",
        default=8192,
        doc="Connections one pod may have open, per direction.",
    )
    window_budget_bytes: int = setting(
        env="RECEIVE_WINDOW_BUDGET",
        default=64 << 20,
        doc="Receive window for all tunnels together, in bytes, beyond the first 256 KiB of each. "
        "Four times as much may wait for applications that do not read, before tunnels are cut.",
    )
    connect_timeout_seconds: float = setting(
        env="CONNECT_TIMEOUT", default=10.0, doc="For TCP connections that we open."
    )
    admin_address: str = setting(
        env="ADMIN_ADDR",
        default="localhost:15000",
        doc="Admin endpoint: a port of loopback, or `unix:PATH`; it asks nobody who they are.",
    )
    stats_address: str = setting(env="STATS_ADDR", default="[::]:15020", doc="Prometheus endpoint.")
    readiness_address: str = setting(
        env="READINESS_ADDR", default="[::]:15021", doc="Readiness endpoint."
    )
    termination_deadline_seconds: float | None = setting(
        env="CONNECTION_TERMINATION_DEADLINE",
        default=None,
        doc="How long open connections may live on after SIGTERM.",
    )
    termination_grace_seconds: float | None = setting(
        env="TERMINATION_GRACE_PERIOD_SECONDS",
        default=None,
        doc="The pod's grace period, from which that deadline is derived.",
    )
    log_level: str = setting(env="LOG_LEVEL", default="info", doc="Level of the log on stderr.")
    log_format: str = setting(
        env="LOG_FORMAT",
        default="",
        doc="`json` or `plain`; by default plain on a terminal.",
        choices=("", "json", "plain"),
    )

    def __post_init__(self) -> None:
        """Judge the values. Raises ConfigError."""
        TracingSettings.__post_init__(self)
        if not _is_private(self.admin_address):
            raise ConfigError(
                f"{self.admin_address!r} is no port of loopback",
                field="admin_address",
                hint="write localhost:PORT, or unix:PATH; reach it by kubectl port-forward",
            )

    @property
    def drain_seconds(self) -> float:
        """How long draining may take."""
        return drain_seconds(self.termination_grace_seconds, self.termination_deadline_seconds)


def _is_private(address: str) -> bool:
    if address.startswith(UNIX):
        return len(address) > len(UNIX)
    host, _, port = address.rpartition(":")
    try:
        return port.isdecimal() and (
            host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
        )
    except ValueError:
        return False
