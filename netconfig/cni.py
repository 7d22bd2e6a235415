"""The CNI plugin's counterpart: `POST /cmdadd` on a unix socket, one request per new pod.

The plugin is chained after the one that made the pod's network; the container runtime waits
for it. An enrolled pod is captured before the answer 200, so no container of it ever ran
outside the mesh; any other answer fails the pod's sandbox, with the reason as its text, and
the kubelet tries again. A pod that is not enrolled is 200 at once. Body as Istio's plugin
sends it: `{"Netns": path, "PodName": ..., "PodNamespace": ..., "IPs": null or [...]}`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.cluster.api import Cluster, Ref
from mesh.cluster.fields import Reader
from mesh.cluster.objects import Namespace, Pod, parse_namespace, parse_pod
from mesh.errors import ConfigError, MeshError
from mesh.runtime import log
from mesh.runtime.admin import AdminApp, Request, Response
from netconfig.enrolment import Enrolments
from netconfig.plan import Enrol, Excluded, Selection, judge
from netconfig.pods import NodePods

PATH = "/cmdadd"
MAX_BODY_BYTES = 64 << 10
MAX_NAME = 253
MAX_PATH = 4096
MAX_ADDRESSES = 32

_log = log.get("cni")


@dataclass(frozen=True, slots=True)
class AddRequest:
    """A pod whose network has just been made. `addresses` in canonical text."""

    netns: Path
    name: str
    namespace: str
    addresses: tuple[str, ...] = ()


def parse_request(body: bytes) -> AddRequest:
    """Read the plugin's JSON. Raises ConfigError naming the field."""
    if len(body) > MAX_BODY_BYTES:
        raise ConfigError(f"larger than {MAX_BODY_BYTES} bytes")
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise ConfigError("not JSON") from exc
    if not isinstance(document, dict):
        raise ConfigError("not a JSON object")
    top = Reader(document)
    netns = top.get("Netns").text()
    if not netns.startswith("/") or len(netns) > MAX_PATH or "\0" in netns:
        raise ConfigError("not an absolute path", field="Netns")
    addresses = list(top.get("IPs").items())
    if len(addresses) > MAX_ADDRESSES:
        raise ConfigError(f"more than {MAX_ADDRESSES} addresses", field="IPs")
    return AddRequest(
        Path(netns),
        _name(top, "PodName"),
        _name(top, "PodNamespace"),
        tuple(each.get("Address").get("IP").address() for each in addresses),
    )


def _name(top: Reader, field: str) -> str:
    text = top.get(field).text()
    if not 0 < len(text) <= MAX_NAME:
        raise ConfigError(f"a name of {len(text)} characters", field=field)
    return text


class PluginServer:
    """Answers the CNI plugin."""

    def __init__(
        self,
        cluster: Cluster,
        pods: NodePods,
        enrolments: Enrolments,
        selection: Selection,
        deadline_seconds: float,
    ) -> None:
        self._cluster = cluster
        self._pods = pods
        self._enrolments = enrolments
        self._selection = selection
        self._deadline = deadline_seconds

    def app(self) -> AdminApp:
        """The HTTP application, to be served on the plugin's socket."""
        app = AdminApp("cni")
        app.route(PATH, self._answer, methods=("POST",))
        return app

    async def _answer(self, request: Request) -> Response:
        try:
            await self.add(parse_request(request.body))
        except MeshError as exc:
            _log.warning("cni_add_failed", error=str(exc))
            return Response.text(str(exc), 400 if isinstance(exc, ConfigError) else 500)
        return Response.text("")

    async def add(self, request: AddRequest) -> None:
        """Have the pod captured, if it is to be. Raises MeshError with the reason if not.

        If cancelled: the attempt goes on.
        """
        ref = Ref("Pod", request.namespace, request.name)
        pod = await self._read_pod(ref)
        namespace = await self._read_namespace(request.namespace)
        judged = judge(pod, namespace, self._selection)
        if isinstance(judged, Excluded):
            _log.info("cni_pod_left_alone", pod=str(ref), reason=judged.reason)
            return
        # The watch may lag behind; what is not known to it would look like a pod that ended.
        self._pods.remember(pod)
        action = Enrol(pod.uid, ref, judged)
        await self._enrolments.capture(action, pod, request.netns, self._deadline)

    async def _read_pod(self, ref: Ref) -> Pod:
        found = await self._cluster.get(ref)
        if found is None:
            raise ConfigError(f"{ref} does not exist")
        return parse_pod(found)

    async def _read_namespace(self, name: str) -> Namespace | None:
        found = await self._cluster.get(Ref("Namespace", "", name))
        return parse_namespace(found) if found is not None else None
