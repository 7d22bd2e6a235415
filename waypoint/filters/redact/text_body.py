"""Text as it streams: what is found is replaced, all other bytes pass as they are.

A block ends at a boundary, a byte that no match and no escape can hold, so it does not matter how
the stream was cut. Where none comes for `MAX_UNIT` bytes (base64, say) a block ends there, but what
begins in its last `OVERLAP` bytes waits for the next one: every value up to `OVERLAP` bytes is
found, memory is bounded, and the ends still depend on the text alone. A private key, which has
newlines, is waited for from its BEGIN. At boundaries nothing waits, so events and lines of a slow
stream leave at once.
"""

from __future__ import annotations

import re

from waypoint.filters.redact.rules import Plan, Report
from waypoint.filters.redact.scanner import Hit, Scanner
from waypoint.filters.redact.views import JSON, Syntax, View

MAX_UNIT = 32 << 10
OVERLAP = 8 << 10
_CONTEXT = 48
_STRUCTURE = re.compile(rb'\\.|"', re.DOTALL)
_NUMBER_CHAR = frozenset(b"0123456789+-.eE")
_NUMBER_REST = re.compile(rb"[0-9.]*(?:[eE][+-]?[0-9]+)?")
_PRIVATE_END = re.compile(rb"-----END [A-Z0-9 ]{0,40}-----\Z|Private-MAC: [0-9a-f]{40,64}\Z|\AAGE-")


