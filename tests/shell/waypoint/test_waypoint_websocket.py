"""WebSocket (RFC 6455) through the whole daemon, in the manner of Autobahn's cases: a small but
real client and server on both sides, and what must not be taken for an upgrade.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
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
from tests.support.waypoints import Mesh, key, running_app, running_waypoint, service, traffic

pytestmark = pytest.mark.usefixtures("no_fd_leak")

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
_KEY = base64.b64encode(b"0123456789abcdef")
_ACCEPT = base64.b64encode(hashlib.sha1(_KEY + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
ASK = (
    b"GET /chat HTTP/1.1\r\nhost: web\r\nconnection: keep-alive, Upgrade\r\nupgrade: WebSocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: " + _KEY + b"\r\n\r\n"
)


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, masks: bool = True) -> bytes:
    size = len(payload)
    head = bytes((opcode | (0x80 if fin else 0),))
    mask = 0x80 if masks else 0
    if size < 126:
        head += bytes((mask | size,))
    elif size < 1 << 16:
        head += struct.pack(">BH", mask | 126, size)
    else:
        head += struct.pack(">BQ", mask | 127, size)
    if not masks:
        return head + payload
    chosen = os.urandom(4)
    key_stream = (chosen * (size // 4 + 1))[:size]
    mixed = int.from_bytes(payload, "big") ^ int.from_bytes(key_stream, "big")
    return head + chosen + mixed.to_bytes(size, "big")


class Reader:
    """Exactly as many bytes as asked for; EOFError at the end."""

    def __init__(self, stream: trio.abc.ReceiveStream, data: bytes = b"") -> None:
        self._stream = stream
        self._data = bytearray(data)

    async def take(self, count: int) -> bytes:
        with trio.fail_after(30):
            while len(self._data) < count:
                piece = await self._stream.receive_some(65536)
                if not piece:
                    raise EOFError
                self._data += piece
        found = bytes(self._data[:count])
        del self._data[:count]
        return found

    async def head(self) -> bytes:
        found = b""
        while not found.endswith(b"\r\n\r\n"):
            found += await self.take(1)
        return found

    async def frame(self) -> tuple[int, bool, bytes]:
        """Opcode, whether it is the last, payload."""
        first, size = await self.take(2)
        masked, size = size & 0x80, size & 0x7F
        if size == 126:
            size = int.from_bytes(await self.take(2), "big")
        elif size == 127:
            size = int.from_bytes(await self.take(8), "big")
        mask = await self.take(4) if masked else b"\0\0\0\0"
        data = await self.take(size)
        plain = int.from_bytes(data, "big") ^ int.from_bytes((mask * (size // 4 + 1))[:size], "big")
        return first & 0x0F, bool(first & 0x80), plain.to_bytes(size, "big")


class ChatServer:
    """Echoes messages frame by frame, answers pings, closes with the code it is closed with."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.closed: list[bytes] = []

    async def serve(self, stream: trio.SocketStream) -> None:
        reader = Reader(stream)
        with contextlib.suppress(trio.BrokenResourceError, EOFError):
            async with stream:
                while True:
                    head = await reader.head()
                    self.heads.append(head)
                    if b"upgrade: websocket" not in head.lower() or b"/refuse" in head:
                        await stream.send_all(b"HTTP/1.1 426 x\r\ncontent-length: 2\r\n\r\nno")
                        continue
                    await stream.send_all(
                        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n"
                        b"connection: Upgrade\r\nsec-websocket-accept: " + _ACCEPT + b"\r\n\r\n"
                        + frame(TEXT, b"welcome", masks=False)
                    )  # fmt: skip
                    await self._chat(stream, reader)
                    return

    async def _chat(self, stream: trio.SocketStream, reader: Reader) -> None:
        while True:
            opcode, fin, payload = await reader.frame()
            if opcode == PING:
                await stream.send_all(frame(PONG, payload, masks=False))
            elif opcode == CLOSE:
                self.closed.append(payload)
                await stream.send_all(frame(CLOSE, payload, masks=False))
                return
            elif payload == b"bye":
                await stream.send_all(frame(CLOSE, struct.pack(">H", 1001), masks=False))
                self.closed.append((await reader.frame())[2])
                return
            elif opcode != PONG:
                await stream.send_all(frame(opcode, payload, fin=fin, masks=False))


async def join(mesh: Mesh, more: bytes = b"") -> tuple[trio.SocketStream, Reader]:
    """An open chat; `more` is sent in the same breath as the request."""
    stream = await mesh.open("10.96.0.1:80")
    await stream.send_all(ASK + more)
    reader = Reader(stream)
    head = (await reader.head()).lower()
    assert head.startswith(b"http/1.1 101 ")
    assert b"\r\nupgrade: websocket\r\n" in head
    assert _ACCEPT.lower() in head
    assert await reader.frame() == (TEXT, True, b"welcome")
    return stream, reader


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
