"""FAST PATH: bytes between two sockets, for traffic that is carried without a tunnel.

As `mesh.hbone.relay`: reactor callbacks over one process-wide buffer, back-pressure by not
reading, half-close kept in every order, a reset on one side becomes a reset on the other.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import NamedTuple

from mesh.fiber import Signal
from mesh.reactor import READABLE, WRITABLE, Reactor
from mesh.sockets import end_on_close, reset_on_close
from mesh.tls.session import READ_SIZE

_SCRATCH = memoryview(bytearray(READ_SIZE))
_NO_WAIT = socket.MSG_DONTWAIT


class RelayResult(NamedTuple):
    """How a relay ended: bytes towards the tunnel (for PlainRelay: from a to b) and from it
    (from b to a); `error` is None after an orderly end in both directions.
    """

    bytes_to_tunnel: int
    bytes_from_tunnel: int
    error: str | None


class _Half:
    """One socket of a PlainRelay."""

    __slots__ = ("count", "ended", "events", "fd", "other", "pending", "relay", "shut", "sock")

    other: _Half

    def __init__(self, relay: PlainRelay, sock: socket.socket) -> None:
        self.relay = relay
        self.sock = sock
        self.fd = sock.fileno()
        self.events = READABLE
        self.pending: bytearray | None = None
        self.ended = False
        self.shut = False
        self.count = 0

    def watch(self, events: int) -> None:
        if events != self.events:
            self.events = events
            self.relay.reactor.modify(self.fd, events)

    def on_readable(self) -> None:
        relay, other = self.relay, self.other
        if relay.is_closed:
            return
        if not self.events & READABLE:
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                relay.reset(os.strerror(error))
            elif not self.events:
                relay.reactor.mute(self.fd)
            return
        try:
            count = self.sock.recv_into(_SCRATCH, READ_SIZE, _NO_WAIT)
        except BlockingIOError:
            return
        except OSError as exc:
            relay.reset(exc.strerror or str(exc))
            return
        if not count:
            self.ended = True
            self.watch(self.events & ~READABLE)
            other.shut_after_pending()
            return
        self.count += count
        try:
            sent = other.sock.send(_SCRATCH[:count], _NO_WAIT)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            relay.reset(exc.strerror or str(exc))
            return
        if sent < count:
            other.pending = bytearray(_SCRATCH[sent:count])
            other.watch(other.events | WRITABLE)
            self.watch(self.events & ~READABLE)

    def on_writable(self) -> None:
        pending = self.pending
        if self.relay.is_closed:
            return
        if pending:
            try:
                sent = self.sock.send(pending, _NO_WAIT)
            except BlockingIOError:
                return
            except OSError as exc:
                self.relay.reset(exc.strerror or str(exc))
                return
            del pending[:sent]
            if pending:
                return
        self.pending = None
        self.watch(self.events & ~WRITABLE)
        if self.other.ended:
            self.shut_after_pending()
        else:
            self.other.watch(self.other.events | READABLE)

    def shut_after_pending(self) -> None:
        if self.pending is not None or self.shut:
            return
        self.shut = True
        if self.ended and self.other.shut:
            self.relay.finish(None)
            return
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as exc:
            if exc.errno != errno.ENOTCONN:
                self.relay.reset(exc.strerror or str(exc))

    def on_failed(self, error: Exception) -> None:
        self.relay.reset("internal error")


class PlainRelay:
    """Bytes between two connected non-blocking sockets, both owned and closed by the relay.

    Starts at once. Half-close is kept, a reset on one side becomes a reset on the other.
    """

    def __init__(self, reactor: Reactor, a: socket.socket, b: socket.socket) -> None:
        self.reactor = reactor
        self.is_closed = False
        """Whether both sockets are closed."""
        self._error: str | None = None
        self._closed = Signal()
        self._a, self._b = _Half(self, a), _Half(self, b)
        self._a.other, self._b.other = self._b, self._a
        for half in (self._a, self._b):
            # Until the end is an orderly one: not even our own death may look like one.
            reset_on_close(half.sock)
            reactor.add(half.fd, half, READABLE)

    @property
    def a_to_b(self) -> int:
        """Bytes read from `a` so far."""
        return self._a.count

    @property
    def b_to_a(self) -> int:
        """Bytes read from `b` so far."""
        return self._b.count

    def reset(self, reason: str = "cut") -> None:
        """Cut both sides now: both peers see RST. Idempotent."""
        self.finish(reason)

    def finish(self, error: str | None) -> None:
        """Close both sockets, in order if there is no error. Idempotent."""
        if self.is_closed:
            return
        self._error = error
        self.is_closed = True
        self._closed.set()
        for half in (self._a, self._b):
            self.reactor.forget(half.fd)
            if error is None:
                end_on_close(half.sock)
            half.sock.close()

    async def wait_closed(self) -> RelayResult:
        """Wait for both directions to end. If cancelled: both sockets are reset and closed."""
        try:
            await self._closed.wait()
        finally:
            self.reset("cancelled")
        return RelayResult(self.a_to_b, self.b_to_a, self._error)
