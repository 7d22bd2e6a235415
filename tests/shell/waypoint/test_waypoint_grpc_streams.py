"""gRPC streams that stay open while policy changes, through the whole daemon."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from mesh.model.l7_policy import (
    ExternalAuthorizer,
    L7Authorization,
    L7Operation,
    L7Rule,
    TrafficConfig,
)
from mesh.model.service import AppProtocol
from tests.support.waypoints import key, running_app, running_waypoint, scrape, service, traffic
from tests.support.websockets import H2Call, Reader, serve_http2

pytestmark = pytest.mark.usefixtures("no_fd_leak")

CALL = (
    (b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"web"),
    (b":path", b"/chat.Chat/Talk"), (b"content-type", b"application/grpc"), (b"te", b"trailers"),
)  # fmt: skip
MESSAGE = b"\0\0\0\0\x02hi"


def denying(path: str) -> TrafficConfig:
    rule = L7Rule(operations=(L7Operation(paths=(path,)),))
    return traffic("web", authorizations=(L7Authorization("shop", "d", "DENY", (rule,)),))


def asking(path: str) -> TrafficConfig:
    rule = L7Rule(operations=(L7Operation(paths=(path,)),))
    provider = ExternalAuthorizer("opa", "http", key("opa"), 8080)
    policy = L7Authorization("shop", "c", "CUSTOM", (rule,), provider=provider)
    return traffic("web", authorizations=(policy,))


@pytest.mark.parametrize("refusing", [denying, asking])
async def test_an_open_stream_ends_when_policy_would_refuse_it(
    refusing: Callable[[str], TrafficConfig],
) -> None:
    cut = trio.Event()

    async def echo(call: H2Call) -> None:
        await call.send_head([(b":status", b"200"), (b"content-type", b"application/grpc")])
        try:
            while piece := await call.receive_some():
                await call.send_all(piece)
        except trio.BrokenResourceError:
            cut.set()

    async with (
        running_app("web-1", key("web"), serve=serve_http2(echo)) as app,
        running_waypoint(
            [service("web", 1, protocol=AppProtocol.GRPC), app.workload, refusing("/other")]
        ) as mesh,
        trio.open_nursery() as nursery,
    ):
        call = H2Call(await mesh.open("10.96.0.1:80"), client=True)
        nursery.start_soon(call.run)
        await call.begin()
        await call.send_head(CALL)
        reader = Reader(call)
        for path in ("/elsewhere", "/nowhere"):
            await call.send_all(MESSAGE)
            assert await reader.take(len(MESSAGE)) == MESSAGE
            assert call.head[b":status"] == b"200"
            await mesh.control_plane.push(refusing(path))
        assert not call.has_ended
        await mesh.control_plane.push(refusing("/chat.Chat/*"))
        await call.wait(lambda: call.has_ended)
        assert call.trailers == {b"grpc-status": b"7", b"grpc-message": b"policy changed"}
        with trio.fail_after(20):
            await cut.wait()
        counted = await scrape(mesh)
        assert 'grpc_response_status="7"' in counted
        nursery.cancel_scope.cancel()
