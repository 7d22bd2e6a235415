"""Fibers: coroutines that the reactor steps, and what they may await."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from mesh.fiber import Cut, Fibers, Signal, current, in_task
from mesh.reactor import Reactor, SharedClock

pytestmark = pytest.mark.usefixtures("no_fd_leak")


@dataclass
class Loop:
    """A running reactor, fibers of it, and what it was told of bugs."""

    fibers: Fibers
    nursery: trio.Nursery
    bugs: list[Exception] = field(default_factory=list)


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Loop]:
    bugs: list[Exception] = []
    with Reactor(on_bug=lambda error, _where: bugs.append(error)) as reactor:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reactor.run)
            with trio.fail_after(30):
                yield Loop(Fibers(reactor), nursery, bugs)
            nursery.cancel_scope.cancel()


async def test_starts_at_once_parks_and_goes_on() -> None:
    async with running() as loop:
        signal, said = Signal(), []

        async def work() -> None:
            assert current() is not None
            said.append("begun")
            await signal.wait()
            said.append("woken")
            await signal.wait()  # set already: does not wait
            said.append("done")

        loop.fibers.start(work())
        assert said == ["begun"]
        assert len(loop.fibers) == 1
        signal.set()
        assert said == ["begun"]  # not inside of whoever sets it
        await loop.fibers.wait_ended()
        assert said == ["begun", "woken", "done"]
        assert not loop.bugs
        assert current() is None


async def test_a_task_and_a_fiber_wait_for_the_same_signal() -> None:
    async with running() as loop:
        signal = Signal()

        async def wait() -> None:
            await signal.wait()

        loop.fibers.start(wait())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            signal.set()
        await loop.fibers.wait_ended()
        await signal.wait()


async def test_cut_is_raised_where_it_waits() -> None:
    async with running() as loop:
        said = []

        async def work() -> None:
            try:
                await Signal().wait()
            except Cut:
                said.append("cut")
                # Whoever waits again is cut again.
                with pytest.raises(Cut):
                    await Signal().wait()
                raise

        loop.fibers.start(work())
        loop.fibers.start(work())
        loop.fibers.cut()
        assert said == ["cut", "cut"]
        assert not loop.fibers
        loop.fibers.cut()
        assert not loop.bugs


async def test_a_fiber_that_cuts_itself_ends_where_it_waits_next() -> None:
    async with running() as loop:
        said = []

        async def work() -> None:
            loop.fibers.cut()
            said.append("goes on")
            await Signal().wait()
            said.append("never")

        loop.fibers.start(work())
        assert said == ["goes on"]
        assert not loop.fibers


async def test_woken_and_cut_in_one_turn_is_cut() -> None:
    async with running() as loop:
        signal, said = Signal(), []

        async def work() -> None:
            await signal.wait()
            said.append("never")

        loop.fibers.start(work())
        signal.set()
        loop.fibers.cut()
        await trio.testing.wait_all_tasks_blocked()
        assert not said
        assert not loop.fibers


async def test_bugs_are_reported_and_end_that_fiber_only() -> None:
    async with running() as loop:
        signal = Signal()

        async def bug() -> None:
            await signal.wait()
            raise ZeroDivisionError

        async def trio_without_task() -> None:
            await trio.sleep(0.01)

        async def waits() -> None:
            await other.wait()

        loop.fibers.start(trio_without_task())
        assert [type(each) for each in loop.bugs] == [RuntimeError]
        other = Signal()
        loop.fibers.start(waits())
        loop.fibers.start(bug())
        signal.set()
        while len(loop.bugs) < 2:
            await trio.sleep(0.001)
        assert type(loop.bugs[1]) is ZeroDivisionError
        assert len(loop.fibers) == 1
        other.set()
        await loop.fibers.wait_ended()


async def test_in_task_gives_results_and_errors() -> None:
    async with running() as loop:
        said: list[object] = []

        async def sleep(value: object) -> object:
            assert current() is None
            await trio.sleep(0.001)
            if isinstance(value, Exception):
                raise value
            return value

        async def work() -> None:
            said.append(await in_task(loop.nursery, sleep, 1))
            try:
                await in_task(loop.nursery, sleep, KeyError("x"))
            except KeyError:
                said.append("error")

        loop.fibers.start(work())
        await loop.fibers.wait_ended()
        assert said == [1, "error"]
        assert await in_task(None, sleep, 2) == 2


async def test_cut_cancels_the_task() -> None:
    async with running() as loop, trio.open_nursery() as nursery:
        loop.fibers.start(in_task(nursery, trio.sleep_forever))
        await trio.testing.wait_all_tasks_blocked()
        loop.fibers.cut()
        assert not loop.fibers
        # The nursery ends: nothing is left in it.


async def test_a_cancelled_nursery_cuts_who_waits_for_its_task() -> None:
    async with running() as loop:
        async with trio.open_nursery() as nursery:
            loop.fibers.start(in_task(nursery, trio.sleep_forever))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await loop.fibers.wait_ended()
        assert not loop.bugs


async def test_fibers_wake_each_other_within_a_turn() -> None:
    async with running() as loop:
        signals = [Signal() for _ in range(1000)]

        async def link(at: int) -> None:
            await signals[at].wait()
            if at + 1 < len(signals):
                signals[at + 1].set()

        for at in range(len(signals)):
            loop.fibers.start(link(at))
        signals[0].set()
        await loop.fibers.wait_ended()


def test_under_the_shared_clock_fibers_tasks_and_timers_all_go_on() -> None:
    async def main() -> None:
        async with running() as loop:
            rounds = 200
            answers: list[int] = []

            async def later(value: int) -> int:
                await trio.sleep(0.001)
                return value

            async def work() -> None:
                for number in range(rounds):
                    answers.append(await in_task(loop.nursery, later, number))

            loop.fibers.start(work())
            await loop.fibers.wait_ended()
            assert answers == list(range(rounds))
            # From another thread, too.
            signal = Signal()

            async def wait() -> None:
                await signal.wait()

            loop.fibers.start(wait())
            token = trio.lowlevel.current_trio_token()
            await trio.to_thread.run_sync(token.run_sync_soon, signal.set)
            await loop.fibers.wait_ended()

    trio.run(main, clock=SharedClock())
