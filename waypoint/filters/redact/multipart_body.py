"""`multipart/form-data` (RFC 7578) and other multiparts, part by part, as they stream.

A part that a rule names by its field is taken as a whole; text, JSON and forms in parts are looked
into as bodies are; any other part cannot be inspected. Heads of parts pass as they are, but for
values that detectors find in them (names of files).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from waypoint.filters.chain import BodyFilter
from waypoint.filters.redact import views
from waypoint.filters.redact.rules import Plan, Report
from waypoint.filters.redact.text_body import redact_value

MAX_HEAD: Final = 16 << 10
MAX_VALUE: Final = 64 << 10
MAX_PARTS: Final = 10_000
_NAME = re.compile(rb'(?i)[;\s]name="((?:[^"\\]|\\.)*)"|[;\s]name=([^";\s]+)')
_BOUNDARY = re.compile(rb'(?i);\s*boundary=(?:"([^"]{1,70})"|([^\s";,]{1,70}))')

OpenPart = Callable[[bytes, bool, str], BodyFilter | None]
"""What looks into a part: its content type (empty: none), whether it is a file, its location."""


def boundary_of(content_type: bytes) -> bytes | None:
    """The boundary that a content type names."""
    found = _BOUNDARY.search(content_type)
    return (found.group(1) or found.group(2)) if found else None


class MultipartRedactor:
    """A `BodyFilter`."""

    __slots__ = (
        "_delimiter", "_head", "_held", "_inner", "_location", "_open", "_parts", "_plan",
        "_report", "_rule", "_state", "_value", "_where",
    )  # fmt: skip

    def __init__(
        self, plan: Plan, report: Report, boundary: bytes, open_part: OpenPart, location: str
    ) -> None:
        self._plan = plan
        self._report = report
        self._open = open_part
        self._location = location
        self._delimiter = b"\r\n--" + boundary
        self._held = b"\r\n"  # so that the first delimiter looks as the others do
        self._state = "preamble"
        self._head = b""
        self._inner: BodyFilter | None = None
        self._rule: int | None = None
        self._value = b""
        self._where = ""
        self._parts = 0

    def feed(self, data: bytes) -> bytes:
        """What is certain of all bytes so far. Raises `Blocked`."""
        self._held += data
        out: list[bytes] = []
        while self._step(out):
            pass
        return b"".join(out)

    def finish(self) -> bytes:
        """The rest. Raises `Blocked`, also for a body without its last boundary."""
        if self._state == "epilogue":
            return self._take_held()
        self._plan.pass_unseen(self._report, "multipart is cut short")
        out: list[bytes] = []
        if self._state == "content":
            self._content(self._take_held(), out)
            self._end_part(out)
        return b"".join(out) + self._take_held()

    def _take_held(self) -> bytes:
        held, self._held = self._held, b""
        return held.removeprefix(b"\r\n") if self._parts == 0 else held

    def _step(self, out: list[bytes]) -> bool:
        if self._state == "epilogue":
            out.append(self._held)
            self._held = b""
            return False
        if self._state == "head":
            return self._read_head(out)
        place = self._held.find(self._delimiter)
        if place < 0:
            # What may be the begin of a delimiter stays.
            keep = len(self._delimiter) - 1
            if self._state == "content" and len(self._held) > keep:
                self._content(self._held[:-keep], out)
                self._held = self._held[-keep:]
            elif len(self._held) > MAX_HEAD:
                self._plan.pass_unseen(self._report, "multipart without its boundary")
                self._leave(out)
            return False
        if self._state == "content":
            self._content(self._held[:place], out)
            self._end_part(out)
        elif place > 2:
            self._plan.pass_unseen(self._report, "text before the first part")
            out.append(self._held[2:place])
        self._held = self._held[place:]
        self._state = "head"
        return True

    def _leave(self, out: list[bytes]) -> None:
        """Nothing more is looked into."""
        out.append(self._take_held())
        self._parts += 1
        self._state = "epilogue"

    def _read_head(self, out: list[bytes]) -> bool:
        begin = len(self._delimiter)
        after = self._held[begin : begin + 2]
        if len(after) < 2:
            return False
        if after == b"--":
            self._leave(out)
            return False
        line = self._held.find(b"\r\n", begin)
        end = self._held.find(b"\r\n\r\n", line) if line >= 0 else -1
        if end < 0:
            if len(self._held) > MAX_HEAD:
                self._plan.pass_unseen(self._report, "a part's head is too long")
                self._leave(out)
            return False
        is_first, self._parts = self._parts == 0, self._parts + 1
        if self._held[begin:line].strip(b" \t") or self._parts > MAX_PARTS:
            self._plan.pass_unseen(self._report, "multipart is malformed")
            self._leave(out)
            return False
        head = self._held[2 if is_first else 0 : end + 4]
        fields = _fields(self._held[line + 2 : end])
        self._held = self._held[end + 4 :]
        self._begin_part(head, fields, out)
        self._state = "content"
        return True

    def _begin_part(self, head: bytes, fields: dict[bytes, bytes], out: list[bytes]) -> None:
        disposition = fields.get(b"content-disposition", b"")
        found = _NAME.search(disposition)
        name = (found.group(1) or found.group(2) or b"") if found else b""
        name = name.replace(b'\\"', b'"').lower()
        rule = self._plan.form_fields.get(name)
        if rule is not None:
            self._where = f"{self._location} field {name.decode('utf-8', 'replace')}"
            if not self._plan.rules[rule].policy.is_dry_run:
                self._rule, self._head, self._value = rule, head, b""
                return
            self._plan.take(self._report, rule, b"", self._where)
        location = f"{self._location} part"
        for scanner in self._plan.scanners:
            where = f"{location} head"
            head = redact_value(self._plan, self._report, scanner, views.TEXT, head, where)
        out.append(head)
        coding = fields.get(b"content-transfer-encoding", b"binary").strip().lower()
        if coding in (b"base64", b"quoted-printable"):
            self._plan.pass_unseen(self._report, "content transfer encoding of a part")
            self._inner = None
            return
        is_file = b"filename" in disposition.lower()
        kind = fields.get(b"content-type", b"").strip()
        self._inner = self._open(kind, is_file, location)

    def _content(self, data: bytes, out: list[bytes]) -> None:
        if self._rule is not None:
            self._value += data[: max(0, MAX_VALUE - len(self._value))]
        elif self._inner is not None:
            out.append(self._inner.feed(data))
        else:
            out.append(data)

    def _end_part(self, out: list[bytes]) -> None:
        if self._rule is not None:
            put = self._plan.take(self._report, self._rule, self._value, self._where)
            if not self._plan.drops(self._rule):
                out += [self._head, put or b""]
            self._rule = None
        elif self._inner is not None:
            out.append(self._inner.finish())
            self._inner = None


def _fields(head: bytes) -> dict[bytes, bytes]:
    """The fields of a part's head; folded lines are joined. The first of a name counts."""
    found: dict[bytes, bytes] = {}
    for line in re.sub(rb"\r\n[ \t]+", b" ", head).split(b"\r\n"):
        name, _, value = line.partition(b":")
        found.setdefault(name.strip().lower(), b" " + value)
    return found
