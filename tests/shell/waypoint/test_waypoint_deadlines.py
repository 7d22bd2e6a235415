"""Timeouts of routes and callers, as both sides see them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import h11
import pytest
import trio

from mesh.model.route import Backend, Route, RouteRule
from mesh.model.service import AppProtocol
from mesh.model.workload import TunnelProtocol, Workload
from tests.conformance.mesh_http import prefix
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


class _Slow(grpc.GenericRpcHandler):
    """Says how much time is left, or begins a stream that does not end by itself."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if call.method == "/pb.Slow/Left":
            return grpc.unary_unary_rpc_method_handler(self._left)
        return grpc.unary_stream_rpc_method_handler(self._drip)

    def _left(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        return repr(context.time_remaining()).encode()

    def _drip(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(self.ended.set)
        if request:
            yield request
        self.ended.wait(20)


@contextlib.contextmanager
def _server(handler: _Slow) -> Iterator[Workload]:
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[handler])
    port = server.add_insecure_port(f"{NODE_IP}:0")
    server.start()
    try:
        yield Workload(
            uid="Kubernetes//Pod/shop/slow", name="slow", namespace="shop", addresses=(NODE_IP,),
            tunnel_protocol=TunnelProtocol.HBONE, service_account="web",
            services={key("slow"): {7070: port}},
        )  # fmt: skip
    finally:
        handler.ended.set()
        server.stop(0).wait()


async def test_callers_of_grpc_get_deadline_exceeded_and_servers_are_told() -> None:
    handler = _Slow()

    def calls(port: int) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            left = float(channel.unary_unary("/pb.Slow/Left")(b"", timeout=30))
            assert 0 < left <= 30
            # Not this client's own clock: it would wait for a minute.
            for first in (b"", b"begun"):
                handler.ended.clear()
                stream = channel.unary_stream("/pb.Slow/Drip")(first, timeout=60)
                if first:
                    assert next(stream) == first
                with pytest.raises(grpc.RpcError) as caught:
                    next(stream)
                assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                assert "timeout passed" in caught.value.details() or first
                assert handler.ended.wait(20), "the server was not told"

    slow = service("slow", 1, protocol=AppProtocol.GRPC, ports=(7070,))
    backends = (Backend(key("slow"), 7070),)
    rules = (
        RouteRule(matches=(prefix("/pb.Slow/Left"),), backends=backends),
        RouteRule(backends=backends, request_timeout=0.4),
    )
    with _server(handler) as workload:
        route = Route("HTTPRoute", "shop", "slow", rules)
        async with running_waypoint([slow, workload, traffic("slow", route)]) as mesh:
            port = await mesh.listen("10.96.0.1:7070")
            await trio.to_thread.run_sync(calls, port)


async def test_a_try_ends_with_its_response_and_tells_what_is_left() -> None:
    async def endless(stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.receive_some(65536)
                await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
                assert not await stream.receive_some(65536)

    rules = (
        RouteRule(matches=(prefix("/half"),), backends=(Backend(key("half"), 80),),
                  backend_timeout=0.2),
        RouteRule(matches=(prefix("/off"),), backends=(Backend(key("web"), 80),),
                  request_timeout=0.0),
        RouteRule(backends=(Backend(key("web"), 80),), request_timeout=30.0, backend_timeout=5.0),
    )  # fmt: skip
    async with (
        running_app("web-1", key("web")) as app,
        running_app("half-1", key("half"), serve=endless) as half,
        running_waypoint(
            [service("web", 1), service("half", 2), app.workload, half.workload,
             traffic("web", Route("HTTPRoute", "shop", "web", rules))]
        ) as mesh,
    ):  # fmt: skip
        stream = await mesh.open("10.96.0.1:80")
        talk = h11.Connection(h11.CLIENT)
        for path in ("/", "/off"):
            assert (await fetch(stream, path, connection=talk))[0].status_code == 200
        told = [dict(each.headers).get(b"x-envoy-expected-rq-timeout-ms") for each in app.requests]
        assert 4000 < int(told[0] or 0) <= 5000
        assert told[1] is None
        with pytest.raises(
            (h11.RemoteProtocolError, ConnectionResetError, trio.BrokenResourceError)
        ):
            await fetch(stream, "/half", connection=talk)
