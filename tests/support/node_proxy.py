"""A small node proxy for tests of the node agent: real ZDS, real listeners, settable answers."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from mesh import netns, sockets, zds
from mesh.errors import Unavailable


class NodeProxy:
    """Listens on 15001, 15006 and 15008 in every pod it is given."""

    def __init__(self) -> None:
        self.heard: list[zds.Message] = []
        self.pods: dict[str, dict[int, socket.socket]] = {}
        self.namespaces: dict[str, tuple[int, int]] = {}
        self.refusal = ""
        self.has_snapshot = trio.Event()

    def uids(self, kind: type[zds.Message]) -> list[str]:
        """The uids of what was heard of one kind, in order."""
        return [
            m.uid for m in self.heard if isinstance(m, kind) and not isinstance(m, zds.SnapshotSent)
        ]

    async def run(self, path: Path) -> None:
        """Serve the agent at `path` until cancelled, dialling again as the real one does."""
        try:
            while True:
                with contextlib.suppress(Unavailable), await zds.connect(path) as connection:
                    await self._obey(connection)
                await trio.sleep(0.02)
        finally:
            for uid in list(self.pods):
                self._stop(uid)

    async def _obey(self, connection: zds.ZdsConnection) -> None:
        named: set[str] = set()
        in_snapshot = True
        while True:
            message = await connection.receive()
            self.heard.append(message)
            answer = ""
            match message:
                case zds.Add(uid=uid):
                    named.add(uid)
                    answer = self.refusal or self._start(message)
                case zds.Keep(uid=uid):
                    named.add(uid)
                case zds.Del(uid=uid):
                    self._stop(uid)
                case zds.SnapshotSent():
                    for uid in [uid for uid in self.pods if in_snapshot and uid not in named]:
                        self._stop(uid)
                    in_snapshot = False
            if isinstance(message, zds.Add):
                message.close()
            await connection.ack(answer)
            if isinstance(message, zds.SnapshotSent):
                self.has_snapshot.set()

    def _start(self, message: zds.Add) -> str:
        (fd,) = message.fds
        if self.namespaces.get(message.uid) == netns.identity(fd):
            return ""
        self._stop(message.uid)
        try:
            self.pods[message.uid] = {
                port: sockets.open_listener(port, namespace=fd, mark=sockets.PROXY_MARK)
                for port in sorted(sockets.PRIVATE_PORTS)
            }
        except OSError as exc:
            return str(exc)
        self.namespaces[message.uid] = netns.identity(fd)
        return ""

    def _stop(self, uid: str) -> None:
        self.namespaces.pop(uid, None)
        for listener in self.pods.pop(uid, {}).values():
            listener.close()


@asynccontextmanager
async def running_proxy(path: Path) -> AsyncIterator[NodeProxy]:
    """A proxy that dials the agent at `path`; leaving the context kills it."""
    proxy = NodeProxy()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(proxy.run, path)
        yield proxy
        nursery.cancel_scope.cancel()
