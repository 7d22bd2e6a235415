"""The node agent's end of ZDS: listen, hand pods over, hear acknowledgements, notice the end."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import trio

from mesh.errors import (
    ConfigError,
    MeshError,
    ProtocolError,
    RemoteProtocolError,
    Unavailable,
)
from mesh.zds.codec import (
    Add,
    Del,
    Keep,
    Message,
    SnapshotSent,
    close_all,
    decode_ack,
    decode_hello,
    encode_request,
)
from mesh.zds.packets import DEADLINE_SECONDS, receive, send

MAX_CLIENTS = 8
ACCEPT_INTERVAL_SECONDS = 0.2
SOCKET_MODE = 0o600
DIRECTORY_MODE = 0o700

Take: TypeAlias = Callable[[Mapping[int, int]], None]
"""Becomes the owner of listening sockets, by `Listener`. Must not raise."""


class Session:
    """One connected proxy, seen by the agent. Requests queue up; one is in flight.

    A session is over, and every request raises Unavailable, after the first error of any
    kind: an answer that is late, unreadable or not asked for leaves nothing to rely on.
    """

    def __init__(
        self,
        sock: trio.socket.SocketType,
        deadline_seconds: float,
    ) -> None:
        self.takes_listeners = False
        """Whether an Add may carry listeners, and its answer will."""
        self._sock = sock
        self._deadline = deadline_seconds
        self._turn = trio.Lock()
        self._answers, self._answered = trio.open_memory_channel[str](0)
        self._is_waiting = False
        self._take: Take | None = None
        self._error: MeshError | None = None
        self.closed = trio.Event()

    async def add(self, message: Add, take: Take | None = None) -> str | None:
        """Hand over a pod; `message.fds` are only borrowed. The proxy's error, or None.

        When the message says that listeners are kept, `take` is called with those that the
        proxy answers with, and owns them from then on.
        Raises Unavailable when the proxy is gone. If cancelled: the session is closed,
        because it is unknown what the proxy did.
        """
        return await self._request(message, take)

    async def keep(self, uid: str) -> str | None:
        """Name a pod whose namespace is not known, in a snapshot. As `add`."""
        return await self._request(Keep(uid))

    async def delete(self, uid: str) -> str | None:
        """Take a pod away. As `add`."""
        return await self._request(Del(uid))

    async def snapshot_sent(self) -> str | None:
        """End the snapshot. As `add`."""
        return await self._request(SnapshotSent())

    def close(self, error: MeshError | None = None) -> None:
        """End the session; may be called again."""
        if not self.closed.is_set():
            self._error = error
            self.closed.set()
            self._sock.close()
            self._answers.close()

    @property
    def error(self) -> MeshError | None:
        """Why it ended; None while it lives and after an orderly end."""
        return self._error

    async def _request(self, message: Message, take: Take | None = None) -> str | None:
        data = encode_request(message)
        async with self._turn:
            if self.closed.is_set():
                raise Unavailable("ZDS: the node proxy is gone")
            try:
                with trio.fail_after(self._deadline):
                    self._is_waiting, self._take = True, take
                    await send(self._sock, data, message.fds if isinstance(message, Add) else ())
                    error = await self._answered.receive()
            except trio.TooSlowError as exc:
                late = Unavailable(
                    f"ZDS: the node proxy did not answer within {self._deadline:g} s"
                )
                self.close(late)
                raise late from exc
            except trio.EndOfChannel as exc:
                raise Unavailable("ZDS: the node proxy is gone") from (self._error or exc)
            except BaseException:
                self.close()
                raise
            return error or None

    async def read(self) -> None:
        """Take answers, and notice the end, until the session is over.

        If cancelled: the session stays as it is.
        """
        try:
            while True:
                data, fds = await receive(self._sock)
                if not data:
                    close_all(fds)
                    self.close()
                    return
                await self._answers.send(self._accept(data, fds))
        except (ProtocolError, Unavailable) as exc:
            self.close(exc)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.close()

    def _accept(self, data: bytes, fds: Sequence[int]) -> str:
        """The error in an answer; its listeners go to who asked for them.

        Without a wait in between, so that no cancellation loses a descriptor.
        """
        try:
            if not self._is_waiting:
                raise RemoteProtocolError("ZDS: an answer that nobody asked for")
            answer, take = decode_ack(data, fds), self._take
            if answer.listeners and take is None:
                raise RemoteProtocolError("ZDS: listeners that nobody asked for")
        except RemoteProtocolError:
            close_all(fds)
            raise
        self._is_waiting, self._take = False, None
        if answer.listeners and take is not None:
            take(answer.listeners)
        return answer.error


class ZdsServer:
    """The agent's end: listens, and runs `on_session` for every proxy that says hello."""

    def __init__(
        self,
        *,
        deadline_seconds: float = DEADLINE_SECONDS,
        on_failure: Callable[[MeshError], None] = lambda _: None,
    ) -> None:
        self._deadline = deadline_seconds
        self._on_failure = on_failure
        self._clients = 0

    async def serve(
        self,
        path: str | os.PathLike[str],
        on_session: Callable[[Session], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen on `path` until cancelled; started when connections are accepted.

        `on_session` is cancelled when its proxy goes away; when it returns, the proxy is
        disconnected. A proxy that breaks the protocol is told to `on_failure`, as is a
        MeshError out of `on_session`.
        Raises ConfigError when the path cannot be used, or another agent answers there.
        If cancelled: every session is closed and the socket file removed.
        """
        listener, inode = open_listener(path)
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    try:
                        sock, _ = await listener.accept()
                    except OSError as exc:
                        # A lack of descriptors passes; the listener stays good.
                        self._on_failure(Unavailable(f"ZDS accept: {exc.strerror or exc}"))
                    else:
                        if self._clients >= MAX_CLIENTS:
                            sock.close()
                            self._on_failure(Unavailable(f"more than {MAX_CLIENTS} ZDS clients"))
                        else:
                            self._clients += 1
                            nursery.start_soon(self._serve_client, sock, on_session)
                    await trio.sleep(ACCEPT_INTERVAL_SECONDS)
        finally:
            listener.close()
            with contextlib.suppress(OSError):
                # Only our own file: a successor may have put its own there.
                if os.stat(path).st_ino == inode:
                    os.unlink(path)

    async def _serve_client(
        self, sock: trio.socket.SocketType, on_session: Callable[[Session], Awaitable[None]]
    ) -> None:
        session = Session(sock, self._deadline)
        errors: list[MeshError] = []
        try:
            session.takes_listeners = await self._read_hello(sock)
            async with trio.open_nursery() as nursery:

                async def read() -> None:
                    await session.read()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(read)
                await on_session(session)
                nursery.cancel_scope.cancel()
        except* MeshError as group:
            errors = list(_leaves(group))
        finally:
            self._clients -= 1
            session.close()
        # What ended the session is the cause of whatever else went wrong in it.
        for error in [session.error] if session.error is not None else errors:
            self._on_failure(error)

    async def _read_hello(self, sock: trio.socket.SocketType) -> bool:
        with trio.move_on_after(self._deadline) as scope:
            data, fds = await receive(sock)
        if scope.cancelled_caught:
            raise Unavailable("ZDS: a client connected and said nothing")
        close_all(fds)
        if not data:
            raise Unavailable("ZDS: a client connected and left")
        return decode_hello(data)


def _leaves(group: BaseExceptionGroup[MeshError]) -> Iterator[MeshError]:
    for each in group.exceptions:
        if isinstance(each, BaseExceptionGroup):
            yield from _leaves(each)
        else:
            yield each


def open_listener(path: str | os.PathLike[str]) -> tuple[trio.socket.SocketType, int]:
    """A listening SEQPACKET socket at `path`, mode 0600, and the inode of its file.

    A stale file is removed, but only if it is a socket and nobody answers there; missing
    directories are made, mode 0700. Raises ConfigError.
    """
    where = Path(path)
    try:
        where.parent.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        _remove_stale(where)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(os.fspath(where))
            # Before listen(), so that nobody gets in by the wider mode.
            where.chmod(SOCKET_MODE)
            inode = where.stat().st_ino
            listener.listen(MAX_CLIENTS)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
    except OSError as exc:
        raise ConfigError(
            f"cannot listen: {exc.strerror or exc}",
            file=os.fspath(path),
            hint="look at the directory's owner and mode; a path has at most 107 bytes",
        ) from exc
    return trio.socket.from_stdlib_socket(listener), inode


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError("is in the way and no socket", file=os.fspath(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError as exc:
            if exc.errno in {errno.ECONNREFUSED, errno.ENOENT}:
                path.unlink(missing_ok=True)
                return
            # EAGAIN: a full queue, so somebody listens.
            if exc.errno != errno.EAGAIN:
                raise
    raise ConfigError(
        "another node agent answers there",
        file=os.fspath(path),
        hint="only one may run on a node",
    )
