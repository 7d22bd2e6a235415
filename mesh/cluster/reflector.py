"""One kind of object followed for ever: list, watch, and what to do when either fails.

    discover -> list by pages -> watch from there -> (ends) watch again from the last version
                  ^ 410, too many failures |              | 404: the kind is not served (any more)
                  +------------------------+              +-> look again, slowly

Back-off is capped and jittered, also after watches that end at once without an error. What
lasts is told as a `Fault` and taken back when it is over; what was known stays in force
meanwhile. A kind that is not served (its CRD is not installed) counts as told: there are no
objects of it. A kind that we may not read does not: policies that cannot be read must not
look like policies that do not exist.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from mesh.cluster.api import Deleted, Event, Fault, Object
from mesh.cluster.mirror import ApiFailure, Mirror, Resource, failure_of_status, version_of
from mesh.errors import ConfigError
from mesh.retry import Backoff, Random

PAGE_LIMIT = 500
# A watch that lived this long was a good one: the next failure is the first of its kind.
_SOUND_SECONDS = 5.0
_ABSENT_SECONDS = 20.0
_FAULT_AFTER_FAILURES = 3
_RELIST_AFTER_REFUSALS = 6
_EXPIRED = 410

#: Tells of what is no fault but worth a line in the log: `(event, fields)`.
Report = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list; `token` is empty on the last."""

    items: list[Any]
    version: str
    token: str


class Source(Protocol):
    """Where a reflector reads. All of it raises ApiFailure."""

    async def discover(self, kind: str) -> Resource | None:
        """How the kind is served; None if it is not."""
        ...

    async def list_page(self, resource: Resource, token: str, limit: int) -> Page:
        """A page of all objects; `limit` 0 means all at once."""
        ...

    def open_watch(
        self, resource: Resource, version: str
    ) -> AbstractAsyncContextManager[AsyncIterator[list[Object]]]:
        """Changes since `version`, as `{"type", "object"}`, in the batches that they come in.

        Ends when the server ends it, or has been silent for too long.
        """
        ...


@dataclass
class Reflector:
    """See the module. `on_told` is called once, when all that exists has been sent."""

    kind: str
    source: Source
    send: Callable[[Event], Awaitable[None]]
    on_told: Callable[[], None]
    rng: Random
    report: Report
    _mirror: Mirror = field(default_factory=Mirror)
    _resource: Resource | None = None
    _version: str = ""
    _is_told: bool = False
    _is_absent: bool = False
    _fault: Fault | None = None
    _failures: int = 0
    _refusals: int = 0

    def __post_init__(self) -> None:
        self._backoff = Backoff(self.rng, base=0.1, cap=30.0, jitter=0.3)

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                if self._resource is None:
                    self._resource = await self.source.discover(self.kind)
                if self._resource is None:
                    await self._wait_served()
                    continue
                if not self._version:
                    await self._list(self._resource)
                await self._watch(self._resource)
            except ApiFailure as failure:
                await self._recover(failure)

    # -- list and watch ----------------------------------------------------------------

    async def _list(self, resource: Resource) -> None:
        token, limit, version = "", PAGE_LIMIT, ""
        self._mirror.begin_list()
        while True:
            try:
                page = await self.source.list_page(resource, token, limit)
            except ApiFailure as failure:
                if failure.code != _EXPIRED or not token:
                    raise
                # The pages outlived the server's history. All at once cannot.
                token, limit = "", 0
                self._mirror.begin_list()
                continue
            for event in self._mirror.take_page(resource, page.items):
                await self.send(event)
            version = page.version or version
            token = page.token
            if not token:
                break
        await self._send_gone()
        self._version = version
        self._is_absent = False
        await self._recovered()
        self.report("kind_listed", {"kind": self.kind, "objects": len(self._mirror)})
        self._tell()

    async def _watch(self, resource: Resource) -> None:
        started = trio.current_time()
        async with self.source.open_watch(resource, self._version) as batches:
            await self._recovered()
            async for batch in batches:
                for change in batch:
                    await self._take(change)
        # Without an error, but perhaps at once and for ever: that must not become a busy loop.
        if trio.current_time() - started >= _SOUND_SECONDS:
            self._backoff.reset()
        else:
            await trio.sleep(self._backoff.next())

    async def _take(self, change: Mapping[str, Any]) -> None:
        kind, obj = change.get("type"), change.get("object")
        if kind == "ERROR":
            # Whatever it was, the server no longer vouches for what came in between.
            self._version = ""
            raise failure_of_status(obj)
        if kind in ("ADDED", "MODIFIED", "DELETED") and isinstance(obj, dict):
            for event in self._mirror.take_change(kind, obj):
                await self.send(event)
        self._version = version_of(obj) or self._version

    # -- what may go wrong -------------------------------------------------------------

    async def _wait_served(self) -> None:
        if not self._is_absent:
            self._is_absent = True
            self.report("kind_not_served", {"kind": self.kind})
        self._mirror.begin_list()
        await self._send_gone()
        await self._recovered()
        self._tell()
        await trio.sleep(_ABSENT_SECONDS * self.rng.uniform(0.75, 1.25))

    async def _recover(self, failure: ApiFailure) -> None:
        """Make of a failure what it means, and wait before the next attempt."""
        self._failures += 1
        match failure.code:
            case 404:
                self._resource, self._version = None, ""
            case 410:
                self._version = ""
                self.report("watch_expired", {"kind": self.kind, "reason": str(failure)})
            case 401 | 403:
                await self._set_fault(failure)
            case 400 | 405 | 406 | 415 | 422:
                self._version = ""
        self._refusals += failure.code not in (0, 429)
        if self._refusals >= _RELIST_AFTER_REFUSALS:
            self._refusals = 0
            # A version from a future that a restored server never had would fail for ever.
            self._version = ""
        if self._failures >= _FAULT_AFTER_FAILURES and failure.code != _EXPIRED:
            await self._set_fault(failure)
        if self._failures == 1:
            self.report("watch_interrupted", {"kind": self.kind, "reason": str(failure)})
        await trio.sleep(max(self._backoff.next(), failure.retry_after_seconds))

    async def _set_fault(self, failure: ApiFailure) -> None:
        fault = Fault(ConfigError(f"{self.kind} cannot be read: {failure}", hint=failure.hint))
        if self._fault is not None and str(self._fault.error) == str(fault.error):
            return
        await self._clear_fault()
        self._fault = fault
        await self.send(fault)

    async def _clear_fault(self) -> None:
        if self._fault is not None:
            fault, self._fault = self._fault, None
            await self.send(Fault(fault.error, repaired=True))

    async def _recovered(self) -> None:
        self._failures = self._refusals = 0
        await self._clear_fault()

    async def _send_gone(self) -> None:
        gone: list[Deleted] = self._mirror.end_list()
        for event in gone:
            await self.send(event)

    def _tell(self) -> None:
        if not self._is_told:
            self._is_told = True
            self.on_told()
