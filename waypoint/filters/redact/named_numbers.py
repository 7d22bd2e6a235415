"""Numbers that only their name tells from any other: `"phone": 2125550187`, `SSN 123456789`.

To look at each number for a name before it would cost more than all else together, as APIs are
full of numbers. So the names are looked for, with one RE2, and then what follows them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import re2

from mesh.model.l7_policy import DetectorKind
from waypoint.filters.redact.national_ids import ID_NAMES, check_national_id
from waypoint.filters.redact.phone import PHONE_NAMES, check_phone
from waypoint.filters.redact.spans import CONTEXT_BYTES, Found

_KINDS: tuple[tuple[DetectorKind, bytes, Callable[[bytes, int, int], Found]], ...] = (
    ("national-id", ID_NAMES, check_national_id),
    ("phone", PHONE_NAMES, check_phone),
)
NAMED_KINDS = frozenset(kind for kind, _, _ in _KINDS)
_CLAUSE_END = re.compile(rb"[,{}\];&]")
_NUMBER = re.compile(
    rb"(?<![0-9A-Za-z_.])(?:\d{7,17}|\(?\d{1,5}\)?(?:[ ./-]{1,2}\(?\d{1,8}\)?){1,6})"
    rb"(?![0-9A-Za-z_])"
)


class NamedNumbers:
    """Those of `kinds` (a part of `NAMED_KINDS`) that are called so."""

    __slots__ = ("_kinds", "_search")

    def __init__(self, kinds: frozenset[DetectorKind]) -> None:
        self._kinds = [(kind, check) for kind, _, check in _KINDS if kind in kinds]
        names = b"|".join(words for kind, words, _ in _KINDS if kind in kinds)
        options = re2.Options()
        options.encoding = re2.Options.Encoding.LATIN1
        options.case_sensitive = False
        between = rb"[^,{}\];&]{0,%d}\b\d{1,5}[ ./()-]{0,2}\d" % (CONTEXT_BYTES - 8)
        self._search = re2.compile(b"(?:" + names + b")" + between, options).search

    def may_find(self, raw: bytes) -> bool:
        """Whether there is a name with digits after it."""
        return self._search(raw) is not None

    def find(self, view: bytes, place: int) -> Iterator[tuple[int, int, DetectorKind]]:
        """Spans and kinds that end after `place`, from left to right."""
        size = len(view)
        while place < size:
            named = self._search(view, place)
            if named is None:
                return
            begin, limit = named.start(), named.end() + CONTEXT_BYTES
            ends = _CLAUSE_END.search(view, begin, limit)
            limit = min(ends.start() if ends else limit, size)
            last = named.end()
            for number in _NUMBER.finditer(view, begin, limit):
                if number.start() < last and last != named.end():
                    continue
                for kind, check in self._kinds:
                    said = check(view, *number.span())
                    if not isinstance(said, int):
                        yield said[0], said[1], kind
                        last = said[1]
                        break
            place = max(last, limit)
