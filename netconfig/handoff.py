"""Hands this node's pods to the node proxy: the ZDS server, and what a proxy must be told.

`HandOff` knows every pod the proxy should carry. A proxy that connects gets them all as a
snapshot; afterwards a new pod goes to the newest proxy only (during an upgrade the older one
is draining), the end of a pod to all of them.

Descriptors are borrowed: whoever registers a pod keeps its descriptor open until it has
called `forget` or `delete`. For each message a duplicate is sent and closed again, so that a
pod which ends meanwhile cannot have its descriptor's number reused under a message.

Keeper of the pods' listeners: a proxy that knows how answers with its listening sockets. Our
duplicates keep them open when that proxy is killed or exchanged, so that who connects
meanwhile waits in their queues, and the next proxy gets them with the pod. They are ours alone
and are closed by `forget` and `delete`, at the latest: no pod's namespace lives on by them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import trio

from mesh import netns, zds
from mesh.errors import MeshError, Unavailable
from mesh.runtime import log
from netconfig.plan import Target

_log = log.get("handoff")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A pod to be carried; `fd` is borrowed, None while its namespace is not known.
    `listeners`, by kind, are owned.
    """

    target: Target
    fd: int | None
    listeners: dict[int, int] = field(default_factory=dict)


class HandOff:
    """The pods that the node proxy should carry, and the proxies that are connected.

    `on_connected` is called when a proxy has taken its snapshot: pods that wait for one
    should try again.
    """

    def __init__(self, on_connected: Callable[[], None] = lambda: None) -> None:
        self._entries: dict[str, _Entry] = {}
        self._sessions: list[zds.Session] = []
        self._on_connected = on_connected
        self._may_begin = trio.Event()

    def begin(self) -> None:
        """The pods that were captured before are registered: snapshots may be sent."""
        self._may_begin.set()

    @property
    def connected(self) -> int:
        """How many proxies are connected."""
        return len(self._sessions)

    def pods(self) -> list[str]:
        """The uids of the pods registered."""
        return sorted(self._entries)

    async def serve(
        self,
        path: Path,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve proxies on `path`. Never returns; raises ConfigError.

        If cancelled: proxies are disconnected (and go on carrying what they have).
        """
        server = zds.ZdsServer(on_failure=_tell_failure)
        await server.serve(path, self._serve_session, task_status=task_status)

    def register(self, target: Target, fd: int | None) -> None:
        """Name the pod in snapshots from now on, without telling a proxy now."""
        before = self._entries.pop(target.uid, None)
        listeners = before.listeners if before is not None else {}
        known = before.fd if before is not None else None
        if known is None or fd is None or netns.identity(known) != netns.identity(fd):
            _drop(listeners)
        self._entries[target.uid] = _Entry(target, fd, listeners)

    def forget(self, uid: str) -> None:
        """Name the pod in no snapshot any more, and let go of its listeners."""
        entry = self._entries.pop(uid, None)
        if entry is not None:
            _drop(entry.listeners)

    def listeners(self, uid: str) -> list[int]:
        """The kinds of listeners that are kept for a pod."""
        entry = self._entries.get(uid)
        return sorted(entry.listeners) if entry is not None else []

    async def add(self, target: Target, fd: int) -> str | None:
        """Register the pod and hand it to the newest proxy; the proxy's error, or None.

        Raises Unavailable without a proxy, or when it goes away. Waits for at most the ZDS
        deadline. If cancelled: that proxy is disconnected, and comes back for a snapshot.
        """
        self.register(target, fd)
        if not self._sessions:
            raise Unavailable("no node proxy is connected")
        return await self._send(self._sessions[-1], target.uid)

    async def delete(self, uid: str) -> None:
        """Forget the pod and take it from every proxy. Never fails: a proxy that does not
        hear of it now learns by its next snapshot.
        """
        self.forget(uid)
        async with trio.open_nursery() as nursery:
            for session in list(self._sessions):
                nursery.start_soon(self._delete_from, session, uid)

    async def _delete_from(self, session: zds.Session, uid: str) -> None:
        try:
            error = await session.delete(uid)
        except Unavailable as exc:
            _log.info("delete_not_delivered", uid=uid, error=str(exc))
        else:
            if error:
                _log.warning("delete_refused", uid=uid, error=error)

    async def _serve_session(self, session: zds.Session) -> None:
        await self._may_begin.wait()
        self._sessions.append(session)
        try:
            await self._snapshot(session)
            await session.closed.wait()
        finally:
            self._sessions.remove(session)
            _log.info("proxy_disconnected", connected=len(self._sessions))

    async def _snapshot(self, session: zds.Session) -> None:
        uids = list(self._entries)
        for uid in uids:
            error = await self._send(session, uid)
            if error:
                # The proxy goes on trying by itself, and stays unready until it succeeds.
                _log.warning("pod_refused_in_snapshot", uid=uid, error=error)
        error = await session.snapshot_sent()
        if error:
            raise Unavailable(f"the node proxy refused the snapshot: {error}")
        _log.info("proxy_connected", pods=len(uids), connected=len(self._sessions))
        self._on_connected()

    async def _send(self, session: zds.Session, uid: str) -> str | None:
        entry = self._entries.get(uid)
        if entry is None:  # gone since the snapshot began
            return None
        if entry.fd is None:
            return await session.keep(uid)
        if not session.takes_listeners:
            # It opens its own, on the same ports.
            _drop(entry.listeners)
        kinds = tuple(entry.listeners)
        target = entry.target
        fds: list[int] = []
        try:
            fds.extend(map(os.dup, (entry.fd, *entry.listeners.values())))
            message = zds.Add(
                uid,
                target.ref.name,
                target.ref.namespace,
                target.service_account,
                tuple(fds),
                kinds if session.takes_listeners else None,
            )
            return await session.add(message, functools.partial(self._keep, uid))
        except OSError as exc:
            raise Unavailable(f"cannot hand {target.ref} over: {exc.strerror}") from exc
        finally:
            for fd in fds:
                os.close(fd)

    def _keep(self, uid: str, given: Mapping[int, int]) -> None:
        """Take over the listeners of a pod, in place of those that were kept."""
        listeners = dict(given)
        entry = self._entries.get(uid)
        try:
            if entry is None or entry.fd is None:  # gone since it was handed over
                raise Unavailable("the pod is gone")
            inside = netns.identity(entry.fd)
            if any(netns.identity_of_socket(each) != inside for each in listeners.values()):
                raise Unavailable("they are not the pod's")
        except MeshError as exc:
            _log.warning("listeners_refused", uid=uid, error=str(exc))
            _drop(listeners)
            return
        _drop(entry.listeners)
        entry.listeners.update(listeners)


def _drop(listeners: dict[int, int]) -> None:
    """Close what is kept."""
    while listeners:
        _, fd = listeners.popitem()
        os.close(fd)


def _tell_failure(error: MeshError) -> None:
    _log.warning("proxy_failed", error=str(error))
