"""The pool over real connections: sharing, one dial, limits, idling, drain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
import trio.testing

from mesh.errors import IdentityError, Unavailable
from mesh.hbone.connection import TunnelConnection
from mesh.hbone.head import ConnectHead
from mesh.hbone.pool import Pool, PoolKey
from tests.support.tunnels import CLIENT, SERVER, Link, open_link

pytestmark = pytest.mark.usefixtures("no_fd_leak")

HEAD = ConnectHead("10.0.0.1:80")


class Dialler:
    """Counts dials; `gate` holds them back."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.count = 0
        self.gate = trio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def __call__(self, key: PoolKey) -> TunnelConnection:
        self.count += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        # The pool runs it; the link must not as well.
        async with trio.open_nursery() as nursery:
            outer, self.link.nursery = self.link.nursery, _NoNursery()  # type: ignore[assignment]
            try:
                connection = await self.link.dial()
            finally:
                self.link.nursery = outer
            nursery.cancel_scope.cancel()
        return connection


class _NoNursery:
    def start_soon(self, *_args: object) -> None:
        """Nothing."""


def _key(link: Link) -> PoolKey:
    return PoolKey(CLIENT.identity, frozenset({SERVER.identity}), link.address, "10.0.0.9")


async def test_one_connection_serves_many_and_one_dial_serves_all_waiters() -> None:
    async with open_link(dial=False) as link:
        dial = Dialler(link)
        dial.gate = trio.Event()
        pool = Pool(dial, link.nursery)
        got: list[TunnelConnection] = []

        async def use() -> None:
            connection = await pool.acquire(_key(link))
            connection.open_tunnel(HEAD)
            got.append(connection)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(use)
            await trio.sleep(0.01)
            dial.gate.set()
        assert dial.count == 1
        assert len(set(map(id, got))) == 1
        assert got[0].tunnel_count == 20
        other = replace(_key(link), source_ip="10.0.0.10")
        assert await pool.acquire(other) is not got[0]
        assert dial.count == 2
        pool.close_all()
        assert all(connection.is_closed for connection in got)
        with pytest.raises(Unavailable):
            await pool.acquire(_key(link))


async def test_a_cancelled_waiter_does_not_cancel_the_dial_of_the_others() -> None:
    async with open_link(dial=False) as link:
        dial = Dialler(link)
        dial.gate = trio.Event()
        pool = Pool(dial, link.nursery)
        got: list[TunnelConnection] = []

        async def wait() -> None:
            got.append(await pool.acquire(_key(link)))

        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0.01):
                await pool.acquire(_key(link))
            nursery.start_soon(wait)
            await trio.sleep(0.01)
            dial.gate.set()
        assert dial.count == 1
        assert got[0].is_usable
        pool.close_all()


async def test_every_waiter_hears_of_a_failed_dial_and_the_next_dials_again() -> None:
    async with open_link(dial=False) as link:
        dial = Dialler(link)
        dial.error = IdentityError("expected somebody else", hint="look at the SANs")
        pool = Pool(dial, link.nursery)
        seen: list[Exception] = []

        async def fail() -> None:
            with pytest.raises(IdentityError, match="somebody else") as caught:
                await pool.acquire(_key(link))
            assert caught.value.hint == "look at the SANs"
            seen.append(caught.value)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(fail)
        assert dial.count == 1
        assert len(set(map(id, seen))) == 3
        dial.error = None
        assert (await pool.acquire(_key(link))).is_usable
        pool.close_all()


async def test_a_nearly_full_connection_is_taken_out_and_lives_on() -> None:
    async with open_link(dial=False) as link:
        dial = Dialler(link)
        pool = Pool(dial, link.nursery, max_streams=3)
        connections = []
        for _ in range(7):
            connection = await pool.acquire(_key(link))
            connection.open_tunnel(HEAD)
            connections.append(connection)
        assert dial.count == 3
        assert [c.tunnel_count for c in dict.fromkeys(connections)] == [3, 3, 1]
        assert len(pool.connections) == 3
        assert all(c.is_usable for c in pool.connections)
        pool.close_all()


async def test_connections_that_go_away_are_replaced() -> None:
    async with open_link(dial=False) as link:
        dial = Dialler(link)
        pool = Pool(dial, link.nursery)
        first = await pool.acquire(_key(link))
        link.servers[0].goaway()
        with trio.fail_after(30):
            while first.is_usable:
                await trio.sleep(0.01)
        second = await pool.acquire(_key(link))
        assert second is not first
        pool.close_all()


async def test_idle_connections_are_closed_in_order_and_busy_ones_kept() -> None:
    async with open_link(dial=False) as link:
        dial = Dialler(link)
        pool = Pool(dial, link.nursery, idle_seconds=0.2)
        idle = await pool.acquire(_key(link))
        busy = await pool.acquire(replace(_key(link), source_ip="10.0.0.10"))
        busy.open_tunnel(HEAD)
        with trio.fail_after(30):
            await idle.wait_closed()
        assert idle.failure is None
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert busy.is_usable
        assert pool.connections == (busy,)
        pool.close_all()


async def test_drain_waits_for_tunnels_until_the_deadline() -> None:
    async with open_link(dial=False) as link:
        pool = Pool(Dialler(link), link.nursery)
        link.client = await pool.acquire(_key(link))
        near, far, tunnel, _ = await link.pipe()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.drain, 10)
            await trio.sleep(0.05)
            with pytest.raises(Unavailable):
                await pool.acquire(_key(link))
            await near.send_all(b"last words")
            assert await far.receive_some(100) == b"last words"
            await near.send_eof()
            await far.send_eof()
            with trio.fail_after(30):
                assert (await tunnel.wait_closed()).error is None
        assert link.client.failure is None
