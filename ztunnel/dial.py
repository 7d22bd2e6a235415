"""Opening a TCP connection from inside a pod. Only that: no deadline, no choice of address."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Callable

import trio

from mesh.errors import KernelError, Unavailable
from mesh.fiber import in_task
from mesh.sockets import SocketAddress, open_outgoing

_HINTS = {
    errno.ECONNREFUSED: "nothing listens there",
    errno.EHOSTUNREACH: "there is no route to it from this node",
    errno.ENETUNREACH: "there is no route to it from this node",
}


# Odd ones, which connect() takes last, so that they are not those of the caller's own live
# connections; and the one that rested longest, because the kernel's search among thousands that
# are in TIME_WAIT takes longer than the whole connection.
_next_port = itertools.cycle(range(32769, 61000, 2)).__next__
_PORTS_TO_TRY = 4


async def dial(
    namespace: int,
    destination: SocketAddress,
    nursery: trio.Nursery | None = None,
    *,
    source: str | None = None,
    stays_inside: bool = False,
    on_wait: Callable[[], None] | None = None,
) -> socket.socket:
    """Connect to `destination` from network namespace `namespace`, optionally from a foreign
    `source` address. The socket is non-blocking and carries the proxy's mark; `stays_inside`
    says that `destination` is in the namespace, too.

    Raises Unavailable. The caller's cancel scope is the timeout; `on_wait` is called before
    the first wait, when there is one; a fiber waits in a task of `nursery`. If cancelled: closed.
    """
    ports_left = 0 if source is None else _PORTS_TO_TRY
    while True:
        port = _next_port() if ports_left else 0
        try:
            sock = open_outgoing(
                destination.ip,
                namespace=namespace,
                source=source,
                source_port=port,
                stays_inside=stays_inside,
            )
        except KernelError as exc:
            if port and exc.errno == errno.EADDRINUSE:
                ports_left -= 1
                continue
            raise Unavailable(f"cannot dial {destination}: {exc}") from exc
        error = sock.connect_ex(tuple(destination))
        if not (port and error == errno.EADDRNOTAVAIL):
            break
        ports_left -= 1
        sock.close()
    try:
        if error == errno.EINPROGRESS:
            error = 0
            if not _is_connected(sock):
                if on_wait is not None:
                    on_wait()
                await in_task(nursery, trio.lowlevel.wait_writable, sock)
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            reason = os.strerror(error).lower()
            raise Unavailable(f"connect to {destination}: {reason}", hint=_HINTS.get(error, ""))
    except BaseException:
        sock.close()
        raise
    return sock


def _is_connected(sock: socket.socket) -> bool:
    # Within a pod the handshake is over before connect() returns; waiting would cost a turn.
    try:
        sock.getpeername()
    except OSError:
        return False
    return True
