"""WebSockets over HTTP/2 (RFC 8441) through the whole daemon: callers and endpoints of either
version, spoken by the h2 package; and half-closed tunnels, which stay open the other way.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator

import pytest
import trio

from mesh.http import h2_frames
from mesh.model.l7_policy import L7Authorization, L7Operation, L7Rule, TrafficConfig
from mesh.model.service import AppProtocol
from tests.support.waypoints import Mesh, key, running_app, running_waypoint, service, traffic
from tests.support.websockets import (
    ASK,
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    ChatServer,
    H2Call,
    Reader,
    accept_of,
    frame,
    join,
    serve_http2,
)

pytestmark = pytest.mark.usefixtures("no_fd_leak")

CONNECT = (
    (b":method", b"CONNECT"), (b":protocol", b"websocket"), (b":scheme", b"http"),
    (b":authority", b"web"), (b":path", b"/chat?x=1"), (b"sec-websocket-version", b"13"),
    (b"sec-websocket-protocol", b"chat"),
)  # fmt: skip


@contextlib.asynccontextmanager
async def calling(mesh: Mesh, authority: str = "10.96.0.1:80") -> AsyncIterator[H2Call]:
    """A caller's HTTP/2 connection, SETTINGS exchanged."""
    call = H2Call(await mesh.open(authority), client=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call.run)
        await call.begin()
        await call.wait(lambda: call.takes_connect)
        yield call
        nursery.cancel_scope.cancel()


class ChatOfHttp2(ChatServer):
    """The same over HTTP/2."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[dict[bytes, bytes]] = []

    async def handle(self, call: H2Call) -> None:
        self.asked.append(call.head)
        if call.head[b":method"] != b"CONNECT" or call.head[b":path"].startswith(b"/refuse"):
            await call.send_head([(b":status", b"426")], ends=True)
            return
        await call.send_head([(b":status", b"200"), (b"sec-websocket-protocol", b"chat")])
        await call.send_all(frame(TEXT, b"welcome", masks=False))
        await self.chat(call, Reader(call))
        await call.send_eof()


def denying(path: str) -> TrafficConfig:
    rule = L7Rule(operations=(L7Operation(paths=(path,)),))
    return traffic("web", authorizations=(L7Authorization("shop", "d", "DENY", (rule,)),))


async def converse(stream: trio.abc.SendStream | H2Call, reader: Reader) -> None:
    """Autobahn's kinds of messages, and an orderly end."""
    for size in (0, 125, 126, 65535, 65536, 400_000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, frame(BINARY, b"*" * size))
            assert await reader.frame() == (BINARY, True, b"*" * size)
    sent = frame(TEXT, b"a", fin=False) + frame(PING, b"?") + frame(CONTINUATION, b"b")
    for byte in sent:
        await stream.send_all(bytes((byte,)))
    heard = [await reader.frame() for _ in range(3)]
    assert heard == [(TEXT, False, b"a"), (PONG, True, b"?"), (CONTINUATION, True, b"b")]
    await stream.send_all(frame(CLOSE, struct.pack(">H", 4000)))
    assert await reader.frame() == (CLOSE, True, struct.pack(">H", 4000))
    with pytest.raises(EOFError):
        await reader.frame()


@pytest.mark.parametrize("is_http2", [False, True])
async def test_a_caller_of_http2_talks_to_an_endpoint_of_either_version(is_http2: bool) -> None:
    old, new = ChatServer(), ChatOfHttp2()
    serve = serve_http2(new.handle) if is_http2 else old.serve
    protocol = AppProtocol.HTTP2 if is_http2 else AppProtocol.HTTP11
    async with (
        running_app("web-1", key("web"), serve=serve) as app,
        running_waypoint([service("web", 1, protocol=protocol), app.workload]) as mesh,
    ):
        for _ in range(2):  # the second finds the endpoint's connection and settings there
            async with calling(mesh) as call:
                await call.send_head(CONNECT)
                await call.wait(lambda call=call: call.head)
                assert call.head[b":status"] == b"200"
                assert not any(b"accept" in name or b"upgrade" in name for name in call.head)
                reader = Reader(call)
                assert await reader.frame() == (TEXT, True, b"welcome")
                await converse(call, reader)
        if is_http2:
            asked = new.asked[0]
            assert (asked[b":protocol"], asked[b":path"]) == (b"websocket", b"/chat?x=1")
            assert b"sec-websocket-key" not in asked
            # A caller of HTTP/1.1 gets there, too.
            stream, reader = await join(mesh)
            await converse(stream, reader)
        else:
            head = old.heads[0].lower()
            assert head.startswith(b"get /chat?x=1 http/1.1\r\n")
            assert b"\r\nupgrade: websocket\r\n" in head
            assert b"\r\nsec-websocket-protocol: chat\r\n" in head


