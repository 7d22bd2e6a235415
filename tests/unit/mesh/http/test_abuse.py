"""The token bucket: bursts, refill, clocks."""

from __future__ import annotations

from mesh.http.abuse import TokenBucket


def test_a_burst_then_nothing() -> None:
    bucket = TokenBucket(burst=3, rate=1)
    assert [bucket.take(5.0) for _ in range(4)] == [True, True, True, False]


def test_refill_is_by_rate_and_capped() -> None:
    bucket = TokenBucket(burst=3, rate=2)
    for _ in range(3):
        bucket.take(0.0)
    assert not bucket.take(0.4)
    assert bucket.take(0.5)
    assert not bucket.take(0.5)
    assert [bucket.take(1000.0) for _ in range(4)] == [True, True, True, False]


def test_a_clock_that_goes_back_changes_nothing() -> None:
    bucket = TokenBucket(burst=1, rate=1)
    assert bucket.take(10.0)
    assert not bucket.take(1.0)
    assert not bucket.take(10.5)
    assert bucket.take(11.0)


def test_a_costly_take_is_all_or_nothing() -> None:
    bucket = TokenBucket(burst=5, rate=0)
    assert not bucket.take(0.0, 6)
    assert bucket.take(0.0, 5)
