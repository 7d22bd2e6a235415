"""From the cluster's changes to the clients: watch -> index -> snapshot -> ADS.

The walk of a config push, as one loop. A change after a quiet moment is told at once; those
that follow it closely are gathered, because an edit rarely comes alone. Nothing is published
before the cluster has told everything it has, so that no client is ever told that something is
gone that was only not read yet.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio
from prometheus_client import CollectorRegistry, Counter, Histogram

from istiod_lite import snapshot
from istiod_lite.ads import AdsService
from istiod_lite.index import KINDS, ClusterIndex
from mesh.cluster.api import Cluster, Event, Fault, Synced
from mesh.cluster.validate import Finding, Severity, finding_of
from mesh.runtime import log
from mesh.xds.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE

# How long after a push further changes are gathered before the next, in seconds.
GATHER_SECONDS = 0.02
_PUSH_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

_log = log.get(__name__)


class Publisher:
    """Keeps `index` and `ads` as the cluster is. `on_push` is called after each publication."""

    def __init__(
        self,
        index: ClusterIndex,
        ads: AdsService,
        registry: CollectorRegistry,
        on_push: Callable[[], None] = lambda: None,
    ) -> None:
        self._index = index
        self._ads = ads
        self._on_push = on_push
        self._told: set[str] = set()
        self._is_ours = False
        self._events = Counter(
            "ambit_istiod_events", "Changes in the cluster, by kind", ["kind"], registry=registry
        )
        self._pushes = Counter("ambit_istiod_pushes", "Snapshots published", registry=registry)
        self._seconds = Histogram(
            "ambit_istiod_push_seconds",
            "From the first change to its publication",
            buckets=_PUSH_BUCKETS,
            registry=registry,
        )

    async def follow(
        self, cluster: Cluster, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Follow the cluster for ever; started when all it had is published.

        Raises ConfigError if it cannot be read at all. If cancelled: clients keep what they have.
        """
        async with cluster.watch(KINDS) as events:
            while not self._receive(await events.receive()):
                pass
            self._index.settle()
            self._publish()
            task_status.started()
            quiet_at = trio.current_time()
            while True:
                event = await events.receive()
                started = trio.current_time()
                self._receive(event)
                with trio.move_on_at(quiet_at), suppress(trio.WouldBlock):
                    while True:
                        self._receive(
                            await events.receive()
                            if trio.current_time() < quiet_at
                            else events.receive_nowait()
                        )
                if self._index.settle():
                    self._publish()
                    self._seconds.observe(trio.current_time() - started)
                else:
                    self._tell()
                    self._on_push()
                quiet_at = trio.current_time() + GATHER_SECONDS

    def findings(self) -> list[Finding]:
        """What is wrong or odd now: about objects, and about what came of them."""
        current = self._ads.snapshot
        faults = current.faults if current is not None else ()
        return [*self._index.findings(), *map(finding_of, faults)]

    def _receive(self, event: Event) -> bool:
        """Take an event; whether it says that all has been told."""
        self._index.receive(event)
        match event:
            case Synced():
                return True
            case Fault():
                self._events.labels("fault").inc()
            case _:
                self._events.labels(event.ref.kind).inc()
        return False

    def _publish(self) -> None:
        index = self._index
        traffic = index.traffic.configs
        addresses, policies = index.take_touched()
        before = self._ads.snapshot
        if before is None or not self._is_ours:
            # The first time, perhaps after what an earlier process knew: all is compared.
            self._ads.publish(snapshot.build(index.addresses, index.policies, before, traffic))
            self._is_ours = True
        else:
            touched = {ADDRESS_TYPE: addresses, AUTHORIZATION_TYPE: policies}
            self._ads.publish(
                *snapshot.advance(before, index.addresses, index.policies, traffic, touched)
            )
        self._pushes.inc()
        _log.debug("pushed", addresses=len(index.addresses), policies=len(index.policies))
        self._tell()
        self._on_push()

    def _tell(self) -> None:
        """Log what was found, once for as long as it lasts."""
        found = {str(each): each for each in self.findings()}
        for text, finding in found.items():
            if text not in self._told:
                is_error = finding.severity is Severity.ERROR
                say = _log.error if is_error else _log.warning
                say(
                    "object_rejected" if is_error else "object_odd", finding=text, hint=finding.hint
                )
        for text in self._told - found.keys():
            _log.info("finding_resolved", finding=text)
        self._told = set(found)
