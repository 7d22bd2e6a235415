"""Tunnel connections shared by (source, expected identities, address, source IP).

`assign` and `expired` decide, purely; `Pool` is the shell that dials, runs and forgets
connections. At most one dial per key is in flight, others wait for it. A connection that
comes near its stream limit is taken out for good and lives until its streams have ended;
one that stays idle is taken out and closed in order. One pool per captured pod.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import trio

from mesh.errors import MeshError, Unavailable
from mesh.hbone.connection import TunnelConnection
from mesh.identity import SpiffeId
from mesh.sockets import SocketAddress

MAX_STREAMS = 100
IDLE_SECONDS = 300.0
_SWEEP_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class PoolKey:
    """What two tunnels must have in common to share a connection."""

    source: SpiffeId
    expected: frozenset[SpiffeId]
    address: SocketAddress
    source_ip: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pooled connection as `assign` sees it; `limit` is the peer's stream limit."""

    is_usable: bool
    streams: int
    limit: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """Indices: the connection to use (None: dial) and those to take out of the pool."""

    use: int | None
    take_out: tuple[int, ...]


def assign(candidates: Sequence[Candidate], max_streams: int = MAX_STREAMS) -> Assignment:
    """The first usable connection with room; it is taken out when this fills it.

    Unusable ones are taken out; those full by the peer's own limit, too.
    """
    take_out: list[int] = []
    for index, candidate in enumerate(candidates):
        capacity = min(max_streams, candidate.limit)
        if not candidate.is_usable or candidate.streams >= capacity:
            take_out.append(index)
            continue
        if candidate.streams + 1 >= capacity:
            take_out.append(index)
        return Assignment(index, tuple(take_out))
    return Assignment(None, tuple(take_out))


def expired(idle_since: Sequence[float | None], now: float, idle_seconds: float) -> tuple[int, ...]:
    """Indices of connections without a tunnel for `idle_seconds`; None means in use."""
    return tuple(
        index
        for index, since in enumerate(idle_since)
        if since is not None and now - since >= idle_seconds
    )


