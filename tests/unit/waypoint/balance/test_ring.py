"""The hash ring: even, agreed on, and hardly moved by what comes and goes."""

from __future__ import annotations

from collections import Counter

from waypoint.balance.ring import Ring

KEYS = [f"user-{number}".encode() for number in range(4000)]


def _ring(*names: str, **weights: int) -> Ring[str]:
    return Ring([(name, weights.get(name, 1), name) for name in names])


def test_keys_are_spread_by_weight_and_every_ring_agrees() -> None:
    names = ["a", "b", "c", "d"]
    ring, other = _ring(*names, d=3), _ring(*reversed(names), d=3)
    found = [ring.find(key, names) for key in KEYS]
    assert found == [other.find(key, names) for key in KEYS]
    counts = Counter(found)
    for name, share in (("a", 1 / 6), ("b", 1 / 6), ("c", 1 / 6), ("d", 3 / 6)):
        assert abs(counts[name] / len(KEYS) - share) < 0.08, counts


def test_few_keys_move_when_one_goes_and_none_of_the_others() -> None:
    names = [f"pod-{number}" for number in range(10)]
    ring = _ring(*names)
    before = {key: ring.find(key, names) for key in KEYS}
    # Ejected for a while: the ring stays, its keys go to the next.
    rest = [name for name in names if name != "pod-3"]
    after = {key: ring.find(key, rest) for key in KEYS}
    assert all(after[key] == before[key] for key in KEYS if before[key] != "pod-3")
    moved = Counter(after[key] for key in KEYS if before[key] == "pod-3")
    assert "pod-3" not in moved
    assert len(moved) > 3
    # Gone for good: about a tenth of the keys has a new place.
    smaller = _ring(*rest)
    changed = sum(smaller.find(key, rest) != before[key] for key in KEYS)
    assert changed < 0.16 * len(KEYS)


def test_nobody_usable() -> None:
    assert _ring("a", "b").find(b"x", []) is None
    assert _ring("a").find(b"x", ["a"]) == "a"
