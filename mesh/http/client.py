"""Dialling an HTTP/2 connection of the control plane: TCP, TLS with ALPN h2, SETTINGS.

All of it under one timeout, and every way to fail mapped: nobody there is Unavailable,
somebody who is not who they must be is IdentityError, who speaks something else is
RemoteProtocolError.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from mesh.errors import IdentityError, MeshError, RemoteProtocolError, Unavailable
from mesh.http.driver import Connection, Timing
from mesh.http.h2 import Limits
from mesh.sockets import SocketAddress, from_sockaddr

ALPN = "h2"
CONNECT_SECONDS = 5.0


@asynccontextmanager
async def open_connection(
    host: str,
    port: int,
    ssl_context: ssl.SSLContext | None,
    server_hostname: str | None = None,
    *,
    connect_timeout: float = CONNECT_SECONDS,
    timing: Timing | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[Connection]:
    """A connection that is ready for streams; without `ssl_context` in the clear.

    `server_hostname` (default: `host`) is what the certificate must name. Raises Unavailable,
    IdentityError, RemoteProtocolError; what the body raises comes out as it is, not in a
    group. If cancelled: the connection is closed.
    """
    target = str(SocketAddress(host, port))
    connection: Connection | None = None
    with trio.move_on_after(connect_timeout) as patience:
        transport = await _dial(host, port, target)
        try:
            peer = _peer_address(transport)
            stream: trio.abc.Stream = transport
            certificate = None
            if ssl_context is not None:
                stream, certificate = await _secure(
                    transport, ssl_context, server_hostname or host, target
                )
            connection = Connection(
                stream, limits=limits, timing=timing, peer=peer, peer_certificate=certificate
            )
        finally:
            if connection is None:
                await trio.aclose_forcefully(transport)
    if connection is None:
        raise _timed_out(target, connect_timeout)
    left = max(0.0, patience.deadline - trio.current_time())
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(connection.run)
            with trio.move_on_after(left):
                await _wait_ready(connection)
            if not connection.ready.is_set():
                raise _not_ready(connection, target, connect_timeout)
            yield connection
            connection.close()
    except BaseExceptionGroup as group:
        error = _unwrap(group)
        raise error from error.__cause__


def _unwrap(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The body's error without the nursery's group around it.

    When the outside cancels while the body fails, the cancellation wins over an expected
    failure; a bug is kept beside it.
    """
    cancelled, rest = group.split(trio.Cancelled)
    if cancelled is not None and (rest is None or rest.split(MeshError)[1] is None):
        return cancelled
    return group.exceptions[0] if len(group.exceptions) == 1 else group


async def _dial(host: str, port: int, target: str) -> trio.SocketStream:
    try:
        return await trio.open_tcp_stream(host, port)
    except OSError as exc:
        raise Unavailable(
            f"cannot connect to {target}: {_reason(exc)}", hint="is it running, is the name right?"
        ) from exc


async def _secure(
    transport: trio.SocketStream, context: ssl.SSLContext, name: str, target: str
) -> tuple[trio.SSLStream[trio.SocketStream], bytes | None]:
    secured = trio.SSLStream(transport, context, server_hostname=name, https_compatible=True)
    try:
        await secured.do_handshake()
    except (trio.BrokenResourceError, ssl.SSLError, OSError) as exc:
        cause = exc.__cause__ or exc
        if isinstance(cause, ssl.SSLError):
            raise IdentityError(
                f"TLS with {target} as {name}: {_tls_reason(cause)}",
                hint="does the server's certificate come from the configured root?",
            ) from exc
        raise Unavailable(f"{target} broke the connection during the TLS handshake") from exc
    if secured.selected_alpn_protocol() != ALPN:
        raise RemoteProtocolError(f"{target} does not speak HTTP/2 (ALPN)")
    return secured, secured.getpeercert(binary_form=True)


async def _wait_ready(connection: Connection) -> None:
    async with trio.open_nursery() as nursery:

        async def watch(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch, connection.ready)
        nursery.start_soon(watch, connection.closed)


def _not_ready(
    connection: Connection, target: str, seconds: float
) -> Unavailable | RemoteProtocolError:
    if not connection.closed.is_set():
        return _timed_out(target, seconds)
    if isinstance(connection.failure, RemoteProtocolError):
        return RemoteProtocolError(f"{target} does not speak HTTP/2: {connection.failure}")
    return Unavailable(f"{target} closed the connection at once")


def _timed_out(target: str, seconds: float) -> Unavailable:
    return Unavailable(f"{target} did not answer within {seconds:g} s")


def _peer_address(transport: trio.SocketStream) -> SocketAddress:
    try:
        return from_sockaddr(transport.socket.getpeername())
    except OSError as exc:
        raise Unavailable("the connection is gone") from exc


def _reason(exc: OSError) -> str:
    if isinstance(exc, socket.gaierror):
        return f"the name does not resolve ({exc.strerror})"
    causes = exc.__cause__
    if isinstance(causes, BaseExceptionGroup) and causes.exceptions:
        exc_of_last = causes.exceptions[-1]
        if isinstance(exc_of_last, OSError):
            exc = exc_of_last
    return exc.strerror or str(exc)


def _tls_reason(exc: ssl.SSLError) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return exc.verify_message
    return (exc.reason or str(exc)).lower().replace("_", " ")
