"""What an endpoint's past means for its next request."""

from __future__ import annotations

from waypoint.balance.latency import Latency

NOW = 1000.0


def latency(*seconds: float) -> Latency:
    """Of an endpoint whose requests took so long."""
    made = Latency()
    for each in seconds:
        made.heard(each, NOW)
    return made


def test_the_faster_one_is_preferred() -> None:
    assert latency(0.01).expected(NOW, 0) < latency(0.02).expected(NOW, 0)


def test_one_that_was_slow_is_tried_again() -> None:
    slow, fast = latency(1.0, 1.0), latency(0.002, 0.002)
    assert slow.expected(NOW, 0) > fast.expected(NOW, 0)
    fast.heard(0.002, NOW + 30)
    assert slow.expected(NOW + 30, 0) < fast.expected(NOW + 30, 0)


def test_an_endless_stream_is_no_slow_answer() -> None:
    assert latency(3600.0).expected(NOW, 0) == latency(5.0).expected(NOW, 0)


def test_what_is_under_way_is_not_forgotten() -> None:
    assert latency(0.01).expected(NOW + 60, 1) == latency(0.01).expected(NOW, 0)
