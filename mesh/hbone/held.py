"""How much may wait for applications that do not read: a bound for the process, sans-IO.

Flow control bounds each stream (its window), this bounds all of them. Beyond the bound the next
bytes for a stalled reader cut its tunnel; parts (pods) that hold little are spared, so that one
part's stalled readers cut nobody else's.
"""

from __future__ import annotations

from typing import Final

SPARED_PART: Final = 8
"""A part that holds at most one such part of the bound is not asked to give any up."""


class HeldBytes:
    """A bound of `limit` bytes, or with `whole` a part of another one."""

    __slots__ = ("_whole", "limit", "used")

    def __init__(self, limit: int = 0, *, whole: HeldBytes | None = None) -> None:
        self.limit: int = limit if whole is None else whole.limit
        self._whole = whole
        self.used = 0
        """Bytes held now."""

    def hold(self, count: int) -> bool:
        """`count` bytes wait, too; whether they may. To be released in any case."""
        self.used += count
        whole = self._whole
        if whole is None:
            return self.used <= self.limit
        whole.used += count
        return whole.used <= self.limit or self.used <= self.limit // SPARED_PART

    def release(self, count: int) -> None:
        """They do not any more."""
        self.used -= count
        if self._whole is not None:
            self._whole.used -= count
