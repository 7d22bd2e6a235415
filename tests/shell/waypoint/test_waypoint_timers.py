"""The timers of a waypoint: order, cancellation, and what is not kept."""

from __future__ import annotations

import trio

from waypoint.timers import Timers


async def test_timers_fire_in_order_and_not_when_cancelled() -> None:
    timers, fired = Timers(), []
    done = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(timers.run)
        timers.after(0.02, lambda: fired.append("second"))
        gone = timers.after(0.0, lambda: fired.append("never"))
        timers.after(0.001, lambda: fired.append("first"))
        timers.after(0.03, done.set)
        gone.cancel()
        gone.cancel()
        with trio.fail_after(20):
            await done.wait()
        nursery.cancel_scope.cancel()
    assert fired == ["first", "second"]


async def test_what_is_cancelled_is_not_kept_until_it_would_have_fired() -> None:
    timers, fired = Timers(), []
    done = trio.Event()
    kept = timers.after(3600.0, lambda: fired.append("never"))
    for _ in range(20_000):
        timers.after(3600.0, lambda: fired.append("never")).cancel()
    assert len(timers) < 1000
    kept.cancel()
    # What is due still fires after so many went.
    timers.after(0.0, done.set)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(timers.run)
        with trio.fail_after(20):
            await done.wait()
        nursery.cancel_scope.cancel()
    assert fired == []
