"""HTTP/2 and gRPC through the whole daemon, translated where the endpoint speaks HTTP/1.1."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
import trio

from mesh.model.route import Backend, MethodMatch, Route, RouteMatch, RouteRule
from mesh.model.service import AppProtocol
from mesh.model.workload import TunnelProtocol, Workload
from tests.support.waypoints import (
    NODE_IP,
    fetch,
    key,
    running_app,
    running_waypoint,
    service,
    traffic,
)

pytestmark = pytest.mark.usefixtures("no_fd_leak")


class _Echo(grpc.GenericRpcHandler):
    """Unary, streaming both ways, and failures."""

    def __init__(self) -> None:
        self.left = threading.Semaphore(0)
        """One for each call of Wait that its caller left."""

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if call.method == "/pb.Echo/Say":
            return grpc.unary_unary_rpc_method_handler(self._say)
        if call.method == "/pb.Echo/Stream":
            return grpc.stream_stream_rpc_method_handler(lambda requests, _context: requests)
        if call.method == "/pb.Echo/Fail":
            return grpc.unary_unary_rpc_method_handler(self._fail)
        if call.method == "/pb.Echo/Repeat":
            return grpc.unary_stream_rpc_method_handler(lambda text, _context: iter([text] * 20))
        if call.method == "/pb.Echo/Join":
            return grpc.stream_unary_rpc_method_handler(lambda texts, _context: b"".join(texts))
        if call.method == "/pb.Echo/Meta":
            return grpc.unary_unary_rpc_method_handler(self._meta)
        if call.method == "/pb.Echo/Wait":
            return grpc.unary_stream_rpc_method_handler(self._wait)
        if call.method == "/pb.Echo/Break":
            return grpc.unary_stream_rpc_method_handler(self._break)
        return None

    def _meta(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        sent = {each.key: each.value for each in context.invocation_metadata()}
        context.send_initial_metadata((("x-large", sent["x-large"]), ("x-b-bin", sent["x-b-bin"])))
        return str(context.time_remaining() is not None).encode()

    def _wait(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Goes on until its caller leaves."""
        left = threading.Event()
        context.add_callback(left.set)
        yield request
        if left.wait(30):
            self.left.release()

    def _break(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield request
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "enough: \xe4 %")

    def _say(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata((("x-after", "wards"),))
        return request

    def _fail(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not today")
        return b""


@contextlib.contextmanager
def grpc_server(*services: str, echo: _Echo | None = None) -> Iterator[Workload]:
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[echo or _Echo()])
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


def _harder_calls(port: int, left: threading.Semaphore) -> None:
    """Streams in one direction, large metadata, deadlines, ends from either side."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        texts = [b"%d" % number * 1000 for number in range(30)]
        assert channel.stream_unary("/pb.Echo/Join")(iter(texts), timeout=30) == b"".join(texts)
        repeat = channel.unary_stream("/pb.Echo/Repeat")
        assert list(repeat(b"z" * 20_000, timeout=30)) == [b"z" * 20_000] * 20
        large, binary = "m" * 7000, bytes(range(256))
        has_deadline, call = channel.unary_unary("/pb.Echo/Meta").with_call(
            b"", timeout=30, metadata=(("x-large", large), ("x-b-bin", binary))
        )
        assert has_deadline == b"True"
        told = dict(call.initial_metadata())
        assert (told["x-large"], told["x-b-bin"]) == (large, binary)
        wait = channel.unary_stream("/pb.Echo/Wait")
        # The caller cancels; its deadline passes: either way the server hears of it.
        calls = [wait(b"hi", timeout=30), wait(b"hi", timeout=0.5)]
        assert [next(each) for each in calls] == [b"hi", b"hi"]
        calls[0].cancel()
        codes = []
        for each in calls:
            with pytest.raises(grpc.RpcError) as caught:
                next(each)
            codes.append(caught.value.code())
            assert left.acquire(timeout=30)
        assert codes == [grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED]
        broken = channel.unary_stream("/pb.Echo/Break")(b"one", timeout=30)
        assert next(broken) == b"one"
        with pytest.raises(grpc.RpcError) as caught:
            next(broken)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.details() == "enough: \xe4 %"


async def test_grpcio_on_both_sides() -> None:
    echo, server = service("echo", 1, protocol=AppProtocol.GRPC, ports=(7070,)), _Echo()
    with grpc_server(key("echo"), echo=server) as workload:
        async with running_waypoint([echo, workload]) as mesh:
            port = await mesh.listen("10.96.0.1:7070")
            await trio.to_thread.run_sync(_calls, port)
            await trio.to_thread.run_sync(_harder_calls, port, server.left)


async def test_grpc_web_is_plain_http() -> None:
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        for kind in ("application/grpc-web", "application/grpc-web-text", "application/grpcish"):
            stream = await mesh.open("10.96.0.1:80")
            answer = await fetch(
                stream, "/echo", method="POST", body=b"\0\0\0\0\0", headers=[("content-type", kind)]
            )
            assert (answer[0].status_code, answer[1]) == (200, b"\0\0\0\0\0")


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
