"""Accepting HTTP/2 connections of the control plane: TLS under a timeout, ALPN h2, a limit
on connections, and a drain that lets streams end.

A connection that fails concerns nobody else: its end is told to `on_failure`, and a bug in
a handler goes to `supervise`, which lifecycle provides.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import trio

from mesh.errors import IdentityError, MeshError, RemoteProtocolError, Unavailable
from mesh.http.client import ALPN
from mesh.http.driver import Connection, Timing
from mesh.http.h2 import Limits
from mesh.http.stream import Stream
from mesh.sockets import SocketAddress, from_sockaddr, set_keepalive

_ACCEPT_PAUSE_SECONDS = 0.1
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

FailureSink = Callable[[SocketAddress, MeshError], None]


class Supervisor(Protocol):
    """`mesh.runtime.lifecycle.supervise`: runs a task, logs a bug in it and goes on."""

    def __call__(
        self, name: str, fn: Callable[..., Awaitable[object]], /, *args: object
    ) -> Awaitable[None]:
        """Run `fn(*args)`; MeshError and cancellation pass."""
        ...


async def propagate(name: str, fn: Callable[..., Awaitable[object]], /, *args: object) -> None:
    """The supervisor of tests: a bug ends the server."""
    del name
    await fn(*args)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Bounds of a server; times in seconds."""

    max_connections: int = 1024
    handshake_seconds: float = 10.0
    grace_seconds: float = 5.0
    """How long streams may live on once a drain began."""
    limits: Limits = field(default_factory=Limits)
    timing: Timing = field(default_factory=lambda: Timing(idle_seconds=300.0, stall_seconds=60.0))


async def serve_http2(
    listener: socket.socket | trio.SocketListener,
    ssl_context: ssl.SSLContext | None,
    handler: Callable[[Stream], Awaitable[None]],
    *,
    settings: ServerSettings | None = None,
    drain: trio.Event | None = None,
    supervise: Supervisor = propagate,
    on_failure: FailureSink | None = None,
    task_status: trio.TaskStatus[SocketAddress] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `drain` is set and the connections are over; without `ssl_context` in the
    clear. Owns the listener. Started with the address that it listens on.

    If cancelled: listener and connections are closed, handlers cancelled.
    """
    server = _Server(ssl_context, handler, settings or ServerSettings(), supervise, on_failure)
    if isinstance(listener, socket.socket):
        listener.setblocking(False)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    async with listener, trio.open_nursery() as nursery:
        task_status.started(from_sockaddr(listener.socket.getsockname()))
        nursery.start_soon(server.accept, listener, nursery)
        if drain is None:
            await trio.sleep_forever()
        else:
            await drain.wait()
        server.accepting.cancel()
        await listener.aclose()
        with trio.move_on_after(server.settings.grace_seconds):
            async with trio.open_nursery() as drains:
                for connection in list(server.connections):
                    drains.start_soon(connection.drain)
        nursery.cancel_scope.cancel()


class _Server:
    def __init__(
        self,
        ssl_context: ssl.SSLContext | None,
        handler: Callable[[Stream], Awaitable[None]],
        settings: ServerSettings,
        supervise: Supervisor,
        on_failure: FailureSink | None,
    ) -> None:
        self.settings = settings
        self.connections: set[Connection] = set()
        self.accepting = trio.CancelScope()
        self._ssl_context = ssl_context
        self._handler = handler
        self._supervise = supervise
        self._on_failure = on_failure
        self._count = 0

    async def accept(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        with self.accepting:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as exc:
                    if exc.errno not in _OUT_OF_RESOURCES:
                        raise Unavailable(f"cannot accept: {os.strerror(exc.errno or 0)}") from exc
                    # Nothing to do about it here; connections that end will help.
                    await trio.sleep(_ACCEPT_PAUSE_SECONDS)
                    continue
                if self._count >= self.settings.max_connections:
                    await trio.aclose_forcefully(stream)
                    continue
                self._count += 1
                nursery.start_soon(self._supervise, "connection", self._serve, stream)

    async def _serve(self, transport: trio.SocketStream) -> None:
        peer = SocketAddress("", 0)
        try:
            peer = from_sockaddr(transport.socket.getpeername())
            set_keepalive(transport.socket)  # type: ignore[arg-type]
            connection = await self._open(transport, peer)
        except OSError:
            await trio.aclose_forcefully(transport)
        except MeshError as exc:
            await trio.aclose_forcefully(transport)
            self._report(peer, exc)
        except BaseException:
            await trio.aclose_forcefully(transport)
            raise
        else:
            await self._run(connection)
        finally:
            self._count -= 1

    async def _run(self, connection: Connection) -> None:
        self.connections.add(connection)
        try:
            await connection.run()
        finally:
            self.connections.discard(connection)
        if connection.failure is not None:
            self._report(connection.peer, connection.failure)

    async def _open(self, transport: trio.SocketStream, peer: SocketAddress) -> Connection:
        stream: trio.abc.Stream = transport
        certificate = None
        if self._ssl_context is not None:
            with trio.move_on_after(self.settings.handshake_seconds) as patience:
                stream, certificate = await self._secure(transport, self._ssl_context)
            if patience.cancelled_caught:
                raise Unavailable("the TLS handshake took too long")
        return Connection(
            stream,
            handler=self._handler,
            limits=self.settings.limits,
            timing=self.settings.timing,
            peer=peer,
            peer_certificate=certificate,
        )

    @staticmethod
    async def _secure(
        transport: trio.SocketStream, context: ssl.SSLContext
    ) -> tuple[trio.abc.Stream, bytes | None]:
        secured = trio.SSLStream(transport, context, server_side=True, https_compatible=True)
        try:
            await secured.do_handshake()
        except (trio.BrokenResourceError, ssl.SSLError, OSError) as exc:
            cause = exc.__cause__ or exc
            if isinstance(cause, ssl.SSLError):
                raise IdentityError(f"TLS handshake: {cause.reason or cause}") from exc
            raise Unavailable("the peer left during the TLS handshake") from exc
        if secured.selected_alpn_protocol() != ALPN:
            raise RemoteProtocolError("the peer does not offer h2 (ALPN)")
        return secured, secured.getpeercert(binary_form=True)

    def _report(self, peer: SocketAddress, failure: MeshError) -> None:
        if self._on_failure is not None:
            self._on_failure(peer, failure)
