"""What a waypoint was told: every setting, by the names Istio's proxies use.

Values only; `mesh.runtime.config` reads them. Paths are relative to the working directory, as the
node proxy has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mesh.runtime.config import setting
from mesh.runtime.lifecycle import drain_seconds
from mesh.runtime.tracing import TracingSettings

ISTIOD = "https://istiod.istio-system.svc:15012"
ROOT_FILE = "./var/run/secrets/istio/root-cert.pem"
TOKEN_FILE = "./var/run/secrets/tokens/istio-token"  # noqa: S105 - a path, not a token


@dataclass(frozen=True, slots=True)
class WaypointConfig(TracingSettings):
    """Settings of one waypoint."""

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
    node_name: str = setting(env="NODE_NAME", default="", doc="The node this waypoint runs on.")
    network: str = setting(env="NETWORK", default="", doc="The network this waypoint is on.")
    cluster_id: str = setting(
        env=("ISTIO_META_CLUSTER_ID", "CLUSTER_ID"),
        default="Kubernetes",
        doc="The cluster's name at the control plane.",
    )
    cluster_domain: str = setting(
        env="CLUSTER_DOMAIN", default="cluster.local", doc="The cluster's DNS domain."
    )
    trust_domain: str = setting(
        env="TRUST_DOMAIN", default="cluster.local", doc="Trust domain of this waypoint."
    )
    pod_name: str = setting(env="POD_NAME", default="waypoint", doc="Name of this pod.")
    pod_namespace: str = setting(
        env="POD_NAMESPACE", default="default", doc="Namespace of this pod."
    )
    service_account: str = setting(
        env="SERVICE_ACCOUNT", default="waypoint", doc="Service account of this pod."
    )
    instance_ip: str = setting(env="INSTANCE_IP", default="127.0.0.1", doc="Address of this pod.")
    gateway_name: str = setting(
        env="GATEWAY_NAME",
        default="waypoint",
        doc="The Gateway that this waypoint belongs to, in its own namespace.",
    )
    secret_ttl_seconds: float = setting(
        env="SECRET_TTL", default=86400.0, doc="Lifetime to ask for in certificates."
    )
    hbone_address: str = setting(
        env="HBONE_ADDR", default="[::]:15008", doc="Where tunnels are accepted."
    )
    hbone_port: int = setting(
        env="HBONE_PORT", default=15008, doc="Port of the tunnels that we open to workloads."
    )
    connect_timeout_seconds: float = setting(
        env="CONNECT_TIMEOUT", default=10.0, doc="For connections and tunnels that we open."
    )
    head_timeout_seconds: float = setting(
        env="REQUEST_HEADERS_TIMEOUT", default=10.0, doc="Within which a request's head must come."
    )
    stream_idle_seconds: float = setting(
        env="STREAM_IDLE_TIMEOUT",
        default=300.0,
        doc="After how long a request ends whose body does not come, or whose answer is not read.",
    )
    connection_idle_seconds: float = setting(
        env="CONNECTION_IDLE_TIMEOUT",
        default=3600.0,
        doc="After how long a caller's connection without requests is closed.",
    )
    detection_timeout_seconds: float = setting(
        env="PROTOCOL_DETECTION_TIMEOUT",
        default=0.1,
        doc="How long the first bytes of a port of unknown protocol are waited for.",
    )
    idle_seconds: float = setting(
        env="UPSTREAM_IDLE_TIMEOUT",
        default=60.0,
        doc="After how long an unused connection to an endpoint is closed.",
    )
    pool_max_streams: int = setting(
        env="POOL_MAX_STREAMS_PER_CONNECTION", default=100, doc="Tunnels on one connection."
    )
    window_budget_bytes: int = setting(
        env="RECEIVE_WINDOW_BUDGET",
        default=64 << 20,
        doc="Receive window for all connections together, in bytes, beyond each one's first.",
    )
    max_active_requests: int = setting(
        env="MAX_ACTIVE_REQUESTS",
        default=10_000,
        doc="Requests in flight, of all services; more are answered 503 at once. 0: no bound.",
    )
    rate_limit_credentials: str = setting(
        env="RATE_LIMIT_CREDENTIALS",
        default="/var/run/secrets/ambit/rate-limit/credentials",
        doc="File with `password` or `user:password` for the Redis that limits are shared in, "
        "if it wants them.",
    )
    redaction_keys: Path = setting(
        env="REDACTION_KEYS",
        default=Path("/var/run/secrets/ambit/redaction"),
        doc="Directory with the files that `keyFile` of a RedactionPolicy may name.",
    )
    audit_file: str = setting(
        env="AUDIT_FILE",
        default="",
        doc="Where redactions are recorded, one chained line for each request; nowhere by default.",
    )
    audit_max_bytes: int = setting(
        env="AUDIT_MAX_BYTES",
        default=64 << 20,
        doc="Size at which the audit file is renamed (its last record's number is appended).",
    )
    admin_address: str = setting(
        env="ADMIN_ADDR", default="localhost:15000", doc="Admin endpoint, on loopback."
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
        env="LOG_FORMAT", default="", doc="`json` or `plain`; by default plain on a terminal."
    )

    @property
    def drain_seconds(self) -> float:
        """How long draining may take."""
        return drain_seconds(self.termination_grace_seconds, self.termination_deadline_seconds)

    @property
    def gateway(self) -> str:
        """The Gateway, `namespace/name`."""
        return f"{self.pod_namespace}/{self.gateway_name}"
