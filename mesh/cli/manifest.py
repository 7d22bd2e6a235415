"""What `ambit install` puts into a cluster, as values. Pure.

One source for three forms: what is applied, the rendered YAML in `manifests/install.yaml`,
and the Helm chart in `manifests/chart`, which is the same objects with template expressions
where the values go. `make manifests` writes the files; a test keeps them true.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh.cli.rights import agent_rights, controller_rights
from mesh.cli.values import (
    AUDIENCE,
    CA_SECRET,
    GATEWAY_API,
    GATEWAY_CLASS,
    GATEWAY_CONTROLLER,
    MONITORING_PORT,
    ROOT_CERTIFICATE,
    USER,
    XDS_PORT,
    Values,
    metadata_of,
)
from mesh.cluster.api import Object


def objects(values: Values, *, gateway_class: bool = True) -> list[Object]:
    """Everything but the CRDs, in the order to apply. Without Gateway API there is no class."""
    return [
        namespace(values),
        *_accounts(values),
        *controller_rights(values),
        *agent_rights(values),
        _service(values),
        _disruption_budget(values),
        _controller(values),
        _proxy(values),
        _agent(values),
        *([_gateway_class()] if gateway_class else []),
    ]


def namespace(values: Values) -> Object:
    """The mesh's own namespace. Node proxy and agent need what only `privileged` allows."""
    labels = {
        "istio.io/dataplane-mode": "none",
        "pod-security.kubernetes.io/enforce": "privileged",
    }
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": values.namespace, "labels": labels},
    }


def _accounts(values: Values) -> list[Object]:
    return [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": metadata_of(values, app),
            # ztunnel asks the Kubernetes API for nothing.
            **({"automountServiceAccountToken": False} if app == "ztunnel" else {}),
        }
        for app in ("istiod", "ztunnel", "netconfig")
    ]


def _service(values: Values) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata_of(values, "istiod"),
        "spec": {
            "selector": {"app": "istiod"},
            "ports": [
                {"name": "tls-xds", "port": XDS_PORT, "targetPort": XDS_PORT, "protocol": "TCP"}
            ],
        },
    }


def _disruption_budget(values: Values) -> Object:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata_of(values, "istiod"),
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "istiod"}}},
    }


