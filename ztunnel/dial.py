"""Opening a TCP connection from inside a pod. Only that: no deadline, no choice of address."""

from __future__ import annotations

import errno
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


async def dial(
    namespace: int,
    destination: SocketAddress,
    nursery: trio.Nursery | None = None,
    *,
    source: str | None = None,
    on_wait: Callable[[], None] | None = None,
) -> socket.socket:
    """Connect to `destination` from network namespace `namespace`, optionally from a foreign
    `source` address. The socket is non-blocking and carries the proxy's mark.

    Raises Unavailable. The caller's cancel scope is the timeout; `on_wait` is called before
    the first wait, when there is one; a fiber waits in a task of `nursery`. If cancelled: closed.
    """
    try:
        sock = open_outgoing(destination.ip, namespace=namespace, source=source)
    except KernelError as exc:
        raise Unavailable(f"cannot dial {destination}: {exc}") from exc
    try:
        error = sock.connect_ex(tuple(destination))
        if error == errno.EINPROGRESS and not _is_connected(sock):
            if on_wait is not None:
                on_wait()
            await in_task(nursery, trio.lowlevel.wait_writable, sock)
        if error == errno.EINPROGRESS:
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
