"""The buckets of this process, bounded in number. Pure: `now` is given.

Keys come from callers, so their number is bounded. Room is made by forgetting buckets that are
full again, which loosens nothing; when there is none of those, strangers share one bucket. A
flood of made-up keys then throttles itself and leaves the buckets of those who were here alone.
"""

from __future__ import annotations

from typing import Final

from waypoint.filters.rate_limit.gcra import Rate, Verdict, hit

Key = tuple[str, ...]

MAX_BUCKETS: Final = 100_000
_LOOKED_AT: Final = 8
_STRANGERS: Final[Key] = ("", "strangers")


class Buckets:
    """The buckets of one rule: when each will be full again, least lately used first."""

    __slots__ = ("_full_at", "_most")

    def __init__(self, most: int = MAX_BUCKETS) -> None:
        self._full_at: dict[Key, float] = {}
        self._most = most

    def __len__(self) -> int:
        return len(self._full_at)

    def hit(self, key: Key, now: float, rate: Rate, cost: int = 1) -> Verdict:
        """Take `cost` from the bucket of `key`, at `now` (monotonic seconds)."""
        found = self._full_at.pop(key, None)
        if found is None:
            found = now
            if len(self._full_at) >= self._most and not self._make_room(now):
                key = _STRANGERS
                found = self._full_at.pop(key, now)
        verdict = hit(found, now, rate, cost)
        if verdict.full_at > now:
            self._full_at[key] = verdict.full_at
        return verdict

    def peek(self, key: Key, now: float, rate: Rate, cost: int = 1) -> Verdict:
        """What `hit` would say, with nothing taken; a newcomer when all is full is a stranger."""
        is_stranger = key not in self._full_at and len(self._full_at) >= self._most
        return hit(self._full_at.get(_STRANGERS if is_stranger else key, now), now, rate, cost)

    def _make_room(self, now: float) -> bool:
        oldest = [key for key, _ in zip(self._full_at, range(_LOOKED_AT), strict=False)]
        for key in oldest:
            if self._full_at[key] <= now:
                del self._full_at[key]
            else:
                # Looked at next time after the others.
                self._full_at[key] = self._full_at.pop(key)
        return len(self._full_at) < self._most


class Rehearsal(Buckets):
    """Stands for the buckets of a rule where nothing may be taken; notes what was asked of it."""

    __slots__ = ("_inner", "asked")

    def __init__(self, real: Buckets) -> None:
        super().__init__()
        self._inner = real
        self.asked: list[tuple[Key, Rate, Verdict]] = []

    def hit(self, key: Key, now: float, rate: Rate, cost: int = 1) -> Verdict:
        """What the real ones would say."""
        verdict = self._inner.peek(key, now, rate, cost)
        self.asked.append((key, rate, verdict))
        return verdict
