"""The rules of many policies as one table, so that asking does not take longer the more there are.

Most rules name who calls, a namespace, a host or the beginning of a path. Each rule is filed under
what it names (its anchor: of all the kinds it names in full, the one shared by the fewest rules),
and a request is compared only with the rules filed under what it says, and with those that name
nothing. Anchors only save work: whether a rule matches is always its own test's answer. Pure.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from mesh.model.l7_policy import L7Operation, L7Rule, L7Source
from waypoint.filters.chain import Request
from waypoint.filters.readings import host_readings, path_readings

Test = Callable[[Request], bool]
Key = tuple[bool, bytes]
"""Whether it is only the beginning of the value, and what it is."""
Anchors = Mapping[str, frozenset[Key]]

FEW: Final = 8
"""So many rules are asked one after the other sooner than looked up."""


@dataclass(frozen=True, slots=True)
class Filed:
    """One rule: its policy (`namespace/name`), its index there, what it names, its test."""

    policy: str
    rule: str
    anchors: Anchors
    test: Test


def find_anchors(rule: L7Rule, namespace: str) -> Anchors:
    """Kind to keys, for the kinds of which the rule names every value that it lets match."""
    by_source = {
        kind: [keys_of(each) for each in rule.sources]
        for kind, keys_of in _source_kinds(namespace).items()
    }
    by_operation = {
        kind: [keys_of(each) for each in rule.operations]
        for kind, keys_of in _OPERATION_KINDS.items()
    }
    return {
        kind: frozenset().union(*each)
        for kind, each in (by_source | by_operation).items()
        if each and all(each)
    }


def _keys(values: Iterable[str], *, folds_case: bool = False) -> frozenset[Key]:
    """None where some value does not begin with anything in particular."""
    found: set[Key] = set()
    for value in values:
        text = value.lower() if folds_case else value
        start, operator_found, _ = text.partition("{")
        if not operator_found:
            start, operator_found, _ = text.partition("*")
        if operator_found and not start:
            return frozenset()
        found.add((bool(operator_found), start.encode()))
    return frozenset(found)


def _source_kinds(namespace: str) -> dict[str, Callable[[L7Source], frozenset[Key]]]:
    def accounts(source: L7Source) -> frozenset[Key]:
        names = source.service_accounts
        return frozenset(
            (False, (each if "/" in each else f"{namespace}/{each}").encode()) for each in names
        )

    return {
        "principal": lambda source: _keys(source.principals),
        "account": accounts,
        "namespace": lambda source: _keys(source.namespaces),
    }


_OPERATION_KINDS: Final[dict[str, Callable[[L7Operation], frozenset[Key]]]] = {
    "host": lambda operation: _keys(operation.hosts, folds_case=True),
    "path": lambda operation: _keys(operation.paths),
}


def _principal(request: Request) -> Sequence[bytes]:
    source = request.source
    return () if source is None else (str(source).removeprefix("spiffe://").encode(),)


def _account(request: Request) -> Sequence[bytes]:
    source = request.source
    return () if source is None else (f"{source.namespace}/{source.service_account}".encode(),)


def _namespace(request: Request) -> Sequence[bytes]:
    return () if request.source is None else (request.source.namespace.encode(),)


# What a request says of each kind: every reading of it, as DENY rules take any.
_SAID: Final[Mapping[str, Callable[[Request], Sequence[bytes]]]] = {
    "principal": _principal,
    "account": _account,
    "namespace": _namespace,
    "host": lambda request: host_readings(request.authority),
    "path": lambda request: path_readings(request.path),
}

_Entry = tuple[int, Filed]
_order = operator.itemgetter(0)


@dataclass(slots=True)
class _Kind:
    """The rules filed under one kind."""

    said: Callable[[Request], Sequence[bytes]]
    exact: dict[bytes, list[_Entry]] = field(default_factory=dict)
    prefixes: dict[int, dict[bytes, list[_Entry]]] = field(default_factory=dict)

    def file(self, key: Key, entry: _Entry) -> None:
        is_prefix, text = key
        among = self.prefixes.setdefault(len(text), {}) if is_prefix else self.exact
        among.setdefault(text, []).append(entry)

    def find(self, request: Request) -> list[list[_Entry]]:
        found = []
        for value in self.said(request):
            if entries := self.exact.get(value):
                found.append(entries)
            for length, by_start in self.prefixes.items():
                if entries := by_start.get(value[:length]):
                    found.append(entries)
        return found


class RuleIndex:
    """Rules in the order in which they are to be asked."""

    __slots__ = ("_general", "_kinds")

    def __init__(self, rules: Iterable[Filed]) -> None:
        self._general: list[_Entry] = []
        kinds = {kind: _Kind(said) for kind, said in _SAID.items()}
        entries = list(enumerate(rules))
        shared = Counter(
            (kind, key)
            for _, each in entries
            for kind, keys in each.anchors.items()
            for key in keys
        )
        for entry in entries:
            anchors = entry[1].anchors
            if len(entries) <= FEW or not anchors:
                self._general.append(entry)
                continue
            kind = min(anchors, key=lambda kind: max(shared[kind, key] for key in anchors[kind]))
            for key in anchors[kind]:
                kinds[kind].file(key, entry)
        self._kinds = [each for each in kinds.values() if each.exact or each.prefixes]

    def first(self, request: Request) -> tuple[str, str] | None:
        """Policy and rule of the first that matches, or None."""
        found = [self._general] if self._general else []
        for kind in self._kinds:
            found += kind.find(request)
        if not found:
            return None
        asked = found[0] if len(found) == 1 else sorted(itertools.chain(*found), key=_order)
        for _, each in asked:
            if each.test(request):
                return each.policy, each.rule
        return None
