"""DECIDES the ServiceAccount, Service and Deployment of each waypoint Gateway. Pure.

`desired` says what a waypoint consists of, `plan` what has to be done so that it is so: what is
missing is made, what drifted is put back (what an API server or a user added beside is left
alone), what no Gateway asks for any more is deleted. Names and labels are Istio's.

Only objects that carry our label are ever changed or deleted. If somebody else's object has the
name, that is told and nothing is taken over; a service account is used as it is found.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from istiod_lite.bindings import waypoint_of
from istiod_lite.workloads import TRAFFIC_DISTRIBUTION
from mesh.cluster.api import Object, Ref, ref_of
from mesh.cluster.gateways import (
    GATEWAY_GROUP,
    GATEWAY_NAME,
    HBONE_PORT,
    MANAGED,
    WAYPOINT_CLASS,
    Gateway,
)

CONTROLLER = "istio.io-mesh-controller"
CLASS_NAME = "gateway.networking.k8s.io/gateway-class-name"
OWNED_KINDS = ("ServiceAccount", "Service", "Deployment")
METRICS_PORT = 15020
READINESS_PORT = 15021
GRACE_SECONDS = 30
_TOKEN_SECONDS = 43200
_TOKEN_PATH = "/var/run/secrets/tokens"  # noqa: S105
_ROOT_PATH = "/var/run/secrets/istio"
_SECRETS = {
    "ambit-rate-limit": "/var/run/secrets/ambit/rate-limit",
    "ambit-redaction": "/var/run/secrets/ambit/redaction",
}
"""Secrets of the Gateway's namespace that a waypoint reads where they are, by their names."""


@dataclass(frozen=True, slots=True)
class WaypointSettings:
    """What is the same for every waypoint. `command` is split as a shell does."""

    image: str = "ambit/waypoint"
    command: str = "python3 -m waypoint"
    xds_address: str = "https://istiod.istio-system.svc:15012"
    trust_domain: str = "cluster.local"
    cluster_domain: str = "cluster.local"
    cluster_id: str = "Kubernetes"
    traces: tuple[tuple[str, str], ...] = ()
    """OTEL_* variables; `$(HOST_IP)` in them is the address of the waypoint's node."""


@dataclass(frozen=True, slots=True)
class Make:
    """Create the object, unless somebody else's has its name."""

    object: Object


@dataclass(frozen=True, slots=True)
class Mend:
    """Put back what drifted."""

    ref: Ref
    patch: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Remove:
    """Nothing asks for it any more."""

    ref: Ref


Step: TypeAlias = Make | Mend | Remove


def plan(
    gateways: Iterable[Gateway], live: Mapping[Ref, Object], settings: WaypointSettings
) -> list[Step]:
    """The steps from `live`, which holds objects that carry our label alone, to what is desired."""
    steps: list[Step] = []
    wanted: set[Ref] = set()
    for gateway in gateways:
        if not gateway.is_waypoint or gateway.is_terminating:
            continue
        objects = desired(gateway, settings)
        wanted.update(ref_of(each) for each in objects)
        if waypoint_of(gateway, None, has_ready_pod=False).problem:
            continue  # a mistake in the Gateway takes no running waypoint down
        for each in objects:
            found = live.get(ref_of(each))
            if found is None:
                steps.append(Make(each))
            elif patch := difference(found, each):
                steps.append(Mend(ref_of(each), patch))
    return [*steps, *(Remove(ref) for ref in sorted(live.keys() - wanted))]


def is_ours(obj: Mapping[str, Any]) -> bool:
    """Whether an object is one that we made for a waypoint."""
    metadata = obj.get("metadata")
    labels = metadata.get("labels") if isinstance(metadata, Mapping) else None
    return isinstance(labels, Mapping) and labels.get(MANAGED) == CONTROLLER


def difference(live: Any, wanted: Any) -> dict[str, Any]:
    """The merge patch that puts what is wanted into an object, empty if all of it is there."""
    patch = {}
    for key, value in wanted.items():
        found = live.get(key) if isinstance(live, Mapping) else None
        if isinstance(value, Mapping) and isinstance(found, Mapping):
            if inner := difference(found, value):
                patch[key] = inner
        elif not _covers(found, value):
            patch[key] = value
    return patch


def _covers(live: Any, wanted: Any) -> bool:
    """Whether a value says what is wanted; a server's defaults beside it are no difference."""
    if isinstance(wanted, Mapping):
        return isinstance(live, Mapping) and not difference(live, wanted)
    if isinstance(wanted, list):
        same_length = isinstance(live, list) and len(live) == len(wanted)
        return same_length and all(map(_covers, live, wanted))
    return bool(live == wanted) and type(live) is type(wanted)


