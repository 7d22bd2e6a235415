"""A reflector against a scripted server: what each failure leads to, and how often it asks."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
import trio.testing

from mesh.cluster.api import Deleted, Event, Fault, Put
from mesh.cluster.mirror import ApiFailure, Resource
from mesh.cluster.reflector import Page, Reflector

PODS = Resource("Pod", "", "v1", "pods", is_namespaced=True)


def pod(name: str, version: int) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "shop", "resourceVersion": str(version)}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}


def change(kind: str, name: str, version: int) -> dict[str, Any]:
    return {"type": kind, "object": pod(name, version)}


def status(code: int) -> dict[str, Any]:
    return {"type": "ERROR", "object": {"kind": "Status", "code": code, "message": f"{code}"}}


@dataclass
class Script:
    """What each call gets, one after the other: a value, a failure; the last one for ever."""

    lists: list[Page | ApiFailure] = field(default_factory=list)
    watches: list[list[Any] | ApiFailure] = field(default_factory=list)
    discoveries: list[Resource | None] = field(default_factory=lambda: [PODS])
    asked: list[str] = field(default_factory=list)

    def last(self) -> str:
        return self.asked[-1] if self.asked else ""

    async def discover(self, kind: str) -> Resource | None:
        await trio.lowlevel.checkpoint()
        self.asked.append("discover")
        return self._next(self.discoveries)

    async def list_page(self, resource: Resource, token: str, limit: int) -> Page:
        await trio.lowlevel.checkpoint()
        self.asked.append(f"list {token} {limit}")
        page: Page = self._next(self.lists)
        return page

    @asynccontextmanager
    async def open_watch(
        self, resource: Resource, version: str
    ) -> AsyncIterator[AsyncIterator[list[dict[str, Any]]]]:
        self.asked.append(f"watch {version}")
        steps = self._next(self.watches)

        async def batches() -> AsyncIterator[list[dict[str, Any]]]:
            for step in steps:
                if isinstance(step, float):
                    await trio.sleep(step)
                elif isinstance(step, ApiFailure):
                    raise step
                else:
                    yield [step]

        async with aclosing(batches()) as given:
            yield given

    @staticmethod
    def _next(steps: list[Any]) -> Any:
        step = steps.pop(0) if len(steps) > 1 else steps[0]
        if isinstance(step, ApiFailure):
            raise step
        return step


def page(version: int, *items: dict[str, Any], token: str = "") -> Page:
    return Page(list(items), str(version), token)


LONG = 1e6


class Followed:
    """A reflector that runs, and what it has told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.told = trio.Event()
        self.reports: list[str] = []

    async def take(self, event: Event) -> None:
        await trio.lowlevel.checkpoint()
        self.events.append(event)

    def names(self) -> list[str]:
        return [
            f"{'+' if isinstance(event, Put) else '-'}{event.ref.name}"
            for event in self.events
            if isinstance(event, Put | Deleted)
        ]

    def faults(self) -> list[tuple[str, bool]]:
        return [(str(each.error), each.repaired) for each in self.events if isinstance(each, Fault)]


@asynccontextmanager
async def following(script: Script) -> AsyncIterator[Followed]:
    followed = Followed()
    reflector = Reflector(
        "Pod",
        script,
        followed.take,
        followed.told.set,
        random.Random(1),
        lambda event, _fields: followed.reports.append(event),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reflector.run)
        yield followed
        nursery.cancel_scope.cancel()


Clock = trio.testing.MockClock


async def until(check: Callable[[], bool], seconds: float = 1000) -> None:
    with trio.fail_after(seconds):
        while not check():
            await trio.sleep(0.01)


async def test_pages_then_changes_from_there(autojump_clock: Clock) -> None:
    script = Script(
        lists=[page(10, pod("a", 1), token="next"), page(10, pod("b", 2))],
        watches=[[change("ADDED", "c", 11), change("DELETED", "a", 12), 30.0], [LONG]],
    )
    async with following(script) as followed:
        await until(lambda: script.last() == "watch 12")
    assert followed.told.is_set()
    assert followed.names() == ["+a", "+b", "+c", "-a"]
    assert script.asked == ["discover", "list  500", "list next 500", "watch 10", "watch 12"]


