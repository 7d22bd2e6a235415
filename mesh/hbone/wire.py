"""One TLS connection with an H2Core on it, as a reactor handler.

It moves bytes between socket, TLS session and core: reads, decrypts and parses what is
there; gathers what is to be sent and encrypts it once per turn; closes in order or at
once. What the streams mean is the subclass's (`mesh.hbone.connection`): it is the core's
Receiver and hears `_torn_down` at the end.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from abc import ABC, abstractmethod

import trio

from mesh.errors import MeshError, RemoteProtocolError
from mesh.http.h2_core import H2Core
from mesh.reactor import READABLE, WRITABLE, Reactor
from mesh.sockets import from_sockaddr
from mesh.tls.session import PLAIN, WOULD_BLOCK, TlsSession, tls_failure

LINGER_SECONDS = 5.0
_SMALL_WRITE = 4096
_EARLY = 8 << 10
_MAX_WAITING_OUTPUT = 1 << 20


class Wire(ABC):
    """The moving of bytes; owns the session (and its socket)."""

    core: H2Core

    def __init__(self, reactor: Reactor, session: TlsSession) -> None:
        self.reactor = reactor
        self.peer_address = from_sockaddr(session.sock.getpeername())
        self.local_address = from_sockaddr(session.sock.getsockname())
        self.failure: str | None = None
        """Why the connection ended abnormally; None while open or after an orderly end."""
        self.is_blocked = False
        """Whether the TLS connection takes no more bytes now."""
        self.is_closed = False
        """Whether the connection has ended."""
        session.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._session = session
        self._fd = session.sock.fileno()
        self._error: MeshError | None = None
        self._write_error: OSError | None = None
        self._started = self._dirty = False
        self._closing = False
        self._closing_at = 0.0
        self._reads = 0
        self._closed = trio.Event()

    # ---- for the subclass

    @abstractmethod
    def _is_drained(self) -> bool:
        """Whether nothing is left to do, so that the connection may close in order."""

    @abstractmethod
    def _unblocked(self) -> None:
        """Everything went out; there is room again."""

    @abstractmethod
    def _torn_down(self, reason: str) -> None:
        """The connection has ended, the socket is closed."""

    def _start(self) -> None:
        """Begin to read and write. Idempotent."""
        if not self._started and not self.is_closed:
            self._started = True
            self.reactor.add(self._fd, self, READABLE)
            self.touch()
            # The handshake may have read the peer's first frames already.
            self._decrypt()

    async def wait_closed(self) -> None:
        """Wait until the connection has ended."""
        await self._closed.wait()

    def close(self, reason: str = "closed") -> None:
        """Abrupt: GOAWAY if it can be sent at once; every stream ends with an error.

        Idempotent.
        """
        if self.is_closed:
            return
        if self._started and not self._closing:
            self.core.goaway()
            self._last_words()
        self._tear_down(reason)

    def touch(self) -> None:
        """Flush at the end of this turn."""
        if not self._dirty and not self.is_closed:
            self._dirty = True
            self.reactor.defer(self)

    def gathered(self) -> None:
        """As `touch`; but what fills half a TLS record goes out now, so that the peer has
        something to do while this turn goes on.
        """
        if len(self.core.out) < _EARLY or self.is_blocked:
            self.touch()
            return
        try:
            self._session.encrypt(self._take_output())
            if not self._session.flush():
                self._block()
        except OSError as exc:
            self._write_failed(exc)

    def write(self, frames: memoryview) -> None:
        """Send frames: small ones together at the end of the turn, large ones at once."""
        if len(frames) < _SMALL_WRITE:
            self.core.out += frames
            self.touch()
            return
        session = self._session
        try:
            if self.core.out:
                session.encrypt(self._take_output())
            session.encrypt(frames)
            if not session.flush():
                self._block()
        except OSError as exc:
            self._write_failed(exc)

    # ---- reactor handler

    def on_readable(self) -> None:
        """Read, decrypt and parse what is there."""
        if self.is_closed:
            return
        try:
            count = self._session.fill()
        except OSError as exc:
            self._lost(exc)
            return
        if count == WOULD_BLOCK:
            return
        if count == 0:
            self._ended_by_peer()
            return
        self._reads += 1
        self._decrypt()

    def _decrypt(self) -> None:
        session, core = self._session, self.core
        more = True
        while more and not self.is_closed:
            try:
                count, more = session.take()
            except ssl.SSLError as exc:
                if self._closing:
                    self._tear_down(None)
                    return
                self._error = tls_failure(exc, str(self.peer_address))
                self._tear_down(str(self._error))
                return
            if count and not self._closing:
                try:
                    core.receive(PLAIN[:count], time.monotonic())
                except RemoteProtocolError as exc:
                    self._broken(exc)
                    return
            if session.peer_closed:
                self._ended_by_peer()
                return
        if core.out or session.has_output:
            self.touch()

    def on_writable(self) -> None:
        """Send what waits; tell the tunnels when everything went out."""
        if self.is_closed:
            return
        try:
            if not self._session.flush():
                return
        except OSError as exc:
            self._write_failed(exc)
            return
        self.is_blocked = False
        self.reactor.modify(self._fd, READABLE)
        self.flush()
        if not self.is_blocked:
            self._unblocked()

    def flush(self) -> None:
        """Send what was gathered."""
        self._dirty = False
        if self.is_closed:
            return
        if self.is_blocked:
            if len(self.core.out) > _MAX_WAITING_OUTPUT:
                self.close("the peer does not read")
            return
        finished = not self.core.streams and self._is_drained() and not self._closing
        if finished:
            self._closing = True
            self._closing_at = trio.current_time()
        try:
            if self.core.out:
                self._session.encrypt(self._take_output())
            if finished:
                self._session.close_notify()
            if not self._session.flush():
                self._block()
            elif self._closing:
                self._session.sock.shutdown(socket.SHUT_WR)
        except OSError as exc:
            self._write_failed(exc)

    def on_failed(self, error: Exception) -> None:
        """A bug in a callback."""
        self._tear_down("internal error")

    def _take_output(self) -> bytearray:
        out, self.core.out = self.core.out, bytearray()
        return out

    def _block(self) -> None:
        if not self.is_blocked:
            self.is_blocked = True
            self.reactor.modify(self._fd, READABLE | WRITABLE)

    # ---- ends

    def _write_failed(self, error: OSError) -> None:
        # Only writing ends here: what the peer said before it left is still to be read, and
        # reading it to its end tears down.
        self._write_error = error
        self.is_blocked = True
        self.reactor.modify(self._fd, READABLE)

    def _ended_by_peer(self) -> None:
        if self._write_error is not None:
            self._lost(self._write_error)
        else:
            self._tear_down("connection closed by the peer" if self.core.streams else None)

    def _lost(self, error: OSError) -> None:
        if self._closing:
            self._tear_down(None)
        else:
            self._tear_down(f"connection lost: {error.strerror or error}")

    def _broken(self, error: RemoteProtocolError) -> None:
        self._error = error
        self.core.goaway(error.h2_code, str(error))
        self._last_words()
        self._tear_down(f"protocol error of the peer: {error}")

    def _last_words(self) -> None:
        if self.is_blocked:
            return
        with contextlib.suppress(OSError, ssl.SSLError):
            if self.core.out:
                self._session.encrypt(self._take_output())
            self._session.close_notify()
            self._session.flush()

    def _tear_down(self, failure: str | None) -> None:
        if self.is_closed:
            return
        self.failure = failure
        self.is_closed = True
        self._closed.set()
        self.reactor.remove(self._fd)
        self._session.close()
        self._torn_down(failure if failure is not None else "connection closed")
