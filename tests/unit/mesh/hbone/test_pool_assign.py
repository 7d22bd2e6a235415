"""Which pooled connection serves next, and which leave the pool."""

from __future__ import annotations

import pytest

from mesh.hbone.pool import Assignment, Candidate, assign, expired


def usable(streams: int, limit: int = 200) -> Candidate:
    return Candidate(True, streams, limit)


GONE = Candidate(False, 3, 200)


@pytest.mark.parametrize(
    ("candidates", "assignment"),
    [
        ([], Assignment(None, ())),
        ([usable(0)], Assignment(0, ())),
        ([usable(98)], Assignment(0, ())),
        ([usable(99)], Assignment(0, (0,))),
        ([usable(100)], Assignment(None, (0,))),
        ([usable(5), usable(0)], Assignment(0, ())),
        ([GONE], Assignment(None, (0,))),
        ([GONE, usable(1)], Assignment(1, (0,))),
        ([GONE, usable(99), usable(0)], Assignment(1, (0, 1))),
        ([usable(8, limit=10)], Assignment(0, ())),
        ([usable(9, limit=10), usable(0)], Assignment(0, (0,))),
        ([usable(10, limit=10), usable(0)], Assignment(1, (0,))),
        ([usable(0, limit=1)], Assignment(0, (0,))),
        ([usable(0, limit=0)], Assignment(None, (0,))),
    ],
)
def test_assign(candidates: list[Candidate], assignment: Assignment) -> None:
    assert assign(candidates) == assignment


def test_expired() -> None:
    assert expired([None, 0.0, 100.0, 100.1], 400.0, 300.0) == (1, 2)
