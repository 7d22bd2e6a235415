"""Tunnels over real loopback mTLS: half-close in every order, resets, integrity, limits."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
import resource
import socket
import struct
from typing import Any

import pytest
import trio

from mesh.hbone.connection import Tunnel
from mesh.hbone.head import ConnectHead
from mesh.hbone.held import HeldBytes
from mesh.hbone.relay import TOO_MUCH_WAITS
from mesh.http import h2_frames as h2
from mesh.http.h2_core import H2Core
from tests.support.tunnels import Link, open_link, tcp_pair

pytestmark = pytest.mark.usefixtures("no_fd_leak")


async def _all(stream: trio.SocketStream) -> bytes:
    out = bytearray()
    while data := await stream.receive_some(65536):
        out += data
    return bytes(out)


async def _reset_of(stream: trio.SocketStream) -> bool:
    """Whether the application sees RST (and never an orderly end)."""
    try:
        while await stream.receive_some(65536):
            pass
    except trio.BrokenResourceError:
        return True
    return False


def _cut(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


_ORDERS = [
    order
    for order in itertools.permutations(("near_data", "near_end", "far_data", "far_end"))
    if order.index("near_data") < order.index("near_end")
    and order.index("far_data") < order.index("far_end")
]


@pytest.mark.parametrize("paced", [True, False])
@pytest.mark.parametrize("order", _ORDERS, ids="-".join)
async def test_half_close_in_every_order(
    order: tuple[str, ...], paced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six orders of write and shutdown of two sides, stepwise and at once: twelve."""
    arrived: list[int] = []
    control_arrived = H2Core.control_arrived

    def note(core: H2Core, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        arrived.append(kind)
        control_arrived(core, kind, flags, stream_id, payload)

    monkeypatch.setattr(H2Core, "control_arrived", note)
    async with open_link() as link:
        near, far, tunnel, served = await link.pipe()
        for step in order:
            stream = near if step.startswith("near") else far
            if step.endswith("data"):
                await stream.send_all(step.encode() * 1000)
            else:
                await stream.send_eof()
            if paced:
                await trio.sleep(0.01)
        assert await _all(far) == b"near_data" * 1000
        assert await _all(near) == b"far_data" * 1000
        near_result, far_result = await tunnel.wait_closed(), await served.wait_closed()
        assert (near_result.error, far_result.error) == (None, None)
        assert (near_result.bytes_to_tunnel, near_result.bytes_from_tunnel) == (9000, 8000)
        assert (far_result.bytes_to_tunnel, far_result.bytes_from_tunnel) == (8000, 9000)
        assert link.client.tunnel_count == 0
        assert link.servers[0].tunnel_count == 0
        assert link.client.is_usable
        # What either side had still to say of that tunnel comes before what it says of the next.
        await link.pipe()
        assert h2.SETTINGS in arrived
        assert h2.RST_STREAM not in arrived, "an orderly end needs no reset"


@pytest.mark.parametrize("cutter", ["near", "far"])
async def test_reset_of_one_application_is_a_reset_of_the_other(cutter: str) -> None:
    async with open_link() as link:
        near, far, tunnel, served = await link.pipe()
        await near.send_all(b"hello")
        assert await far.receive_some(100) == b"hello"
        _cut(near if cutter == "near" else far)
        with trio.fail_after(30):
            assert await _reset_of(far if cutter == "near" else near)
            assert (await tunnel.wait_closed()).error
            assert (await served.wait_closed()).error
        assert link.client.is_usable


async def test_reset_of_a_half_closed_application_is_seen() -> None:
    async with open_link() as link:
        near, far, _, _ = await link.pipe()
        await near.send_eof()
        assert await _all(far) == b""
        _cut(near)
        with trio.fail_after(30):
            while True:
                try:
                    await far.send_all(b"x" * 1000)
                except trio.BrokenResourceError:
                    break
                await trio.sleep(0.005)


async def test_a_blocked_application_that_resets_is_noticed() -> None:
    """Reading is paused (the far side does not read), yet the reset goes through."""
    async with open_link() as link:
        near, far, tunnel, served = await link.pipe()
        with trio.move_on_after(0.5):
            while True:
                await near.send_all(bytes(1 << 16))
        _cut(near)
        with trio.fail_after(30):
            assert (await tunnel.wait_closed()).error
            assert (await served.wait_closed()).error
            assert await _reset_of(far)


@pytest.mark.parametrize("direction", ["up", "down", "both"])
async def test_integrity_over_several_streams(direction: str) -> None:
    """20 MB in odd writes over five streams each way: the same bytes come out."""
    size = 4 << 20
    async with open_link() as link:

        async def one(number: int) -> None:
            near, far, tunnel, served = await link.pipe()
            async with trio.open_nursery() as nursery:
                if direction != "down":
                    nursery.start_soon(_carry, near, far, size, number)
                else:
                    await near.send_eof()
                if direction != "up":
                    nursery.start_soon(_carry, far, near, size, 100 + number)
                else:
                    await far.send_eof()
            assert (await tunnel.wait_closed()).error is None
            assert (await served.wait_closed()).error is None

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number in range(5):
                    nursery.start_soon(one, number)


async def _carry(
    source: trio.SocketStream, target: trio.SocketStream, size: int, seed: int
) -> None:
    rng = random.Random(seed)
    data = rng.randbytes(size)
    digest = hashlib.sha1(data).digest()

    async def send() -> None:
        view = memoryview(data)
        while view:
            count = rng.choice((1, 7, 100, 4095, 16375, 16384, 70001, 300_000))
            await source.send_all(view[:count])
            view = view[count:]
        await source.send_eof()

    seen = hashlib.sha1()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while got := await target.receive_some(rng.choice((1000, 65536, 1 << 20))):
            seen.update(got)
    assert seen.digest() == digest


async def test_a_slow_reader_holds_no_more_than_a_window_and_blocks_nobody() -> None:
    async with open_link() as link:
        streams = [await link.pipe() for _ in range(4)]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sent = [0] * len(streams)

        async def flood(index: int) -> None:
            near = streams[index][0]
            with trio.move_on_after(1.5):
                while True:
                    sent[index] += await near.socket.send(bytes(1 << 18))

        async with trio.open_nursery() as nursery:
            for index in range(len(streams)):
                nursery.start_soon(flood, index)
        for near, *_ in streams:
            await near.send_eof()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        for count in sent:
            # A window, the rest in kernel buffers on the way.
            assert 256 << 10 <= count < 24 << 20
        assert grown < 64 << 10  # KiB
        near, far, _, _ = await link.pipe()
        with trio.fail_after(30):
            await near.send_all(b"through")
            assert await far.receive_some(100) == b"through"
        for index, (_, far, tunnel, _) in enumerate(streams):
            await far.send_eof()
            with trio.fail_after(30):
                assert len(await _all(far)) == sent[index]
                assert (await tunnel.wait_closed()).error is None


async def test_many_stalled_readers_hold_little_and_block_nobody() -> None:
    """Half of them never read at all, half of them stop after they were fast."""
    async with open_link() as link:
        streams = [await link.pipe() for _ in range(60)]
        stalled: set[int] = set()

        async def flood(index: int) -> None:
            near = streams[index][0]
            with trio.CancelScope() as scopes[index]:
                while True:
                    await near.send_all(bytes(1 << 16))

        async def read(index: int) -> None:
            total = 0
            while index % 2 and total < 2 << 20:
                total += len(await streams[index][1].receive_some(1 << 16))
            stalled.add(index)

        scopes: dict[int, trio.CancelScope] = {}
        with trio.fail_after(100):
            async with trio.open_nursery() as nursery:
                for index in range(len(streams)):
                    nursery.start_soon(flood, index)
                    nursery.start_soon(read, index)
                held = -1
                while len(stalled) < len(streams) or held != _held(streams):
                    held = _held(streams)
                    await trio.sleep(0.3)
                nursery.cancel_scope.cancel()
            # The first windows, and what was granted beyond them.
            assert held <= 60 * (256 << 10) + (16 << 20)
            assert link.servers[0].core._windows._budget.used <= 16 << 20
            near, far, _, _ = await link.pipe()
            await near.send_all(b"through")
            assert await far.receive_some(100) == b"through"
            for each, *_ in streams:
                _cut(each)
            while link.servers[0].core._windows._budget.used:
                await trio.sleep(0.01)


def _held(streams: list[Any]) -> int:
    return sum(len(served._sink._pending or b"") for _, _, _, served in streams)


async def test_what_stalled_readers_hold_together_is_bounded() -> None:
    node = HeldBytes(1 << 20)
    async with open_link(held=HeldBytes(whole=node)) as link:
        streams = [await link.pipe() for _ in range(16)]
        for _, far, _, served in streams:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            served._sink._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

        async def flood(near: trio.SocketStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                while True:
                    await near.send_all(bytes(1 << 16))

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for near, *_ in streams:
                    nursery.start_soon(flood, near)
                ends = [served for *_, served in streams]
                while not any(served.is_closed for served in ends):
                    await trio.sleep(0.01)
                    assert node.used <= (1 << 20) + (1 << 18)
                nursery.cancel_scope.cancel()
        assert {served._error for served in ends if served.is_closed} == {TOO_MUCH_WAITS}
        assert not all(served.is_closed for served in ends)
        assert 0 < node.used <= (1 << 20) + (1 << 18)
        for *_, tunnel, _ in streams:
            tunnel.reset()
        with trio.fail_after(30):
            while node.used:
                await trio.sleep(0.01)


async def test_death_of_the_peer_resets_every_application() -> None:
    async with open_link() as link:
        pipes = [await link.pipe() for _ in range(3)]
        await pipes[1][0].send_eof()
        await pipes[2][1].send_eof()
        await trio.sleep(0.05)
        sock = link.servers[0]._session.sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.servers[0]._tear_down("killed")
        with trio.fail_after(30):
            for near, _, tunnel, _ in pipes:
                if near is not pipes[2][0]:
                    assert await _reset_of(near)
                assert (await tunnel.wait_closed()).error
        assert not link.client.is_usable
        assert link.client.is_closed


async def test_an_orderly_close_with_open_tunnels_is_no_orderly_end_for_them() -> None:
    async with open_link() as link:
        near, far, tunnel, served = await link.pipe()
        link.servers[0].close("going")
        with trio.fail_after(30):
            assert await _reset_of(near)
            assert await _reset_of(far)
            assert (await tunnel.wait_closed()).error
            assert (await served.wait_closed()).error == "going"


async def test_cancelling_the_run_closes_and_resets() -> None:
    async with open_link(dial=False) as link:
        async with trio.open_nursery() as nursery:
            link.nursery, outer = nursery, link.nursery
            link.client = await link.dial()
            link.nursery = outer
            near, _, tunnel, _ = await link.pipe()
            nursery.cancel_scope.cancel()
        assert link.client.is_closed
        assert (await tunnel.wait_closed()).error == "cancelled"
        with trio.fail_after(30):
            assert await _reset_of(near)


async def test_cancelling_wait_closed_resets_the_tunnel_only() -> None:
    async with open_link() as link:
        near, far, tunnel, served = await link.pipe()
        with trio.move_on_after(0.01):
            await tunnel.wait_closed()
        with trio.fail_after(30):
            assert await _reset_of(near)
            assert await _reset_of(far)
            assert (await served.wait_closed()).error
        assert link.client.is_usable


async def test_reset_no_error_after_the_end_keeps_buffered_bytes() -> None:
    """What Envoy does: END_STREAM, then RST_STREAM(NO_ERROR), with a slow application."""
    async with open_link() as link:
        near, far, tunnel, served = await link.pipe()
        with trio.move_on_after(0.5):
            total = 0
            while True:
                total += await far.socket.send(bytes(1 << 18))
        core = link.servers[0].core
        core.end(served._stream)
        core.reset(served._stream, h2.NO_ERROR)
        link.servers[0].touch()
        served._cut(h2.NO_ERROR, "as Envoy does")
        sent = served.sent
        await trio.sleep(0.1)
        with trio.fail_after(30):
            got = await _all(near)
            assert len(got) == sent
            await near.send_all(b"nobody listens")
            await near.send_eof()
            assert (await tunnel.wait_closed()).error is None


async def test_malformed_connects_are_answered_400() -> None:
    async with open_link() as link:
        tunnel = link.client.open_tunnel(ConnectHead("not-an-authority"))
        assert (await tunnel.wait_response()).status == 400
        assert (await tunnel.wait_closed()).error == "refused with 400"
        assert link.tunnels == []
        assert link.client.tunnel_count == 0


async def test_refusals_reach_the_client() -> None:
    def refuse(link: Link, tunnel: Tunnel) -> None:
        tunnel.refuse(401)

    async with open_link(on_tunnel=refuse) as link:
        tunnel = link.client.open_tunnel(ConnectHead("10.0.0.1:80"))
        assert (await tunnel.wait_response()).status == 401
        assert link.client.is_usable
        assert tunnel.is_closed
        near, proxy = tcp_pair()
        tunnel.relay(proxy)
        assert await _reset_of(link.application(near))


async def test_data_before_the_answer_is_kept() -> None:
    """A server that speaks first, and a client that half-closes before it is accepted."""
    async with open_link() as link:
        tunnel = link.client.open_tunnel(ConnectHead("10.0.0.1:80"))
        near, near_proxy = tcp_pair()
        tunnel.relay(near_proxy)
        stream = link.application(near)
        await stream.send_all(b"early")
        await stream.send_eof()
        await link.arrived.wait()
        await trio.sleep(0.05)
        served = link.tunnels[0]
        far, far_proxy = tcp_pair()
        far.send(b"banner")
        served.respond(200)
        served.relay(far_proxy)
        assert (await tunnel.wait_response()).status == 200
        assert await _all(link.application(far)) == b"early"
        assert await stream.receive_some(100) == b"banner"


async def test_what_a_leaving_peer_said_is_read_although_writing_to_it_fails() -> None:
    """The server answers in full and is gone; our own write meets RST before we read."""
    async with open_link() as link:
        near, far, tunnel, _served = await link.pipe()
        server = link.servers[0]
        link.reactor.mute(link.client._fd)
        await far.send_all(b"last answer" * 1000)
        await far.send_eof()
        await trio.sleep(0.05)
        sock = server._session.sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.client.write(memoryview(bytes(8192)))  # unread at the peer: its close is a reset
        await trio.sleep(0.02)
        server._tear_down("killed")
        await trio.sleep(0.05)
        link.client.write(memoryview(h2.pack_frame(h2.PING, 0, 0, bytes(8)) * 1000))
        link.reactor.modify(link.client._fd, 1)
        with trio.fail_after(30):
            assert (await tunnel.wait_closed()).error
            got = bytearray()
            with contextlib.suppress(trio.BrokenResourceError):
                while data := await near.receive_some(65536):
                    got += data
        assert len(got) == tunnel.received == 11000


async def test_an_ended_application_still_gets_what_waits_for_it() -> None:
    """Both sides have ended, yet the slow reader's bytes are still in the relay."""
    async with open_link() as link:
        near, far, tunnel, _ = await link.pipe()
        size = 250 << 10  # less than the window, more than the socket takes
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        tunnel._sink._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await far.send_all(bytes(size))
        await far.send_eof()
        await trio.sleep(0.2)
        assert tunnel._stream.remote_ended
        assert tunnel._sink._pending
        await near.send_eof()
        await trio.sleep(0.1)
        with trio.fail_after(30):
            assert len(await _all(near)) == size
            assert (await tunnel.wait_closed()).error is None
        assert tunnel.received == size


async def test_a_silent_application_is_let_go_after_a_polite_reset() -> None:
    """It got everything, and whom it could answer is gone: no socket waits for it for ever."""
    async with open_link(server_options={"ping_seconds": 0.05}) as link:
        near, far, tunnel, served = await link.pipe()
        await near.send_all(b"bye")
        await near.send_eof()
        assert await _all(far) == b"bye"
        link.client.core.reset(tunnel._stream, h2.NO_ERROR)
        link.client.touch()
        with trio.fail_after(30):
            assert (await served.wait_closed()).error is None
        assert served._sink._sock is None
        tunnel.reset()


async def test_a_silent_application_gets_everything_before_it_is_let_go() -> None:
    async with open_link(server_options={"ping_seconds": 0.05}) as link:
        near, far, tunnel, served = await link.pipe()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        served._sink._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        size = 48 << 10
        await near.send_all(bytes(size))
        await near.send_eof()
        with trio.fail_after(30):
            while not served._stream.remote_ended:
                await trio.sleep(0.01)
        link.client.core.reset(tunnel._stream, h2.NO_ERROR)
        link.client.touch()
        with trio.fail_after(30):
            while not link.servers[0]._leftovers.lingering:
                await trio.sleep(0.01)
            assert len(await _all(far)) == size
            assert (await served.wait_closed()).error is None
        assert not link.servers[0]._leftovers.lingering
        tunnel.reset()


async def test_everything_said_before_the_relay_starts_is_kept() -> None:
    """200, bytes, END_STREAM and a polite RST_STREAM, all before the client has a socket."""
    async with open_link() as link:
        tunnel = link.client.open_tunnel(ConnectHead("10.0.0.1:80"))
        await link.arrived.wait()
        served = link.tunnels[0]
        served.respond(200)
        served.send(b"short and complete")
        core = link.servers[0].core
        core.end(served._stream)
        core.reset(served._stream, h2.NO_ERROR)
        served.finish(None)
        assert (await tunnel.wait_response()).status == 200
        await trio.sleep(0.05)
        near, near_proxy = tcp_pair()
        tunnel.relay(near_proxy)
        stream = link.application(near)
        assert await _all(stream) == b"short and complete"
        await stream.send_eof()
        with trio.fail_after(30):
            assert (await tunnel.wait_closed()).error is None


async def test_tunnels_that_end_while_the_connection_is_blocked_stay_ended() -> None:
    """The peer stops reading, parked tunnels end in every way, then it reads again."""
    async with open_link() as link:
        pipes = [await link.pipe() for _ in range(4)]
        for _, _, tunnel, served in pipes[:3]:
            tunnel._stream.send_window += 4 << 20
            served._stream.receive_window += 4 << 20
        link.reactor.mute(link.servers[0]._fd)

        async def flood(near: trio.SocketStream) -> None:
            with trio.move_on_after(0.5):
                while True:
                    await near.send_all(bytes(1 << 18))

        async with trio.open_nursery() as nursery:
            for near, *_ in pipes[:3]:
                nursery.start_soon(flood, near)
        assert link.client.is_blocked or link.client.core.send_window <= 0 or link.client._parked
        _cut(pipes[0][0])
        pipes[1][2].reset()
        with trio.fail_after(30):
            assert (await pipes[0][2].wait_closed()).error
        link.reactor.modify(link.servers[0]._fd, 1)
        near, far, _, _ = pipes[3]
        with trio.fail_after(30):
            await near.send_all(b"hello")
            assert await far.receive_some(10) == b"hello"
            assert await _reset_of(pipes[0][1])
            assert await _reset_of(pipes[1][1])
            total = 0
            while total < pipes[2][2].sent:
                total += len(await pipes[2][1].receive_some(1 << 20))
