"""FAST PATH: where a codec's bytes come from and go to: a tunnel, or a plain socket.

Both have one interface, so the L7 code is written once. Reading stops while a codec has paused it
(a socket leaves the poll set, a tunnel withholds credit); what cannot be written at once waits
here and `is_blocked` says so, until `on_writable` tells that all of it went out. Callbacks of the
reactor throughout: nothing here waits, and an idle transport holds no buffer.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Protocol

from mesh.hbone.tunnel import Tunnel
from mesh.http import h2_frames as h2
from mesh.reactor import READABLE, WRITABLE, Reactor
from mesh.sockets import end_on_close, reset_on_close
from mesh.tls.session import READ_SIZE

_SCRATCH = memoryview(bytearray(READ_SIZE))
_NO_WAIT = socket.MSG_DONTWAIT


class Codec(Protocol):
    """What reads a transport. Calls must not raise for what a peer did."""

    def on_data(self, data: memoryview) -> None:
        """Bytes; the view is valid during the call."""
        ...

    def on_end(self) -> None:
        """The peer's orderly end: nothing more will come, it may still listen."""
        ...

    def on_lost(self, reason: str) -> None:
        """The connection was cut. Called once, never after `close` or `abort`."""
        ...

    def on_writable(self) -> None:
        """What was held back has gone out."""
        ...


