"""PlainRelay between real sockets: half-close, resets, back-pressure, integrity."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
from collections.abc import AsyncIterator

import pytest
import trio

from mesh.hbone.relay import PlainRelay
from mesh.reactor import Reactor
from tests.support.tunnels import tcp_pair

pytestmark = pytest.mark.usefixtures("no_fd_leak")

Ends = tuple[trio.SocketStream, trio.SocketStream, PlainRelay]


@contextlib.asynccontextmanager
async def _relay() -> AsyncIterator[Ends]:
    bugs: list[Exception] = []
    with Reactor(on_bug=lambda error, _where: bugs.append(error)) as reactor:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reactor.run)
            a, a_proxy = tcp_pair()
            b, b_proxy = tcp_pair()
            relay = PlainRelay(reactor, a_proxy, b_proxy)
            streams = [trio.SocketStream(trio.socket.from_stdlib_socket(s)) for s in (a, b)]
            yield streams[0], streams[1], relay
            for stream in streams:
                stream.socket.close()
            relay.reset()
            nursery.cancel_scope.cancel()
    assert bugs == []


async def _all(stream: trio.SocketStream) -> bytes:
    out = bytearray()
    while data := await stream.receive_some(65536):
        out += data
    return bytes(out)


_ORDERS = [
    order
    for order in itertools.permutations(("a_data", "a_end", "b_data", "b_end"))
    if order.index("a_data") < order.index("a_end") and order.index("b_data") < order.index("b_end")
]


@pytest.mark.parametrize("paced", [True, False])
@pytest.mark.parametrize("order", _ORDERS, ids="-".join)
async def test_half_close_in_every_order(order: tuple[str, ...], paced: bool) -> None:
    async with _relay() as (a, b, relay):
        for step in order:
            stream = a if step.startswith("a") else b
            if step.endswith("data"):
                await stream.send_all(step.encode())
            else:
                await stream.send_eof()
            if paced:
                await trio.sleep(0.005)
        assert await _all(b) == b"a_data"
        assert await _all(a) == b"b_data"
        result = await relay.wait_closed()
        assert result == type(result)(6, 6, None)


@pytest.mark.parametrize("side", [0, 1])
async def test_a_reset_goes_through(side: int) -> None:
    async with _relay() as ends:
        cutter, other, relay = ends[side], ends[1 - side], ends[2]
        await cutter.send_all(b"x")
        assert await other.receive_some(1) == b"x"
        cutter.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        cutter.socket.close()
        with trio.fail_after(30):
            with pytest.raises(trio.BrokenResourceError):
                await other.receive_some(1)
            assert (await relay.wait_closed()).error == "Connection reset by peer"


async def test_a_stalled_reader_stops_the_writer_and_loses_nothing() -> None:
    async with _relay() as (a, b, relay):
        data = os.urandom(1 << 20) * 20
        sent = 0
        with trio.move_on_after(0.5):
            while True:
                sent += await a.socket.send(data[sent : sent + (1 << 18)])
        assert sent < len(data)
        assert relay.a_to_b - sent <= 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send_all, data[sent:])
            got = bytearray()
            while len(got) < len(data):
                got += await b.receive_some(1 << 18)
        assert bytes(got) == data
        await a.send_eof()
        assert await b.receive_some(1) == b""
        await b.send_eof()
        assert (await relay.wait_closed()).bytes_to_tunnel == len(data)


async def test_cancelling_the_wait_cuts_both_sides() -> None:
    async with _relay() as (a, b, relay):
        with trio.move_on_after(0.01):
            await relay.wait_closed()
        assert relay.is_closed
        for end in (a, b):
            with pytest.raises(trio.BrokenResourceError):
                await end.receive_some(1)


async def test_no_end_is_orderly_until_it_is() -> None:
    async with _relay() as (a, b, relay):
        linger = [
            half.sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
            for half in (relay._a, relay._b)
        ]
        # Were this process killed now, both peers would see a reset.
        assert linger == [struct.pack("ii", 1, 0)] * 2
        await a.send_all(b"x" * 1000)
        await a.send_eof()
        await b.send_eof()
        assert (await relay.wait_closed()).error is None
        assert await _all(b) == b"x" * 1000
        assert await _all(a) == b""
