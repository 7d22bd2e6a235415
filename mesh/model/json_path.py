"""JSON paths: the part of RFC 9535 that a stream can follow. Pure.

Names (`.a`, `['a b']`, `["a"]`), wildcards (`.*`, `[*]`), indexes from the front (`[0]`), several
of these in one bracket (`['a','b']`), and descendants (`..name`, `..*`, `..[0]`). Not: indexes from
the end, slices, filters; for those the whole document would have to be held.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mesh.errors import ConfigError

MAX_SEGMENTS = 32
MAX_PATH = 1024
_SHORTHAND = re.compile(
    r"[A-Za-z_\u0080-\U0010ffff-][A-Za-z0-9_\u0080-\U0010ffff-]*|[0-9]+[A-Za-z_-]*"
)
_SELECTOR = re.compile(
    r"""\s*(?:(?P<star>\*)|(?P<index>0|[1-9][0-9]{0,8})|'(?P<single>(?:[^'\\]|\\.){0,256})'"""
    r"""|"(?P<double>(?:[^"\\]|\\.){0,256})")\s*(?P<end>[,\]])"""
)
_ESCAPE = re.compile(r"\\(u[0-9A-Fa-f]{4}|.)")
_LETTERS = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


@dataclass(frozen=True, slots=True)
class Segment:
    """One step: any of `names` or `indexes`, or everything; at any depth if it descends."""

    names: tuple[str, ...] = ()
    indexes: tuple[int, ...] = ()
    is_any: bool = False
    descends: bool = False


def parse_json_path(text: str) -> tuple[Segment, ...]:
    """The segments of a path. Raises ConfigError, saying where it stops to be one."""
    if not text.startswith("$"):
        raise _wrong(text, 0, "a path begins with $")
    if len(text) > MAX_PATH:
        raise ConfigError(f"a JSON path of {len(text)} characters, allowed are {MAX_PATH}")
    found: list[Segment] = []
    place = 1
    while place < len(text):
        descends = text.startswith("..", place)
        if descends:
            place += 2
        elif text[place] == ".":
            place += 1
        elif text[place] != "[":
            raise _wrong(text, place, "expected . or [")
        if text.startswith("[", place):
            segment, place = _bracket(text, place, descends=descends)
        elif text.startswith("*", place):
            segment, place = Segment(is_any=True, descends=descends), place + 1
        else:
            name = _SHORTHAND.match(text, place)
            if name is None:
                raise _wrong(text, place, "expected a name, * or [")
            segment, place = Segment((name.group(),), descends=descends), name.end()
        found.append(segment)
    if not found:
        raise _wrong(text, 1, "the whole document is no part of it")
    if len(found) > MAX_SEGMENTS:
        raise ConfigError(f"a JSON path of {len(found)} segments, allowed are {MAX_SEGMENTS}")
    return tuple(found)


def _bracket(text: str, place: int, *, descends: bool) -> tuple[Segment, int]:
    names: list[str] = []
    indexes: list[int] = []
    is_any = False
    place += 1
    while True:
        found = _SELECTOR.match(text, place)
        if found is None:
            if text.startswith(("?", "-", ":"), place) or ":" in text[place:].split("]")[0]:
                raise _wrong(text, place, "a stream can follow no filter, slice or negative index")
            raise _wrong(text, place, "expected a quoted name, an index or *")
        if found["star"]:
            is_any = True
        elif found["index"] is not None:
            indexes.append(int(found["index"]))
        else:
            quoted = found["single"] if found["single"] is not None else found["double"]
            names.append(_ESCAPE.sub(_unescape, quoted))
        place = found.end()
        if found["end"] == "]":
            return Segment(tuple(names), tuple(indexes), is_any, descends), place


def _unescape(found: re.Match[str]) -> str:
    said = found.group(1)
    return chr(int(said[1:], 16)) if len(said) == 5 else _LETTERS.get(said, said)


def _wrong(text: str, place: int, why: str) -> ConfigError:
    return ConfigError(
        f"not a JSON path that can be followed: {text[:64]!r} at character {place + 1}: {why}",
        hint="such as $.a.b[*].c, $['a b'], $.list[0], $..name",
    )
