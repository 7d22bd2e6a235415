"""HTTP/2 and gRPC through the whole daemon, translated where the endpoint speaks HTTP/1.1."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
import trio

from mesh.model.route import Backend, MethodMatch, Route, RouteMatch, RouteRule
from mesh.model.service import AppProtocol
from mesh.model.workload import TunnelProtocol, Workload
from tests.support.waypoints import NODE_IP, key, running_app, running_waypoint, service, traffic

pytestmark = pytest.mark.usefixtures("no_fd_leak")


class _Echo(grpc.GenericRpcHandler):
    """Unary, streaming both ways, and a failure."""

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if call.method == "/pb.Echo/Say":
            return grpc.unary_unary_rpc_method_handler(self._say)
        if call.method == "/pb.Echo/Stream":
            return grpc.stream_stream_rpc_method_handler(lambda requests, _context: requests)
        if call.method == "/pb.Echo/Fail":
            return grpc.unary_unary_rpc_method_handler(self._fail)
        return None

    def _say(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata((("x-after", "wards"),))
        return request

    def _fail(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not today")
        return b""


@contextlib.contextmanager
def grpc_server(*services: str) -> Iterator[Workload]:
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[_Echo()])
    port = server.add_insecure_port(f"{NODE_IP}:0")
    server.start()
    try:
        yield Workload(
            uid="Kubernetes//Pod/shop/echo",
            name="echo",
            namespace="shop",
            addresses=(NODE_IP,),
            tunnel_protocol=TunnelProtocol.HBONE,
            service_account="web",
            services={each: {7070: port} for each in services},
        )
    finally:
        server.stop(0).wait()


def _calls(port: int) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        say = channel.unary_unary("/pb.Echo/Say")
        for size in (0, 10, 300_000):
            answer, call = say.with_call(b"x" * size, timeout=20)
            assert answer == b"x" * size
            assert ("x-after", "wards") in call.trailing_metadata()
        pieces = [b"y" * 50_000] * 40
        assert list(channel.stream_stream("/pb.Echo/Stream")(iter(pieces), timeout=30)) == pieces
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/pb.Echo/Fail")(b"", timeout=20)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert caught.value.details() == "not today"


async def test_grpcio_on_both_sides() -> None:
    echo = service("echo", 1, protocol=AppProtocol.GRPC, ports=(7070,))
    with grpc_server(key("echo")) as workload:
        async with running_waypoint([echo, workload]) as mesh:
            port = await mesh.listen("10.96.0.1:7070")
            await trio.to_thread.run_sync(_calls, port)


async def test_grpc_routes_answer_what_they_do_not_know() -> None:
    def call(port: int) -> tuple[grpc.StatusCode, grpc.StatusCode]:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            codes = []
            for method in ("/pb.Echo/Other", "/pb.Echo/Broken"):
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(method)(b"", timeout=20)
                codes.append(caught.value.code())
            assert channel.unary_unary("/pb.Echo/Say")(b"hi", timeout=20) == b"hi"
            return codes[0], codes[1]

    def to(method: str, backend: Backend) -> RouteRule:
        match = RouteMatch(grpc=MethodMatch("pb.Echo", method))
        return RouteRule(matches=(match,), backends=(backend,))

    echo = service("echo", 1, protocol=AppProtocol.GRPC, ports=(7070,))
    rules = (
        to("Say", Backend(key("echo"), 7070)),
        to("Broken", Backend("", 7070, problem="no such Service")),
    )
    route = Route("GRPCRoute", "shop", "echo", rules)
    with grpc_server(key("echo")) as workload:
        async with running_waypoint([echo, workload, traffic("echo", route)]) as mesh:
            port = await mesh.listen("10.96.0.1:7070")
            codes = await trio.to_thread.run_sync(call, port)
    assert codes == (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_http2_callers_reach_endpoints_of_http1() -> None:
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        port = await mesh.listen("10.96.0.1:80")
        url = f"http://127.0.0.1:{port}"
        command = ["curl", "-sS", "-m", "30", "--http2-prior-knowledge"]
        done = await trio.run_process([*command, url + "/a?x=1"], capture_stdout=True)
        assert done.stdout == b"web-1"
        done = await trio.run_process(
            [*command, "--data-binary", "@-", url + "/echo"],
            stdin=b"z" * 1_500_000,
            capture_stdout=True,
        )
        assert done.stdout == b"z" * 1_500_000
        done = await trio.run_process([*command, "-I", url + "/"], capture_stdout=True)
        assert b"HTTP/2 200" in done.stdout
    assert app.requests[0].target == b"/a?x=1"


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
async def test_h2load_keeps_many_streams_busy() -> None:
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        port = await mesh.listen("10.96.0.1:80")
        done = await trio.run_process(
            ["h2load", "-n", "600", "-c", "3", "-m", "20", f"http://127.0.0.1:{port}/x"],
            capture_stdout=True,
        )
        assert b"600 succeeded, 0 failed, 0 errored" in done.stdout
