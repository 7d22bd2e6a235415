"""The inner side of the lab's door (`mesh.lab.door`): a port of each node's loopback that leads to
one address of the machine outside.

For a handful of connections that carry telemetry, so bytes are pumped by trio, and no
faster than that.
"""

from __future__ import annotations

import contextlib
import socket

import trio

from mesh import sockets
from mesh.errors import Unavailable
from mesh.lab.door import ask

MAX_CONNECTIONS = 32


class Doorway:
    """All nodes go through the one door, one at a time; `door` stays the caller's."""

    def __init__(self, door: socket.socket) -> None:
        self._door = door
        self._asking = trio.Lock()
        self._slots = trio.Semaphore(MAX_CONNECTIONS)

    async def serve(self, net: int, port: int, address: str) -> None:
        """Lead `port` of loopback, and of the node's own `address`, in the node's namespace `net`
        outside, for ever. Pods of the node, such as waypoints, come by its address.

        If cancelled: its connections are cut. Raises KernelError when the port is taken there.
        """
        listeners = [
            trio.SocketListener(
                trio.socket.from_stdlib_socket(
                    sockets.open_listener(port, namespace=net, host=host)
                )
            )
            for host in ("127.0.0.1", "::1", address)
        ]
        await trio.serve_listeners(self._carry, listeners)

    async def _carry(self, near: trio.SocketStream) -> None:
        async with near, self._slots:
            # Nobody outside: the node's connection ends, as it would have there.
            with contextlib.suppress(Unavailable):
                far = await self._open()
                async with far, trio.open_nursery() as nursery:
                    nursery.start_soon(_pump, near, far)
                    nursery.start_soon(_pump, far, near)

    async def _open(self) -> trio.SocketStream:
        """A connection to the outside. Raises Unavailable."""
        async with self._asking:
            opened = await trio.to_thread.run_sync(ask, self._door, abandon_on_cancel=True)
        opened.setblocking(False)
        return trio.SocketStream(trio.socket.from_stdlib_socket(opened))


async def _pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for data in source:
            await sink.send_all(data)
        await sink.send_eof()
