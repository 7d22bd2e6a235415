"""A mesh on Kubernetes, as verbs speak to it: the same calls that a lab answers.

Objects are read and written through the API server; pages of daemons through a forwarded port,
so that only who may `kubectl port-forward` in the mesh's own namespace sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from mesh.cluster.api import NotFound, Object, Ref
from mesh.cluster.api_server import Access
from mesh.cluster.kubernetes import KubernetesCluster
from mesh.errors import Unavailable
from mesh.lab.control import NotThere

T = TypeVar("T")

CONTROLLER: Final = "istiod"
_ADMIN_PORT: Final = 15000
_CAPTURED: Final = "ambient.istio.io/redirection"
_OF_NODES: Final = ("ztunnel", "netconfig")


class KubeClient:
    """The mesh of one cluster, whose own namespace is `namespace`.

    Calls block; they raise Unavailable, ConfigError (also for what we may not do) or NotThere.
    """

    def __init__(self, kubeconfig: Path | None, context: str, namespace: str) -> None:
        self._cluster = KubernetesCluster(Access(kubeconfig, context or None))
        self._namespace = namespace
        self._proxies: dict[str, Ref] | None = None
        self.where = f"context {context}" if context else "the cluster"

    def get(self, kind: str, namespace: str | None = None, name: str | None = None) -> list[Object]:
        """See `LabClient.get`."""
        if name is not None and (namespace or kind == "Namespace"):
            found = _run(partial(self._cluster.get, Ref(kind, namespace or "", name)))
            return [found] if found is not None else []
        listed = _run(partial(self._cluster.list_objects, kind, namespace or ""))
        return [each for each in listed if name in (None, each["metadata"]["name"])]

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """See `LabClient.apply`; server-side apply, as the field manager `ambit`."""
        for each in objects:
            _run(partial(self._cluster.apply, dict(each)))

    def patch(self, kind: str, namespace: str, name: str, merge_patch: Mapping[str, Any]) -> Object:
        """See `LabClient.patch`."""
        ref = Ref(kind, namespace, name)
        try:
            _run(partial(self._cluster.patch, ref, merge_patch))
        except NotFound as exc:
            raise NotThere(str(exc)) from exc
        found = _run(partial(self._cluster.get, ref))
        if found is None:
            raise NotThere(f"{ref} does not exist")
        return found

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """See `LabClient.delete`; what is not there is no error."""
        _run(partial(self._cluster.delete, Ref(kind, namespace, name)))

    def status(self) -> dict[str, Any]:
        """As `LabClient.status`, of it: phase, nodes, control_plane and pods.

        `controllers` are the places to ask, one for each replica; `logs_hint` is how to read on.
        """
        pods = self.get("Pod")
        own = [each for each in pods if each["metadata"]["namespace"] == self._namespace]
        controllers = [each for each in own if _app(each) == CONTROLLER and not _is_over(each)]
        nodes = [_node(each, own) for each in self.get("Node") if _is_linux(each)]
        return {
            "phase": "ready" if any(map(_is_ready, controllers)) else "not ready",
            "nodes": nodes,
            "logs_hint": f"kubectl -n {self._namespace} logs -l app={{app}}",
            "control_plane": {"daemons": _daemons(controllers)},
            "controllers": [_full(each) for each in controllers if _is_ready(each)],
            "pods": [
                {
                    "namespace": each["metadata"]["namespace"],
                    "name": each["metadata"]["name"],
                    "enrolled": (each["metadata"].get("annotations") or {}).get(_CAPTURED)
                    == "enabled",
                }
                for each in pods
                if not _is_over(each)
            ],
        }

    def http_get(self, place: str, path: str, *, port: int = _ADMIN_PORT) -> tuple[int, bytes]:
        """GET a page that a daemon serves to itself; status and body.

        `place` is a node, for its proxy, or a pod (`namespace/name`).
        """
        namespace, slash, name = place.partition("/")
        if slash:
            pod = Ref("Pod", namespace, name)
        else:
            found = self._proxy_of(place)
            if found is None:
                raise Unavailable(f"no ztunnel runs on node {place}")
            pod = found
        return _run(partial(self._cluster.read_page, pod, port, path))

    def _proxy_of(self, node: str) -> Ref | None:
        if self._proxies is None:
            self._proxies = {
                each["spec"].get("nodeName", ""): Ref(
                    "Pod", self._namespace, each["metadata"]["name"]
                )
                for each in self.get("Pod", self._namespace)
                if _app(each) == "ztunnel" and _is_ready(each)
            }
        return self._proxies.get(node)


def _run(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return trio.run(call)


def _app(pod: Object) -> str:
    return str((pod["metadata"].get("labels") or {}).get("app", ""))


def _full(pod: Object) -> str:
    return f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"


def _is_over(pod: Object) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def _is_ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(each.get("type") == "Ready" and each.get("status") == "True" for each in conditions)


def _is_linux(node: Object) -> bool:
    labels = node["metadata"].get("labels") or {}
    return str(labels.get("kubernetes.io/os", "linux")) == "linux"


def _state(pod: Object) -> str:
    if pod["metadata"].get("deletionTimestamp"):
        return "stopping"
    phase = str((pod.get("status") or {}).get("phase", "")) or "unknown"
    return "ready" if _is_ready(pod) else "not ready" if phase == "Running" else phase.lower()


def _daemons(controllers: list[Object]) -> dict[str, Any]:
    """The controller, by its best replica; replicas that are not well beside it."""
    states = {each["metadata"]["name"]: _state(each) for each in controllers}
    if "ready" in states.values():
        bad = {name: {"state": state} for name, state in states.items() if state != "ready"}
        return {CONTROLLER: {"state": "ready"}, **bad}
    return {CONTROLLER: {"state": (*states.values(), "absent")[0]}}


def _node(node: Object, own: list[Object]) -> dict[str, Any]:
    name = node["metadata"]["name"]
    here = [each for each in own if (each.get("spec") or {}).get("nodeName") == name]
    found = {}
    for app in _OF_NODES:
        states = [_state(each) for each in here if _app(each) == app and not _is_over(each)]
        found[app] = {"state": "ready" if "ready" in states else (*states, "absent")[0]}
    return {"name": name, "daemons": found}