async def test_what_opens_no_tunnel_is_an_answer() -> None:
    async def careless(stream: trio.SocketStream) -> None:
        """Answers what nobody asked: another key, or plain success."""
        async with stream:
            with contextlib.suppress(EOFError):
                await answer(stream, await Reader(stream).head())

    async def answer(stream: trio.SocketStream, head: bytes) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            if b"/key" in head:
                await stream.send_all(
                    b"HTTP/1.1 101 x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
                    b"sec-websocket-accept: AAAA\r\n\r\nraw"
                )
            elif b"/success" in head:
                await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            else:
                await stream.send_all(b"HTTP/1.1 404 x\r\ncontent-length: 2\r\n\r\nno")
            await stream.receive_some(1)

    async with (
        running_app("web-1", key("web"), serve=careless) as app,
        running_waypoint([service("web", 1), app.workload, denying("/admin")]) as mesh,
    ):
        wanted = {
            b"/key": b"502", b"/success": b"502", b"/none": b"404", b"/admin": b"403",
        }  # fmt: skip
        for path, status in wanted.items():
            async with calling(mesh) as call:
                await call.send_head([*CONNECT[:4], (b":path", path)])
                await call.send_all(frame(TEXT, b"too early"))
                await call.wait(lambda call=call: call.has_ended)
                assert call.head[b":status"] == status
        refused: dict[bytes, list[tuple[bytes, bytes]]] = {
            b"501": [CONNECT[0], (b":protocol", b"connect-udp"), *CONNECT[2:]],
            b"400": [*CONNECT, (b"content-length", b"5")],
        }
        for status, head in refused.items():
            async with calling(mesh) as call:
                await call.send_head(head)
                await call.wait(lambda call=call: call.reset is not None)
                assert call.head[b":status"] == status


async def test_an_endpoint_of_http2_that_takes_none_gets_a_plain_request() -> None:
    server = ChatOfHttp2()
    async with (
        running_app(
            "web-1", key("web"), serve=serve_http2(server.handle, takes_connect=False)
        ) as app,
        running_waypoint([service("web", 1, protocol=AppProtocol.HTTP2), app.workload]) as mesh,
    ):
        stream = await mesh.open("10.96.0.1:80")
        await stream.send_all(ASK)
        assert (await Reader(stream).head()).startswith(b"HTTP/1.1 426")
        assert server.asked[0][b":method"] == b"GET"


async def test_cuts_and_half_closes_reach_the_other_side() -> None:
    ends: list[str] = []

    async def half(stream: trio.SocketStream) -> None:
        """Ends its half first, then tells what it still hears."""
        async with stream:
            reader = Reader(stream)
            head = await reader.head()
            await stream.send_all(
                b"HTTP/1.1 101 x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
                b"sec-websocket-accept: " + accept_of(head)
                + b"\r\n\r\nbye"
            )  # fmt: skip
            if b"/cut" in head:
                with pytest.raises((EOFError, trio.BrokenResourceError)):
                    await reader.take(1)
                ends.append("cut")
                return
            await stream.send_eof()
            data = b""
            while piece := await stream.receive_some(65536):
                data += piece
            ends.append(str(len(data)))

    async with (
        running_app("web-1", key("web"), serve=half) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        late = b"x" * 300_000
        async with calling(mesh) as call:
            await call.send_head(CONNECT)
            assert await Reader(call).take(3) == b"bye"
            await call.wait(lambda: call.has_ended)
            await call.send_all(late)
            await call.send_eof()
            with trio.fail_after(20):
                while len(ends) < 1:
                    await trio.sleep(0.01)
        stream = await mesh.open("10.96.0.1:80")
        await stream.send_all(ASK)
        reader = Reader(stream)
        await reader.head()
        assert await reader.take(3) == b"bye"
        with pytest.raises(EOFError):
            await reader.take(1)
        await stream.send_all(late)
        await stream.send_eof()
        async with calling(mesh) as call:
            await call.send_head([*CONNECT[:4], (b":path", b"/cut")])
            assert await Reader(call).take(3) == b"bye"
            await call.send_reset()
            with trio.fail_after(20):
                while len(ends) < 3:
                    await trio.sleep(0.01)
        assert sorted(ends) == ["300000", "300000", "cut"]


async def test_an_open_one_ends_when_policy_would_refuse_it() -> None:
    server = ChatServer()
    async with (
        running_app("web-1", key("web"), serve=server.serve) as app,
        running_waypoint([service("web", 1), app.workload, denying("/other")]) as mesh,
        calling(mesh) as call,
    ):
        await call.send_head(CONNECT)
        assert await Reader(call).frame() == (TEXT, True, b"welcome")
        await mesh.control_plane.push(denying("/chat"))
        await call.wait(lambda: call.reset is not None)
        assert call.reset == h2_frames.CANCEL
