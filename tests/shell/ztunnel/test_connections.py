"""Tracked connections: recorded once, however they end, and judged again when policy changes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest
import trio
from prometheus_client import CollectorRegistry

from mesh.authz import ConnectionContext, Permit
from mesh.errors import Refusal, Unavailable
from mesh.hbone.relay import RelayResult
from mesh.identity import SpiffeId
from mesh.model.authorization import Action, Authorization, PolicyScope, Rule
from mesh.model.store import Store
from mesh.model.workload import Workload
from mesh.runtime.tcp_metrics import TcpMetrics
from ztunnel.connections import Connections, Judges, Tracked
from ztunnel.record import Journal, Record

WEB = Workload("web", "web", "shop", ("10.0.0.2",))
CONTEXT = ConnectionContext(SpiffeId("cluster.local", "shop", "a"), "10.0.0.1", "10.0.0.2", 80)
DENY = Authorization("deny", "shop", PolicyScope.NAMESPACE, Action.DENY, (Rule(),))


class Access:
    def __init__(self) -> None:
        self.lines: list[dict[str, object]] = []

    def record(self, fields: dict[str, object]) -> None:
        self.lines.append(fields)


class World:
    def __init__(self) -> None:
        self.store = Store()
        self.store.apply_addresses([WEB], [])
        self.access = Access()
        self.judges = Judges(self.store)
        journal = Journal(self.access, TcpMetrics(CollectorRegistry()))
        self.connections = Connections(self.store, self.judges, journal)

    def record(self) -> Record:
        return Record("x", "inbound", trio.current_time())

    def admit(self) -> Tracked:
        permit = Permit("shop/allow", 0)
        return self.connections.admit(permit, self.record(), "pod", WEB, CONTEXT)

    def say(self, *policies: Authorization, removed: tuple[str, ...] = ()) -> None:
        self.connections.changed(self.store.apply_policies(policies, removed))


@contextlib.asynccontextmanager
async def world() -> AsyncIterator[tuple[World, trio.Nursery]]:
    made = World()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.connections.run)
        yield made, nursery
        nursery.cancel_scope.cancel()


async def carry(
    made: World, tracked: Tracked, work: Callable[[Tracked], Awaitable[RelayResult]]
) -> None:
    with made.connections.carrying(tracked) as carrying:
        carrying.result = await work(tracked)


async def forever(_tracked: Tracked) -> RelayResult:
    await trio.sleep_forever()
    raise AssertionError


async def test_an_orderly_end() -> None:
    async with world() as (made, _):
        tracked = made.admit()
        assert list(made.connections) == [tracked]

        async def work(each: Tracked) -> RelayResult:
            made.connections.opened(each, lambda: (0, 0))
            return RelayResult(7, 9, None)

        await carry(made, tracked, work)
        assert len(made.connections) == 0
        (line,) = made.access.lines
        assert (line["bytes_sent"], line["bytes_recv"], line["policy"]) == (7, 9, "shop/allow")
        assert (line["response_flags"], line.get("error")) == ("-", None)


async def test_a_failure_is_recorded_with_its_flag() -> None:
    async with world() as (made, _):

        async def work(_each: Tracked) -> RelayResult:
            raise Unavailable("nobody there", hint="look")

        await carry(made, made.admit(), work)
        (line,) = made.access.lines
        assert (line["response_flags"], line["error"], line["hint"]) == (
            "CONNECT",
            "nobody there",
            "look",
        )


async def test_a_bug_is_recorded_and_raised() -> None:
    async with world() as (made, _):

        async def work(_each: Tracked) -> RelayResult:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await carry(made, made.admit(), work)
        assert len(made.access.lines) == 1
        assert len(made.connections) == 0


async def test_cancellation_is_recorded_with_the_bytes_so_far() -> None:
    async with world() as (made, _):
        tracked = made.admit()

        async def work(each: Tracked) -> RelayResult:
            made.connections.opened(each, lambda: (3, 4))
            return await forever(each)

        with trio.move_on_after(0.01):
            await carry(made, tracked, work)
        (line,) = made.access.lines
        assert (line["bytes_sent"], line["bytes_recv"]) == (3, 4)
        assert "stopped" in str(line["error"])


async def test_a_limit_ends_as_it_said() -> None:
    async with world() as (made, _):

        async def work(each: Tracked) -> RelayResult:
            each.limit(0.01, lambda: Refusal("CONNECT", "too late"))
            return await forever(each)

        await carry(made, made.admit(), work)
        assert made.access.lines[0]["error"] == "too late"


async def test_a_limit_that_was_kept_does_nothing() -> None:
    async with world() as (made, _):

        async def work(each: Tracked) -> RelayResult:
            each.limit(0.01, lambda: Refusal("CONNECT", "too late"))
            each.unlimit()
            await trio.sleep(0.03)
            return RelayResult(0, 0, None)

        await carry(made, made.admit(), work)
        assert "error" not in made.access.lines[0]


async def test_a_policy_change_cuts_what_is_refused_now() -> None:
    async with world() as (made, nursery):
        for _ in range(250):
            nursery.start_soon(carry, made, made.admit(), forever)
        await trio.sleep(0.01)
        made.say(replace(DENY, namespace="bank"))
        await trio.sleep(0.01)
        assert len(made.connections) == 250
        made.say(DENY)
        with trio.fail_after(30):
            await made.connections.wait_empty()
        assert len(made.access.lines) == 250
        assert {line["policy"] for line in made.access.lines} == {"shop/deny"}
        assert {line["response_flags"] for line in made.access.lines} == {"DENY"}
        assert str(made.access.lines[0]["error"]).startswith("closed due to policy change")


async def test_outbound_connections_are_not_judged_here() -> None:
    async with world() as (made, nursery):
        tracked = made.connections.track(made.record(), "pod", WEB)
        nursery.start_soon(carry, made, tracked, forever)
        made.say(DENY)
        await trio.sleep(0.01)
        assert len(made.connections) == 1
        made.connections.changed(
            made.store.apply_addresses([replace(WEB, service_account="new")], [])
        )
        with trio.fail_after(30):
            await made.connections.wait_empty()
        assert made.access.lines[0]["response_flags"] == "IDENTITY_ERROR"


async def test_a_workload_that_left_is_not_cut() -> None:
    async with world() as (made, nursery):
        nursery.start_soon(carry, made, made.admit(), forever)
        made.connections.changed(made.store.apply_addresses([], ["web"]))
        await trio.sleep(0.01)
        assert len(made.connections) == 1


async def test_waiting_for_one_pod_only() -> None:
    async with world() as (made, nursery):
        nursery.start_soon(carry, made, made.admit(), forever)
        with trio.fail_after(30):
            await made.connections.wait_empty("another pod")
        with trio.move_on_after(0.01) as scope:
            await made.connections.wait_empty("pod")
        assert scope.cancelled_caught


async def test_judges_follow_policies_and_workloads() -> None:
    made = World()
    assert isinstance(made.judges.evaluate(WEB, CONTEXT), Permit)
    made.store.apply_policies([DENY], [])
    assert isinstance(made.judges.evaluate(WEB, CONTEXT), Refusal)
    made.store.apply_policies([replace(DENY, dry_run=True)], [])
    assert isinstance(made.judges.evaluate(WEB, CONTEXT), Permit)
    named = replace(DENY, name="sel", scope=PolicyScope.WORKLOAD_SELECTOR)
    made.store.apply_policies([named], [])
    assert isinstance(made.judges.evaluate(WEB, CONTEXT), Permit)
    now = replace(WEB, authorization_policies=("shop/sel",))
    assert isinstance(made.judges.evaluate(now, CONTEXT), Refusal)
