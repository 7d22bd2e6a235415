"""Retry budgets, in flight and by interval."""

from __future__ import annotations

from mesh.model.route import ConnectionLimits
from waypoint.balance.budget import RetryBudget


def _take(budget: RetryBudget, count: int, now: float = 0.0, active: int = 0) -> int:
    return sum(budget.take(now, active, is_first=True) for _ in range(count))


def test_a_share_of_what_is_in_flight_and_never_less_than_the_minimum() -> None:
    assert _take(RetryBudget(ConnectionLimits()), 10) == 3
    budget = RetryBudget(ConnectionLimits(retry_budget_percent=10.0))
    assert _take(budget, 50, active=200) == 20
    assert budget.take(0.0, 0, is_first=False), "the second retry of one request is its own"
    budget.give()
    assert _take(budget, 5, active=200) == 1


def test_a_plain_number_goes_before_the_share() -> None:
    assert _take(RetryBudget(ConnectionLimits(max_retries=1)), 9, active=1000) == 1


def test_a_share_of_the_requests_of_an_interval() -> None:
    limits = ConnectionLimits(
        retry_budget_percent=20.0, retry_budget_minimum=2,
        retry_interval_seconds=10.0, retry_minimum_seconds=1.0,
    )  # fmt: skip
    budget = RetryBudget(limits)
    assert budget.counts_requests
    for each in range(100):
        budget.requested(100.0 + each / 100)
    # Each retry counts, those of one request too.
    assert sum(budget.take(101.0, 0, is_first=each < 5) for each in range(50)) == 20
    # The minimum is for every second anew.
    assert sum(budget.take(102.5, 0, is_first=False) for _ in range(50)) == 2
    assert not budget.take(102.6, 0, is_first=False)
    # An interval later nobody asked, so only the minimum is left.
    assert sum(budget.take(130.0, 0, is_first=False) for _ in range(50)) == 2


def test_a_pause_of_days_costs_nothing() -> None:
    budget = RetryBudget(ConnectionLimits(retry_interval_seconds=1.0, retry_budget_minimum=1))
    budget.requested(0.0)
    assert budget.take(1e9, 0, is_first=True)
