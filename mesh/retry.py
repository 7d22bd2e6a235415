"""Back-off: capped, jittered delays as an iterator that takes its random numbers.

It never sleeps; the shell that retries does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Random(Protocol):
    """The part of `random.Random` that a schedule needs."""

    def uniform(self, a: float, b: float, /) -> float:
        """A number between a and b."""
        ...


@dataclass(slots=True)
class Backoff:
    """Delays in seconds: `base`, doubling up to `cap`, each spread by ±`jitter`.

    `next()` gives a delay, `reset()` starts over after a success.
    """

    rng: Random
    base: float = 0.01
    cap: float = 15.0
    jitter: float = 0.2
    attempt: int = 0

    def next(self) -> float:
        """The delay before the next attempt, in seconds."""
        delay = min(self.cap, self.base * 2.0 ** min(self.attempt, 40))
        self.attempt += 1
        return delay * self.rng.uniform(1.0 - self.jitter, 1.0 + self.jitter)

    def reset(self) -> None:
        """Forget earlier failures."""
        self.attempt = 0
