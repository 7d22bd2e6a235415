"""How many retries a service gets, so that repeating does not bury what is failing already. Pure.

Two ways to say it: as a share of the requests in flight (DestinationRule's `retryBudget`, Envoy's),
or as a share of the requests of an interval (XBackendTrafficPolicy's `retryConstraint`). Either has
a minimum that is always allowed.
"""

from __future__ import annotations

from typing import Final

from mesh.model.route import ConnectionLimits

_SLICES: Final = 10


class _Window:
    """A count over the last `seconds`, in slices."""

    __slots__ = ("_counts", "_slice", "_width")

    def __init__(self, seconds: float) -> None:
        self._width = seconds / _SLICES
        self._counts = [0] * _SLICES
        self._slice = 0

    def add(self, now: float) -> None:
        self._turn(now)
        self._counts[self._slice % _SLICES] += 1

    def count(self, now: float) -> int:
        self._turn(now)
        return sum(self._counts)

    def _turn(self, now: float) -> None:
        current = int(now / self._width)
        for each in range(max(self._slice + 1, current - _SLICES + 1), current + 1):
            self._counts[each % _SLICES] = 0
        self._slice = max(self._slice, current)


class RetryBudget:
    """Of one service's port. `in_flight` counts its retries that are not over."""

    __slots__ = ("_limits", "_minimum", "_requests", "_retries", "in_flight")

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self.in_flight = 0
        self._requests: _Window | None = None
        self._retries: _Window | None = None
        self._minimum: _Window | None = None
        if limits.retry_interval_seconds:
            self._requests = _Window(limits.retry_interval_seconds)
            self._retries = _Window(limits.retry_interval_seconds)
            self._minimum = _Window(limits.retry_minimum_seconds)

    @property
    def counts_requests(self) -> bool:
        """Whether `requested` has to be told of every request."""
        return self._requests is not None

    def requested(self, now: float) -> None:
        """A request, tried for the first time."""
        if self._requests is not None:
            self._requests.add(now)

    def take(self, now: float, active: int, *, is_first: bool) -> bool:
        """One retry more, if there is one left. `active`: requests of the service in flight;
        `is_first`: the request's first, which `give` follows once it is over.
        """
        if not self._allows(now, active, is_first=is_first):
            return False
        self.in_flight += is_first
        if self._retries is not None and self._minimum is not None:
            self._retries.add(now)
            self._minimum.add(now)
        return True

    def give(self) -> None:
        """A request that was repeated has ended."""
        self.in_flight -= 1

    def _allows(self, now: float, active: int, *, is_first: bool) -> bool:
        limits = self._limits
        if self._requests is not None and self._retries is not None and self._minimum is not None:
            if self._minimum.count(now) < limits.retry_budget_minimum:
                return True
            share = self._requests.count(now) * limits.retry_budget_percent / 100
            return self._retries.count(now) < share
        if not is_first:
            return True
        if limits.max_retries:
            return self.in_flight < limits.max_retries
        share = active * limits.retry_budget_percent / 100
        return self.in_flight < max(limits.retry_budget_minimum, share)
