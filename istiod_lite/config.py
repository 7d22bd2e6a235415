"""What the controller was told: settings by the names istiod has, where it has one."""

from __future__ import annotations

import ipaddress
import shlex
from dataclasses import dataclass
from pathlib import Path

from istiod_lite.waypoints import WaypointSettings
from istiod_lite.workloads import Mesh
from mesh.cluster.open import SOURCES, ClusterChoice
from mesh.errors import ConfigError
from mesh.identity import DEFAULT_TRUST_DOMAIN, SpiffeId
from mesh.runtime.config import setting
from mesh.runtime.tracing.settings import read_pairs


@dataclass(frozen=True, slots=True)
class IstiodConfig:
    """The controller: tells node proxies of workloads and policies, and certifies identities."""

    cluster_source: str = setting(
        env="CLUSTER_SOURCE",
        default="",
        doc="Where objects come from; by default a directory if CLUSTER_DIR is set.",
        choices=SOURCES,
    )
    cluster_dir: Path | None = setting(
        env="CLUSTER_DIR",
        default=None,
        doc="Directory of live objects, instead of a Kubernetes API server.",
    )
    kubeconfig: Path | None = setting(
        env="KUBECONFIG",
        default=None,
        doc="How to reach the Kubernetes API; in a pod, its service account without this.",
    )
    kube_context: str = setting(
        env="KUBE_CONTEXT", default="", doc="Context of the kubeconfig; its current one if empty."
    )
    ca_dir: Path = setting(
        env="CA_DIR", doc="Directory of the authority's keys; made at the first start."
    )
    ca_secret: str = setting(
        env="CA_SECRET",
        default="",
        doc="Name of the Secret of the root namespace that replicas share these keys in.",
    )
    token_issuer_keys: Path | None = setting(
        env="TOKEN_ISSUER_KEYS",
        default=None,
        doc="JWKS file with the public keys that callers' tokens are verified with; without "
        "it, the Kubernetes API is asked (TokenReview).",
    )
    token_audiences: tuple[str, ...] = setting(
        env="TOKEN_AUDIENCES",
        default=("istio-ca",),
        doc="Audiences of tokens that are accepted.",
    )
    token_issuers: tuple[str, ...] = setting(
        env="TOKEN_ISSUERS", default=(), doc="Issuers of tokens that are accepted; none for any."
    )
    ca_trusted_node_accounts: tuple[str, ...] = setting(
        env="CA_TRUSTED_NODE_ACCOUNTS",
        default=(),
        doc="Service accounts (namespace/name) that may ask for certificates of the pods on "
        "their node.",
    )
    cluster_id: str = setting(
        env="CLUSTER_ID", default="Kubernetes", doc="Name of the cluster in workloads' uids."
    )
    trust_domain: str = setting(
        env="TRUST_DOMAIN", default=DEFAULT_TRUST_DOMAIN, doc="Trust domain of all identities."
    )
    cluster_domain: str = setting(
        env="CLUSTER_DOMAIN", default="cluster.local", doc="DNS domain of Services."
    )
    network: str = setting(
        env="NETWORK", default="", doc="Name of the network that pods and Services are on."
    )
    root_namespace: str = setting(
        env="ROOT_NAMESPACE",
        default="istio-system",
        doc="Namespace whose policies are for the whole mesh; the controller's own.",
    )
    custom_hosts: tuple[str, ...] = setting(
        env="ISTIOD_CUSTOM_HOST",
        default=(),
        doc="Further names or addresses that callers know the controller by.",
    )
    pod_name: str = setting(
        env="POD_NAME",
        default="",
        doc="This replica's name in leader election; without it there is no election.",
    )
    lease_seconds: float = setting(
        env="LEASE_DURATION_SECONDS",
        default=15.0,
        doc="How long after a leader's last word another replica writes; at least 2.",
    )
    xds_port: int = setting(
        env="XDS_PORT", default=15012, doc="Port of xDS and certificates, gRPC over TLS."
    )
    xds_host: str = setting(
        env="XDS_HOST", default="::", doc="Address that xDS and certificates are served on."
    )
    monitoring_port: int = setting(
        env="MONITORING_PORT",
        default=15014,
        doc="Port of /ready, /metrics and /debug; 0 for none.",
    )
    monitoring_host: str = setting(
        env="MONITORING_HOST",
        default="127.0.0.1",
        doc="Address of the same. /debug answers callers from a loopback address only.",
    )
    waypoint_image: str = setting(
        env="WAYPOINT_IMAGE", default="ambit/waypoint", doc="Image of the pods of waypoints."
    )
    waypoint_command: str = setting(
        env="WAYPOINT_COMMAND",
        default="python3 -m waypoint",
        doc="Command of the pods of waypoints, split as a shell does.",
    )
    waypoint_traces: str = setting(
        env="WAYPOINT_TRACES",
        default="",
        doc="OTEL_* variables of every waypoint, `NAME=value,NAME=value` percent-encoded; "
        "`$(HOST_IP)` in a value is the address of its node.",
    )
    state_file: str = setting(
        env="STATE_FILE",
        default="",
        doc="File that the last-known-good state is kept in, for a start without the source; "
        "`off` for none, by default last-known-good in CA_DIR.",
    )
    state_wait_seconds: float = setting(
        env="STATE_WAIT",
        default=10.0,
        doc="How long after a start the source may be silent before that state is served.",
    )
    state_max_age_seconds: float = setting(
        env="STATE_MAX_AGE", default=86400.0, doc="An older state is not served any more."
    )
    drain_seconds: float = setting(
        env="TERMINATION_DRAIN_DURATION_SECONDS",
        default=5.0,
        doc="How long calls may go on after SIGTERM.",
    )
    log_level: str = setting(env="LOG_LEVEL", default="info", doc="Level, or logger=level,...")
    log_format: str = setting(
        env="LOG_FORMAT", default="", doc="json or plain.", choices=("", "json", "plain")
    )

    def __post_init__(self) -> None:
        choice = self.cluster()
        if self.token_issuer_keys is None and not choice.is_kubernetes:
            raise ConfigError("is needed with a directory", field="token_issuer_keys")
        if self.ca_secret and not choice.is_kubernetes:
            raise ConfigError("a directory keeps no secrets", field="ca_secret")
        if not 0 < self.xds_port <= 65535:
            raise ConfigError("is no port", field="xds_port")
        if not 0 <= self.monitoring_port <= 65535:
            raise ConfigError("is no port", field="monitoring_port")
        if not self.lease_seconds >= 2:
            raise ConfigError("is too short to be renewed in", field="lease_seconds")
        for name in ("drain_seconds", "state_wait_seconds", "state_max_age_seconds"):
            if not getattr(self, name) >= 0:
                raise ConfigError("is negative", field=name)
        for name in ("xds_host", "monitoring_host"):
            try:
                ipaddress.ip_address(getattr(self, name))
            except ValueError as exc:
                raise ConfigError("is no IP address", field=name) from exc
        if not self.token_audiences:
            raise ConfigError("is empty: every token would do", field="token_audiences")
        for name in ("cluster_id", "cluster_domain", "root_namespace"):
            if not getattr(self, name) or "/" in getattr(self, name):
                raise ConfigError("is no name", field=name)
        try:
            SpiffeId(self.trust_domain, "namespace", "account")
        except ConfigError as exc:
            raise ConfigError(exc.message, field="trust_domain") from exc
        try:
            has_command = bool(shlex.split(self.waypoint_command))
        except ValueError:
            has_command = False
        if not has_command:
            raise ConfigError("is no command", field="waypoint_command")
        self._waypoint_traces()
        for account in self.ca_trusted_node_accounts:
            if account.count("/") != 1 or not all(account.split("/")):
                raise ConfigError(
                    f"{account!r} is no namespace/name", field="ca_trusted_node_accounts"
                )

    def cluster(self) -> ClusterChoice:
        """Where objects come from. Raises ConfigError."""
        return ClusterChoice(
            self.cluster_source, self.cluster_dir, self.kubeconfig, self.kube_context
        )

    def mesh(self) -> Mesh:
        """What derivations need to know."""
        return Mesh(
            cluster_id=self.cluster_id,
            trust_domain=self.trust_domain,
            domain=self.cluster_domain,
            network=self.network,
            root_namespace=self.root_namespace,
        )

    def saved_state(self) -> Path | None:
        """Where the last-known-good state is kept; None for nowhere."""
        if self.state_file == "off":
            return None
        return Path(self.state_file) if self.state_file else self.ca_dir / "last-known-good"

    def waypoints(self) -> WaypointSettings:
        """What every waypoint is started with."""
        return WaypointSettings(
            image=self.waypoint_image,
            command=self.waypoint_command,
            xds_address=f"https://istiod.{self.root_namespace}.svc:{self.xds_port}",
            trust_domain=self.trust_domain,
            cluster_domain=self.cluster_domain,
            cluster_id=self.cluster_id,
            traces=tuple(self._waypoint_traces().items()),
        )

    def _waypoint_traces(self) -> dict[str, str]:
        """The OTEL_* variables of every waypoint. Raises ConfigError."""
        found = read_pairs(self.waypoint_traces, "waypoint_traces")
        for name in found:
            if not name.startswith("OTEL_") or name.endswith("_HEADERS"):
                raise ConfigError(
                    f"{name} is not passed on to waypoints",
                    field="waypoint_traces",
                    hint="OTEL_* variables without secrets: everybody in a namespace can read them",
                )
        return found

    def serving_names(self) -> tuple[str, ...]:
        """Names and addresses that the serving certificate is good for."""
        service = f"istiod.{self.root_namespace}"
        names = (
            f"{service}.svc",
            f"{service}.svc.{self.cluster_domain}",
            service,
            "istiod",
            "localhost",
            "127.0.0.1",
            "::1",
            *self.custom_hosts,
        )
        return tuple(dict.fromkeys(names))
