"""FAST PATH: bytes between a captured socket and a tunnel.

Everything runs as reactor callbacks over process-wide buffers: a relay that is idle costs
no buffer, and one that is stalled holds at most one stream window. Half-close is kept in
every order; an error on one side becomes a reset on the other, never an orderly end
(RFC 9113 section 8.5). Nothing here decides, logs or measures; two integers count bytes.
Between two plain sockets `mesh.hbone.plain_relay` does the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from mesh.hbone.plain_relay import PlainRelay, RelayResult
from mesh.http import h2_frames as h2
from mesh.reactor import READABLE, WRITABLE, Reactor
from mesh.sockets import end_on_close, reset_on_close
from mesh.tls.session import READ_SIZE

if TYPE_CHECKING:
    from mesh.hbone.tunnel import Tunnel

__all__ = ["PlainRelay", "RelayResult", "Sink", "SocketEnd"]

_FRAMES = h2.FrameBuffer(READ_SIZE)
_SCRATCH = memoryview(bytearray(READ_SIZE))
_NO_WAIT = socket.MSG_DONTWAIT
_MAX_VIEWS = 64
TOO_MUCH_WAITS = "too much waits for those who do not read"
_SIOCOUTQ, _SIOCINQ = 0x5411, 0x541B


class Sink(Protocol):
    """The local end of a tunnel: a socket (`SocketEnd`) or an L7 codec.

    When it is done with both directions it calls `tunnel.finish(error)`.
    """

    def deliver(self, views: Sequence[memoryview], total: int) -> None:
        """Take `total` bytes; the views are valid during the call only.

        Report bytes with `tunnel.credit(n)` once they are really consumed.
        """
        ...

    def end(self) -> None:
        """The peer's orderly end: nothing more will be delivered."""
        ...

    def stop(self) -> None:
        """After `end`: the peer wants nothing more either. What was delivered still counts."""
        ...

    def reset(self, code: int) -> None:
        """The tunnel was cut (an HTTP/2 error code): drop everything, pass the cut on."""
        ...

    def resume(self) -> None:
        """There may be room to send again after `tunnel.room()` gave 0."""
        ...


