"""What an installation may choose, and the names that everything in it shares. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mesh.cluster.api import Object

GATEWAY_API = "gateway.networking.k8s.io"
GATEWAY_CLASS = "istio-waypoint"
GATEWAY_CONTROLLER = "istio.io/mesh-controller"
CA_SECRET = "ambit-ca"  # noqa: S105 - a name
LEASE = "istiod-leader"
ROOT_CERTIFICATE = "istio-ca-root-cert"
AUDIENCE = "istio-ca"
USER = 1337
XDS_PORT = 15012
MONITORING_PORT = 15014


@dataclass(frozen=True, slots=True)
class Values:
    """What an installation may choose. In the chart these are template expressions."""

    namespace: str = "istio-system"
    image: str = "ambit:latest"
    pull_policy: str = "IfNotPresent"
    replicas: Any = 2
    trust_domain: str = "cluster.local"
    cluster_id: str = "Kubernetes"
    cluster_domain: str = "cluster.local"
    log_level: str = "info"


def metadata_of(values: Values, app: str, name: str = "") -> Object:
    """Metadata of an object in the mesh's own namespace."""
    return {
        "name": name or app,
        "namespace": values.namespace,
        "labels": {"app": app, "app.kubernetes.io/part-of": "ambit"},
    }


def global_metadata(app: str) -> Object:
    """Metadata of a cluster-scoped object."""
    return {
        "name": f"ambit-{app}",
        "labels": {"app": app, "app.kubernetes.io/part-of": "ambit"},
    }
