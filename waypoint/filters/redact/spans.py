"""What a check of a candidate says, and the looks at its neighbours that checks share."""

from __future__ import annotations

import re
from collections.abc import Callable

import re2

Found = tuple[int, int] | int
"""The span of the value, or the place (after the candidate's start) where the search goes on."""

CONTEXT_BYTES = 48
"""How far before a number its name is looked for."""
SEPARATORS = b" -"
"""Between the groups of a number."""
_CLAUSE = re.compile(rb"[,{}\];&]")


def is_word(byte: bytes) -> bool:
    """Whether that is one letter, digit, underscore or byte of a longer character."""
    return bool(byte) and (byte.isalnum() or byte == b"_" or byte >= b"\x80")


def naming(words: bytes) -> Callable[[bytes, int], bool]:
    """A test whether one of `words` (RE2) stands before a value, in the same clause: its name."""
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.case_sensitive = False
    search = re2.compile(words, options).search

    def is_named(view: bytes, start: int) -> bool:
        begin = max(0, start - CONTEXT_BYTES)
        found = search(view, begin, start)
        if found is None:
            return False
        clauses = [clause.end() for clause in _CLAUSE.finditer(view, begin, start)]
        return not clauses or search(view, clauses[-1], start) is not None

    return is_named


def stands_alone(view: bytes, start: int, end: int) -> bool:
    """Whether a number is not a part of a longer number, fraction or word."""
    before, after = view[max(0, start - 2) : start], view[end : end + 2]
    if is_word(before[-1:]) or is_word(after[:1]) or after[:1] == b"@":
        return False
    if before[-1:] in (b".", b"-", b"/", b"+") and (before[:1].isdigit() or before[-1:] == b"."):
        return False
    return not (after[:1] in (b".", b"-", b"/") and is_word(after[1:]))


def after_group(view: bytes, start: int, end: int) -> int:
    """Where to go on after what is no value: at a separator, not in the middle of digits."""
    for place in range(start + 1, end):
        if view[place] in SEPARATORS:
            return place
    return end
