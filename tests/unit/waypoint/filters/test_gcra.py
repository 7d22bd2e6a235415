"""GCRA and the bounded buckets, by literals and against a naive token bucket."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waypoint.filters.rate_limit.gcra import NEVER, Rate, hit
from waypoint.filters.rate_limit.local import Buckets

TEN = Rate(10, 1.0, 10)


def test_a_burst_passes_and_no_more() -> None:
    full_at, allowed = 0.0, []
    for _ in range(15):
        verdict = hit(full_at, 100.0, TEN)
        full_at = verdict.full_at
        allowed.append(verdict.is_allowed)
    assert allowed == [True] * 10 + [False] * 5


def test_what_a_verdict_says() -> None:
    first = hit(0.0, 50.0, TEN)
    assert (first.remaining, first.retry_seconds) == (9, 0.0)
    assert first.reset_seconds == pytest.approx(0.1)
    full_at = 50.0 + 1.0
    refused = hit(full_at, 50.0, TEN)
    assert not refused.is_allowed
    assert refused.full_at == full_at
    assert refused.retry_seconds == pytest.approx(0.1)
    assert refused.remaining == 0
    assert hit(full_at, 50.0 + refused.retry_seconds, TEN).is_allowed


@pytest.mark.parametrize(
    ("rate", "cost", "is_allowed", "retry"),
    [
        (TEN, 0, True, 0.0),
        (TEN, 10, True, 0.0),
        (TEN, 11, False, NEVER),
        (Rate(0, 1.0, 0), 1, False, NEVER),
        (Rate(0, 1.0, 0), 0, True, 0.0),
        (Rate(1, 3600.0, 5), 5, True, 0.0),
    ],
)
def test_costs(rate: Rate, cost: int, is_allowed: bool, retry: float) -> None:
    verdict = hit(0.0, 7.0, rate, cost)
    assert (verdict.is_allowed, verdict.retry_seconds) == (is_allowed, retry)


@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), max_size=60),
)
def test_it_is_a_token_bucket(requests: int, burst: int, steps: list[tuple[int, int]]) -> None:
    """Whole milliseconds and a window in which tokens come in whole numbers of them."""
    rate = Rate(requests, requests * 0.010, burst)  # a token each 10 ms
    now, full_at = 0, 0.0
    tokens, last = burst * 10, 0  # tenths of a token, one each millisecond
    for wait, cost in steps:
        now += wait
        tokens, last = min(burst * 10, tokens + now - last), now
        verdict = hit(full_at, now / 1000, rate, cost)
        full_at = verdict.full_at
        assert verdict.is_allowed == (tokens >= cost * 10)
        if verdict.is_allowed:
            tokens -= cost * 10
        assert verdict.remaining == tokens // 10
        if not verdict.is_allowed and cost <= burst:
            assert math.ceil(verdict.retry_seconds * 1000 - 1e-3) == cost * 10 - tokens


def test_each_key_has_its_bucket() -> None:
    buckets = Buckets()
    one = Rate(1, 60.0, 1)
    assert buckets.hit(("a",), 1.0, one).is_allowed
    assert buckets.hit(("b",), 1.0, one).is_allowed
    assert not buckets.hit(("a",), 1.0, one).is_allowed
    assert buckets.hit(("a",), 61.0, one).is_allowed


def test_full_buckets_make_room_and_are_the_same_as_none() -> None:
    buckets = Buckets(most=3)
    one = Rate(1, 1.0, 1)
    for name in "abc":
        assert buckets.hit((name,), 0.0, one).is_allowed
    assert buckets.hit(("d",), 2.0, one).is_allowed
    assert len(buckets) <= 3


def test_a_flood_of_keys_neither_grows_nor_loosens() -> None:
    buckets = Buckets(most=50)
    one = Rate(1, 1000.0, 1)
    regulars = [(f"regular-{number}",) for number in range(50)]
    assert all(buckets.hit(key, 0.0, one).is_allowed for key in regulars)
    passed = sum(buckets.hit((f"made-up-{n}",), 1.0, one).is_allowed for n in range(1000))
    assert passed == 1
    assert len(buckets) <= 51
    assert not any(buckets.hit(key, 2.0, one).is_allowed for key in regulars)
