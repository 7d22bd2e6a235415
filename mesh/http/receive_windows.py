"""How much a peer may send before our reader takes it: stream windows that grow with use.

A receive window is memory that a stalled reader can make us hold. So streams begin with a
small one, and one whose reader keeps up is granted more, out of a budget: the process has one,
each pod a part of it, each connection a part of its pod's. A part may hold at most as much as
is left of the whole (the dynamic thresholds of switch buffers): one greedy stream alone
gets plenty, many share, and there is always something left for who comes next. Nothing
is ever waited for: who gets nothing keeps its small window.
"""

from __future__ import annotations

from mesh.http.h2_frames import LocalSettings
from mesh.http.h2_stream import Stream


class WindowBudget:
    """A budget of `limit` bytes, or with `parent` a part of another budget."""

    __slots__ = ("_limit", "_parent", "used")

    def __init__(self, limit: int = 0, *, parent: WindowBudget | None = None) -> None:
        self._limit = limit
        self._parent = parent
        self.used = 0
        """Bytes granted out of this budget now."""

    @property
    def room(self) -> int:
        """The most that one holder of this budget may hold now; less than 0 under pressure."""
        return (self._limit if self._parent is None else self._parent.room) - self.used

    def take(self, held: int, count: int) -> bool:
        """Grant `count` bytes to a holder that has `held` already; whether that was possible."""
        part: WindowBudget = self
        while held + count <= part.room - count:
            if part._parent is None:
                self.give(-count)
                return True
            held, part = part.used, part._parent
        return False

    def give(self, count: int) -> None:
        """Return what was taken."""
        self.used -= count
        if self._parent is not None:
            self._parent.give(count)


class ReceiveWindows:
    """The windows of one connection's streams: `settings` say how large, `budget` how many."""

    def __init__(self, settings: LocalSettings, budget: WindowBudget | None) -> None:
        self._first = settings.stream_window
        self._most = max(0, settings.largest_window - settings.stream_window)
        self._budget = WindowBudget(settings.connection_window, parent=budget)

    def settle(self, stream: Stream) -> int:
        """The increment to announce for a stream whose `uncredited` has reached its
        `credit_step`: what was consumed, more when the reader keeps up (`stream.lagged` says
        that it does not), less when others need it.
        """
        increment = stream.uncredited + self._change(stream)
        stream.uncredited = 0
        stream.lagged = False
        return increment

    def forget(self, stream: Stream) -> None:
        """The stream has ended."""
        if stream.granted:
            self._budget.give(stream.granted)
            stream.granted = 0

    def _change(self, stream: Stream) -> int:
        granted, budget = stream.granted, self._budget
        if not stream.lagged and granted < self._most:
            change = min(self._first + granted, self._most - granted)
            if budget.take(granted, change):
                return self._set(stream, granted + change)
        if granted > max(0, budget.room):
            kept = granted - min(stream.uncredited - 1, (granted + 1) // 2)
            budget.give(granted - kept)
            return self._set(stream, kept)
        return 0

    def _set(self, stream: Stream, granted: int) -> int:
        change, stream.granted = granted - stream.granted, granted
        stream.credit_step = max(1, (self._first + granted) // 2)
        return change
