"""Deadlines of requests and connections without a task for each: one heap, one trio task.

Setting one is a push; cancelling it only marks it. The task sleeps until the earliest and is woken
when an earlier one is set. Accuracy is a few milliseconds, which is what deadlines here need.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable

import trio

from mesh.runtime import lifecycle


class Timer:
    """A deadline that was set."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """It will not fire. Idempotent."""
        self.action = None


class Timers:
    """`run` must be going somewhere. What an action lets escape is logged as a bug."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self._wake = trio.Event()
        self._sleeps_until = float("inf")

    def after(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Call `action` once, in `seconds`."""
        timer = Timer(action)
        due = time.monotonic() + seconds
        heapq.heappush(self._heap, (due, next(self._count), timer))
        if due < self._sleeps_until:
            self._sleeps_until = due
            self._wake.set()
        return timer

    async def run(self) -> None:
        """Fire what is due, for ever. If cancelled: nothing fires any more."""
        while True:
            self._fire(time.monotonic())
            self._wake = trio.Event()
            self._sleeps_until = self._heap[0][0] if self._heap else float("inf")
            left = self._sleeps_until - time.monotonic()
            with trio.move_on_after(max(0.0, left)):
                await self._wake.wait()

    def _fire(self, now: float) -> None:
        heap = self._heap
        # Those that were cancelled leave with the first that is due after them.
        while heap and (heap[0][0] <= now or heap[0][2].action is None):
            action = heapq.heappop(heap)[2].action
            if action is not None:
                lifecycle.call("timer", action)
