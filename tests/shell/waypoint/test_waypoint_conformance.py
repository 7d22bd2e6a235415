"""Gateway API's mesh conformance tests: YAML through the controller, then through a waypoint."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent import futures
from typing import Any

import grpc
import h11
import pytest
import trio

from istiod_lite.status import statuses
from istiod_lite.subscriptions import Share
from mesh.cluster.api import Ref
from mesh.model.l7_policy import TrafficConfig
from mesh.model.workload import Workload
from tests.conformance.mesh_http import CONSUMER, NAMESPACE, Case
from tests.conformance.mesh_manifests import ADDRESSES, CASES, MANIFESTS, SERVICES
from tests.support.gateways import USE, Held, gateway, namespace, waypoint_pod
from tests.support.waypoints import (
    NODE_IP,
    App,
    Mesh,
    fetch,
    header,
    key,
    running_app,
    running_waypoint,
)

pytestmark = pytest.mark.usefixtures("no_fd_leak")
_KEYS = {name: key(name, NAMESPACE) for name in ADDRESSES}


def _held(*routes: dict[str, Any]) -> Held:
    """The controller with the bench, and some routes."""
    use = {USE: "waypoint", "istio.io/use-waypoint-namespace": "shop"}
    spaces = [namespace("shop"), *(namespace(each, **use) for each in (NAMESPACE, CONSUMER))]
    doors = gateway("waypoint")
    doors["spec"]["listeners"][0]["allowedRoutes"] = {"namespaces": {"from": "All"}}
    return Held(*spaces, doors, waypoint_pod("waypoint"), *SERVICES, *routes)


def _configs(held: Held) -> list[TrafficConfig]:
    return list(held.index.traffic.configs.values())


class _Echo(grpc.GenericRpcHandler):
    """Says which pod it is, and the metadata that it got."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.heard: list[list[str]] = []

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        def say(_request: bytes, context: grpc.ServicerContext) -> bytes:
            pairs = [f"{k}={v}" for k, v in context.invocation_metadata() if k.startswith("x-")]
            self.heard.append(pairs)
            return "\n".join([self._name, *pairs]).encode()

        return grpc.unary_unary_rpc_method_handler(say)


