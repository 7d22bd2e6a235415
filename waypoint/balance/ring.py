"""A hash ring (Ketama's): equal keys meet equal endpoints, and few move when an endpoint comes or
goes. Pure.

Each member stands at many points, in proportion to its weight; a key belongs to the first point
after its own. Points depend on the member's name alone, so that all replicas of a waypoint agree.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Collection, Sequence
from typing import Final, Generic, TypeVar

T = TypeVar("T")
MIN_POINTS: Final = 1024
MAX_POINTS: Final = 65536


def hash_key(key: bytes) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


class Ring(Generic[T]):
    """Members by (name, weight, value), at least one; `size` points in all or up to twice that,
    16 for each of the lightest or more, as far as `MAX_POINTS` allows.
    """

    def __init__(self, members: Sequence[tuple[str, int, T]], size: int = MIN_POINTS) -> None:
        total = sum(max(1, weight) for _, weight, _ in members)
        wanted = min(max(size, 16 * total), MAX_POINTS)
        # A power of two: as members come and go, those of the others mostly stay what they are.
        each = 1 << max(0, (wanted // total - 1).bit_length())
        points = [
            (hash_key(f"{name}#{number}".encode()), name, value)
            for name, weight, value in members
            for number in range(each * max(1, weight))
        ]
        points.sort(key=lambda each: each[:2])
        self._keys = [key for key, _, _ in points]
        self._values = [value for _, _, value in points]
        self._members = len(members)

    def find(self, key: bytes, usable: Collection[T]) -> T | None:
        """Who has the key: the first of the usable ones on the way round; None if there is none."""
        start = bisect.bisect_right(self._keys, hash_key(key))
        seen: set[int] = set()
        count = len(self._values)
        for step in range(count):
            value = self._values[(start + step) % count]
            if id(value) in seen:
                continue
            if value in usable:
                return value
            seen.add(id(value))
            if len(seen) == self._members:
                break
        return None
