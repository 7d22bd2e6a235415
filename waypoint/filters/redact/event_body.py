"""JSON by path inside other text: in the `data:` lines of server-sent events, and in bodies that
say they are plain text but begin as JSON does.
"""

from __future__ import annotations

import re
from typing import Final

from waypoint.filters.chain import BodyFilter
from waypoint.filters.redact.json_body import JsonRedactor
from waypoint.filters.redact.rules import Plan, Report

MAX_LINE: Final = 256 << 10
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\n|\Z)")
_DATA = re.compile(rb"data: ?(?=[{\[])")


class EventRedactor:
    """`text/event-stream` (WHATWG HTML section 9.2), line by line. JSON that is spread over several
    lines of one event cannot be inspected.
    """

    __slots__ = ("_held", "_location", "_plan", "_report")

    def __init__(self, plan: Plan, report: Report, location: str) -> None:
        self._plan = plan
        self._report = report
        self._location = location
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Whole lines. Raises `Blocked`."""
        held = self._held + data
        out: list[bytes] = []
        place = 0
        for end in _LINE_END.finditer(held):
            out += [self._line(held[place : end.start()]), end.group()]
            place = end.end()
        self._held = held[place:]
        if len(self._held) > MAX_LINE:
            self._plan.pass_unseen(self._report, "a line of events that is too long")
            out.append(self._held)
            self._held = b""
        return b"".join(out)

    def finish(self) -> bytes:
        """The last line. Raises `Blocked`."""
        held, self._held = self._held, b""
        return self._line(held)

    def _line(self, line: bytes) -> bytes:
        begin = _DATA.match(line)
        if begin is None:
            return line
        body = JsonRedactor(self._plan, self._report, self._location)
        return begin.group() + body.feed(line[begin.end() :]) + body.finish()


class Sniffed:
    """Text that may be JSON: its first byte decides, as those do who read it so."""

    __slots__ = ("_inner", "_is_decided", "_location", "_plan", "_report")

    def __init__(self, plan: Plan, report: Report, location: str) -> None:
        self._plan = plan
        self._report = report
        self._location = location
        self._is_decided = False
        self._inner: BodyFilter | None = None

    def feed(self, data: bytes) -> bytes:
        """Raises `Blocked`."""
        if not self._is_decided:
            begin = data.lstrip(b" \t\r\n\xef\xbb\xbf")[:1]
            self._is_decided = bool(begin)
            if begin in (b"{", b"["):
                self._inner = JsonRedactor(self._plan, self._report, self._location)
        return data if self._inner is None else self._inner.feed(data)

    def finish(self) -> bytes:
        """Raises `Blocked`."""
        return b"" if self._inner is None else self._inner.finish()
