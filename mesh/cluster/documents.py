"""The text of one file -> the Kubernetes objects in it, each with the place it stands at.

YAML is read the way people mean it in manifests: only `true` and `false` are booleans, so a
label value `no` stays text (YAML 1.2 core schema), and `0400` is octal, because kubectl
reads it so and it is always a file mode; a key that is written twice is an error, as are
anchors, aliases and tags of other languages. The parser is libyaml, by events: nothing
recurses over what the file nests, and every value keeps its line and column. JSON is read
by the json module.

Bounded: bytes by the caller, nesting and number of objects here. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from mesh.cluster.api import Marks, Object, Ref, Source, located, ref_of
from mesh.errors import ConfigError

MAX_DEPTH = 100
MAX_OBJECTS = 20_000
_LONGEST_NUMBER = 40

_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "seq")}
_OCTAL = re.compile(r"0[0-7]+")
_CONSTANTS: dict[str, bool | None] = {"~": None, "": None}
for _word, _constant in (("true", True), ("false", False), ("null", None)):
    _CONSTANTS.update({_word: _constant, _word.title(): _constant, _word.upper(): _constant})


@dataclass(frozen=True, slots=True)
class Document:
    """One object of a file."""

    ref: Ref
    object: Object
    source: Source


def read_documents(
    data: bytes,
    file: str,
    *,
    marks: bool = True,
    complain: Callable[[ConfigError], None] | None = None,
) -> list[Document]:
    """The objects in the bytes of `file`; its suffix says whether they are JSON.

    `marks=False` gives up columns and fields of JSON files, which makes them several times
    cheaper to read. With `complain` an object that is none is told and left out, and the rest
    is read. Raises ConfigError with file, line and column, as far as known.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise ConfigError(f"not UTF-8 text (byte {exc.start})", file=file, line=line) from exc
    if not file.endswith(".json"):
        return _documents(_parse_yaml(text, file), file, complain)
    value = _parse_json(text, file)
    places = _json_marks(text, file) if marks else None
    return _documents([(value, places)] if value is not None else [], file, complain)


def read_text(text: str) -> tuple[Any, Marks | None]:
    """The one value of YAML text that is itself a value, and its marks within the text; None if
    there is nothing. Raises ConfigError with line and column within the text.
    """
    found = _parse_yaml(text, "")
    if len(found) > 1:
        raise ConfigError("more than one document", line=found[1][1].line)
    return found[0] if found else (None, None)


def _documents(
    values: Iterable[tuple[Any, Marks | None]],
    file: str,
    complain: Callable[[ConfigError], None] | None,
) -> list[Document]:
    found: list[Document] = []
    places: dict[Ref, Source] = {}
    for value, marks in values:
        for obj, mark in _expand(value, marks):
            source = Source(file, mark.line, mark.column, mark) if mark else Source(file)
            try:
                ref = ref_of(obj)
                if ref in places:
                    raise ConfigError(f"{ref} stands in this file twice, first at {places[ref]}")
            except ConfigError as exc:
                if complain is None:
                    raise located(exc, source) from exc
                complain(located(exc, source))
                continue
            places[ref] = source
            found.append(Document(ref, obj, source))
            if len(found) > MAX_OBJECTS:
                raise ConfigError(f"more than {MAX_OBJECTS} objects", file=file)
    return found


def _expand(value: Any, marks: Marks | None) -> Iterable[tuple[Any, Marks | None]]:
    """The elements of a `List`, of lists in it too, or the one object that this is."""
    kind = value.get("kind") if isinstance(value, dict) else None
    items = value.get("items") if isinstance(value, dict) else None
    if not isinstance(kind, str) or not kind.endswith("List") or not isinstance(items, list):
        yield value, marks
        return
    for index, each in enumerate(items):
        if isinstance(each, dict) and kind != "List":
            # Elements of a PodList need not say that they are pods.
            each.setdefault("kind", kind.removesuffix("List"))
            each.setdefault("apiVersion", value.get("apiVersion"))
        yield from _expand(each, marks.find(("items", index)) if marks else None)


# -- JSON ------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ConfigError(f"key {key[:80]!r} is written twice")
            seen.add(key)
    return found


def _no_constant(name: str) -> Any:
    raise ConfigError(f"{name} is not JSON")


def _parse_json(text: str, file: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as exc:
        message = f"not JSON: {exc.msg[:1].lower()}{exc.msg[1:]}"
        raise ConfigError(message, file=file, line=exc.lineno, column=exc.colno) from exc
    except ConfigError as exc:
        raise ConfigError(exc.message, file=file) from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError("numbers too long or nesting too deep", file=file) from exc


def _json_marks(text: str, file: str) -> Marks | None:
    # JSON is nearly YAML; where it is not (escaped surrogates), positions are lost, no more.
    try:
        return next((marks for _, marks in _parse_yaml(text, file)), None)
    except ConfigError:
        return None


# -- YAML ------------------------------------------------------------------------------


def _parse_yaml(text: str, file: str) -> list[tuple[Any, Marks]]:
    try:
        return _Builder(file, text).build(yaml.CSafeLoader(text))
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        message = " ".join(part for part in (exc.context, exc.problem) if part)
        raise ConfigError(
            f"not YAML: {message}",
            file=file,
            line=mark.line + 1 if mark else 0,
            column=mark.column + 1 if mark else 0,
        ) from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"not YAML: {str(exc).splitlines()[0]}", file=file) from exc


