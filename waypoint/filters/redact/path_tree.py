"""The JSON paths of some rules as one automaton over the places of a document. Pure.

A `Place` is a container of the document: what each of its members is to a path. Places are made
when a document first gets there and kept, so to follow a thousand paths costs what one does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import re2

from mesh.errors import ConfigError
from mesh.model.json_path import Segment, parse_json_path

MAX_PLACES = 4096
_State = tuple[int, int]
"""Which path, and how many of its segments are behind us."""


@dataclass(slots=True, eq=False)
class Place:
    """`members` and `elements`: what is at a name or index; else `other`, `other_element`."""

    states: frozenset[_State]
    members: dict[str, Step] = field(default_factory=dict)
    elements: dict[int, Step] = field(default_factory=dict)
    other: Step | None = None
    other_element: Step | None = None
    _skips: dict[tuple[bool, bool], Any] = field(default_factory=dict)

    def skip(self, *, is_object: bool, is_first: bool) -> Any:
        """RE2 for members that are nothing to us, the comma before each included; None if there is
        none. The first has no comma. Made where a document first has such a place.
        """
        key = is_object, is_first
        if key not in self._skips:
            each = _members(self, _DEPTH) if is_object else _elements(self, _DEPTH)
            if each is None:
                self._skips[key] = None
            else:
                more = b"(?:" + _WS + b"," + _WS + each + b")*"
                self._skips[key] = _re2(_WS + each + more if is_first else more)
        return self._skips[key]


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What a member is: `rule` takes its value; `place` is followed if it is a container. `path` is
    as the policy writes it: what the document calls its members is nobody's business.
    """

    rule: int | None = None
    path: str = ""
    place: Place | None = None


STRING = rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"'
SCALAR = rb"(?:" + STRING + rb"|-?\d[\d.eE+-]*+|true|false|null)"
_WS = rb"[ \t\r\n]*"
_PLAIN = SCALAR.replace(b"*+", b"*")
_TOKEN = rb"[ \t\r\n:,]|" + _PLAIN
_FLAT = rb"[{\[](?:" + _TOKEN + rb")*[}\]]"
_NESTED = rb"[{\[](?:" + _TOKEN + b"|" + _FLAT + rb")*[}\]]"


def _re2(pattern: bytes) -> Any:
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.dot_nl = True
    return re2.compile(pattern, options)


UNREACHED = _re2(b"(?:" + _TOKEN + b"|" + _FLAT + b"|" + _NESTED + b")*")
"""All up to the next bracket that is not closed soon. RE2, as `re` takes ten times as long."""
NOTHING = Step()


class PathTree:
    """`paths`: text and the index of its rule. Of two that meet, the first one's rule counts."""

    __slots__ = ("_ends", "_paths", "_places", "root")

    def __init__(self, paths: list[tuple[str, int]]) -> None:
        """Raises ConfigError."""
        self._paths = [parse_json_path(text) for text, _ in paths]
        self._ends = list(paths)
        self._places: dict[frozenset[_State], Place] = {}
        self.root = self._place(frozenset((index, 0) for index in range(len(paths))))

    def named(self, name: str, rule: int) -> Step:
        """A value that a rule takes by a name of its own, wherever it is."""
        self._ends.append((name, rule))
        return self._whole(len(self._ends) - 1)

    def _whole(self, path: int) -> Step:
        """A value that is taken; if it is a container, each value in it is."""
        states = frozenset({(-1 - path, 0)})
        text, rule = self._ends[path]
        found = self._places.get(states)
        if found is None:
            found = self._places[states] = Place(states)
            found.other = found.other_element = Step(rule, text, found)
        return Step(rule, text, found)

    def _place(self, states: frozenset[_State]) -> Place:
        found = self._places.get(states)
        if found is not None:
            return found
        if len(self._places) >= MAX_PLACES:
            raise ConfigError("JSON paths with too many places where they meet")
        found = self._places[states] = Place(states)
        here = [(state, self._paths[state[0]][state[1]]) for state in states]
        names = {name for _, segment in here for name in segment.names}
        indexes = {index for _, segment in here for index in segment.indexes}
        found.other = self._step(here, None, None)
        found.other_element = self._step(here, None, -1)
        found.members = {name: self._step(here, name, None) for name in names}
        found.elements = {index: self._step(here, None, index) for index in indexes}
        return found

    def _step(
        self, here: list[tuple[_State, Segment]], name: str | None, index: int | None
    ) -> Step:
        ends: list[int] = []
        following: set[_State] = set()
        for (path, place), segment in here:
            if segment.descends:
                following.add((path, place))
            taken = segment.is_any or name in segment.names or index in segment.indexes
            if taken and place + 1 == len(self._paths[path]):
                ends.append(path)
            elif taken:
                following.add((path, place + 1))
        if ends:
            return self._whole(min(ends))
        return Step(place=self._place(frozenset(following))) if following else NOTHING


_DEPTH = 2
"""How deep what is passed over at once may be nested."""


def _members(place: Place, depth: int) -> bytes | None:
    """A member that no path takes, nor anything in it."""
    value = _value(place.other or NOTHING, depth)
    if value is None:
        return None
    names = {name.encode("utf-8", "surrogatepass") for name in place.members}
    return b'"' + _none_of(names) + b'"' + _WS + b":" + _WS + value


def _elements(place: Place, depth: int) -> bytes | None:
    return None if place.elements else _value(place.other_element or NOTHING, depth)


def _value(step: Step, depth: int) -> bytes | None:
    if step.rule is not None:
        return None
    ways = [_PLAIN]
    if step.place is None:
        ways += [_FLAT, _NESTED]
    elif depth:
        for each, begin, end in (
            (_members(step.place, depth - 1), b"[{]", b"[}]"),
            (_elements(step.place, depth - 1), rb"\[", rb"\]"),
        ):
            if each is not None:
                inner = _WS + each + b"(?:" + _WS + b"," + _WS + each + b")*"
                ways.append(begin + b"(?:" + inner + b")?" + _WS + end)
    return b"(?:" + b"|".join(ways) + b")"


def _none_of(names: set[bytes]) -> bytes:
    """What is between the quotes of a name without escapes that is none of `names`."""
    nexts = {name[:1] for name in names if name}
    ways = [] if b"" in names else [b""]
    ways.append(
        b'[^"\\\\\\x00-\\x1f' + b"".join(map(_escaped, sorted(nexts))) + rb'][^"\\\x00-\x1f]*'
    )
    for each in sorted(nexts):
        rest = {name[1:] for name in names if name[:1] == each}
        ways.append(_escaped(each) + _none_of(rest))
    return b"(?:" + b"|".join(ways) + b")"


def _escaped(byte: bytes) -> bytes:
    return b"\\x%02x" % byte[0]