def _field(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _env(variables: Mapping[str, str]) -> list[Object]:
    return [{"name": name, "value": value} for name, value in variables.items()]


def _container(values: Values, name: str, module: str, **more: Any) -> Object:
    return {
        "name": name,
        "image": values.image,
        "imagePullPolicy": values.pull_policy,
        "command": ["python", "-m", module],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        **more,
    }


def _probe(path: str, port: int, **more: int) -> Object:
    return {"httpGet": {"path": path, "port": port, "scheme": "HTTP"}, **more}


def _controller(values: Values) -> Object:
    labels = {"app": "istiod"}
    env = [
        *_env(
            {
                "CLUSTER_SOURCE": "kubernetes",
                "CA_DIR": "/var/run/ambit/ca",
                "CA_SECRET": CA_SECRET,
                "CA_TRUSTED_NODE_ACCOUNTS": f"{values.namespace}/ztunnel",
                "ROOT_NAMESPACE": values.namespace,
                "TOKEN_AUDIENCES": AUDIENCE,
                "TRUST_DOMAIN": values.trust_domain,
                "CLUSTER_ID": values.cluster_id,
                "CLUSTER_DOMAIN": values.cluster_domain,
                "MONITORING_HOST": "::",
                "WAYPOINT_IMAGE": values.image,
                "LOG_LEVEL": values.log_level,
                "LOG_FORMAT": "json",
            }
        ),
        _field("POD_NAME", "metadata.name"),
    ]
    container = _container(
        values,
        "istiod",
        "istiod_lite",
        env=env,
        ports=[
            {"name": "tls-xds", "containerPort": XDS_PORT, "protocol": "TCP"},
            {"name": "http-monitoring", "containerPort": MONITORING_PORT, "protocol": "TCP"},
        ],
        # The first start makes keys and reads the whole cluster.
        startupProbe=_probe("/ready", MONITORING_PORT, periodSeconds=2, failureThreshold=150),
        readinessProbe=_probe("/ready", MONITORING_PORT, periodSeconds=5),
        livenessProbe=_probe("/metrics", MONITORING_PORT, periodSeconds=20, failureThreshold=6),
        resources={"requests": {"cpu": "200m", "memory": "256Mi"}},
        securityContext={
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        volumeMounts=[
            {"name": "state", "mountPath": "/var/run/ambit"},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a mount of its own
        ],
    )
    spread = {
        "weight": 100,
        "podAffinityTerm": {
            "topologyKey": "kubernetes.io/hostname",
            "labelSelector": {"matchLabels": labels},
        },
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata_of(values, "istiod"),
        "spec": {
            "replicas": values.replicas,
            "selector": {"matchLabels": labels},
            "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": {
                "metadata": {"labels": {**labels, "istio.io/dataplane-mode": "none"}},
                "spec": {
                    "serviceAccountName": "istiod",
                    "securityContext": {
                        "runAsNonRoot": True,
                        "runAsUser": USER,
                        "runAsGroup": USER,
                        "fsGroup": USER,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "affinity": {
                        "podAntiAffinity": {
                            "preferredDuringSchedulingIgnoredDuringExecution": [spread]
                        }
                    },
                    "containers": [container],
                    # In memory: the authority's keys are never on a disk of the node.
                    "volumes": [
                        {"name": "state", "emptyDir": {"medium": "Memory", "sizeLimit": "96Mi"}},
                        {"name": "tmp", "emptyDir": {}},
                    ],
                },
            },
        },
    }


def _daemon_set(values: Values, app: str, pod: Object) -> Object:
    labels = {"app": app}
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": metadata_of(values, app),
        "spec": {
            "selector": {"matchLabels": labels},
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
            "template": {
                "metadata": {"labels": {**labels, "istio.io/dataplane-mode": "none"}},
                "spec": {
                    "serviceAccountName": app,
                    "priorityClassName": "system-node-critical",
                    "nodeSelector": {"kubernetes.io/os": "linux"},
                    "tolerations": [
                        {"operator": "Exists", "effect": effect}
                        for effect in ("NoSchedule", "NoExecute")
                    ],
                    **pod,
                },
            },
        },
    }


def _host_path(name: str, path: str, kind: str = "DirectoryOrCreate") -> Object:
    return {"name": name, "hostPath": {"path": path, "type": kind}}


def _capable(*capabilities: str) -> Object:
    return {
        "allowPrivilegeEscalation": True,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "runAsUser": 0,
        "capabilities": {"drop": ["ALL"], "add": list(capabilities)},
    }


def _proxy(values: Values) -> Object:
    controller = f"https://istiod.{values.namespace}.svc:{XDS_PORT}"
    env = [
        *_env(
            {
                "XDS_ADDRESS": controller,
                "CA_ADDRESS": controller,
                "CLUSTER_ID": values.cluster_id,
                "CLUSTER_DOMAIN": values.cluster_domain,
                "TRUST_DOMAIN": values.trust_domain,
                "INPOD_UDS": "/var/run/ztunnel/ztunnel.sock",
                "TERMINATION_GRACE_PERIOD_SECONDS": "30",
                "LOG_LEVEL": values.log_level,
                "LOG_FORMAT": "json",
            }
        ),
        _field("NODE_NAME", "spec.nodeName"),
        _field("POD_NAME", "metadata.name"),
        _field("POD_NAMESPACE", "metadata.namespace"),
        _field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
        _field("INSTANCE_IP", "status.podIP"),
    ]
    container = _container(
        values,
        "ztunnel",
        "ztunnel",
        workingDir="/",
        env=env,
        ports=[
            {"name": "http-stats", "containerPort": 15020, "protocol": "TCP"},
            {"name": "readiness", "containerPort": 15021, "protocol": "TCP"},
        ],
        readinessProbe=_probe("/healthz/ready", 15021, periodSeconds=5),
        resources={"requests": {"cpu": "200m", "memory": "128Mi"}},
        # To enter pods' network namespaces, mark sockets, and keep callers' addresses.
        securityContext=_capable("NET_ADMIN", "NET_RAW", "SYS_ADMIN"),
        volumeMounts=[
            {"name": "root", "mountPath": "/var/run/secrets/istio", "readOnly": True},
            {"name": "token", "mountPath": "/var/run/secrets/tokens", "readOnly": True},
            {"name": "zds", "mountPath": "/var/run/ztunnel"},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a mount of its own
        ],
    )
    token = {"audience": AUDIENCE, "expirationSeconds": 43200, "path": "istio-token"}
    pod = {
        "terminationGracePeriodSeconds": 30,
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": [
            {"name": "root", "configMap": {"name": ROOT_CERTIFICATE}},
            {
                "name": "token",
                "projected": {"sources": [{"serviceAccountToken": token}]},
            },
            _host_path("zds", "/var/run/ztunnel"),
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    return _daemon_set(values, "ztunnel", pod)


def _agent(values: Values) -> Object:
    env = [
        *_env(
            {
                "CLUSTER_SOURCE": "kubernetes",
                "SYSTEM_NAMESPACE": values.namespace,
                "ZTUNNEL_UDS_ADDRESS": "/var/run/ztunnel/ztunnel.sock",
                "LOG_LEVEL": values.log_level,
                "LOG_FORMAT": "json",
            }
        ),
        _field("NODE_NAME", "spec.nodeName"),
    ]
    container = _container(
        values,
        "netconfig",
        "netconfig",
        env=env,
        ports=[{"name": "health", "containerPort": 8000, "protocol": "TCP"}],
        readinessProbe=_probe("/readyz", 8000, periodSeconds=5),
        livenessProbe=_probe("/healthz", 8000, periodSeconds=20, failureThreshold=6),
        resources={"requests": {"cpu": "50m", "memory": "96Mi"}},
        # To enter pods' network namespaces and write their rules.
        securityContext=_capable("NET_ADMIN", "NET_RAW", "SYS_ADMIN", "SYS_PTRACE"),
        volumeMounts=[
            {"name": "zds", "mountPath": "/var/run/ztunnel"},
            {"name": "cni", "mountPath": "/var/run/istio-cni"},
            {
                "name": "netns",
                "mountPath": "/run/netns",
                "mountPropagation": "HostToContainer",
            },
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a mount of its own
        ],
    )
    pod = {
        # Pods' namespaces are found by their processes; health is asked by the kubelet.
        "hostNetwork": True,
        "hostPID": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "containers": [container],
        "volumes": [
            _host_path("zds", "/var/run/ztunnel"),
            _host_path("cni", "/var/run/istio-cni"),
            _host_path("netns", "/run/netns"),
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    return _daemon_set(values, "netconfig", pod)


def _gateway_class() -> Object:
    return {
        "apiVersion": f"{GATEWAY_API}/v1",
        "kind": "GatewayClass",
        "metadata": {"name": GATEWAY_CLASS},
        "spec": {
            "controllerName": GATEWAY_CONTROLLER,
            "description": "Waypoints: layer 7 for the services that choose one.",
        },
    }
