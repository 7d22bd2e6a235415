"""Writes what `istiod_lite.status` says, when something changed or a proxy answered.

A moment is waited first, because acknowledgements come in bursts. What is right already is not
written; what could not be written is tried again. An object that is gone has no status.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

import trio

from istiod_lite import status
from istiod_lite.ads import AdsService
from istiod_lite.conditions import Condition, Fragment, merged
from istiod_lite.index import ClusterIndex
from mesh.cluster.api import Cluster, NotFound, Ref
from mesh.errors import ConfigError, Unavailable
from mesh.runtime import log

GATHER_SECONDS = 0.2
MOST_SECONDS = 5.0
_RETRY_SECONDS = 2.0
_AT_ONCE = 20

_log = log.get(__name__)


class StatusWriter:
    """Keeps statuses as they are true. `clock` gives seconds since the epoch; `contested` are
    further conditions of Gateways.
    """

    def __init__(
        self,
        index: ClusterIndex,
        ads: AdsService,
        clock: Callable[[], float],
        contested: Callable[[], Mapping[Ref, Condition]] = dict,
    ) -> None:
        self._contested = contested
        self._index = index
        self._ads = ads
        self._clock = clock
        self._written: dict[Ref, Fragment] = {}
        self._look = trio.Event()

    def look(self) -> None:
        """Something changed, or a proxy answered."""
        self._look.set()

    async def run(self, cluster: Cluster) -> None:
        """Write for ever. Ends if the cluster takes no writes. If cancelled: nothing is undone."""
        self._written = {}  # another may have written since we did
        while True:
            self._look = trio.Event()
            started = trio.current_time()
            try:
                await self._write(cluster)
            except Unavailable as exc:
                _log.warning("status_delayed", reason=str(exc))
                await trio.sleep(_RETRY_SECONDS)
                continue
            except ConfigError as exc:
                _log.error("status_not_written", reason=str(exc), hint=exc.hint)
                return
            spent = trio.current_time() - started
            await self._look.wait()
            # The larger the mesh, the rarer.
            await trio.sleep(min(max(GATHER_SECONDS, 10.0 * spent), MOST_SECONDS))

    async def _write(self, cluster: Cluster) -> None:
        current: dict[Ref, Fragment] = {}
        contested = self._contested()
        for number, (ref, fragment) in enumerate(
            status.each_status(self._index, self._ads.share), 1
        ):
            if ref in contested:
                found = (*fragment.conditions, contested[ref])
                current[ref] = replace(fragment, conditions=found)
            else:
                current[ref] = fragment
            if number % _AT_ONCE == 0:
                await trio.lowlevel.checkpoint()  # pushes to proxies go before this
        for ref, fragment in list(status.changed(self._written, current)):
            live = await cluster.get(ref)
            if live is not None:
                now = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                patch = merged(live, fragment, now)
                if patch is not None:
                    try:
                        await cluster.patch(ref, {"status": patch})
                    except NotFound:
                        _log.debug("status_of_what_is_gone", object=str(ref))
            if ref in current:
                self._written[ref] = fragment
            else:
                self._written.pop(ref, None)
