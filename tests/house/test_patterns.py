"""Regular expressions that every Python we support reads alike."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from re import _constants as kinds
from re import _parser as parser
from typing import Any

import pytest

from tests.support.tree import modules

_MISREAD = frozenset({
    kinds.BRANCH, kinds.ASSERT, kinds.ASSERT_NOT, kinds.MAX_REPEAT, kinds.MIN_REPEAT,
})  # fmt: skip


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """All operations of a parsed pattern, with their arguments."""
    for operation, argument in tree:
        yield operation, argument
        parts = argument if isinstance(argument, tuple | list) else (argument,)
        for part in parts:
            for each in part if isinstance(part, list) else (part,):
                if isinstance(each, parser.SubPattern):
                    yield from _nodes(each)


def misread(pattern: str | bytes, flags: int = 0) -> list[str]:
    """What Python before 3.11.5 (Debian 12 has 3.11.2) misreads: it backtracks wrongly in a
    possessive repeat of what can itself match in two ways, and so matches what it must not.
    """
    text = pattern.decode("latin-1") if isinstance(pattern, bytes) else pattern
    return [
        str(inner)
        for operation, argument in _nodes(parser.parse(text, flags & ~re.UNICODE))
        if operation is kinds.POSSESSIVE_REPEAT
        for inner, _ in _nodes(argument[2])
        if inner in _MISREAD
    ]


@pytest.mark.parametrize(
    ("pattern", "is_misread"),
    [
        (rb"(?:(?!//)[^%])*+", True),
        (rb"(?:ab|c)*+", True),
        (rb"(?:[a-z]+;)*+", True),
        (rb"(?:[a-z]++;)*+", False),
        (rb"[a-z]*+(?:x|yz)*", False),
    ],
)
def test_what_is_misread_is_known(pattern: bytes, is_misread: bool) -> None:
    assert bool(misread(pattern)) is is_misread


def test_no_pattern_is_misread_by_an_early_python() -> None:
    seen = 0
    found = []
    for name in sorted(modules()):
        if name.endswith("__main__"):
            continue
        for attribute, value in vars(importlib.import_module(name)).items():
            if isinstance(value, re.Pattern):
                seen += 1
                found += [
                    f"{name}.{attribute}: {why}" for why in misread(value.pattern, value.flags)
                ]
    assert seen > 100
    assert found == []
