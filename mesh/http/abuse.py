"""One token bucket against floods of cheap frames.

Rapid resets, SETTINGS, PING, PRIORITY, empty DATA, stray WINDOW_UPDATE and RST that a peer
provokes from us ("made you reset") all draw from one bucket per connection. An honest
peer never empties it; a flood does within a second and gets ENHANCE_YOUR_CALM.
Takes `now`, never looks at a clock.
"""

from __future__ import annotations

BURST = 1000.0
RATE = 33.0


class TokenBucket:
    """`burst` tokens, refilled at `rate` per second. Times in seconds, any epoch."""

    __slots__ = ("_burst", "_last", "_rate", "_tokens")

    def __init__(self, burst: float = BURST, rate: float = RATE) -> None:
        self._burst = burst
        self._rate = rate
        self._tokens = burst
        self._last: float | None = None

    def take(self, now: float, cost: float = 1.0) -> bool:
        """Take `cost` tokens; False (and nothing taken) when there are too few.

        A clock that goes back gives no tokens and takes none away.
        """
        last = self._last
        if last is None:
            self._last = now
        elif now > last:
            self._last = now
            self._tokens = min(self._burst, self._tokens + (now - last) * self._rate)
        if self._tokens < cost:
            return False
        self._tokens -= cost
        return True
