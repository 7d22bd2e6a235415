"""One mTLS connection carrying many tunnels (HBONE), from either side.

Under trio it dials, shakes hands, keeps alive and drains; its bytes are moved by `Wire`,
and what the core finds in them becomes calls on `Tunnel`s. It decides nothing: whom to
trust is `verify`, what a CONNECT means is `on_tunnel`. When the connection dies, every
tunnel ends with an error and its application sees RST, never an orderly end.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable, Sequence

import trio

from mesh.errors import RemoteProtocolError, Unavailable
from mesh.hbone.head import (
    ConnectHead,
    encode_request,
    parse_request,
)
from mesh.hbone.held import HeldBytes
from mesh.hbone.leftovers import Leftovers
from mesh.hbone.relay import SocketEnd
from mesh.hbone.tunnel import Tunnel
from mesh.hbone.wire import LINGER_SECONDS, Wire
from mesh.http import h2_frames as h2
from mesh.http.h2_core import H2Core, Stream
from mesh.http.hpack_table import Pair, encode_block
from mesh.http.receive_windows import WindowBudget
from mesh.identity import SpiffeId
from mesh.reactor import Reactor
from mesh.sockets import HBONE_PORT, SocketAddress
from mesh.tls.context import verify_parameters
from mesh.tls.session import TlsSession, handshake

__all__ = ["CLIENT_SETTINGS", "SERVER_SETTINGS", "Tunnel", "TunnelConnection", "Verify"]

Verify = Callable[[bytes], SpiffeId]
"""The identity in a leaf certificate (DER). Raises IdentityError."""

_FIRST_WINDOW, _LARGEST_WINDOW = 256 << 10, 4 << 20
SERVER_SETTINGS = h2.LocalSettings(_FIRST_WINDOW, _LARGEST_WINDOW, max_header_list=64 << 10)
CLIENT_SETTINGS = h2.LocalSettings(_FIRST_WINDOW, _LARGEST_WINDOW, max_header_list=16 << 10)

PING_SECONDS = 10.0
PING_TIMEOUT_SECONDS = 20.0

_DRAIN_PING = b"ambitdrn"


class TunnelConnection(Wire):
    """Made by `connect` (client) or `accept` (server); keep `run()` going in a nursery.

    `run` starts a server connection, drives the keepalive, returns when the connection has
    ended, and closes it (every tunnel ends with an error) when cancelled. The reactor must
    be running.
    """

    def __init__(
        self,
        reactor: Reactor,
        session: TlsSession,
        peer: SpiffeId,
        *,
        on_tunnel: Callable[[Tunnel], None] | None = None,
        budget: WindowBudget | None = None,
        held: HeldBytes | None = None,
        ping_seconds: float = PING_SECONDS,
        ping_timeout_seconds: float = PING_TIMEOUT_SECONDS,
    ) -> None:
        super().__init__(reactor, session)
        self.held = held
        self.peer = peer
        self._on_tunnel = on_tunnel
        self._ping_seconds = ping_seconds
        self._ping_timeout_seconds = ping_timeout_seconds
        client = on_tunnel is None
        self.core = H2Core(
            self,
            client=client,
            settings=CLIENT_SETTINGS if client else SERVER_SETTINGS,
            budget=budget,
        )
        self._parked: dict[Tunnel, None] = {}
        self._leftovers = Leftovers(self.core)
        self._draining = False
        self._idle_since: float | None = trio.current_time()
        self._settled = trio.Event()
        # How it came about, for whoever asks where the time went. Seconds; trio time.
        self.dial_seconds = self.handshake_seconds = self.settled_at = 0.0

    # ---- making one

    @classmethod
    async def connect(
        cls,
        reactor: Reactor,
        sock: socket.socket,
        address: SocketAddress,
        context: ssl.SSLContext,
        *,
        verify: Verify,
        connect_timeout: float = 10.0,
        handshake_timeout: float = 10.0,
        budget: WindowBudget | None = None,
        held: HeldBytes | None = None,
        ping_seconds: float = PING_SECONDS,
        ping_timeout_seconds: float = PING_TIMEOUT_SECONDS,
    ) -> TunnelConnection:
        """Connect `sock` (non-blocking, see `mesh.sockets.open_outgoing`) to `address`, shake
        hands, `verify(leaf DER)` the server and wait for its SETTINGS, so that a server
        which refuses our certificate fails here. Times in seconds.

        Takes `sock` over. Raises Unavailable (flag NETWORK_POLICY when connecting to the
        HBONE port timed out) or IdentityError. If cancelled: the socket is closed.
        """
        began = trio.current_time()
        try:
            await _dial(sock, address, connect_timeout)
        except BaseException:
            sock.close()
            raise
        dialled = trio.current_time()
        session = await handshake(sock, context, server_side=False, timeout=handshake_timeout)
        try:
            verify_parameters(session)
            connection = cls(
                reactor,
                session,
                verify(session.peer_certificate_der()),
                budget=budget,
                held=held,
                ping_seconds=ping_seconds,
                ping_timeout_seconds=ping_timeout_seconds,
            )
        except BaseException:
            session.close()
            raise
        try:
            connection._start()
            with trio.move_on_after(handshake_timeout):
                await connection._settled.wait()
            if connection._error is not None:
                raise connection._error
            if connection.failure is not None or not connection.core.settings_received:
                raise Unavailable(
                    f"{address} did not open HTTP/2: {connection.failure or 'timeout'}"
                )
        except BaseException:
            connection.close("not established")
            raise
        connection.settled_at = trio.current_time()
        connection.dial_seconds = dialled - began
        connection.handshake_seconds = connection.settled_at - dialled
        return connection

    @classmethod
    async def accept(
        cls,
        reactor: Reactor,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        verify: Verify,
        on_tunnel: Callable[[Tunnel], None],
        handshake_timeout: float = 10.0,
        budget: WindowBudget | None = None,
        held: HeldBytes | None = None,
        ping_seconds: float = PING_SECONDS,
        ping_timeout_seconds: float = PING_TIMEOUT_SECONDS,
    ) -> TunnelConnection:
        """Server side of an accepted non-blocking socket: handshake, `verify(leaf DER)`.

        `on_tunnel(tunnel)` is called for every good CONNECT, from `run()` on; it must not
        wait: it starts a task that calls `respond` or `refuse`, and `relay`. Malformed
        CONNECTs are answered 400, or reset, without a call.
        Takes `sock` over. Raises Unavailable, IdentityError. If cancelled: the socket is
        closed. Call `run` at once: nothing is read before.
        """
        began = trio.current_time()
        session = await handshake(sock, context, server_side=True, timeout=handshake_timeout)
        try:
            verify_parameters(session)
            connection = cls(
                reactor,
                session,
                verify(session.peer_certificate_der()),
                on_tunnel=on_tunnel,
                budget=budget,
                held=held,
                ping_seconds=ping_seconds,
                ping_timeout_seconds=ping_timeout_seconds,
            )
        except BaseException:
            session.close()
            raise
        connection.settled_at = trio.current_time()
        connection.handshake_seconds = connection.settled_at - began
        return connection

    # ---- for the owner

    async def run(self) -> None:
        """Keepalive until the connection has ended. If cancelled: close()."""
        self._start()
        waiting_since: float | None = None
        reads = 0
        try:
            while True:
                with trio.move_on_after(self._ping_seconds):
                    await self._closed.wait()
                    return
                now = trio.current_time()
                self._leftovers.tidy()
                self.touch()
                if self._closing:
                    if now - self._closing_at >= LINGER_SECONDS:
                        self._tear_down(None)
                elif waiting_since is None or self._reads != reads:
                    self.core.ping(b"ambit%03d" % (self._reads % 1000))
                    waiting_since, reads = now, self._reads
                elif now - waiting_since >= self._ping_timeout_seconds:
                    self.close(f"no sign of life for {self._ping_timeout_seconds:g} s")
        finally:
            self.close("cancelled")

    def open_tunnel(self, head: ConnectHead, block: bytes | None = None) -> Tunnel:
        """Client: send a CONNECT at the end of this turn. Who has its header block ready (see
        `HeadTemplate`) gives it; `head` then need not say more than what it shares with others.

        Synchronous, so that the counts the pool sees are true. Raises Unavailable when the
        connection is not usable or the peer allows no more streams.
        """
        if not self.is_usable or not self.core.can_open:
            raise Unavailable(f"the connection to {self.peer_address} takes no new tunnels")
        tunnel = Tunnel(self, head)
        if block is None:
            block = encode_block(encode_request(head))
        tunnel.bind(self.core.open(block, tunnel))
        self._idle_since = None
        self.touch()
        return tunnel

    @property
    def is_usable(self) -> bool:
        """Whether tunnels may be opened: open, and no GOAWAY either way."""
        core = self.core
        return not (self.is_closed or self._closing or core.goaway_sent or core.goaway_received)

    @property
    def tunnel_count(self) -> int:
        """Streams open now, in either direction."""
        return len(self.core.streams)

    @property
    def max_tunnels(self) -> int:
        """How many concurrent streams the peer allows."""
        return self.core.peer_max_streams

    @property
    def idle_since(self) -> float | None:
        """trio time at which the last tunnel ended; None while there is one."""
        return self._idle_since

    def goaway(self) -> None:
        """Take no new tunnels, let the others finish, then close in order. Idempotent."""
        if self.is_closed or self._draining:
            return
        self._draining = True
        self._leftovers.dismiss_refused()
        if self._on_tunnel is None:
            self.core.goaway()
        else:
            # Streams on their way are still served: the line is drawn a round trip later.
            self.core.goaway(soon=True)
            self.core.ping(_DRAIN_PING)
        self.touch()

    async def drain(self, deadline_seconds: float) -> None:
        """goaway(), wait for the tunnels until the deadline, then close()."""
        self.goaway()
        with trio.move_on_after(deadline_seconds):
            await self._closed.wait()
        self.close("drain deadline")

    # ---- for tunnels

    def park(self, tunnel: Tunnel) -> None:
        """Resume `tunnel` when the connection takes bytes again."""
        self._parked[tunnel] = None

    def linger(self, end: SocketEnd) -> None:
        """Look after `end`, whose tunnel is over: it is to leave when its application has got all.

        Nothing wakes us when that is so.
        """
        if self.is_closed:
            end.leave(at_once=True)
        else:
            self._leftovers.lingering[end] = None

    def unpark(self, tunnel: Tunnel) -> None:
        """`tunnel` has ended."""
        self._parked.pop(tunnel, None)

    # ---- for the wire

    def _is_drained(self) -> bool:
        core = self.core
        if core.streams:
            return False
        if self._on_tunnel is None:
            return core.goaway_sent or core.goaway_received
        return core.goaway_final

    def _unblocked(self) -> None:
        if self.core.send_window > 0 and self._parked:
            parked, self._parked = self._parked, {}
            for tunnel in parked:
                tunnel.resume()

    def _torn_down(self, reason: str) -> None:
        self._settled.set()
        self._parked.clear()
        self._leftovers.abandon()
        for stream in list(self.core.streams.values()):
            if isinstance(stream.owner, Tunnel):
                stream.owner.on_lost(reason)

    # ---- Receiver of the core

    def on_headers(self, stream: Stream, pairs: Sequence[Pair]) -> None:
        """A CONNECT, an answer, or trailers (which say nothing to a tunnel)."""
        tunnel = stream.owner
        if tunnel is None:
            if self._on_tunnel is not None and not self.is_closed:
                self._accept_tunnel(stream, pairs, self._on_tunnel)
        elif self._on_tunnel is None:
            tunnel.on_response(pairs)

    def _accept_tunnel(
        self, stream: Stream, pairs: Sequence[Pair], on_tunnel: Callable[[Tunnel], None]
    ) -> None:
        self._idle_since = None
        try:
            head = parse_request(pairs)
        except RemoteProtocolError as exc:
            self._leftovers.refuse(stream, pairs, exc)
            return
        tunnel = Tunnel(self, head)
        tunnel.bind(stream)
        try:
            on_tunnel(tunnel)
        except Exception as exc:
            self._bug(tunnel, exc)

    def on_data(self, stream: Stream, views: Sequence[memoryview], total: int) -> None:
        """Payload for one tunnel; a bug in its sink ends that tunnel only."""
        tunnel = stream.owner
        try:
            tunnel.on_data(views, total)
        except Exception as exc:
            self._bug(tunnel, exc)

    def on_end(self, stream: Stream) -> None:
        """END_STREAM."""
        tunnel = stream.owner
        try:
            tunnel.on_end()
        except Exception as exc:
            self._bug(tunnel, exc)

    def on_reset(self, stream: Stream, code: int, *, by_peer: bool) -> None:
        """The stream was cut."""
        if stream.owner is not None:
            stream.owner.on_reset(code, by_peer=by_peer)

    def on_closed(self, stream: Stream) -> None:
        """One stream less."""
        if self._leftovers.refused:
            self._leftovers.refused.pop(stream.id, None)
        if not self.core.streams:
            self._idle_since = trio.current_time()
            self.touch()

    def on_stream_room(self, stream: Stream) -> None:
        """A starved stream may send."""
        if stream.owner is not None:
            stream.owner.resume()

    def on_connection_room(self) -> None:
        """The connection window opened."""
        if not self.is_blocked:
            self._unblocked()

    def on_settings(self) -> None:
        """The peer's SETTINGS arrived."""
        self._settled.set()

    def on_pong(self, payload: bytes) -> None:
        """An answer to a PING."""
        if payload == _DRAIN_PING and self._draining and not self.core.goaway_final:
            self.core.goaway()
            self.touch()

    def on_goaway(self, code: int, debug: bytes) -> None:
        """The peer takes no new tunnels; when the last one has ended, so do we."""
        self.touch()

    def _bug(self, tunnel: Tunnel, error: Exception) -> None:
        self.reactor.report_bug(error, tunnel)
        tunnel.reset(h2.INTERNAL_ERROR, "internal error")


async def _dial(sock: socket.socket, address: SocketAddress, timeout: float) -> None:
    """Connect a non-blocking socket. Raises Unavailable."""
    try:
        with trio.fail_after(timeout):
            try:
                sock.connect((address.ip, address.port))
            except BlockingIOError:
                await trio.lowlevel.wait_writable(sock)
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise OSError(error, os.strerror(error)) from None
    except trio.TooSlowError as exc:
        hbone = address.port == HBONE_PORT
        raise Unavailable(
            f"no connection to {address} within {timeout:g} s",
            hint=f"a NetworkPolicy may block port {HBONE_PORT}" if hbone else "",
            flag="NETWORK_POLICY" if hbone else None,
        ) from exc
    except OSError as exc:
        raise Unavailable(f"cannot connect to {address}: {exc.strerror or exc}") from exc
