"""The generic cell rate algorithm: a token bucket that is one number. Pure.

A bucket is the time at which it will be full again (its theoretical arrival time, monotonic
seconds). Nothing is refilled by a timer, and a bucket whose time has passed is the same as one
that never was, so forgetting it loosens nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

NEVER = math.inf


@dataclass(frozen=True, slots=True)
class Rate:
    """`requests` in `window_seconds`, at most `burst` of them at once (at least 1)."""

    requests: int
    window_seconds: float
    burst: int

    @property
    def interval(self) -> float:
        """Seconds that one request costs; a rate of nothing costs for ever."""
        return self.window_seconds / self.requests if self.requests > 0 else NEVER


@dataclass(slots=True, init=False)
class Verdict:
    """What became of a request. `full_at` is the bucket from now on.

    `remaining` is how many requests of cost 1 may follow at once, `retry_seconds` when this one
    would pass (0 if it did, `NEVER` if it never will), `reset_seconds` when the bucket is full.
    """

    is_allowed: bool
    full_at: float
    remaining: int
    retry_seconds: float
    reset_seconds: float

    # Written out: one that dataclasses make is not compiled, and this is made for each request.
    def __init__(
        self,
        is_allowed: bool,
        full_at: float,
        remaining: int,
        retry_seconds: float,
        reset_seconds: float,
    ) -> None:
        self.is_allowed = is_allowed
        self.full_at = full_at
        self.remaining = remaining
        self.retry_seconds = retry_seconds
        self.reset_seconds = reset_seconds


def hit(full_at: float, now: float, rate: Rate, cost: int = 1) -> Verdict:
    """Take `cost` (0 or more) from a bucket at `now`. One that is refused takes nothing."""
    interval = rate.interval
    if interval == NEVER:
        return Verdict(cost == 0, full_at, 0, 0.0 if cost == 0 else NEVER, NEVER)
    capacity = interval * rate.burst
    start = max(full_at, now)
    after = start + interval * cost
    wait = after - capacity - now
    # A millionth of a request: sums of fractions do not come out even.
    slack = interval * 1e-6
    if wait <= slack:
        left = max(0.0, capacity - (after - now))
        return Verdict(True, after, int((left + slack) / interval), 0.0, after - now)
    left = max(0.0, capacity - (start - now))
    retry = NEVER if cost > rate.burst else wait
    return Verdict(False, full_at, int((left + slack) / interval), retry, start - now)
