"""Back-off doubles, stays within its cap and starts over."""

from __future__ import annotations

import random

from mesh.retry import Backoff


class Even:
    def uniform(self, a: float, b: float, /) -> float:
        return (a + b) / 2


def test_doubles_to_the_cap() -> None:
    backoff = Backoff(Even(), base=1, cap=10)
    assert [backoff.next() for _ in range(6)] == [1, 2, 4, 8, 10, 10]
    backoff.reset()
    assert backoff.next() == 1


def test_never_overflows_and_stays_in_its_band() -> None:
    backoff = Backoff(random.Random(1), base=0.01, cap=15, jitter=0.2)
    delays = [backoff.next() for _ in range(5000)]
    assert max(delays) <= 15 * 1.2
    assert min(delays[20:]) >= 15 * 0.8
