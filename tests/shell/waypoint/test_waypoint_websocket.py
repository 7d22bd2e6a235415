"""WebSocket (RFC 6455) through the whole daemon, in the manner of Autobahn's cases: a small but
real client and server on both sides, and what must not be taken for an upgrade.
"""

from __future__ import annotations

import struct

import pytest
import trio

from mesh.model.l7_policy import (
    L7Authorization,
    L7Condition,
    L7Operation,
    L7Rule,
    TrafficConfig,
)
from tests.support.waypoints import key, running_app, running_waypoint, service, traffic
from tests.support.websockets import (
    ASK,
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    ChatServer,
    Reader,
    frame,
    join,
)

pytestmark = pytest.mark.usefixtures("no_fd_leak")


async def test_messages_of_every_kind_and_size() -> None:
    server = ChatServer()
    async with (
        running_app("web-1", key("web"), serve=server.serve) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        stream, reader = await join(mesh)
        for size in (0, 1, 125, 126, 127, 128, 65535, 65536, 1_000_000):
            for opcode in (TEXT, BINARY):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.send_all, frame(opcode, b"*" * size))
                    assert await reader.frame() == (opcode, True, b"*" * size)
        # Pings between the fragments of a message, byte by byte.
        sent = (
            frame(TEXT, b"one ", fin=False) + frame(PING, b"p" * 125)
            + frame(CONTINUATION, b"two ", fin=False) + frame(CONTINUATION, b"three")
        )  # fmt: skip
        for byte in sent:
            await stream.send_all(bytes((byte,)))
        heard = [await reader.frame() for _ in range(4)]
        assert heard == [
            (TEXT, False, b"one "),
            (PONG, True, b"p" * 125),
            (CONTINUATION, False, b"two "),
            (CONTINUATION, True, b"three"),
        ]
        await stream.send_all(frame(PONG, b"unasked") + frame(CLOSE, struct.pack(">H", 4000)))
        assert await reader.frame() == (CLOSE, True, struct.pack(">H", 4000))
        with pytest.raises(EOFError):
            await reader.frame()
        # The server closes first.
        stream, reader = await join(mesh, frame(TEXT, b"early"))
        assert await reader.frame() == (TEXT, True, b"early")
        await stream.send_all(frame(TEXT, b"bye"))
        assert await reader.frame() == (CLOSE, True, struct.pack(">H", 1001))
        await stream.send_all(frame(CLOSE, struct.pack(">H", 1001)))
        with pytest.raises(EOFError):
            await reader.frame()
        assert server.closed == [struct.pack(">H", 4000), struct.pack(">H", 1001)]
        # Whoever sends very much before the switch is neither stuck nor cut short.
        stream, reader = await join(mesh, frame(BINARY, b"x" * 500_000))
        assert (await reader.frame())[2] == b"x" * 500_000
        # A client that vanishes takes its server along, and nobody else.
        await stream.aclose()
        stream, reader = await join(mesh)
        await stream.send_all(frame(PING))
        assert await reader.frame() == (PONG, True, b"")


async def test_a_refused_upgrade_leaves_http_as_it_was() -> None:
    """What was sent behind the request is judged as the next request, not carried as raw bytes."""
    server = ChatServer()
    rule = L7Rule(conditions=(L7Condition("request.headers[x-secret]", ("1",)),))
    config = traffic("web", authorizations=(L7Authorization("shop", "d", "DENY", (rule,)),))
    async with (
        running_app("web-1", key("web"), serve=server.serve) as app,
        running_waypoint([service("web", 1), app.workload, config]) as mesh,
    ):
        stream = await mesh.open("10.96.0.1:80")
        smuggled = b"GET /smuggled HTTP/1.1\r\nhost: web\r\nx-secret: 1\r\n\r\n"
        await stream.send_all(ASK.replace(b"/chat", b"/refuse") + smuggled)
        reader = Reader(stream)
        assert (await reader.head()).startswith(b"HTTP/1.1 426")
        assert await reader.take(2) == b"no"
        assert (await reader.head()).startswith(b"HTTP/1.1 403")
        # h2c and TLS are not passed on: the request is a plain one.
        for protocol in (b"h2c", b"TLS/1.0", b"websocket, h2c"):
            stream = await mesh.open("10.96.0.1:80")
            await stream.send_all(ASK.replace(b"WebSocket", protocol))
            assert (await Reader(stream).head()).startswith(b"HTTP/1.1 426")
            assert b"upgrade" not in server.heads[-1].lower()
        assert not any(b"smuggled" in each for each in server.heads)


async def test_a_policy_can_deny_upgrades() -> None:
    server = ChatServer()
    rule = L7Rule(conditions=(L7Condition("request.headers[upgrade]", ("websocket",)),))
    config = traffic("web", authorizations=(L7Authorization("shop", "d", "DENY", (rule,)),))
    async with (
        running_app("web-1", key("web"), serve=server.serve) as app,
        running_waypoint([service("web", 1), app.workload, config]) as mesh,
    ):
        stream = await mesh.open("10.96.0.1:80")
        await stream.send_all(ASK + frame(TEXT, b"hi"))
        assert (await Reader(stream).head()).startswith(b"HTTP/1.1 403")
        assert server.heads == []


async def test_an_open_one_ends_when_policy_would_refuse_it() -> None:
    server = ChatServer()

    def denying(path: str) -> TrafficConfig:
        rule = L7Rule(operations=(L7Operation(paths=(path,)),))
        policies = (L7Authorization("shop", "d", "DENY", (rule,)),)
        return traffic("web", authorizations=policies)

    async with (
        running_app("web-1", key("web"), serve=server.serve) as app,
        running_waypoint([service("web", 1), app.workload, denying("/other")]) as mesh,
    ):
        stream, reader = await join(mesh)
        await mesh.control_plane.push(denying("/elsewhere"))
        # Another connection is judged by what is in force now, this one goes on.
        second, _ = await join(mesh)
        await stream.send_all(frame(PING))
        assert await reader.frame() == (PONG, True, b"")
        await mesh.control_plane.push(denying("/chat"))
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await reader.frame()
        await second.aclose()
