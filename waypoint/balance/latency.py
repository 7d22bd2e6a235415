"""How long an endpoint takes, as far as we remember: an average that weighs later requests more,
and that is forgotten while nothing is asked of it. Without that, one that was slow once would be
avoided for ever. Pure.
"""

from __future__ import annotations

import math
from typing import Final

SHARE: Final = 0.2
FIRST_GUESS_SECONDS: Final = 0.005
FORGOTTEN_SECONDS: Final = 5.0
LONGEST_SECONDS: Final = 5.0
"""What takes longer is a stream, which says nothing about the next answer."""


class Latency:
    """Of one endpoint. Times are monotonic seconds."""

    __slots__ = ("_average", "_heard")

    def __init__(self) -> None:
        self._average = FIRST_GUESS_SECONDS
        self._heard = 0.0

    def heard(self, taken: float, now: float) -> None:
        """A request was over at `now`, after `taken` seconds."""
        self._heard = now
        self._average += SHARE * (min(taken, LONGEST_SECONDS) - self._average)

    def expected(self, now: float, active: int) -> float:
        """Seconds that the next request will take; with some under way nothing is forgotten."""
        if active or not self._heard:
            return self._average
        return self._average * math.exp((self._heard - now) / FORGOTTEN_SECONDS)
