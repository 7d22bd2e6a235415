"""Who writes: one replica at a time, by a Lease of the API server.

Every replica serves xDS; what is written into the cluster is written by the holder of the
lease. Work runs while the lease is held and is cancelled when it is lost, which is before
another may take it: a holder that cannot renew gives up after `RENEW_SECONDS`, others wait
until the lease has not changed for `LEASE_SECONDS` *of their own clock*, so that clocks need
not agree. On a clean end the lease is given back at once.

After client-go's leader election, and the fields of coordination.k8s.io/v1.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import trio

from mesh.cluster.api import Conflict, Object, Ref, VersionedCluster
from mesh.errors import ConfigError, Unavailable
from mesh.retry import Random
from mesh.runtime import log

LEASE_SECONDS = 15.0
RENEW_SECONDS = 10.0
RETRY_SECONDS = 2.0

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds; see the module."""

    lease: float = LEASE_SECONDS
    renew: float = RENEW_SECONDS
    retry: float = RETRY_SECONDS

    @classmethod
    def of(cls, lease: float) -> Timing:
        """In the usual proportions, for a lease of so many seconds."""
        share = lease / LEASE_SECONDS
        return cls(lease, RENEW_SECONDS * share, RETRY_SECONDS * share)


class Leader:
    """One candidate, `identity`, for the Lease `ref`."""

    def __init__(
        self,
        cluster: VersionedCluster,
        ref: Ref,
        identity: str,
        rng: Random,
        timing: Timing = Timing(),
    ) -> None:
        self._cluster = cluster
        self._ref = ref
        self._identity = identity
        self._rng = rng
        self._timing = timing
        self._held: Object | None = None
        self._seen: tuple[object, float] = (None, 0.0)
        self.holder = ""

    @property
    def is_leader(self) -> bool:
        """Whether the lease is ours, as of the last renewal."""
        return self._held is not None

    async def run(
        self, work: Callable[[], Awaitable[None]], on_standby: Callable[[], None] = lambda: None
    ) -> None:
        """Do `work` whenever the lease is held, for ever; `on_standby` when it is another's.

        Ends if the cluster takes no leases. If cancelled: the lease is given back.
        """
        while True:
            try:
                await self._acquire(on_standby)
            except ConfigError as exc:
                _log.error("election_impossible", reason=str(exc), hint=exc.hint)
                on_standby()
                return
            _log.info("leading", lease=str(self._ref), identity=self._identity)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._renew, nursery.cancel_scope)
                    await work()
                    await trio.sleep_forever()  # work that is done is still ours
            finally:
                await self._release()
            _log.warning("leading_lost", lease=str(self._ref))

    async def _acquire(self, on_standby: Callable[[], None]) -> None:
        while True:
            try:
                if await self._try():
                    return
                on_standby()
            except Unavailable as exc:
                _log.debug("election_delayed", reason=str(exc))
            await trio.sleep(self._timing.retry * self._rng.uniform(0.8, 1.2))

    async def _try(self) -> bool:
        """Take the lease if it is free."""
        current = await self._cluster.get(self._ref)
        try:
            if current is None:
                self._held = await self._cluster.create(self._lease({}, 0))
                return True
            spec = current.get("spec") or {}
            self.holder = spec.get("holderIdentity") or ""
            version = current["metadata"]["resourceVersion"]
            if self._seen[0] != version:
                self._seen = (version, trio.current_time())
            waited = trio.current_time() - self._seen[1]
            duration = float(spec.get("leaseDurationSeconds") or self._timing.lease)
            if self.holder not in ("", self._identity) and waited < duration:
                return False
            changes = int(spec.get("leaseTransitions") or 0) + (self.holder != self._identity)
            self._held = await self._cluster.replace(self._lease(current["metadata"], changes))
        except Conflict:
            return False
        self.holder = self._identity
        return True

    async def _renew(self, scope: trio.CancelScope) -> None:
        while True:
            await trio.sleep(self._timing.retry)
            held = self._held
            if held is None:
                break
            renewed = False
            with trio.move_on_after(self._timing.renew):
                while not renewed:
                    try:
                        spec = {**held["spec"], "renewTime": _now()}
                        self._held = await self._cluster.replace({**held, "spec": spec})
                        renewed = True
                    except Conflict:
                        break
                    except (Unavailable, ConfigError):
                        await trio.sleep(self._timing.retry / 4)
            if not renewed:
                self._held = None
                break
        scope.cancel()

    async def _release(self) -> None:
        held, self._held = self._held, None
        if held is None:
            return
        # Shielded for a moment: the others need not wait for the lease to run out.
        with trio.move_on_after(1.0) as scope:
            scope.shield = True
            try:
                spec: dict[str, Any] = {**held["spec"], "holderIdentity": "", "renewTime": _now()}
                await self._cluster.replace({**held, "spec": spec})
            except (Unavailable, ConfigError) as exc:
                _log.debug("lease_not_released", reason=str(exc))

    def _lease(self, metadata: Any, changes: int) -> Object:
        now = _now()
        kept = {"resourceVersion": metadata["resourceVersion"]} if metadata else {}
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._ref.name, "namespace": self._ref.namespace, **kept},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": max(1, round(self._timing.lease)),
                "leaseTransitions": changes,
                "acquireTime": now,
                "renewTime": now,
            },
        }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
