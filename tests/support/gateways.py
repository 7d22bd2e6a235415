"""Kubernetes objects around waypoints, as literals; and an index that holds them."""

from __future__ import annotations

from typing import Any

from istiod_lite.index import ClusterIndex
from istiod_lite.workloads import Mesh
from mesh.cluster.api import Deleted, Put, Ref, Source, ref_of
from mesh.model.l7_policy import TrafficConfig
from mesh.model.service import Service
from mesh.model.workload import Workload

GATEWAY_API = "gateway.networking.k8s.io/v1"
SECURITY = "security.istio.io/v1"
OURS = "ambit.dev/v1alpha1"
USE = "istio.io/use-waypoint"


def obj(kind: str, name: str, namespace: str, version: str, **fields: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace, **fields.pop("metadata", {})}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **fields}


def namespace(name: str, **labels: str) -> dict[str, Any]:
    return obj("Namespace", name, "", "v1", metadata={"labels": labels})


def gateway(
    name: str = "wp",
    home: str = "shop",
    *,
    allowed: dict[str, Any] | None = None,
    listeners: list[dict[str, Any]] | None = None,
    addresses: tuple[str, ...] = (),
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    class_name: str = "istio-waypoint",
) -> dict[str, Any]:
    listener: dict[str, Any] = {"name": "mesh", "port": 15008, "protocol": "HBONE"}
    if allowed is not None:
        listener["allowedRoutes"] = {"namespaces": allowed}
    return obj(
        "Gateway",
        name,
        home,
        GATEWAY_API,
        metadata={"labels": labels or {}, "annotations": annotations or {}},
        spec={"gatewayClassName": class_name, "listeners": listeners or [listener]},
        status={"addresses": [{"value": each} for each in addresses]},
    )


def pod(
    name: str,
    home: str = "shop",
    app: str = "web",
    *,
    ip: str = "10.0.0.1",
    ready: bool = True,
    account: str = "default",
    labels: dict[str, str] | None = None,
    port: int = 8080,
) -> dict[str, Any]:
    condition = {"type": "Ready", "status": "True" if ready else "False"}
    return obj(
        "Pod",
        name,
        home,
        "v1",
        metadata={"labels": {"app": app, **(labels or {})}},
        spec={
            "nodeName": "n1",
            "serviceAccountName": account,
            "containers": [{"ports": [{"name": "http", "containerPort": port}]}],
        },
        status={"phase": "Running", "podIPs": [{"ip": ip}], "conditions": [condition]},
    )


def waypoint_pod(name: str = "wp", home: str = "shop", *, ready: bool = True) -> dict[str, Any]:
    labels = {"gateway.networking.k8s.io/gateway-name": name}
    return pod(f"{name}-1", home, name, ip="10.0.9.9", ready=ready, account=name, labels=labels)


def service(
    name: str = "web",
    home: str = "shop",
    app: str = "web",
    *,
    target: int | str = 8080,
    ports: dict[str, int] | None = None,
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
) -> dict[str, Any]:
    listed = [
        {"name": each, "port": number, "targetPort": target}
        for each, number in (ports or {"http": 80}).items()
    ]
    return obj(
        "Service",
        name,
        home,
        "v1",
        metadata={"labels": labels or {}, "annotations": annotations or {}},
        spec={"clusterIP": "10.96.0.1", "selector": {"app": app}, "ports": listed},
    )


def parent(name: str = "web", **more: Any) -> dict[str, Any]:
    return {"group": "", "kind": "Service", "name": name, **more}


def route(
    name: str = "r",
    home: str = "shop",
    *,
    kind: str = "HTTPRoute",
    parents: list[dict[str, Any]] | None = None,
    backends: list[dict[str, Any]] | None = None,
    rules: list[dict[str, Any]] | None = None,
    created: str = "",
    hostnames: list[str] | None = None,
) -> dict[str, Any]:
    backends = backends if backends is not None else [{"name": "web", "port": 80}]
    spec: dict[str, Any] = {
        "parentRefs": parents or [parent()],
        "rules": rules or [{"backendRefs": backends}],
    }
    if hostnames:
        spec["hostnames"] = hostnames
    metadata = {"creationTimestamp": created} if created else {}
    return obj(kind, name, home, GATEWAY_API, metadata=metadata, spec=spec)


def target(name: str = "web", kind: str = "Service", **more: Any) -> dict[str, Any]:
    group = "" if kind == "Service" else "gateway.networking.k8s.io"
    return {"group": group, "kind": kind, "name": name, **more}


def authorization(
    name: str = "p", home: str = "shop", refs: list[dict[str, Any]] | None = None, **spec: Any
) -> dict[str, Any]:
    refs = refs if refs is not None else [target()]
    return obj("AuthorizationPolicy", name, home, SECURITY, spec={"targetRefs": refs, **spec})


def rate_limit(
    name: str = "l", home: str = "shop", refs: list[dict[str, Any]] | None = None, **spec: Any
) -> dict[str, Any]:
    rules = spec.pop("rules", [{"limit": {"requests": 10, "window": "1m"}}])
    refs = refs if refs is not None else [target()]
    spec = {"targetRefs": refs, "rules": rules, **spec}
    return obj("RateLimitPolicy", name, home, OURS, spec=spec)


class Held:
    """An index, fed with objects."""

    def __init__(self, *objects: dict[str, Any]) -> None:
        self.index = ClusterIndex(Mesh())
        self.put(*objects)

    def put(self, *objects: dict[str, Any]) -> bool:
        for each in objects:
            ref = ref_of(each)
            self.index.receive(Put(ref, each, Source(f"{ref.name}.yaml", 3)))
        return self.index.settle()

    def delete(self, kind: str, name: str, home: str = "shop") -> bool:
        self.index.receive(Deleted(Ref(kind, home, name)))
        return self.index.settle()

    def service(self, name: str = "web", home: str = "shop") -> Service:
        found = self.index.addresses[f"{home}/{name}.{home}.svc.cluster.local"]
        assert isinstance(found, Service)
        return found

    def workload(self, name: str, home: str = "shop") -> Workload:
        found = self.index.addresses[f"Kubernetes//Pod/{home}/{name}"]
        assert isinstance(found, Workload)
        return found

    def config(
        self, name: str = "web", home: str = "shop", waypoint: str = "shop/wp"
    ) -> TrafficConfig | None:
        key = f"{waypoint}/{home}/{name}.{home}.svc.cluster.local"
        return self.index.traffic.configs.get(key)

    def waypoint_of(self, name: str = "web", home: str = "shop") -> str:
        """The waypoint that node proxies are told for a service; empty for none."""
        found = self.service(name, home).waypoint
        return f"{found.destination}:{found.hbone_mtls_port}" if found else ""

    def guards(self) -> dict[str, Any]:
        return {
            key: each for key, each in self.index.policies.items() if "/ambit_waypoint_only_" in key
        }

    def findings(self) -> list[str]:
        return [str(each) for each in self.index.findings()]
