"""JSON by path, as it streams: values that a path names are replaced, all other bytes stay.

One document, or several one after the other (newline-delimited, or RFC 7464 sequences). What no
path can reach is passed over a container at a time. Held are only the member that is being read
and, of a value that is taken, `MAX_VALUE` bytes; what a longer one has beyond is left out.

What is no JSON (single quotes, comments, mismatched brackets, an end in the middle), or deeper than
`MAX_DEPTH`, cannot be inspected. Duplicate names are each taken.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from mypy_extensions import mypyc_attr

from waypoint.filters.redact.path_tree import NOTHING, SCALAR, STRING, UNREACHED, Place, Step
from waypoint.filters.redact.rules import Plan, Report
from waypoint.filters.redact.views import write_json

MAX_DEPTH: Final = 128
MAX_KEY: Final = 4 << 10
MAX_VALUE: Final = 64 << 10
_SPACE = re.compile(rb"[ \t\r\n]*+")
_BETWEEN = re.compile(rb"(?:[ \t\r\n\x1e]++|\xef\xbb\xbf)*")
_KEY = re.compile(rb"(" + STRING + rb")[ \t\r\n]*+:[ \t\r\n]*+")
_IN_STRING = rb'[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*'
_KEY_BEGUN = re.compile(b'"' + _IN_STRING + rb'(?:\\?|"[ \t\r\n]*+)\Z')
_SCALAR = re.compile(SCALAR)
_STRING_REST = re.compile(_IN_STRING)
_ENDS = b" \t\r\n,]}\x1e"
_LITERALS = (b"true", b"false", b"null")


class _Frame:
    """A container that a path may reach into."""

    __slots__ = ("at", "index", "is_first", "is_object", "keeps", "place")

    def __init__(self, place: Place, *, is_object: bool) -> None:
        self.place = place
        self.is_object = is_object
        self.is_first = True
        self.keeps = False
        """Whether a member has been passed on, which the next one's comma is after."""
        self.index = 0


@mypyc_attr(native_class=False)
class _Broken(Exception):
    """This is no JSON; `args[0]` says why."""


