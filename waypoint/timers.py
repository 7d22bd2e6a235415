"""Deadlines of requests and connections without a task for each: one heap, one trio task.

Setting one is a push; cancelling it only marks it. The task sleeps until the earliest and is woken
when an earlier one is set. Accuracy is a few milliseconds, which is what deadlines here need.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from typing import Final

import trio

from mesh.runtime import lifecycle

_FEW: Final = 256


class Timer:
    """A deadline that was set."""

    __slots__ = ("_timers", "action")

    def __init__(self, timers: Timers, action: Callable[[], None]) -> None:
        self._timers = timers
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """It will not fire. Idempotent."""
        if self.action is not None:
            self.action = None
            self._timers.on_cancelled()


class Timers:
    """`run` must be going somewhere. What an action lets escape is logged as a bug."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self._cancelled = 0
        self._wake = trio.Event()
        self._sleeps_until = float("inf")

    def __len__(self) -> int:
        """How many are kept, those included that were cancelled a moment ago."""
        return len(self._heap)

    def after(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Call `action` once, in `seconds`."""
        timer = Timer(self, action)
        due = time.monotonic() + seconds
        heapq.heappush(self._heap, (due, next(self._count), timer))
        if due < self._sleeps_until:
            self._sleeps_until = due
            self._wake.set()
        return timer

    def on_cancelled(self) -> None:
        """One more that will not fire. When most are such, they are let go: an hour that nobody
        waits for any more must not be kept for an hour.
        """
        self._cancelled += 1
        if self._cancelled > _FEW and self._cancelled * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].action is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

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
        # An action may set or cancel others, and so make the heap a new one.
        while self._heap and (self._heap[0][0] <= now or self._heap[0][2].action is None):
            timer = heapq.heappop(self._heap)[2]
            action, timer.action = timer.action, None
            if action is not None:
                lifecycle.call("timer", action)
            else:
                self._cancelled -= 1