def desired(gateway: Gateway, settings: WaypointSettings) -> Sequence[Object]:
    """What a waypoint consists of, in the order to make it."""
    labels = {
        GATEWAY_NAME: gateway.name,
        CLASS_NAME: WAYPOINT_CLASS,
        MANAGED: CONTROLLER,
        "istio.io/dataplane-mode": "none",
    }
    metadata: dict[str, Any] = {
        "name": gateway.name,
        "namespace": gateway.namespace,
        "labels": labels,
    }
    if gateway.uid:
        metadata["ownerReferences"] = [
            {
                "apiVersion": f"{GATEWAY_GROUP}/v1",
                "kind": "Gateway",
                "name": gateway.name,
                "uid": gateway.uid,
            }
        ]
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}
    return account, _service(gateway, metadata), _deployment(gateway, metadata, settings)


def _service(gateway: Gateway, metadata: dict[str, Any]) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {**metadata, "annotations": {TRAFFIC_DISTRIBUTION: "PreferClose"}},
        "spec": {
            "type": "ClusterIP",
            "ipFamilyPolicy": "PreferDualStack",
            "selector": {GATEWAY_NAME: gateway.name},
            "ports": [
                {
                    "name": "status-port",
                    "port": READINESS_PORT,
                    "protocol": "TCP",
                    "targetPort": READINESS_PORT,
                },
                {
                    "name": "mesh",
                    "port": HBONE_PORT,
                    "protocol": "TCP",
                    "targetPort": HBONE_PORT,
                    "appProtocol": "hbone",
                },
            ],
        },
    }


def _deployment(gateway: Gateway, metadata: dict[str, Any], settings: WaypointSettings) -> Object:
    labels = {
        GATEWAY_NAME: gateway.name,
        MANAGED: CONTROLLER,
        "istio.io/dataplane-mode": "none",
        "sidecar.istio.io/inject": "false",
        "service.istio.io/canonical-name": gateway.name,
        "service.istio.io/canonical-revision": "latest",
    }
    annotations = {"prometheus.io/port": str(METRICS_PORT), "prometheus.io/scrape": "true"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        # How many there are is an autoscaler's business.
        "spec": {
            "selector": {"matchLabels": {GATEWAY_NAME: gateway.name}},
            "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": {
                "metadata": {"labels": labels, "annotations": annotations},
                "spec": {
                    "serviceAccountName": gateway.name,
                    "terminationGracePeriodSeconds": GRACE_SECONDS,
                    "containers": [_container(gateway, settings)],
                    "volumes": [_token_volume(), _root_volume(), *map(_secret_volume, _SECRETS)],
                },
            },
        },
    }


def _container(gateway: Gateway, settings: WaypointSettings) -> dict[str, Any]:
    probe = {
        "httpGet": {"path": "/healthz/ready", "port": READINESS_PORT, "scheme": "HTTP"},
        "periodSeconds": 1,
        "timeoutSeconds": 3,
        "failureThreshold": 4,
    }
    fixed = {
        "GATEWAY_NAME": gateway.name,
        "SERVICE_ACCOUNT": gateway.name,
        "XDS_ADDRESS": settings.xds_address,
        "CA_ADDRESS": settings.xds_address,
        "TRUST_DOMAIN": settings.trust_domain,
        "CLUSTER_DOMAIN": settings.cluster_domain,
        "CLUSTER_ID": settings.cluster_id,
        "XDS_ROOT_CA": f"{_ROOT_PATH}/root-cert.pem",
        "CA_ROOT_CA": f"{_ROOT_PATH}/root-cert.pem",
        "AUTH_TOKEN": f"{_TOKEN_PATH}/istio-token",
    }
    return {
        "name": "istio-proxy",
        "image": settings.image,
        "command": shlex.split(settings.command),
        "env": [
            *({"name": name, "value": value} for name, value in fixed.items()),
            _field("POD_NAME", "metadata.name"),
            _field("POD_NAMESPACE", "metadata.namespace"),
            _field("INSTANCE_IP", "status.podIP"),
            _field("NODE_NAME", "spec.nodeName"),
            *([_field("HOST_IP", "status.hostIP")] if settings.traces else []),
            *({"name": name, "value": value} for name, value in settings.traces),
        ],
        "ports": [
            {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
            {"name": "status-port", "containerPort": READINESS_PORT, "protocol": "TCP"},
            {"name": "mesh", "containerPort": HBONE_PORT, "protocol": "TCP"},
        ],
        "readinessProbe": probe,
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [
            {"name": "istio-token", "mountPath": _TOKEN_PATH, "readOnly": True},
            {"name": "istiod-ca-cert", "mountPath": _ROOT_PATH, "readOnly": True},
            *(
                {"name": name, "mountPath": path, "readOnly": True}
                for name, path in _SECRETS.items()
            ),
        ],
    }


def _field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _token_volume() -> dict[str, Any]:
    token = {"audience": "istio-ca", "expirationSeconds": _TOKEN_SECONDS, "path": "istio-token"}
    return {"name": "istio-token", "projected": {"sources": [{"serviceAccountToken": token}]}}


def _secret_volume(name: str) -> dict[str, Any]:
    # What policies need of secrets: who has no such policy has no such Secret.
    return {"name": name, "secret": {"secretName": name, "optional": True}}


def _root_volume() -> dict[str, Any]:
    return {"name": "istiod-ca-cert", "configMap": {"name": "istio-ca-root-cert"}}