class JsonRedactor:
    """A `BodyFilter`."""

    __slots__ = (
        "_dead", "_done", "_drops", "_held", "_is_end", "_is_over", "_location", "_out", "_plan",
        "_report", "_stack", "_string", "_tree",
    )  # fmt: skip

    def __init__(self, plan: Plan, report: Report, location: str = "body") -> None:
        assert plan.json_paths is not None  # noqa: S101 - only made for such plans
        self._plan = plan
        self._tree = plan.json_paths
        self._report = report
        self._location = location
        self._held = b""
        self._stack: list[_Frame] = []
        self._dead = 0
        """How many containers we are deep in what no path reaches."""
        self._drops = False
        """Whether that is left out."""
        self._string = ""
        """Inside a long string that is passed on (`pass`) or left out (`omit`)."""
        self._is_over = self._is_end = False
        self._out: list[bytes] = []
        self._done = 0

    def feed(self, data: bytes) -> bytes:
        """What is certain of all bytes so far. Raises `Blocked`."""
        return data if self._is_over else self._advance(data)

    def finish(self) -> bytes:
        """The rest. Raises `Blocked`, also for a document that is cut short."""
        if self._is_over:
            return b""
        self._is_end = True
        rest = self._advance(b"")
        if not self._is_over and (self._held or self._stack or self._dead or self._string):
            self._plan.pass_unseen(self._report, "JSON is cut short")
            rest += self._held
        return rest

    def _advance(self, data: bytes) -> bytes:
        text = self._held + data
        self._out, self._done = [], 0
        place = reached = 0
        try:
            while reached >= 0 and place < len(text):
                if self._string:
                    reached = self._in_string(text, place)
                elif self._dead:
                    reached = self._unreached(text, place)
                elif self._stack:
                    reached = self._member(text, place, self._stack[-1])
                else:
                    reached = self._document(text, place)
                place = max(place, reached)
        except _Broken as broken:
            self._plan.pass_unseen(self._report, str(broken))
            self._is_over = True
            return b"".join(self._out) + text[self._done :]
        self._pass(text, place)
        self._held = text[place:]
        return b"".join(self._out)

    def _pass(self, text: bytes, until: int) -> None:
        if until > self._done:
            self._out.append(text[self._done : until])
            self._done = until

    # Each of these returns the place up to which all is done; -1: it needs more bytes for that.

    def _document(self, text: bytes, place: int) -> int:
        """Between documents, or the begin of one."""
        place = _end(_BETWEEN, text, place)
        if place == len(text):
            return place
        return self._value(text, place, place, Step(place=self._tree.root), None)

    def _member(self, text: bytes, begin: int, frame: _Frame) -> int:
        """One member or element, with the comma before it; or the end of the container."""
        if (frame.keeps and text[begin] == 44) or frame.is_first:
            skip = frame.place.skip(is_object=frame.is_object, is_first=frame.is_first)
            passed = _end(skip, text, begin) if skip is not None else begin
            # A number at the end may go on.
            if begin < passed < len(text) and text[passed] in _ENDS:
                frame.keeps, frame.is_first = True, False
                return passed
        place = _end(_SPACE, text, begin)
        if place == len(text):
            return -1
        if text[place] in b"}]":
            if (text[place] == 125) is not frame.is_object:
                raise _Broken("not JSON: brackets do not match")
            self._stack.pop()
            return place + 1
        comma = -1
        if not frame.is_first:
            if text[place] != 44:
                raise _Broken("not JSON: no comma between values")
            comma, place = place, _end(_SPACE, text, place + 1)
        step: Step | None = None
        if frame.is_object:
            name = self._name(text, place)
            if name is None:
                return -1
            place = name.end()
            step = frame.place.members.get(_text_of(name.group(1)))
        elif frame.place.elements:
            step = frame.place.elements.get(frame.index)
        if step is None:
            step = (frame.place.other if frame.is_object else frame.place.other_element) or NOTHING
        if place == len(text):
            return -1
        return self._value(text, begin, place, step, frame, comma)

    def _name(self, text: bytes, place: int) -> re.Match[bytes] | None:
        found = _KEY.match(text, place)
        if found is not None:
            return found
        if len(text) - place > MAX_KEY:
            raise _Broken("not JSON, or a name that is too long")
        if place < len(text) and not _KEY_BEGUN.match(text, place):
            raise _Broken("not JSON: a name is missing")
        return None

    def _value(
        self, text: bytes, begin: int, place: int, step: Step, frame: _Frame | None, comma: int = -1
    ) -> int:
        byte = text[place]
        if byte in b"{[":
            return self._container(text, begin, place, step, frame, comma)
        found = _SCALAR.match(text, place)
        end = found.end() if found else -1
        if found is not None and byte != 34 and not self._is_ended(text, end):
            return -1 if len(text) - place <= MAX_KEY else self._no_json()
        if found is None:
            if byte != 34:
                is_begun = byte == 45 or any(
                    each.startswith(text[place:]) for each in _LITERALS
                )  # fmt: skip
                return -1 if is_begun and not self._is_end else self._no_json()
            return self._long_string(text, begin, place, step, frame, comma)
        if step.rule is None:
            self._keep(text, frame, comma)
        elif self._plan.drops(step.rule) and frame is not None:
            self._plan.take(self._report, step.rule, b"", self._where(step))
            self._omit(text, begin, end, frame)
        else:
            self._keep(text, frame, comma)
            self._replace(text, place, end, step)
        return end

    def _is_ended(self, text: bytes, end: int) -> bool:
        if end == len(text):
            return self._is_end
        if text[end] not in _ENDS:
            raise _Broken("not JSON: more after a value")
        return True

    def _no_json(self) -> int:
        raise _Broken("not JSON")

    def _container(
        self, text: bytes, begin: int, place: int, step: Step, frame: _Frame | None, comma: int
    ) -> int:
        if len(self._stack) + self._dead >= MAX_DEPTH:
            raise _Broken(f"JSON deeper than {MAX_DEPTH}")
        if step.rule is not None and self._plan.drops(step.rule) and frame is not None:
            self._plan.take(self._report, step.rule, b"", self._where(step))
            self._omit(text, begin, place + 1, frame)
            self._dead, self._drops = 1, True
            return place + 1
        self._keep(text, frame, comma)
        if step.place is None:
            self._dead = 1
        else:
            self._stack.append(_Frame(step.place, is_object=text[place] == 123))
        return place + 1

    def _keep(self, text: bytes, frame: _Frame | None, comma: int) -> None:
        """The member passes; without the comma before it if nothing has passed before."""
        if frame is None:
            return
        if comma >= 0 and not frame.keeps:
            self._pass(text, comma)
            self._done = comma + 1
        frame.keeps, frame.is_first = True, False
        frame.index += 1

    def _omit(self, text: bytes, begin: int, end: int, frame: _Frame) -> None:
        self._pass(text, begin)
        self._done = end
        frame.is_first = False
        frame.index += 1

    def _replace(self, text: bytes, place: int, end: int, step: Step) -> None:
        assert step.rule is not None  # noqa: S101 - asked before
        raw = text[place:end]
        if raw == b"null":
            return  # there is no value
        value = _decode(raw) if raw[:1] == b'"' else raw
        put = self._plan.take(self._report, step.rule, value, self._where(step))
        if put is not None:
            self._pass(text, place)
            self._out.append(b'"' + write_json(put) + b'"')
            self._done = end

    def _where(self, step: Step) -> str:
        return f"{self._location} {step.path}"

    def _long_string(
        self, text: bytes, begin: int, place: int, step: Step, frame: _Frame | None, comma: int
    ) -> int:
        """A string without its end: passed on as it comes, or waited for if it is taken."""
        end = _end(_STRING_REST, text, place + 1)
        if end < len(text) and text[end : end + 1] != b"\\":
            raise _Broken("not JSON: a control character in a string")
        if self._is_end:
            return -1
        if step.rule is None:
            self._keep(text, frame, comma)
            self._string = "pass"
            return end
        if end - place < MAX_VALUE:
            return -1
        if self._plan.drops(step.rule) and frame is not None:
            self._plan.take(self._report, step.rule, b"", self._where(step))
            self._omit(text, begin, end, frame)
        else:
            self._keep(text, frame, comma)
            put = self._plan.take(
                self._report, step.rule, text[place + 1 : place + MAX_VALUE], self._where(step)
            )
            if put is None:
                self._string = "pass"
                return end
            self._pass(text, place)
            self._out.append(b'"' + write_json(put) + b'"')
            self._done = end
        self._string = "omit"
        return end

    def _in_string(self, text: bytes, place: int) -> int:
        end = _end(_STRING_REST, text, place)
        is_closed = text[end : end + 1] == b'"'
        if not is_closed and end < len(text) - 1:
            raise _Broken("not JSON: a control character in a string")
        if self._string == "omit":
            self._done = end + is_closed
        if is_closed:
            self._string = ""
            return end + 1
        return end if end > place else -1

    def _unreached(self, text: bytes, place: int) -> int:
        end = _end(UNREACHED, text, place)
        byte = text[end : end + 1]
        if byte and byte in b"{[":
            self._dead += 1
            if len(self._stack) + self._dead > MAX_DEPTH:
                raise _Broken(f"JSON deeper than {MAX_DEPTH}")
        elif byte and byte in b"}]":
            self._dead -= 1
        elif byte == b'"':
            rest = _end(_STRING_REST, text, end + 1)
            if rest < len(text) and text[rest : rest + 1] != b"\\":
                raise _Broken("not JSON: a control character in a string")
            self._string = "omit" if self._drops else "pass"
            self._done = rest if self._drops else self._done
            return rest
        elif byte:
            if len(text) - end > 5 or self._is_end:
                raise _Broken("not JSON")
            self._done = end if self._drops else self._done
            return end if end > place else -1
        end += len(byte)
        if self._drops:
            self._done = end
            self._drops = self._dead > 0
        return end


def _end(pattern: Any, text: bytes, place: int) -> int:
    found = pattern.match(text, place)
    return place if found is None else int(found.end())


def _text_of(raw: bytes) -> str:
    """A name, escapes undone."""
    if raw.find(b"\\") >= 0:
        return _decode(raw).decode("utf-8", "surrogatepass")
    return raw[1:-1].decode("utf-8", "replace")


def _decode(raw: bytes) -> bytes:
    """The text of a string. Raises `_Broken`."""
    if raw.find(b"\\") < 0:
        return raw[1:-1]
    try:
        return str(json.loads(raw)).encode("utf-8", "surrogatepass")
    except ValueError as exc:
        raise _Broken("not JSON: an escape that is none") from exc