class TextRedactor:
    """A `BodyFilter` over decoded UTF-8 (or any superset of ASCII)."""

    __slots__ = (
        "_before", "_boundaries", "_boundary_bytes", "_context", "_held", "_in_string", "_is_json",
        "_location", "_plan", "_report", "_syntax",
    )  # fmt: skip

    def __init__(self, plan: Plan, report: Report, syntax: Syntax, location: str = "body") -> None:
        self._plan = plan
        self._report = report
        self._syntax = syntax
        self._location = location
        has_custom = plan.live.has_custom or plan.dry.has_custom
        boundaries = syntax.narrow if has_custom else syntax.boundaries
        self._boundary_bytes = boundaries
        self._boundaries = [bytes((byte,)) for byte in boundaries]
        self._held = b""
        self._context = b""
        self._in_string = False
        self._before = b""
        """Of the last block; whether it ends in a string is not asked before one needs to know."""
        self._is_json = syntax is JSON and (plan.live.has_numbers or plan.dry.has_numbers)

    def feed(self, data: bytes) -> bytes:
        """What is certain of all bytes so far. Raises `Blocked`."""
        self._held = self._held + data if self._held else data
        return self._advance(is_end=False)

    def finish(self) -> bytes:
        """The rest. Raises `Blocked`."""
        return self._advance(is_end=True)

    def _advance(self, *, is_end: bool) -> bytes:
        out: list[bytes] = []
        held, place = self._held, 0
        size = len(held)
        while place < size:
            stop = min(size, place + MAX_UNIT)
            is_last = is_end and stop == size
            cut = size if is_last else self._last_boundary(held, place, stop)
            is_forced = cut <= place
            if is_forced:
                if stop - place < MAX_UNIT:
                    break
                cut = stop
            block = held if cut - place == size else held[place:cut]
            taken = self._block(block, out, is_forced=is_forced, is_last=is_last)
            if not taken:
                if stop - place < MAX_UNIT:
                    break
                # A key without an end fills the window: it has waited long enough.
                taken = self._block(held[place:stop], out, is_forced=True, is_last=False)
            place += taken
        self._held = held[place:] if place else held
        return b"".join(out)

    def _last_boundary(self, held: bytes, place: int, stop: int) -> int:
        if held[stop - 1] in self._boundary_bytes:
            return stop
        best = place
        for boundary in self._boundaries:
            found = held.rfind(boundary, best, stop) + 1
            best = max(best, found)
        return best

    def _block(self, raw: bytes, out: list[bytes], *, is_forced: bool, is_last: bool) -> int:
        """Redact one block, append it; how many bytes are done (fewer than all if some wait)."""
        if is_forced and self._syntax.unfinished:
            unfinished = self._syntax.unfinished.search(raw, max(0, len(raw) - 48))
            if unfinished:
                raw = raw[: unfinished.start()]
        if not is_forced and self._is_clean(raw):
            out.append(raw)
            self._passed(raw, self._syntax.look(raw[-_CONTEXT:]).text, len(raw))
            return len(raw)
        view = self._syntax.look(raw)
        shift = len(self._context)
        text = self._context + view.text if shift else view.text
        limit = len(raw) - OVERLAP if is_forced else len(raw)
        done = 0
        pieces: list[bytes] = []
        for hit in self._plan.live.find(text, shift):
            begin = max(view.raw_start(hit.start - shift), done)
            if begin >= limit:
                break
            if self._waits(hit, text, view, begin, is_forced=is_forced, is_last=is_last):
                limit = begin
                break
            end = view.raw_end(hit.end - shift)
            value = text[hit.start : hit.end]
            begin, end, put = self._replace(raw, done, begin, end, hit, value)
            pieces.append(raw[done:begin])
            pieces.append(put)
            done = end
        taken = max(done, limit)
        if not done and taken == len(raw):
            out.append(raw)
        else:
            pieces.append(raw[done:taken])
            out.append(b"".join(pieces))
        if self._plan.dry:
            for hit in self._plan.dry.find(text, shift):
                if view.raw_start(hit.start - shift) < taken:
                    self._report.count(self._plan.rules[hit.rule].key, self._location)
        self._passed(raw, view.text, taken)
        return taken

    def _is_clean(self, raw: bytes) -> bool:
        """Whether it can be told without a view that there is nothing to find."""
        if self._syntax is not JSON or raw.find(b"\\") >= 0:
            return False
        text = self._context + raw if self._context else raw
        return not any(each.may_find(text) for each in self._plan.scanners)

    def _waits(
        self, hit: Hit, text: bytes, view: View, begin: int, *, is_forced: bool, is_last: bool
    ) -> bool:
        """Whether the value may go on after this block, which then is to begin with it."""
        if is_last:
            return False
        if hit.kind == "private-key":
            if _PRIVATE_END.search(text[hit.start : hit.end]):
                return False
            return begin > 0 or not is_forced
        return is_forced and hit.end == len(text) and begin > 0

    def _replace(
        self, raw: bytes, done: int, begin: int, end: int, hit: Hit, value: bytes
    ) -> tuple[int, int, bytes]:
        """The bytes to replace and what by: a number of JSON as a whole, by a string."""
        rule = self._plan.rules[hit.rule]
        self._report.count(self._plan.rules[hit.rule].key, self._location)
        put = self._syntax.write(rule.replacement(hit.kind, value))
        is_number = self._is_json and all(byte in _NUMBER_CHAR for byte in value)
        if is_number and not self._is_in_string(raw, begin):
            while begin > done and raw[begin - 1] in _NUMBER_CHAR:
                begin -= 1
            rest = _NUMBER_REST.match(raw, end)
            end = rest.end() if rest else end
            put = b'"' + put + b'"'
        return begin, end, put

    def _is_in_string(self, raw: bytes, place: int) -> bool:
        return self._begins_in_string() is not _is_odd(raw[:place])

    def _begins_in_string(self) -> bool:
        if self._before:
            self._in_string = self._in_string is not _is_odd(self._before)
            self._before = b""
        return self._in_string

    def _passed(self, raw: bytes, view: bytes, taken: int) -> None:
        if self._is_json and taken:
            self._begins_in_string()
            self._before = raw[:taken] if taken < len(raw) else raw
        if taken == len(raw):
            self._context = (self._context + view[-_CONTEXT:])[-_CONTEXT:]
        elif taken:
            seen = self._syntax.look(raw[max(0, taken - 8 * _CONTEXT) : taken]).text
            self._context = seen[-_CONTEXT:]


def _is_odd(raw: bytes) -> bool:
    """Whether an odd number of quotes begins or ends strings in these bytes of JSON."""
    if raw.find(b"\\") < 0:
        return raw.count(b'"') % 2 == 1
    return _STRUCTURE.findall(raw).count(b'"') % 2 == 1


def redact_value(
    plan: Plan, report: Report, scanner: Scanner, syntax: Syntax, raw: bytes, location: str
) -> bytes:
    """A short text at once (a header, a query): what `scanner` finds in it replaced."""
    view = syntax.look(raw)
    done, pieces = 0, []
    for hit in scanner.find(view.text):
        rule = plan.rules[hit.rule]
        report.count(rule.key, location)
        if rule.policy.is_dry_run:
            continue
        begin = max(view.raw_start(hit.start), done)
        pieces.append(raw[done:begin])
        pieces.append(syntax.write(rule.replacement(hit.kind, view.text[hit.start : hit.end])))
        done = view.raw_end(hit.end)
    if not done and not pieces:
        return raw
    pieces.append(raw[done:])
    return b"".join(pieces)
