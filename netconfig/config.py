"""What the node agent was told: settings by the names Istio's node agent has, where it has one."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from mesh.cluster.fields import shown
from mesh.cluster.open import SOURCES, ClusterChoice
from mesh.errors import ConfigError
from mesh.runtime.config import setting
from netconfig.plan import Selection
from netconfig.ruleset import Capture

PLUGIN_SOCKET = "pluginevent.sock"


@dataclass(frozen=True, slots=True)
class NetconfigConfig:
    """The node agent: captures the traffic of this node's enrolled pods."""

    node_name: str = setting(env="NODE_NAME", doc="This node, as in the pods' spec.nodeName.")
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
    netns_dir: Path = setting(
        env="NETNS_DIR",
        default=Path("/run/netns"),
        doc="Where a pod's network namespace is mounted, under the pod's uid.",
    )
    ztunnel_uds_address: Path = setting(
        env="ZTUNNEL_UDS_ADDRESS",
        default=Path("/var/run/ztunnel/ztunnel.sock"),
        doc="Socket on which the node proxy is served.",
    )
    cni_agent_run_dir: Path = setting(
        env="CNI_AGENT_RUN_DIR",
        default=Path("/var/run/istio-cni"),
        doc=f"Directory of {PLUGIN_SOCKET}, on which the CNI plugin is served.",
    )
    system_namespace: str = setting(
        env=("SYSTEM_NAMESPACE", "POD_NAMESPACE"),
        default="istio-system",
        doc="Namespace of the node proxies, which are never captured.",
    )
    exclude_namespaces: tuple[str, ...] = setting(
        env="EXCLUDE_NAMESPACES",
        default=("kube-system",),
        doc="Namespaces whose pods are never captured.",
    )
    ambient_dns_capture: bool = setting(
        env="AMBIENT_DNS_CAPTURE", default=True, doc="Redirect the pods' DNS to the node proxy."
    )
    ambient_ipv6: bool = setting(
        env="AMBIENT_IPV6", default=True, doc="Capture IPv6 too; false leaves IPv6 uncaptured."
    )
    host_probe: tuple[str, ...] = setting(
        env=("HOST_PROBE", "HOST_PROBE_ADDRESSES"),
        default=(),
        doc="Addresses or networks of the node from which it probes pods; not captured.",
    )
    host_probe_snat_ip: str = setting(
        env="HOST_PROBE_SNAT_IP",
        default="169.254.7.127",
        doc="Address to which the node's probes are translated; empty for none.",
    )
    host_probe_snat_ipv6: str = setting(
        env="HOST_PROBE_SNAT_IPV6",
        default="fd16:9254:7127:1337:ffff:ffff:ffff:ffff",
        doc="The same for IPv6.",
    )
    drain_seconds: float = setting(
        env="DRAIN_SECONDS",
        default=3600.0,
        doc="How long open connections of a pod that leaves the mesh may live on.",
    )
    drain_settle_seconds: float = setting(
        env="DRAIN_SETTLE_SECONDS",
        default=2.0,
        doc="How long a leaving pod stays reachable through the tunnel at least, so that every "
        "peer has heard of it.",
    )
    drift_seconds: float = setting(
        env="DRIFT_SECONDS", default=10.0, doc="How often a pod's rules are checked."
    )
    cni_deadline_seconds: float = setting(
        env="CNI_DEADLINE_SECONDS",
        default=4.5,
        doc="How long the CNI plugin waits for a pod to be captured; the plugin gives up at 5.",
    )
    health_port: int = setting(
        env="HEALTH_PORT", default=8000, doc="Port of /healthz and /readyz; 0 for none."
    )
    monitoring_port: int = setting(
        env="MONITORING_PORT", default=15014, doc="Port of /metrics; 0 for none."
    )
    log_level: str = setting(env="LOG_LEVEL", default="info", doc="Level, or logger=level,...")
    log_format: str = setting(
        env="LOG_FORMAT", default="", doc="json or plain.", choices=("", "json", "plain")
    )

    def __post_init__(self) -> None:
        self.cluster()
        for name in ("drain_seconds", "drain_settle_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError("is negative", field=name)
        for name in ("drift_seconds", "cni_deadline_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError("must be more than zero", field=name)
        for name in ("health_port", "monitoring_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError("is no port", field=name)
        for name, values in (
            ("host_probe", self.host_probe),
            ("host_probe_snat_ip", (self.host_probe_snat_ip,)),
            ("host_probe_snat_ipv6", (self.host_probe_snat_ipv6,)),
        ):
            for value in filter(None, values):
                _check_exemption(name, value)

    def cluster(self) -> ClusterChoice:
        """Where objects come from. Raises ConfigError."""
        return ClusterChoice(
            self.cluster_source, self.cluster_dir, self.kubeconfig, self.kube_context
        )

    def selection(self) -> Selection:
        """What `netconfig.plan` needs to know."""
        probes = (*self.host_probe, self.host_probe_snat_ip, self.host_probe_snat_ipv6)
        return Selection(
            node=self.node_name,
            system_namespace=self.system_namespace,
            excluded_namespaces=frozenset(self.exclude_namespaces),
            capture=Capture(
                dns=self.ambient_dns_capture,
                ipv6=self.ambient_ipv6,
                exempt=tuple(filter(None, probes)),
            ),
        )

    @property
    def plugin_socket(self) -> Path:
        """Where the CNI plugin calls."""
        return self.cni_agent_run_dir / PLUGIN_SOCKET


def _check_exemption(name: str, value: str) -> None:
    try:
        network = ipaddress.ip_network(value, strict=False)
    except ValueError as exc:
        raise ConfigError(f"{shown(value)} is no address or network", field=name) from exc
    if network.prefixlen == 0:
        raise ConfigError(f"{value} would leave nothing captured", field=name)