class _Open:
    """A mapping or list that is still being read."""

    __slots__ = ("children", "column", "key", "key_mark", "line", "value")

    def __init__(self, value: dict[str, Any] | list[Any], line: int, column: int) -> None:
        self.value = value
        self.children: Any = {} if isinstance(value, dict) else []
        self.line, self.column = line, column
        self.key: str | None = None
        self.key_mark = (line, column)


class _Builder:
    """Events of libyaml -> values and their marks, for one file."""

    def __init__(self, file: str, text: str) -> None:
        self._file = file
        self._text = text
        self._stack: list[_Open] = []
        self._found: list[tuple[Any, Marks]] = []

    def build(self, parser: Any) -> list[tuple[Any, Marks]]:
        while True:
            event = parser.get_event()
            kind = type(event)
            if kind is yaml.ScalarEvent:
                self._scalar(event)
            elif kind is yaml.MappingStartEvent:
                self._open(event, {})
            elif kind is yaml.SequenceStartEvent:
                self._open(event, [])
            elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
                done = self._stack.pop()
                marks = Marks(done.line, done.column, done.children)
                self._add(done.value, marks)
            elif kind is yaml.AliasEvent:
                self._fail(event, "aliases are not allowed: write the value out")
            elif kind is yaml.StreamEndEvent:
                return self._found

    def _fail(self, event: Any, message: str) -> None:
        line, column = event.start_mark.line + 1, event.start_mark.column + 1
        raise ConfigError(message, file=self._file, line=line, column=column)

    def _open(self, event: Any, value: dict[str, Any] | list[Any]) -> None:
        self._check(event)
        if self._wants_key():
            self._fail(event, "a key must be plain text")
        if len(self._stack) >= MAX_DEPTH:
            self._fail(event, f"nested deeper than {MAX_DEPTH} levels")
        line, column = event.start_mark.line + 1, event.start_mark.column + 1
        if self._stack and self._stack[-1].key is not None:
            # A block under a key is found at the key, where people look for it.
            line, column = self._stack[-1].key_mark
        self._stack.append(_Open(value, line, column))

    def _check(self, event: Any) -> None:
        if event.anchor is not None:
            self._fail(event, "anchors are not allowed: write the value out")
        if event.tag is not None and event.tag not in _TAGS and event.tag != "!":
            self._fail(event, f"tag {event.tag[:80]!r} is not allowed")

    def _wants_key(self) -> bool:
        return (
            bool(self._stack)
            and self._stack[-1].key is None
            and isinstance(self._stack[-1].value, dict)
        )

    def _scalar(self, event: Any) -> None:
        self._check(event)
        line, column = event.start_mark.line + 1, event.start_mark.column + 1
        if self._wants_key():
            # Keys are text however they look: JSON has no others (`8080: {mode: STRICT}`).
            top = self._stack[-1]
            if event.value in top.children:
                first = top.children[event.value]
                self._fail(
                    event,
                    f"key {event.value[:80]!r} is written twice, first in line {first.line}",
                )
            top.key, top.key_mark = event.value, (line, column)
            return
        value = self._resolve(event) if event.implicit[0] else event.value
        indent = self._indent(event) if event.style == "|" else -1
        self._add(value, Marks(line, column, block_indent=indent))

    def _indent(self, event: Any) -> int:
        """How far the lines of a literal block are indented, by its first line that has text."""
        lines = self._text[event.start_mark.index : event.end_mark.index].split("\n")[1:]
        return next((len(each) - len(each.lstrip(" ")) for each in lines if each.strip()), 0)

    def _resolve(self, event: Any) -> Any:
        text: str = event.value
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        first = text[0]
        if first.isalpha() or (not first.isascii()):
            return text
        is_integer = _INTEGER.fullmatch(text) is not None
        if not is_integer and _FLOAT.fullmatch(text) is None:
            return text
        if len(text) > _LONGEST_NUMBER:
            self._fail(event, "the number is too long")
        if is_integer:
            if _OCTAL.fullmatch(text):
                return int(text, 8)  # as kubectl reads it: `defaultMode: 0400`
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        number = float(text)
        if number in (float("inf"), float("-inf")):
            self._fail(event, "the number is too large")
        return number

    def _add(self, value: Any, marks: Marks) -> None:
        if not self._stack:
            if value is not None:
                self._found.append((value, marks))
            return
        top = self._stack[-1]
        if isinstance(top.value, list):
            top.value.append(value)
            top.children.append(marks)
        elif top.key is not None:
            top.value[top.key] = value
            top.children[top.key] = marks
            top.key = None
