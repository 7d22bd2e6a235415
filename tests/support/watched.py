"""A watch, with the state that its events add up to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from mesh.cluster.api import Cluster, Deleted, Event, Fault, Object, Put, Ref, Synced


class Watched:
    """What a watch has told so far."""

    def __init__(self, receive: trio.MemoryReceiveChannel[Event]) -> None:
        self._receive = receive
        self.objects: dict[Ref, Object] = {}
        self.faults: list[str] = []
        self.events: list[Event] = []
        self.is_synced = False

    async def next(self, seconds: float = 60.0) -> Event:
        with trio.fail_after(seconds):
            event = await self._receive.receive()
        self.events.append(event)
        match event:
            case Put(ref, obj, _):
                self.objects[ref] = obj
            case Deleted(ref):
                del self.objects[ref]
            case Fault(error, repaired):
                if repaired:
                    self.faults.remove(str(error))
                else:
                    self.faults.append(str(error))
            case Synced():
                self.is_synced = True
        return event

    async def until(self, is_done: Callable[[Watched], bool], seconds: float = 60.0) -> None:
        with trio.fail_after(seconds):
            while not is_done(self):
                await self.next(seconds)

    def names(self, namespace: str, kind: str = "") -> set[str]:
        return {
            ref.name
            for ref in self.objects
            if ref.namespace == namespace and kind in ("", ref.kind)
        }


@asynccontextmanager
async def watched(cluster: Cluster, *kinds: str) -> AsyncIterator[Watched]:
    """A watch that has told everything there is."""
    async with cluster.watch(kinds) as receive:
        watch = Watched(receive)
        await watch.until(lambda watch: watch.is_synced)
        yield watch