@dataclass(slots=True)
class _Dial:
    """A dial in flight and who waits for it."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)
    error: Exception | None = None
    waiters: int = 0


@dataclass(slots=True)
class _Group:
    """The pooled connections of one key."""

    connections: list[TunnelConnection] = field(default_factory=list)
    dial: _Dial | None = None


class Pool:
    """`dial(key)` makes a connection (`TunnelConnection.connect`); the pool runs it
    (`connection.run`) in `nursery` and shares it.
    """

    def __init__(
        self,
        dial: Callable[[PoolKey], Awaitable[TunnelConnection]],
        nursery: trio.Nursery,
        *,
        max_streams: int = MAX_STREAMS,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._dial = dial
        self._nursery = nursery
        self._max_streams = max_streams
        self._idle_seconds = idle_seconds
        self._groups: dict[PoolKey, _Group] = {}
        self._connections: dict[TunnelConnection, None] = {}
        self._is_closed = False
        self._sweep_scope = trio.CancelScope()
        nursery.start_soon(self._sweep)

    @property
    def connections(self) -> tuple[TunnelConnection, ...]:
        """Every live connection, pooled or taken out, for the admin listing."""
        return tuple(self._connections)

    async def acquire(self, key: PoolKey) -> TunnelConnection:
        """A usable connection; call `open_tunnel` on it before the next await.

        Raises what `dial` raised (each waiter its own copy), Unavailable when the pool is
        closed. If cancelled: the dial goes on for the others.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while (connection := self.acquire_nowait(key)) is None:
            await self.wait_dialled(key)
        return connection

    async def wait_dialled(self, key: PoolKey) -> None:
        """Until `acquire_nowait` is worth another try: somebody's dial has succeeded.

        Raises what `dial` raised (each waiter its own copy), Unavailable when the pool is
        closed. If cancelled: the dial goes on for the others.
        """
        if self._is_closed:
            raise Unavailable("the connection pool is closed", flag="DRAINING")
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group()
        elif any(self._has_room(each) for each in group.connections):
            return
        dial = group.dial
        if dial is None:
            dial = group.dial = _Dial()
            self._nursery.start_soon(self._dial_one, key, group, dial)
        dial.waiters += 1
        try:
            await dial.done.wait()
        finally:
            dial.waiters -= 1
        if dial.error is not None:
            raise copy.copy(dial.error) from dial.error

    def _has_room(self, connection: TunnelConnection) -> bool:
        limit = min(self._max_streams, connection.max_tunnels)
        return connection.is_usable and connection.tunnel_count < limit

    def acquire_nowait(self, key: PoolKey) -> TunnelConnection | None:
        """As `acquire`, None when it would have to wait or to fail."""
        group = self._groups.get(key)
        return None if group is None or self._is_closed else self._pick(group)

    async def drain(self, deadline_seconds: float) -> None:
        """GOAWAY everywhere, wait for the tunnels until the deadline, then close_all()."""
        self._stop()
        with trio.move_on_after(deadline_seconds):
            for connection in tuple(self._connections):
                connection.goaway()
            for connection in tuple(self._connections):
                await connection.wait_closed()
        self.close_all("drain deadline")

    def close_all(self, reason: str = "closed") -> None:
        """Close every connection now, also those taken out of the pool."""
        self._stop()
        for connection in tuple(self._connections):
            connection.close(reason)

    def _stop(self) -> None:
        self._is_closed = True
        self._sweep_scope.cancel()
        for group in self._groups.values():
            if group.dial is not None:
                group.dial.scope.cancel()

    def _pick(self, group: _Group) -> TunnelConnection | None:
        pooled = group.connections
        if not pooled:
            return None
        first = pooled[0]
        if first.is_usable and first.tunnel_count + 1 < min(self._max_streams, first.max_tunnels):
            return first  # as `assign` would say, for the common case
        choice = assign(
            [Candidate(c.is_usable, c.tunnel_count, c.max_tunnels) for c in pooled],
            self._max_streams,
        )
        chosen = None if choice.use is None else pooled[choice.use]
        for index in reversed(choice.take_out):
            del pooled[index]
        return chosen

    async def _dial_one(self, key: PoolKey, group: _Group, dial: _Dial) -> None:
        connection: TunnelConnection | None = None
        dial.error = Unavailable("the connection pool is closed", flag="DRAINING")
        try:
            with dial.scope:
                connection = await self._dial(key)
                if connection.max_tunnels < 1:
                    raise Unavailable(f"{key.address} allows no tunnels")
                dial.error = None
        except MeshError as exc:
            dial.error = exc
        except Exception as exc:
            # A bug: whoever waits meets it; with nobody waiting it must not vanish.
            dial.error = exc
            if not dial.waiters:
                raise
        finally:
            group.dial = None
            dial.done.set()
            if connection is not None and (dial.error is not None or self._is_closed):
                connection.close("not wanted any more")
            elif connection is not None:
                group.connections.append(connection)
                self._connections[connection] = None
                self._nursery.start_soon(self._run, key, group, connection)
            self._drop_if_empty(key, group)

    async def _run(self, key: PoolKey, group: _Group, connection: TunnelConnection) -> None:
        try:
            await connection.run()
        finally:
            self._connections.pop(connection, None)
            if connection in group.connections:
                group.connections.remove(connection)
            self._drop_if_empty(key, group)

    def _drop_if_empty(self, key: PoolKey, group: _Group) -> None:
        if not group.connections and group.dial is None and self._groups.get(key) is group:
            del self._groups[key]

    async def _sweep(self) -> None:
        with self._sweep_scope:
            while True:
                await trio.sleep(min(_SWEEP_SECONDS, self._idle_seconds / 2))
                self._sweep_once(trio.current_time())

    def _sweep_once(self, now: float) -> None:
        for key, group in list(self._groups.items()):
            idle = [connection.idle_since for connection in group.connections]
            for index in reversed(expired(idle, now, self._idle_seconds)):
                del group.connections[index]
            self._drop_if_empty(key, group)
        pooled = {c for group in self._groups.values() for c in group.connections}
        for connection in self._connections:
            since = connection.idle_since
            # Just taken out, it may be about to get its last tunnel: leave it a moment.
            if connection not in pooled and since is not None and now - since >= 1.0:
                connection.goaway()
