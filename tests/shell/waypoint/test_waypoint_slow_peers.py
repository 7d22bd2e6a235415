"""Peers that are slow, or never go on: what they hold is bounded, in time and in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import trio

from mesh.hbone.connection import TunnelConnection
from mesh.http import h2_frames as h2
from mesh.model.route import Redirect, Route, RouteFilter, RouteRule
from tests.support.raw_http2 import GET, HELLO, RawPeer, get, head
from tests.support.waypoints import (
    Mesh,
    fetch,
    key,
    running_app,
    running_waypoint,
    service,
    settle,
    traffic,
)
from waypoint.inbound import HANDSHAKES_PER_SOURCE
from waypoint.transport import TunnelTransport

pytestmark = pytest.mark.usefixtures("no_fd_leak")

PEOPLE = {"stream_idle_seconds": 0.4, "head_timeout_seconds": 0.4, "connection_idle_seconds": 60.0}
POST = ((b":method", b"POST"), *GET[1:])


async def silent(mesh: Mesh, connection: TunnelConnection) -> trio.SocketStream:
    """A caller of an endpoint that never answers, with its side closed."""
    stream = await mesh.open("10.96.0.2:80", connection)
    await stream.send_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    await stream.send_eof()
    return stream


async def never(stream: trio.SocketStream) -> None:
    """Answers nothing."""
    with contextlib.suppress(trio.BrokenResourceError):
        while await stream.receive_some(65536):
            pass


async def test_heads_and_bodies_that_never_end_are_given_up() -> None:
    async with (
        running_app("web-1", key("web")) as app,
        running_app("mute-1", key("mute"), serve=never) as mute,
        running_waypoint(
            [service("web", 1), service("mute", 2), app.workload, mute.workload], **PEOPLE
        ) as mesh,
    ):
        connection = await mesh.connect()
        for begun, status in (
            (b"GET / HT", b"408"),
            (b"GET / HTTP/1.1\r\nhost: a\r\n", b"408"),
            (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nabc", b"408"),
            (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab", b"408"),
        ):
            stream = await mesh.open("10.96.0.1:80", connection)
            await stream.send_all(begun)
            assert (await settle(stream, b"never")).startswith(b"HTTP/1.1 " + status), begun
        # Who has closed its side, and waits for an endpoint that says nothing.
        stream = await silent(mesh, connection)
        with pytest.raises(trio.BrokenResourceError):
            await settle(stream, b"never")
        # HTTP/2: a block without end costs the connection, a body only its stream.
        peer = RawPeer(await mesh.open("10.96.0.1:80", connection))
        peer.acknowledges = False  # nothing may come between the parts of a head
        await peer.send(HELLO + get(1, flags=0))
        assert (await peer.read()).goaway == h2.ENHANCE_YOUR_CALM
        peer = RawPeer(await mesh.open("10.96.0.1:80", connection))
        await peer.send(HELLO + head(1, POST, h2.END_HEADERS) + h2.pack_frame(h2.DATA, 0, 1, b"a"))
        assert (await peer.read(1)).resets == {1: h2.CANCEL}
        await peer.send(get(3))
        assert (await peer.read(3)).heads[3][0][b":status"] == b"200"
        assert (await fetch(await mesh.open("10.96.0.1:80", connection)))[0].status_code == 200


async def test_answers_that_nobody_reads_are_given_up_and_idle_connections_closed() -> None:
    async def much(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                await settle(stream, b"\r\n\r\n")
                await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 90000000\r\n\r\n")
                for _ in range(9000):
                    await stream.send_all(bytes(10_000))

    limits = {**PEOPLE, "connection_idle_seconds": 0.4}
    async with (
        running_app("web-1", key("web"), serve=much) as app,
        running_waypoint([service("web", 1), app.workload], **limits) as mesh,
    ):
        stream = await mesh.open("10.96.0.1:80")
        await stream.send_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        peer = RawPeer(await mesh.open("10.96.0.1:80"))
        await peer.send(HELLO + get(1))
        # One is not read at all: it is cut in the midst of it. The other has no window left.
        heard = await peer.read(1)
        assert heard.resets == {1: h2.CANCEL}
        assert len(heard.data[1]) == h2.DEFAULT_WINDOW
        assert (await peer.read()).goaway == h2.NO_ERROR  # nothing more was asked
        with pytest.raises(trio.BrokenResourceError):
            await settle(stream, b"never")


@pytest.fixture
def peak() -> Iterator[list[int]]:
    """The longest backlog of any tunnel's transport."""
    seen = [0]
    write = TunnelTransport.write

    def noted(self: TunnelTransport, data: bytes | bytearray | memoryview) -> None:
        write(self, data)
        seen[0] = max(seen[0], self.backlog)

    TunnelTransport.write = noted  # type: ignore[method-assign]
    yield seen
    TunnelTransport.write = write  # type: ignore[method-assign]


async def wait_full(peak: list[int]) -> None:
    """Until something piles up, and no longer grows."""
    before = -1
    with trio.fail_after(30):
        while not peak[0] or peak[0] != before:
            before = peak[0]
            await trio.sleep(0.1)


async def test_pipelined_requests_wait_until_their_answers_are_read(peak: list[int]) -> None:
    count = 2000
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        app.answers += [lambda _request: (200, b"z" * 20_000)] * count
        stream = await mesh.open("10.96.0.1:80")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" * count)
            await wait_full(peak)
            left = count * 20_000
            answered = 0
            with trio.fail_after(60):
                while left:
                    data = await stream.receive_some(65536)
                    assert data
                    left -= data.count(b"z")
                    answered += len(data)
        assert len(app.requests) == count
        assert peak[0] < 1 << 20


async def test_heads_that_nobody_reads_stop_the_requests(peak: list[int]) -> None:
    """Each is answered at once, by a head of 8 KiB that no window holds back."""
    count, path = 3000, b"/" + b"x" * 8000
    elsewhere = RouteRule(filters=(RouteFilter(redirect=Redirect(hostname="other.example")),))
    route = Route("HTTPRoute", "shop", "web", (elsewhere,))
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload, traffic("web", route)]) as mesh,
    ):
        peer = RawPeer(await mesh.open("10.96.0.1:80"))
        peer.acknowledges = False  # to read must not depend on being read
        async with trio.open_nursery() as nursery:

            async def pour() -> None:
                await peer.send(HELLO)
                for i in range(count):
                    await peer.send(get(2 * i + 1, path=path))

            nursery.start_soon(pour)
            await wait_full(peak)
            heard = await peer.read(2 * count - 1)
        assert len(heard.heads) == count
        # What is on its way when we stop reading: one window of the tunnel, at most 4 MiB.
        assert peak[0] < 8 << 20 < count * len(path) / 2


async def test_handshakes_that_never_end_keep_nobody_out() -> None:
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        open_now = []
        for _ in range(2 * HANDSHAKES_PER_SOURCE):
            raw = await trio.open_tcp_stream(*mesh.waypoint, local_address="127.0.0.9")
            await raw.send_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
            open_now.append(raw)
        with trio.fail_after(30):
            for raw in open_now[HANDSHAKES_PER_SOURCE:]:
                with contextlib.suppress(trio.BrokenResourceError):
                    assert await raw.receive_some(1) == b""
        assert (await fetch(await mesh.open("10.96.0.1:80")))[0].status_code == 200
        for raw in open_now:
            await raw.aclose()
