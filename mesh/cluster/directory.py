"""A plain directory of Kubernetes YAML and JSON behind the `Cluster` protocol.

Read-only it is a user's directory: any layout, several objects to a file, edited by hand;
an edit arrives in well under 200 ms. Writable it is the whole API server of a mesh without
Kubernetes: one object to a file (`<kind>/<namespace>/<name>.json`), each written beside and
renamed into place, writers of all processes kept apart by one lock, so that no patch is
lost. Readers take no lock: they see the old file or the new.

Changes come by inotify (watchfiles). If that fails (no more watches, a foreign file
system), it polls instead and says so with a Fault. What the kernel may drop is caught by a
slow rescan. `mesh.cluster.tree` knows the files; this is the trio shell around it.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio
import watchfiles

from mesh.cluster.api import (
    Deleted,
    Event,
    Fault,
    NotFound,
    Object,
    Put,
    Ref,
    Synced,
    merge_patch,
    ref_of,
)
from mesh.cluster.documents import read_documents
from mesh.cluster.tree import MAX_FILE_BYTES, FileTree, Refreshed, read_file
from mesh.errors import ConfigError, Unavailable

# Milliseconds: how long a burst of changes may be gathered, and how long a quiet ends it.
_DEBOUNCE_MS = 100
_STEP_MS = 25
_SETTLE_SECONDS = 0.1
_POLL_SECONDS = 0.1
_RESCAN_SECONDS = 10.0
_LOCK_SECONDS = 10.0
_BUFFERED_EVENTS = 256
_NO_NAMESPACE = "_"


class DirectoryCluster:
    """Objects in the files under `path`. See the module; raises ConfigError if it is none.

    `notify=False` polls from the start, for file systems known to tell nothing.
    """

    def __init__(self, path: Path, *, writable: bool = False, notify: bool = True) -> None:
        self._root = Path(os.path.abspath(path))
        self._writable = writable
        self._notify = notify
        self._lookup: FileTree | None = None
        self._looking = trio.Lock()

    @property
    def writable(self) -> bool:
        """Whether `apply`, `patch` and `delete` may be used."""
        return self._writable

    @asynccontextmanager
    async def watch(
        self, kinds: Sequence[str] = ()
    ) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        """See `Cluster.watch`. A slow reader loses nothing: changes gather in the files."""
        if not self._root.is_dir():
            raise ConfigError("not a directory", file=str(self._root))
        send, receive = trio.open_memory_channel[Event](_BUFFERED_EVENTS)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    _Follower(self._root, self._writable, kinds, send).run, self._notify
                )
                with receive:
                    yield receive
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # The caller's own error left our nursery in a wrapper that means nothing to it.
            if len(group.exceptions) == 1:
                raise group.exceptions[0] from group.exceptions[0].__cause__
            raise

    async def get(self, ref: Ref) -> Object | None:
        """See `Cluster.get`. Raises ConfigError if the object's own file cannot be read."""
        if self._writable:
            return self._load(ref)
        async with self._looking:
            if self._lookup is None:
                self._lookup = FileTree(self._root, is_patient=False)
            await trio.to_thread.run_sync(self._lookup.rescan)
            found = self._lookup.get(ref)
        return found.object if found else None

    async def apply(self, object: Object) -> None:  # noqa: A002
        """See `Cluster.apply`. If cancelled: nothing has been written, or all of it."""
        ref = ref_of(object)
        async with self._locked():
            self._store(ref, object)

    async def patch(self, ref: Ref, merge_patch: Mapping[str, Any]) -> None:
        """See `Cluster.patch`. If cancelled: nothing has been written, or all of it."""
        async with self._locked():
            current = self._load(ref)
            if current is None:
                raise NotFound(f"{ref} does not exist")
            self._store(ref, _merged(ref, current, merge_patch))

    async def delete(self, ref: Ref) -> None:
        """See `Cluster.delete`."""
        async with self._locked():
            with _file_errors(ref):
                self._path(ref).unlink(missing_ok=True)

    # -- files -------------------------------------------------------------------------

    def _path(self, ref: Ref) -> Path:
        # A Ref may come from anywhere; its parts must be names before they are path segments.
        ref_of(
            {
                "apiVersion": "v1",
                "kind": ref.kind.partition(".")[0],
                "metadata": {"name": ref.name, "namespace": ref.namespace},
            }
        )
        if os.sep in ref.kind:
            raise ConfigError(f"not a kind: {ref.kind[:80]!r}")
        return self._root / ref.kind / (ref.namespace or _NO_NAMESPACE) / f"{ref.name}.json"

    def _load(self, ref: Ref) -> Object | None:
        path = self._path(ref)
        try:
            data, _ = read_file(str(path))
        except ConfigError as exc:
            if isinstance(exc.__cause__, FileNotFoundError):
                return None
            raise
        for each in read_documents(data, str(path), marks=False):
            if each.ref == ref:
                return each.object
        raise ConfigError(f"does not hold {ref}", file=str(path))

    def _store(self, ref: Ref, obj: Object) -> None:
        path = self._path(ref)
        if ref.namespace and not obj["metadata"].get("namespace"):
            obj = {**obj, "metadata": {**obj["metadata"], "namespace": ref.namespace}}
        try:
            data = json.dumps(obj, allow_nan=False, ensure_ascii=False, indent=1).encode()
        except (TypeError, ValueError, RecursionError) as exc:
            raise ConfigError(f"{ref} cannot be written as JSON: {exc}") from exc
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"{ref} is larger than {MAX_FILE_BYTES >> 10} KiB")
        with _file_errors(ref):
            if path.exists() and path.read_bytes() == data:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.parent / f".{secrets.token_hex(8)}.tmp"
            try:
                beside.write_bytes(data)
                # No fsync: the live directory does not outlive the machine's run.
                os.replace(beside, path)
            finally:
                beside.unlink(missing_ok=True)

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        """Keep out every other writer of this directory. Raises Unavailable after 10 s."""
        if not self._writable:
            raise ConfigError("this directory is only read", file=str(self._root))
        with _file_errors(None):
            fd = os.open(self._root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with trio.move_on_after(_LOCK_SECONDS) as scope:
                while not _try_lock(fd):  # noqa: ASYNC110 - nothing tells when a lock is free
                    await trio.sleep(0.002)
            if scope.cancelled_caught:
                raise Unavailable(f"another writer holds {self._root} for {_LOCK_SECONDS:.0f} s")
            yield
        finally:
            os.close(fd)


class _Follower:
    """One watch: a task that hears of changes, and one that reads and tells them."""

    def __init__(
        self,
        root: Path,
        writable: bool,
        kinds: Sequence[str],
        send: trio.MemorySendChannel[Event],
    ) -> None:
        self._root = root
        self._kinds = frozenset(kinds)
        self._send = send
        self._heard = trio.Event()
        self._paths: set[str] = set()
        self._must_rescan = False
        self._tree = FileTree(
            root,
            marks=not writable,
            is_patient=not writable,
            is_wanted=self._is_wanted if writable and kinds else None,
        )

    def _is_wanted(self, inner: str) -> bool:
        # In the layout that we write ourselves, the path says the kind: leave the rest unread.
        parts = inner.split(os.sep)
        return len(parts) != 3 or parts[0] in self._kinds

    async def run(self, notify: bool) -> None:
        async with self._send, trio.open_nursery() as nursery:
            nursery.start_soon(self._listen if notify else self._poll)
            # The listener registers its watches before it first waits, and has done so when we
            # have been scheduled twice; whatever changes from here on is seen or heard of.
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            try:
                await self._tell()
            except trio.BrokenResourceError:
                nursery.cancel_scope.cancel()  # the reader has closed its end

    async def _tell(self) -> None:
        unsettled = await self._emit(self._tree.rescan)
        await self._send.send(Synced())
        while True:
            with trio.move_on_after(_SETTLE_SECONDS if unsettled else _RESCAN_SECONDS) as scope:
                await self._heard.wait()
            paths, must_rescan = self._paths | unsettled, self._must_rescan
            if scope.cancelled_caught and not unsettled:
                must_rescan = True
            self._heard, self._paths, self._must_rescan = trio.Event(), set(), False
            if must_rescan:
                unsettled = await self._emit(self._tree.rescan)
            else:
                unsettled = await self._emit(partial(self._tree.refresh, paths))

    async def _emit(self, look: Callable[[], Refreshed]) -> set[str]:
        refreshed = await trio.to_thread.run_sync(look)
        for event in refreshed.events:
            if (
                isinstance(event, Put | Deleted)
                and self._kinds
                and event.ref.kind not in self._kinds
            ):
                continue
            await self._send.send(event)
        return refreshed.unsettled

    async def _listen(self) -> None:
        stop = trio.Event()
        try:
            changes = watchfiles.awatch(
                self._root,
                watch_filter=_is_of_interest,
                debounce=_DEBOUNCE_MS,
                step=_STEP_MS,
                stop_event=stop,
                # Such a directory is a fault of its own; it must not cost the others their watch.
                ignore_permission_denied=True,
            )
            async with trio.open_nursery() as nursery, aclosing(changes):
                nursery.start_soon(_set_when_cancelled, stop)
                async for batch in changes:
                    self._paths.update(path for _, path in batch)
                    self._heard.set()
        except* (OSError, RuntimeError) as group:
            reason = str(group.exceptions[0])[:200]
            error = ConfigError(
                f"the kernel does not report changes ({reason}): polling every {_POLL_SECONDS} s",
                file=str(self._root),
                hint="fs.inotify.max_user_watches",
            )
            await self._send.send(Fault(error))
        await self._poll()

    async def _poll(self) -> None:
        while True:
            await trio.sleep(_POLL_SECONDS)
            self._must_rescan = True
            self._heard.set()


async def _set_when_cancelled(stop: trio.Event) -> None:
    # The notifier waits in a thread, which cancellation does not reach.
    try:
        await trio.sleep_forever()
    finally:
        stop.set()


def _is_of_interest(change: watchfiles.Change, path: str) -> bool:
    # `..data` is how a mounted ConfigMap is replaced; other hidden names are temporary files.
    name = os.path.basename(path)
    return not name.startswith(".") or name.startswith("..")


def _merged(ref: Ref, current: Object, patch: Mapping[str, Any]) -> Object:
    obj: Object = merge_patch(current, patch)
    if ref_of(obj) != ref:
        raise ConfigError(f"a patch cannot turn {ref} into {ref_of(obj)}")
    return obj


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _file_errors(ref: Ref | None) -> Iterator[None]:
    """OSError -> MeshError: a wrong set-up is ConfigError, a full disk is Unavailable."""
    try:
        yield
    except OSError as exc:
        where = f"{ref}: " if ref else ""
        message = f"{where}{exc.strerror}"
        if isinstance(exc, PermissionError | FileNotFoundError | NotADirectoryError):
            raise ConfigError(message, file=str(exc.filename or "")) from exc
        raise Unavailable(f"{message} ({exc.filename})") from exc
