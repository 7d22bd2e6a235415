"""Forms by the names of their fields: `application/x-www-form-urlencoded`, as it streams.

Names are compared as a server reads them: percent-encoding undone, and without case. Only the field
that is being read is held; of a value that is taken `MAX_VALUE` bytes, the rest is left out.
"""

from __future__ import annotations

from typing import Final

from waypoint.filters.redact import views
from waypoint.filters.redact.rules import Plan, Report

MAX_NAME: Final = 4 << 10
MAX_VALUE: Final = 64 << 10


class FormRedactor:
    """A `BodyFilter`."""

    __slots__ = ("_held", "_keeps", "_location", "_plan", "_report", "_rest")

    def __init__(self, plan: Plan, report: Report, location: str = "body") -> None:
        self._plan = plan
        self._report = report
        self._location = location
        self._held = b""
        self._keeps = False
        """Whether a field has been passed on, which the next one's `&` is after."""
        self._rest = ""
        """What becomes of the rest of a long field: `pass`, `omit`; empty: none."""

    def feed(self, data: bytes) -> bytes:
        """What is certain of all bytes so far. Raises `Blocked`."""
        out: list[bytes] = []
        *fields, last = (self._held + data).split(b"&")
        for field in fields:
            self._field(field, out)
            self._rest = ""
        self._held = last
        name, equals, _ = last.partition(b"=")
        if self._rest:
            self._field(last, out)
            self._held = b""
        elif len(name) > MAX_NAME:
            self._plan.pass_unseen(self._report, "a form with a name that is too long")
            self._begin(last, "pass", out)
        elif equals and self._rule(name) is None and self._plan.form_fields:
            self._begin(last, "pass", out)
        elif equals and len(last) > MAX_VALUE:
            index = self._rule(name)
            is_dry = index is not None and self._plan.rules[index].policy.is_dry_run
            self._field(last, out)
            self._rest, self._held = "pass" if is_dry else "omit", b""
        return b"".join(out)

    def finish(self) -> bytes:
        """The rest. Raises `Blocked`."""
        out: list[bytes] = []
        if self._held or self._rest:
            self._field(self._held, out)
        self._held = b""
        return b"".join(out)

    def _begin(self, field: bytes, rest: str, out: list[bytes]) -> None:
        self._keep(field, out)
        self._rest, self._held = rest, b""

    def _keep(self, field: bytes, out: list[bytes]) -> None:
        if self._keeps:
            out.append(b"&")
        out.append(field)
        self._keeps = True

    def _rule(self, name: bytes) -> int | None:
        return self._plan.form_fields.get(_shown(name))

    def _field(self, field: bytes, out: list[bytes]) -> None:
        if self._rest:
            if self._rest == "pass":
                out.append(field)
            return
        name, equals, value = field.partition(b"=")
        index = self._rule(name)
        if index is None or not equals:
            self._keep(field, out)
            return
        shown = views.FORM.look(value).text
        where = f"{self._location} field {_shown(name).decode('utf-8', 'replace')}"
        put = self._plan.take(self._report, index, shown, where)
        if self._plan.drops(index):
            return
        self._keep(field if put is None else name + equals + views.write_form(put), out)


def _shown(name: bytes) -> bytes:
    return views.FORM.look(name).text.lower()