@contextlib.contextmanager
def _grpc_echo(echo: _Echo) -> Iterator[int]:
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[echo])
    port = server.add_insecure_port(f"{NODE_IP}:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


def _with_grpc(app: App, port: int) -> Workload:
    services = {each: {**ports, 7070: port} for each, ports in app.workload.services.items()}
    return dataclasses.replace(app.workload, services=services)


@contextlib.asynccontextmanager
async def _bench() -> AsyncIterator[tuple[Mesh, dict[str, App], _Echo]]:
    held = _held()
    services = [held.service(name, NAMESPACE) for name in ADDRESSES]
    async with (
        running_app("echo-v1", _KEYS["echo"], _KEYS["echo-v1"]) as one,
        running_app("echo-v2", _KEYS["echo"], _KEYS["echo-v2"]) as two,
    ):
        other = _Echo("echo-v2")
        with _grpc_echo(_Echo("echo-v1")) as first, _grpc_echo(other) as second:
            pods = [_with_grpc(one, first), _with_grpc(two, second)]
            async with running_waypoint([*services, *pods, *_configs(held)]) as mesh:
                yield mesh, {"echo-v1": one, "echo-v2": two}, other


class _Client:
    """A pod that asks: one connection for each (service, port), kept over a test's requests."""

    def __init__(self, mesh: Mesh, apps: dict[str, App]) -> None:
        self._mesh = mesh
        self._apps = apps
        self._open: dict[tuple[str, str, int], tuple[trio.SocketStream, h11.Connection]] = {}

    async def ask(self, case: Case) -> tuple[h11.Response, bytes]:
        place = (case.namespace, case.service, case.port)
        if place not in self._open:
            authority = f"{ADDRESSES[case.service]}:{case.port}"
            identity = f"spiffe://cluster.local/ns/{case.namespace}/sa/default"
            stream = await self._mesh.open(authority, identity=identity)
            self._open[place] = (stream, h11.Connection(h11.CLIENT))
        stream, talk = self._open[place]
        return await fetch(stream, case.target, headers=case.headers, connection=talk,
                           host=case.host)  # fmt: skip

    async def check(self, case: Case) -> None:
        response, body = await self.ask(case)
        assert response.status_code == case.status
        if case.location:
            assert header(response, "location") == case.location
        for name, value in case.response:
            assert header(response, name) == (value or "")
        if case.status != 200:
            return
        pod = body.decode()
        assert pod == case.backend or (case.backend == "echo" and pod in self._apps)
        request = self._apps[pod].requests[-1]
        for name, value in case.sees:
            values = [v.decode() for k, v in request.headers if k == name.encode()]
            assert (",".join(values) or None) == value
        if case.path:
            assert request.target.decode() == case.path


def _shares(counts: Counter[str]) -> dict[str, float]:
    return {name: count / counts.total() for name, count in counts.items()}


def _is_near(counts: Counter[str]) -> bool:
    found = _shares(counts)
    return found.keys() == {"echo-v1", "echo-v2"} and abs(found["echo-v1"] - 0.7) <= 0.05


async def _weigh(client: _Client) -> None:
    for _ in range(4):
        counts: Counter[str] = Counter()
        for _ in range(500):
            response, body = await client.ask(Case("/"))
            assert response.status_code == 200
            counts[body.decode()] += 1
        if _is_near(counts):
            return
    pytest.fail(f"never near 70 to 30: {counts}")


def _call(port: int, count: int, *metadata: tuple[str, str]) -> list[list[str]]:
    """Calls on one HTTP/2 connection; what each pod said, in lines."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        say = channel.unary_unary("/gateway_api_conformance.echo_basic.grpcecho.GrpcEcho/Echo")
        return [say(b"", metadata=metadata, timeout=20).decode().split("\n") for _ in range(count)]


async def _weigh_grpc(mesh: Mesh) -> None:
    port = await mesh.listen(f"{ADDRESSES['echo']}:7070")
    for _ in range(4):
        said = await trio.to_thread.run_sync(_call, port, 500)
        counts = Counter(lines[0] for lines in said)
        if _is_near(counts):
            return
    pytest.fail(f"never near 70 to 30: {counts}")


async def _modify_grpc(mesh: Mesh) -> None:
    port = await mesh.listen(f"{ADDRESSES['echo']}:7070")

    async def seen(case: str, *metadata: tuple[str, str]) -> Sequence[str]:
        marked = (("x-test-case", case), *metadata)
        (lines,) = await trio.to_thread.run_sync(_call, port, 1, *marked)
        assert lines[0] == "echo-v1"
        return [each for each in lines[1:] if each.startswith("x-header")]

    for sent in ((), (("x-header-set", "some-other-value"),)):
        assert await seen("set", *sent) == ["x-header-set=set-overwrites-values"]
    sent = (("x-header-add", "this-value-should-be-appended"),)
    added = await seen("add", *sent)
    values = ",".join(each.partition("=")[2] for each in added)
    assert values == "this-value-should-be-appended,add-appends-values"
    assert await seen("remove", ("x-header-remove", "val")) == []


async def _mirror_grpc(mesh: Mesh, other: _Echo) -> None:
    """The answer is one pod's, the other hears the same, changed alike."""
    port = await mesh.listen(f"{ADDRESSES['echo']}:7070")
    sent = (("x-header-remove", "x"), ("x-header-add-append", "val-1"))
    edited = {
        "x-header-set=set-overwrites-values", "x-header-add=val-1",
        "x-header-add-append=val-1,val-2",
    }  # fmt: skip
    for name, wanted in (("x-mirror-only", set[str]()), ("x-mirror-and-modify", edited)):
        other.heard.clear()
        metadata = ((name, "true"), *(sent if wanted else ()))
        (lines,) = await trio.to_thread.run_sync(_call, port, 1, *metadata)
        assert lines[0] == "echo-v1"
        with trio.fail_after(20):
            while not other.heard:
                await trio.sleep(0.01)
        for seen in (lines[1:], other.heard[0]):
            assert f"{name}=true" in seen
            assert {each for each in seen if each.startswith("x-header")} == wanted


async def test_mesh_conformance() -> None:
    """All of them on one bench, one after the other as the suite does."""
    async with _bench() as (mesh, apps, other):
        for name, manifest in MANIFESTS.items():
            held = _held(*manifest)
            await mesh.control_plane.apply(*_configs(held))
            client = _Client(mesh, apps)
            try:
                for case in CASES.get(name, ()):
                    await client.check(case)
                if name == "MeshHTTPRouteWeight":
                    await _weigh(client)
                elif name == "MeshGRPCRouteWeight":
                    await _weigh_grpc(mesh)
                elif name == "MeshGRPCRouteRequestMirror":
                    await _mirror_grpc(mesh, other)
                elif name == "MeshGRPCRouteRequestHeaderModifier":
                    await _modify_grpc(mesh)
            except AssertionError as exc:
                raise AssertionError(f"{name}: {exc}") from exc
    assert CASES.keys() <= MANIFESTS.keys()


@pytest.mark.parametrize("name", [name for name, routes in MANIFESTS.items() if routes])
def test_statuses_are_what_the_suite_waits_for(name: str) -> None:
    held = _held(*MANIFESTS[name])
    said = statuses(held.index, lambda *_: Share(1, 1))
    for each in MANIFESTS[name]:
        meta, parents = each["metadata"], each["spec"]["parentRefs"]
        told = said[Ref(each["kind"], meta["namespace"], meta["name"])].parents
        assert told is not None
        assert len(told) == len(parents)
        for entry in told:
            conditions = {c.type: (c.status, c.reason) for c in entry.conditions}
            assert conditions["Accepted"] == ("True", "Accepted")
            # A backend of weight 0 that is not there is told, and takes nothing.
            is_whole = name != "MeshGRPCRouteWeight"
            expected = ("True", "ResolvedRefs") if is_whole else ("False", "BackendNotFound")
            assert conditions["ResolvedRefs"] == expected
