"""Accepting the connections of a pod: one fiber each, no trio task.

A burst is taken in portions, so that it cannot starve what is open; at the limit the others
wait in the kernel's queue, and when descriptors run out we pause instead of spinning.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import trio

from mesh import sockets
from mesh.fiber import Fibers
from mesh.reactor import READABLE, Reactor
from mesh.runtime import log
from mesh.sockets import SocketAddress

ACCEPTS_PER_TURN = 64
OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
PAUSE_SECONDS = 0.1

_log = log.get("inpod")


class Acceptor:
    """Accepts from `listener` (lent) and starts `serve(sock, peer)` in `fibers`, at most
    `limit` at a time. `close` before the listener is closed.
    """

    def __init__(
        self,
        reactor: Reactor,
        nursery: trio.Nursery,
        fibers: Fibers,
        name: str,
        listener: socket.socket,
        serve: Callable[[socket.socket, SocketAddress], Coroutine[Any, Any, None]],
        limit: int,
    ) -> None:
        self._reactor = reactor
        self._nursery = nursery
        self._fibers = fibers
        self._name = name
        self._listener = listener
        self._family = listener.family
        self._serve = serve
        self._left = limit
        reactor.add(listener.fileno(), self, READABLE)
        # Should we be killed, the peer must not take that for an orderly end. Accepted sockets
        # inherit it.
        sockets.reset_on_close(listener)

    def close(self) -> None:
        """Accept no more. Idempotent."""
        if self._listener.fileno() >= 0:
            self._reactor.remove(self._listener.fileno())

    def on_readable(self) -> None:
        """Take what waits, up to a portion."""
        for _ in range(min(ACCEPTS_PER_TURN, self._left)):
            try:
                sock, peer = sockets.accept(self._listener, self._family)
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno in OUT_OF_RESOURCES:
                    _log.warning("accept_failed", listener=self._name, error=exc.strerror)
                    self._watch(0)
                    self._nursery.start_soon(self._pause)
                    return
                continue
            self._left -= 1
            self._fibers.start(self._serve_one(sock, peer))
        if not self._left:
            self._watch(0)

    def on_writable(self) -> None:
        """Never asked for."""

    def on_failed(self, error: Exception) -> None:
        """A bug: this listener is dead, the others live."""

    async def _serve_one(self, sock: socket.socket, peer: SocketAddress) -> None:
        try:
            # Blocking, as it is: whoever uses it says MSG_DONTWAIT each time.
            await self._serve(sock, peer)
        finally:
            # What is still open was not carried to its end: the peer must not take it for one.
            if sock.fileno() >= 0:
                sockets.reset_on_close(sock)
                sock.close()
            self._left += 1
            if self._left == 1:
                self._watch(READABLE)

    async def _pause(self) -> None:
        await trio.sleep(PAUSE_SECONDS)
        if self._left:
            self._watch(READABLE)

    def _watch(self, events: int) -> None:
        if self._listener.fileno() >= 0:
            self._reactor.modify(self._listener.fileno(), events)
