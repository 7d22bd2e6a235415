"""All detectors of some rules as one regular expression, and what they find in a view.

One RE2 alternation goes over the text once, whatever the number of rules; only at a candidate is
it asked which rule it belongs to. (A `re2.Set` as gate and one pattern after the other is as fast
where nothing is found and two to four times slower where something is.) RE2's memory is bounded,
its time linear.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import re2
from stdnum import luhn
from stdnum.iso7064 import mod_97_10

from mesh.errors import ConfigError
from mesh.model.l7_policy import DetectorKind, RedactionRule
from waypoint.filters.redact.detectors import BUILT_IN, Detector
from waypoint.filters.redact.named_numbers import NAMED_KINDS, NamedNumbers
from waypoint.filters.redact.spans import CONTEXT_BYTES, Found, is_word
from waypoint.filters.redact.views import Syntax

MAX_REGEX_BYTES = 32 << 20
MAX_PATTERN_BYTES = 4096
MAX_CLEAN = 4096
MAX_CLEAN_BYTES = 256
"""How many short texts without anything to find are remembered, and how long they may be."""
_APART = b"\n" * CONTEXT_BYTES
_NUMERIC = frozenset(("payment-card", "phone", "national-id", "custom"))


class Hit:
    """One value: its place in the view, the rule (its index) and the kind."""

    __slots__ = ("end", "kind", "rule", "start")

    def __init__(self, start: int, end: int, rule: int, kind: DetectorKind) -> None:
        self.start = start
        self.end = end
        self.rule = rule
        self.kind = kind


def compile_pattern(pattern: bytes) -> Any:
    """RE2 over bytes, `^` and `$` at lines, never across one. Raises `ConfigError`."""
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.log_errors = False
    options.never_nl = True
    options.max_mem = MAX_REGEX_BYTES
    try:
        return re2.compile(b"(?m:" + pattern + b")", options)
    except re2.error as exc:
        said = exc.args[0] if exc.args else ""
        text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
        raise ConfigError(f"pattern is not RE2: {text}") from exc


def _custom_check(rule: RedactionRule) -> Detector:
    def check(view: bytes, start: int, end: int) -> Found:
        return (start, end) if end > start and _is_valid(rule, view[start:end]) else end

    pattern = rule.pattern.encode("utf-8")
    if not pattern or len(pattern) > MAX_PATTERN_BYTES:
        raise ConfigError(f"rule {rule.name}: a custom detector needs a pattern of 1 to 4096 bytes")
    compiled = compile_pattern(pattern)
    if compiled.search(b""):
        raise ConfigError(f"rule {rule.name}: the pattern matches nothing at all, so everywhere")
    return Detector("custom", pattern, check, frozenset(range(256)))


def _is_valid(rule: RedactionRule, value: bytes) -> bool:
    if not rule.validator:
        return True
    digits = value.translate(None, b" -./").decode("latin-1")
    if rule.validator == "luhn":
        return digits.isdigit() and luhn.is_valid(digits)
    moved = digits[4:] + digits[:4] if digits[:2].isalpha() else digits
    return moved.isalnum() and moved.isascii() and mod_97_10.is_valid(moved)


def _anchored(part: Detector) -> Callable[[bytes, int], Any]:
    """The pattern at one place. Ours are bounded, so `re` may do it, at a fifth of the call's cost;
    a pattern from a policy stays with RE2.
    """
    if part.kind == "custom":
        own: Callable[[bytes, int], Any] = compile_pattern(part.pattern).match
        return own
    match: Callable[[bytes, int], Any] = re.compile(part.pattern, re.MULTILINE).match
    return match


class Scanner:
    """Detectors of `rules` (index and rule; those without a detector are left out)."""

    __slots__ = (
        "_by_first",
        "_clean",
        "_named",
        "_rules",
        "_search",
        "has_custom",
        "has_numbers",
        "has_private_keys",
    )

    def __init__(self, rules: list[tuple[int, RedactionRule]]) -> None:
        """Raises `ConfigError`: a pattern is no RE2."""
        parts: list[tuple[int, Detector]] = []
        for index, rule in rules:
            if rule.detector == "custom":
                parts.append((index, _custom_check(rule)))
            elif rule.detector and all(known.kind != rule.detector for _, known in parts):
                parts.append((index, BUILT_IN[rule.detector]))
        order = list(BUILT_IN)
        parts.sort(key=lambda part: order.index(part[1].kind) if part[1].kind in order else -1)
        self.has_custom = any(part.kind == "custom" for _, part in parts)
        self.has_numbers = any(part.kind in _NUMERIC for _, part in parts)
        self.has_private_keys = any(part.kind == "private-key" for _, part in parts)
        self._rules = {part.kind: index for index, part in parts}
        self._clean: dict[str, set[bytes]] = {}
        named = NAMED_KINDS.intersection(self._rules)
        self._named = NamedNumbers(named) if named else None
        together = b"|".join(b"(?:" + part.pattern + b")" for _, part in parts)
        self._search = compile_pattern(together).search if parts else None
        singles = [(part, _anchored(part), index) for index, part in parts]
        self._by_first = tuple(
            tuple(
                (part.check, match if len(singles) > 1 else None, index, part.kind)
                for part, match, index in singles
                if byte in part.first
            )
            for byte in range(256)
        )

    def __bool__(self) -> bool:
        return self._search is not None

    def are_clean(self, syntax: Syntax, texts: list[bytes]) -> bool:
        """Whether nothing is found in any of them, such as values of fields: one search, none for
        what was clean before, as most values are those of other requests too.

        No pattern crosses a newline, and no check looks further back than `_APART` is long.
        """
        clean = self._clean.get(syntax.name)
        if clean is None:
            clean = self._clean[syntax.name] = set()
        fresh = [text for text in texts if text not in clean]
        if not fresh:
            return True
        view = syntax.look(_APART.join(fresh)).text
        if self._search is not None and next(iter(self.find(view)), None) is not None:
            return False
        if len(clean) > MAX_CLEAN:
            clean.clear()
        clean.update([text for text in fresh if len(text) <= MAX_CLEAN_BYTES])
        return True

    def may_find(self, raw: bytes) -> bool:
        """Whether a view of `raw` can have anything, if its quotes are all that the view changes.

        Saves making one. Built-in patterns cross neither quote nor newline, and what they ask of a
        line's begin and end (`(?:^|[^0-9])`) a quote fulfils too; of custom ones that is not known.
        """
        if self.has_custom or (self._named is not None and self._named.may_find(raw)):
            return True
        return self._search is not None and self._search(raw) is not None

    def find(self, view: bytes, place: int = 0) -> Iterator[Hit]:
        """What is found from `place` on, from left to right, never overlapping."""
        if self._named is not None:
            named = next(found := self._named.find(view, place), None)
            if named is not None:
                return self._merged(view, place, [named, *found])
        return self._find(view, place)

    def _merged(
        self, view: bytes, place: int, named: list[tuple[int, int, DetectorKind]]
    ) -> Iterator[Hit]:
        hits = list(self._find(view, place))
        hits += [
            Hit(max(start, place), end, self._rules[kind], kind)
            for start, end, kind in named
            if end > place
        ]
        # Of two that overlap the earlier, then the longer one.
        done = place
        for hit in sorted(hits, key=lambda each: (each.start, -each.end)):
            if hit.start >= done:
                yield hit
                done = hit.end

    def _find(self, view: bytes, place: int) -> Iterator[Hit]:
        search = self._search
        if search is None:
            return
        size = len(view)
        before = place
        place = max(0, place - 1)  # patterns of digits take the byte before them
        while place < size:
            found = search(view, place)
            if found is None:
                return
            start, end = found.span()
            resume = max(end, start + 1)
            if view[start + 1 : start + 2].isdigit() and not is_word(view[start : start + 1]):
                resume = start + 1  # the byte before digits was taken: others begin with the digits
            for check, match, index, kind in self._by_first[view[start]]:
                if match is not None:
                    own = match(view, start)
                    if own is None:
                        continue
                    end = own.end()
                said = check(view, start, end)
                if isinstance(said, int):
                    resume = min(resume, said)
                    continue
                if said[1] <= before:
                    continue  # wholly in what has been seen
                yield Hit(max(said[0], before), said[1], index, kind)
                resume = before = said[1]
                break
            place = max(resume, start + 1)