class Transport(Protocol):
    """One connection's bytes."""

    codec: Codec
    is_closed: bool

    def start(self, codec: Codec) -> None:
        """Read into `codec`; before, nothing is read."""
        ...

    @property
    def is_blocked(self) -> bool:
        """Whether bytes wait here because the peer does not take them."""
        ...

    @property
    def backlog(self) -> int:
        """How many."""
        ...

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send now or as soon as possible. Nothing happens when closed."""
        ...

    def pause(self) -> None:
        """No more `on_data`, soon."""
        ...

    def unpause(self) -> None:
        """`on_data` again."""
        ...

    def shut(self) -> None:
        """Our orderly end, after what waits; reading goes on."""
        ...

    def close(self) -> None:
        """Our orderly end after what waits, then nothing more is read. Idempotent."""
        ...

    def abort(self) -> None:
        """Cut now. Idempotent."""
        ...


class TunnelTransport:
    """A tunnel as a transport (it is the tunnel's `Sink`). `start` begins the reading."""

    __slots__ = ("_closing", "_ending", "_paused", "_pending", "_tunnel", "_uncredited", "codec",
                 "is_closed")  # fmt: skip

    codec: Codec

    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel
        self._pending: bytearray | None = None
        self._paused = self._ending = self._closing = False
        self._uncredited = 0
        self.is_closed = False

    def start(self, codec: Codec) -> None:
        """Read into `codec`, beginning with what has arrived."""
        self.codec = codec
        self._tunnel.attach(self)

    @property
    def is_blocked(self) -> bool:
        """Whether bytes wait here."""
        return self._pending is not None

    @property
    def backlog(self) -> int:
        """How many."""
        return len(self._pending) if self._pending is not None else 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """As far as both windows allow; the rest waits."""
        if self.is_closed or self._ending:
            return
        if self._pending is not None:
            self._pending += data
            return
        tunnel = self._tunnel
        if tunnel.send_whole(data):
            return
        room = tunnel.room()
        if len(data) <= room:
            tunnel.send(data)
            return
        view = memoryview(data)
        if room > 0:
            tunnel.send(view[:room])
            view = view[room:]
            tunnel.room()  # being asked without room, it promises to call resume()
        self._pending = bytearray(view)

    def pause(self) -> None:
        """Withhold credit: the peer may send one window more."""
        self._paused = True
        self._tunnel.lag()

    def unpause(self) -> None:
        """Give the credit."""
        self._paused = False
        count, self._uncredited = self._uncredited, 0
        if count and not self._tunnel.is_closed:
            self._tunnel.credit(count)

    def shut(self) -> None:
        """END_STREAM after what waits."""
        if not self._ending and not self.is_closed:
            self._ending = True
            if self._pending is None:
                self._tunnel.end()

    def close(self) -> None:
        """END_STREAM after what waits, then a polite RST_STREAM."""
        if self.is_closed:
            return
        self.is_closed = self._closing = self._ending = True
        if self._pending is None:
            self._finish()

    def _finish(self) -> None:
        self._tunnel.end()
        self._tunnel.reset(h2.NO_ERROR, "closed")

    def abort(self) -> None:
        """RST_STREAM: the peer's application sees a reset."""
        if not self.is_closed:
            self.is_closed = True
            self._pending = None
            self._tunnel.reset(h2.CANCEL, "aborted")

    # ---- for the tunnel

    def deliver(self, views: Sequence[memoryview], total: int) -> None:
        """DATA."""
        for view in views:
            if self.is_closed:
                break
            self.codec.on_data(view)
        if self._paused and not self.is_closed:
            self._uncredited += total
        elif not self._tunnel.is_closed:
            self._tunnel.credit(total)

    def resume(self) -> None:
        """There may be room again."""
        pending, tunnel = self._pending, self._tunnel
        if pending is None:
            return
        while pending and (room := tunnel.room()) > 0:
            tunnel.send(bytes(pending[:room]))
            del pending[:room]
        if pending or tunnel.is_closed:
            return
        self._pending = None
        if self._closing:
            self._finish()
        elif self._ending:
            tunnel.end()
        elif not self.is_closed:
            self.codec.on_writable()

    def end(self) -> None:
        """END_STREAM."""
        if not self.is_closed:
            self.codec.on_end()

    def stop(self) -> None:
        """After its end the peer does not listen either: who asked has gone."""
        self._lost("the peer has gone")

    def reset(self, code: int) -> None:
        """The tunnel was cut."""
        self._lost(f"the tunnel was cut: {h2.error_name(code)}")

    def _lost(self, reason: str) -> None:
        if self.is_closed:
            self._pending = None
            return
        self.is_closed = True
        self._pending = None
        if not self._tunnel.is_closed:
            self._tunnel.reset(h2.CANCEL, reason)
        self.codec.on_lost(reason)


class SocketTransport:
    """A connected non-blocking socket, owned and closed here; in `open_ones` until then."""

    __slots__ = ("_closing", "_ending", "_events", "_fd", "_open", "_pending", "_reactor",
                 "_sock", "codec", "is_closed")  # fmt: skip

    codec: Codec

    def __init__(
        self, reactor: Reactor, sock: socket.socket, open_ones: set[SocketTransport]
    ) -> None:
        self._reactor = reactor
        self._sock = sock
        self._open = open_ones
        open_ones.add(self)
        self._fd = sock.fileno()
        self._events = READABLE
        self._pending: bytearray | None = None
        self._closing = self._ending = False
        self.is_closed = False
        # Until the end is an orderly one: not even our own death may look like one.
        reset_on_close(sock)

    def start(self, codec: Codec) -> None:
        """Read into `codec`."""
        self.codec = codec
        self._reactor.add(self._fd, self, READABLE)

    @property
    def is_blocked(self) -> bool:
        """Whether bytes wait here."""
        return self._pending is not None

    @property
    def backlog(self) -> int:
        """How many."""
        return len(self._pending) if self._pending is not None else 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """As much as the kernel takes; the rest waits."""
        if self.is_closed or self._ending:
            return
        if self._pending is not None:
            self._pending += data
            return
        try:
            sent = self._sock.send(data, _NO_WAIT)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # reading tells, after what the peer still said
        if sent < len(data):
            self._pending = bytearray(memoryview(data)[sent:])
            self._watch(self._events | WRITABLE)

    def pause(self) -> None:
        """Leave the poll set."""
        self._watch(self._events & ~READABLE)

    def unpause(self) -> None:
        """Enter it again."""
        if not self._closing:
            self._watch(self._events | READABLE)

    def shut(self) -> None:
        """FIN after what waits."""
        if not self._ending and not self.is_closed:
            self._ending = True
            if self._pending is None:
                self._send_fin()

    def close(self) -> None:
        """FIN after what waits, then nothing more is read."""
        if self.is_closed:
            return
        self.is_closed = True
        if self._pending is None:
            self._release(in_order=True)
        else:
            self._closing = True
            self._watch(WRITABLE)

    def abort(self) -> None:
        """RST."""
        if not self.is_closed or self._closing:
            self.is_closed = True
            self._release(in_order=False)

    def _send_fin(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            return  # reading tells

    def _release(self, *, in_order: bool) -> None:
        self._closing = False
        self._pending = None
        self._open.discard(self)
        self._reactor.remove(self._fd)
        if in_order:
            end_on_close(self._sock)
        self._sock.close()

    def _watch(self, events: int) -> None:
        if events != self._events:
            self._events = events
            self._reactor.modify(self._fd, events)

    def _lost(self, reason: str) -> None:
        if self._closing:
            self._release(in_order=False)
        elif not self.is_closed:
            self.is_closed = True
            self._release(in_order=False)
            self.codec.on_lost(reason)

    # ---- for the reactor

    def on_readable(self) -> None:
        """Read up to one buffer."""
        if not self._events & READABLE:
            # Reported although nobody asked: a reset, or both directions have ended.
            error = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self._lost(os.strerror(error))
            elif not self._events:
                self._reactor.mute(self._fd)
            return
        try:
            count = self._sock.recv_into(_SCRATCH, READ_SIZE, _NO_WAIT)
        except BlockingIOError:
            return
        except OSError as exc:
            self._lost(exc.strerror or str(exc))
            return
        if count:
            self.codec.on_data(_SCRATCH[:count])
            return
        self._watch(self._events & ~READABLE)
        self.codec.on_end()

    def on_writable(self) -> None:
        """Write what waits."""
        pending = self._pending
        if pending:
            try:
                sent = self._sock.send(pending, _NO_WAIT)
            except BlockingIOError:
                return
            except OSError as exc:
                self._lost(exc.strerror or str(exc))
                return
            del pending[:sent]
            if pending:
                return
        self._pending = None
        if self._closing:
            self._release(in_order=True)
            return
        self._watch(self._events & ~WRITABLE)
        if self._ending:
            self._send_fin()
        elif not self.is_closed:
            self.codec.on_writable()

    def on_failed(self, error: Exception) -> None:
        """A bug in a callback."""
        self._lost("internal error")
