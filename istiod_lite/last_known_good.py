"""Serving without the source: the last-known-good state is kept in a file, and used after a start.

    start ── the source tells everything in time ──────────────────────────> as it is
      └──── it does not, and there is a state ──> what was last known ── the source ──> as it is

While what was last known is served, the controller is ready, says so in its log, its metrics
and its findings, writes nothing into the cluster, and certifies only pods that were there.
Without a usable file nothing is served before the source has spoken, as ever: an early empty
answer would read as "everything is gone". The file is replaced at once (written beside, then
renamed), readable by its owner only, and bounded (`istiod_lite.saved_state`).
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import trio
from prometheus_client import CollectorRegistry, Gauge

from istiod_lite import saved_state
from istiod_lite.ads import AdsService
from istiod_lite.index import ClusterIndex
from istiod_lite.saved_state import MAX_BYTES, SavedState, TokenKeys
from mesh.cluster.objects import Pod
from mesh.cluster.validate import Finding, Severity
from mesh.errors import ConfigError
from mesh.runtime import log

#: At most so often the state is written.
SAVE_SECONDS = 5.0
# And never for more than a twentieth of the time.
_SPARED = 20.0

_log = log.get(__name__)
Follow = Callable[..., Awaitable[None]]


@dataclass(slots=True)
class _Restored:
    """What was restored, while it is what is served."""

    saved_at: float
    pods: dict[tuple[str, str], Pod] = field(default_factory=dict)
    on_node: dict[str, list[Pod]] = field(default_factory=dict)


class LastKnownGood:
    """See the module. `path` None keeps no file. `clock` gives seconds since the epoch.

    It is the `PodIndex` of certificates, too: of the pods as they are, or as they were.
    """

    def __init__(
        self,
        path: Path | None,
        index: ClusterIndex,
        ads: AdsService,
        registry: CollectorRegistry,
        clock: Callable[[], float],
        *,
        wait_seconds: float,
        max_age_seconds: float,
    ) -> None:
        self._path = path
        self._index = index
        self._ads = ads
        self._clock = clock
        self._wait_seconds = wait_seconds
        self._max_age_seconds = max_age_seconds
        self._restored: _Restored | None = None
        self._change = trio.Event()
        self._is_saved = True
        self._lock = trio.Lock()
        self._keys = TokenKeys()
        self.synced = trio.Event()
        self._stale = Gauge(
            "ambit_istiod_stale",
            "1 while the state of an earlier process is served, because the source is silent",
            registry=registry,
        )
        self._saved = Gauge(
            "ambit_istiod_state_saved_timestamp_seconds",
            "When the state that is served, or was saved last, was in force",
            registry=registry,
        )
        self._stale.set(0)

    @property
    def saved_at(self) -> float | None:
        """When what is served now was saved (epoch seconds); None when it comes of the source."""
        return self._restored.saved_at if self._restored is not None else None

    def findings(self) -> list[Finding]:
        """That what is served is old, while it is."""
        if self._restored is None:
            return []
        message = f"the source does not answer: what was known at {_text(self.saved_at)} is served"
        hint = "look at the controller's log: watch_interrupted says why"
        return [Finding(Severity.WARNING, message, hint=hint)]

    # -- for who judges callers ----------------------------------------------------------

    @property
    def keys(self) -> TokenKeys:
        """The keys of tokens, as they were published last."""
        return self._keys

    @keys.setter
    def keys(self, keys: TokenKeys) -> None:
        if keys != self._keys:
            self._keys = keys
            self.look()

    def pod(self, namespace: str, name: str) -> Pod | None:
        """See `PodIndex.pod`."""
        if self._restored is None:
            return self._index.pod(namespace, name)
        return self._restored.pods.get((namespace, name))

    def pods_on_node(self, node: str) -> Iterable[Pod]:
        """See `PodIndex.pods_on_node`."""
        if self._restored is None:
            return self._index.pods_on_node(node)
        return self._restored.on_node.get(node, [])

    # -- tasks ---------------------------------------------------------------------------

    async def follow(
        self,
        publish: Follow,
        on_stale: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run `publish`, which starts when the source has told everything; started when
        something is served. If cancelled: the file stays as it was written last.
        """
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                async with trio.open_nursery() as inner:
                    await inner.start(publish)
                    self._replace()

            nursery.start_soon(run)
            if self._path is not None:
                with trio.move_on_after(self._wait_seconds):
                    await self.synced.wait()
                if not self.synced.is_set() and await self._restore(self._path):
                    on_stale()
                    task_status.started()
                    await self.synced.wait()
                    return
            await self.synced.wait()
            task_status.started()

    def look(self) -> None:
        """Something was published."""
        self._is_saved = False
        self._change.set()

    async def keep(self) -> None:
        """Save what is published, for ever. If cancelled: half a file is nobody's."""
        await self.synced.wait()
        while True:
            self._change = trio.Event()
            started = trio.current_time()
            await self.save()
            spent = trio.current_time() - started
            await trio.sleep(max(SAVE_SECONDS, spent * _SPARED))
            await self._change.wait()

    async def save(self) -> None:
        """Write what is in force, if it is newer than what is written and not itself restored."""
        if self._path is None or self._is_saved or self._restored is not None:
            return
        async with self._lock:
            snapshot = self._ads.snapshot
            if snapshot is None:
                return
            self._is_saved = True
            mesh = self._index.mesh
            state = SavedState(
                cluster_id=mesh.cluster_id,
                trust_domain=mesh.trust_domain,
                saved_at=self._clock(),
                snapshot=snapshot,
                pods=tuple(self._index.pods()),
                keys=self._keys,
            )
            try:
                size = await trio.to_thread.run_sync(partial(_write, self._path, state))
            except (ConfigError, OSError) as exc:
                # It is for bad days; a good one goes on without.
                _log.warning("state_not_saved", file=str(self._path), reason=str(exc))
                return
        self._saved.set(state.saved_at)
        _log.debug("state_saved", file=str(self._path), bytes=size)

    # -- the change from one to the other ------------------------------------------------

    async def _restore(self, path: Path) -> bool:
        try:
            state = await trio.to_thread.run_sync(self._read, path)
        except FileNotFoundError:
            _log.info("state_absent", file=str(path))
            return False
        except (ConfigError, OSError) as exc:
            _log.error(
                "state_refused",
                file=str(path),
                reason=str(exc),
                hint="nothing is served until the source answers; the file may be deleted",
            )
            return False
        if self.synced.is_set():
            return False
        restored = _Restored(state.saved_at)
        for pod in state.pods:
            restored.pods[pod.namespace, pod.name] = pod
            restored.on_node.setdefault(pod.node, []).append(pod)
        self._restored = restored
        if not self._keys.jwks:
            self._keys = state.keys
        self._stale.set(1)
        self._saved.set(state.saved_at)
        self._ads.publish(state.snapshot)
        _log.warning(
            "serving_last_known_good",
            saved_at=_text(state.saved_at),
            age_seconds=round(self._clock() - state.saved_at),
            resources=sum(map(len, state.snapshot.resources.values())),
        )
        return True

    def _read(self, path: Path) -> SavedState:
        mesh = self._index.mesh
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 4096)
        return saved_state.decode(
            content,
            cluster_id=mesh.cluster_id,
            trust_domain=mesh.trust_domain,
            now=self._clock(),
            max_age_seconds=self._max_age_seconds,
        )

    def _replace(self) -> None:
        """The source has told everything, and that is published."""
        if self._restored is not None:
            _log.info("source_synced", instead_of=_text(self._restored.saved_at))
        self._restored = None
        self._stale.set(0)
        self.look()
        self.synced.set()


def _write(path: Path, state: SavedState) -> int:
    content = saved_state.encode(state)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    return len(content)


def _text(moment: float | None) -> str:
    return datetime.fromtimestamp(moment or 0.0, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