class SocketEnd:
    """A socket as the local end of a tunnel; owns and closes it."""

    __slots__ = (
        "_discarding",
        "_events",
        "_fd",
        "_held",
        "_pending",
        "_reactor",
        "_sink_ended",
        "_sock",
        "_source_ended",
        "_tunnel",
    )

    def __init__(
        self, tunnel: Tunnel, sock: socket.socket, reactor: Reactor, *, is_reset_on_close: bool
    ) -> None:
        self._tunnel = tunnel
        self._sock: socket.socket | None = sock
        self._fd = sock.fileno()
        self._reactor = reactor
        self._events = READABLE
        self._pending: bytearray | None = None
        self._held = 0
        self._source_ended = False
        self._sink_ended = False
        self._discarding = False
        # Until the end is an orderly one: not even our own death may look like one.
        if not is_reset_on_close:
            reset_on_close(sock)
        reactor.add(self._fd, self, READABLE)

    def _watch(self, events: int) -> None:
        if events != self._events and self._sock is not None:
            self._events = events
            self._reactor.modify(self._fd, events)

    # -- socket to tunnel

    def on_readable(self) -> None:
        """Move up to one buffer of bytes into the tunnel."""
        sock = self._sock
        if sock is None:
            return
        if not self._events & READABLE:
            self._hung_up(sock)
            return
        if self._discarding:
            self._discard(sock)
            return
        tunnel = self._tunnel
        room = tunnel.room()
        if room <= 0:
            self._watch(self._events & ~READABLE)
            return
        max_frame = tunnel.max_frame
        slots = _FRAMES.slots(room, max_frame)
        try:
            if len(slots) == 1:
                count = sock.recv_into(slots[0], 0, _NO_WAIT)
            else:
                count = sock.recvmsg_into(slots, 0, _NO_WAIT)[0]
        except BlockingIOError:
            return
        except OSError as exc:
            self._broken(exc)
            return
        if count:
            tunnel.send_frames(_FRAMES.seal(count, room, max_frame, tunnel.stream_id), count)
            return
        self._source_ended = True
        tunnel.end()
        if self._sink_ended and self._pending is None:
            self._close(None)
        else:
            self._watch(self._events & ~READABLE)

    def resume(self) -> None:
        """Read again, unless reading has ended."""
        if not self._source_ended:
            self._watch(self._events | READABLE)

    def _hung_up(self, sock: socket.socket) -> None:
        # Reported although nobody asked to read: a reset, or both directions shut.
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._broken(OSError(error, os.strerror(error)))
        elif not self._events:
            self._reactor.mute(self._fd)

    # -- tunnel to socket

    def deliver(self, views: Sequence[memoryview], total: int) -> None:
        """Write to the socket; what it does not take waits, and is not credited yet."""
        sock, pending = self._sock, self._pending
        if sock is None:
            return
        if pending is not None:
            for view in views:
                pending += view
            self._hold(len(pending))
            return
        try:
            if len(views) == 1:
                sent = sock.send(views[0], _NO_WAIT)
            elif len(views) <= _MAX_VIEWS:
                sent = sock.sendmsg(views, (), _NO_WAIT)
            else:
                sent = sock.send(b"".join(views), _NO_WAIT)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self._broken(exc)
            return
        if sent < total:
            self._pending = _rest(views, sent)
            self._watch(self._events | WRITABLE)
            self._hold(total - sent)
        if sent:
            self._tunnel.credit(sent)

    def _hold(self, size: int) -> None:
        """`size` bytes wait now; too many of them cut the tunnel."""
        change, self._held = size - self._held, size
        if change and not self._tunnel.hold(change):
            self._abort()
            self._tunnel.reset(h2.ENHANCE_YOUR_CALM, TOO_MUCH_WAITS)

    def on_writable(self) -> None:
        """Write what waits."""
        sock, pending = self._sock, self._pending
        if sock is None:
            return
        if pending:
            try:
                sent = sock.send(pending, _NO_WAIT)
            except BlockingIOError:
                return
            except OSError as exc:
                self._broken(exc)
                return
            del pending[:sent]
            self._hold(len(pending))
            if pending:
                self._tunnel.lag()
            self._tunnel.credit(sent)
            if pending or self._sock is None:
                return
        self._pending = None
        self._watch(self._events & ~WRITABLE)
        if self._sink_ended:
            self._shut(sock)
        if self._discarding:
            self.leave()

    def end(self) -> None:
        """Pass the orderly end on, after what waits."""
        self._sink_ended = True
        if self._pending is None and self._sock is not None:
            self._shut(self._sock)

    def _shut(self, sock: socket.socket) -> None:
        if self._source_ended:
            self._close(None)
            return
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)

    # -- ends

    def stop(self) -> None:
        """Nobody listens any more: write what waits, throw away what the application says."""
        if self._source_ended:
            return
        self._discarding = True
        self._watch(self._events | READABLE)
        if not self.leave():
            self._tunnel.connection.linger(self)

    def leave(self, *, at_once: bool = False) -> bool:
        """Close, although the application has neither ended nor said anything: once it has got
        everything, or `at_once`, which leaves that to the kernel. Whether it is closed.
        """
        sock = self._sock
        if sock is None or self._pending is not None or _waiting(sock, _SIOCINQ):
            return sock is None
        if at_once or not _waiting(sock, _SIOCOUTQ):
            self._close(None)
        return self._sock is None

    def _discard(self, sock: socket.socket) -> None:
        try:
            count = sock.recv_into(_SCRATCH, READ_SIZE, _NO_WAIT)
        except BlockingIOError:
            return
        except OSError as exc:
            self._broken(exc)
            return
        if not count:
            self._source_ended = True
            if self._pending is None:
                self._close(None)
            else:
                self._watch(self._events & ~READABLE)
        elif self._pending is None and not _waiting(sock, _SIOCOUTQ):
            # Everything has arrived: closing now cannot take it away from the application.
            self._close(None)

    def reset(self, code: int) -> None:
        """The tunnel was cut: the application sees RST."""
        self._abort()

    def _broken(self, error: OSError) -> None:
        self._abort()
        self._tunnel.reset(h2.CONNECT_ERROR, f"application connection: {error.strerror or error}")

    def on_failed(self, error: Exception) -> None:
        """A bug in a callback."""
        self._abort()
        self._tunnel.reset(h2.INTERNAL_ERROR, "internal error")

    def _abort(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            self._pending = None
            self._hold(0)
            self._reactor.forget(self._fd)
            reset_on_close(sock)
            sock.close()

    def _close(self, error: str | None) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            self._reactor.forget(self._fd)
            end_on_close(sock)
            sock.close()
            self._tunnel.finish(error)


def _rest(views: Sequence[memoryview], sent: int) -> bytearray:
    rest = bytearray()
    for view in views:
        size = len(view)
        if sent >= size:
            sent -= size
        else:
            rest += view[sent:]
            sent = 0
    return rest


def _waiting(sock: socket.socket, queue: int) -> int:
    """The bytes that wait in one of the kernel's queues: not read yet, or not acknowledged."""
    (count,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), queue, b"\0\0\0\0"))
    return int(count)
