"""Both sides at once send what nobody planned: no bug is reported, honest callers are served."""

from __future__ import annotations

import contextlib
import random

import pytest
import trio

from mesh.http import h2_frames as h2
from mesh.model.service import AppProtocol
from mesh.runtime import lifecycle
from tests.support.raw_http2 import HELLO, get, head
from tests.support.waypoints import fetch, key, running_app, running_waypoint, service

pytestmark = pytest.mark.usefixtures("no_fd_leak")

ROUNDS = 300
REQUESTS = [
    b"GET / HTTP/1.1\r\nhost: a\r\n\r\n",
    b"POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello",
    b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nabc",
    b"HEAD / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\nabc",
]
RESPONSES = [
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx: y\r\n\r\n",
    b"HTTP/1.1 101 S\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\nxyz",
    b"HTTP/1.1 204 N\r\n\r\n",
    b"HTTP/1.1 100 C\r\n\r\nHTTP/1.1 200 OK\r\n\r\nuntil the end",
]


class Fuzz:
    """Everything that is random, from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def spoil(self, text: bytes) -> bytes:
        data, rng = bytearray(text), self.rng
        for _ in range(rng.choice((0, 0, 1, 2, 5))):
            at = rng.randrange(len(data) or 1)
            match rng.randrange(3):
                case 0:
                    data[at : at + 1] = rng.randbytes(1)
                case 1:
                    del data[at : at + rng.randrange(1, 5)]
                case _:
                    data[at:at] = bytes(rng.choices(b"\0\n\r :0\xff", k=2))
        return bytes(data)

    def frames(self, *, client: bool) -> bytes:
        rng, out = self.rng, b""
        for _ in range(rng.randrange(1, 12)):
            stream, flags = rng.choice((0, 1, 1, 3, 3, 5, 2)), rng.choice((0, 1, 4, 5, 5, 8, 0x25))
            match rng.randrange(8):
                case 0 | 1 | 2:
                    status = rng.choice((b"200", b"204", b"100", b"304"))
                    more = rng.choice(([], [(b"content-length", b"3")], [(b"grpc-status", b"0")]))
                    answer = head(stream, [(b":status", status), *more], flags)
                    out += get(stream, flags=flags) if client else answer
                case 3 | 4:
                    out += h2.pack_frame(h2.DATA, flags, stream, bytes(rng.randrange(50)))
                case 5:
                    out += h2.pack_rst(stream, rng.randrange(14))
                case 6:
                    out += h2.pack_window_update(stream, rng.choice((0, 1, h2.LARGEST_WINDOW)))
                case _:
                    out += h2.pack_frame(rng.randrange(12), flags, stream, rng.randbytes(8))
        return out

    async def serve_http1(self, stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                while data := await stream.receive_some(65536):
                    good = b"/good" in data
                    text = RESPONSES[0] if good else self.spoil(self.rng.choice(RESPONSES))
                    await stream.send_all(text)

    async def serve_http2(self, stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                await stream.send_all(h2.pack_frame(h2.SETTINGS, 0, 0))
                while await stream.receive_some(65536):
                    await stream.send_all(self.frames(client=False))


async def test_nonsense_from_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    bugs: list[object] = []
    monkeypatch.setattr(lifecycle, "report_bug", lambda *what, **_: bugs.append(what))
    fuzz = Fuzz(1)
    async with (
        running_app("one-1", key("one"), serve=fuzz.serve_http1) as one,
        running_app("two-1", key("two"), serve=fuzz.serve_http2) as two,
        running_waypoint(
            [service("one", 1), service("two", 2, protocol=AppProtocol.HTTP2),
             one.workload, two.workload], stream_idle_seconds=0.3
        ) as mesh,
    ):  # fmt: skip
        connection = await mesh.connect()
        for _ in range(ROUNDS):
            stream = await mesh.open(fuzz.rng.choice(("10.96.0.1:80", "10.96.0.2:80")), connection)
            with contextlib.suppress(trio.BrokenResourceError), trio.move_on_after(0.003):
                if fuzz.rng.random() < 0.5:
                    await stream.send_all(fuzz.spoil(fuzz.rng.choice(REQUESTS)))
                else:
                    await stream.send_all(HELLO + fuzz.frames(client=True))
                while await stream.receive_some(65536):
                    pass
            stream.socket.close()
            mesh.streams.remove(stream)
        response, body = await fetch(await mesh.open("10.96.0.1:80", connection), "/good")
        assert (response.status_code, body) == (200, b"ok")
    assert bugs == []