async def test_pages_that_expired_are_read_at_once(autojump_clock: Clock) -> None:
    script = Script(
        lists=[
            page(10, pod("a", 1), pod("gone", 1), token="next"),
            ApiFailure("expired", code=410),
            page(20, pod("a", 1)),
        ],
        watches=[[LONG]],
    )
    async with following(script) as followed:
        await followed.told.wait()
    assert script.asked[:4] == ["discover", "list  500", "list next 500", "list  0"]
    assert followed.names() == ["+a", "+gone", "-gone"]


async def test_410_in_both_forms_lists_again_and_tells_what_was_missed(
    autojump_clock: Clock,
) -> None:
    script = Script(
        lists=[page(10, pod("a", 1), pod("b", 2)), page(20, pod("b", 2)), page(30, pod("c", 25))],
        watches=[[status(410)], ApiFailure("gone", code=410), [LONG]],
    )
    async with following(script) as followed:
        await until(lambda: script.last() == "watch 30")
    assert followed.names() == ["+a", "+b", "-a", "+c", "-b"]
    assert followed.faults() == []
    assert "watch_expired" in followed.reports


async def test_bookmarks_move_the_version_on(autojump_clock: Clock) -> None:
    bookmark = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "77"}}}
    script = Script(lists=[page(10)], watches=[[bookmark, 60.0], [LONG]])
    async with following(script):
        await until(lambda: script.last() == "watch 77")


async def test_watches_that_end_at_once_are_no_busy_loop(autojump_clock: Clock) -> None:
    script = Script(lists=[page(10)], watches=[[]])
    async with following(script):
        await trio.sleep(300)
    assert len(script.asked) < 30


async def test_a_server_that_is_away_costs_no_list_and_is_told_once(
    autojump_clock: Clock,
) -> None:
    away = ApiFailure("refused")
    script = Script(lists=[page(10, pod("a", 1))], watches=[[6.0], *[away] * 10, [9.0], [LONG]])
    async with following(script) as followed:
        await until(lambda: len(script.asked) == 15)
        assert [asked for asked in script.asked if asked.startswith("list")] == ["list  500"]
        await until(lambda: len(followed.faults()) == 2)
    message = "Pod cannot be read: refused"
    assert followed.faults() == [(message, False), (message, True)]
    assert followed.names() == ["+a"]


async def test_a_version_from_the_future_is_given_up(autojump_clock: Clock) -> None:
    future = ApiFailure("too large resource version", code=504)
    script = Script(lists=[page(900), page(5, pod("a", 1))], watches=[*[future] * 6, [LONG]])
    async with following(script):
        await until(lambda: script.last() == "watch 5")


async def test_a_kind_that_is_not_served_counts_as_told_and_is_looked_for_slowly(
    autojump_clock: Clock,
) -> None:
    script = Script(
        lists=[page(10, pod("a", 1)), ApiFailure("no such resource", code=404), page(30)],
        watches=[ApiFailure("no such resource", code=404), [LONG]],
        discoveries=[None, None, PODS, None, PODS],
    )
    async with following(script) as followed:
        await followed.told.wait()
        assert script.asked == ["discover"]
        await until(lambda: script.last() == "watch 10")
        # The CRD is removed: all objects of it are gone.
        await until(lambda: followed.names() == ["+a", "-a"])
        await until(lambda: len(script.asked) > 8)
    assert followed.reports.count("kind_not_served") == 2
    assert followed.faults() == []


async def test_what_we_may_not_read_is_not_taken_for_nothing(autojump_clock: Clock) -> None:
    denied = ApiFailure('cannot list resource "pods"', code=403, hint="grant it")
    script = Script(lists=[denied] * 8 + [page(10, pod("a", 1))], watches=[[LONG]])
    async with following(script) as followed:
        await until(lambda: len(followed.events) == 1)
        assert not followed.told.is_set()
        await followed.told.wait()
        assert [repaired for _, repaired in followed.faults()] == [False, True]
    (fault, _) = followed.faults()[0]
    assert 'cannot list resource "pods"' in fault


async def test_the_servers_wish_to_wait_is_honoured(autojump_clock: Clock) -> None:
    busy = ApiFailure("too many requests", code=429, retry_after_seconds=20.0)
    script = Script(lists=[busy, page(10)], watches=[[LONG]])
    started = trio.current_time()
    async with following(script) as followed:
        await followed.told.wait()
    assert trio.current_time() - started >= 20.0
