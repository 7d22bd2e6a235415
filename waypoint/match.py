"""Route matches, compiled: which rule a request meets, by the precedence of the Gateway API. Pure.

All matches of all routes of one set are pooled and ranked once. They are then grouped by *what they
look at* (an exact path, the first two segments, a method, these headers, ...); within a group one
dictionary lookup finds those whose exact values agree, and only regular expressions (RE2) are left
to try. So a lookup costs as many steps as there are kinds of matches, not as there are rules. A
broken expression matches nothing; the controller has refused it before.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import re2

from mesh.model.route import NamedMatch, Route, RouteMatch
from waypoint.filters.chain import Request

T = TypeVar("T")
Check = Callable[["_Features"], bool]

_EXACT, _PREFIX, _REGEX, _GRPC_METHOD = range(4)


class _Entry(Generic[T]):
    __slots__ = ("checks", "rank", "value")

    def __init__(self, rank: int, value: T, checks: tuple[Check, ...]) -> None:
        self.rank = rank
        self.value = value
        self.checks = checks


class _Group(Generic[T]):
    """Matches that look at the same things; `kind` and `depth` say how they look at the path."""

    __slots__ = ("depth", "entries", "first", "has_method", "headers", "kind", "queries")

    def __init__(
        self,
        kind: int,
        depth: int,
        has_method: bool,
        headers: tuple[bytes, ...],
        queries: tuple[bytes, ...],
        first: int,
    ) -> None:
        self.kind = kind
        self.depth = depth
        self.has_method = has_method
        self.headers = headers
        self.queries = queries
        self.first = first
        self.entries: dict[tuple[Any, ...], list[_Entry[T]]] = {}


class _Features:
    """What groups look at, taken from the request when first asked for."""

    __slots__ = ("_headers", "_queries", "parts", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.parts = request.path.split(b"/")
        self._headers: dict[bytes, bytes] | None = None
        self._queries: dict[bytes, bytes] | None = None

    def header(self, name: bytes) -> bytes | None:
        """Values joined by a comma; `host` is the authority."""
        found = self._headers
        if found is None:
            found = self._headers = {b"host": self.request.authority}
            for key, value in self.request.headers.pairs:
                found[key] = found[key] + b"," + value if key in found else value
        return found.get(name)

    def query(self, name: bytes) -> bytes | None:
        """The first value of a parameter, decoded."""
        found = self._queries
        if found is None:
            found = self._queries = _parameters(self.request.query)
        return found.get(name)


def _parameters(query: bytes) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for part in query.split(b"&"):
        key, _, value = part.partition(b"=")
        decoded = urllib.parse.unquote_to_bytes(key)
        if part and decoded not in found:
            found[decoded] = urllib.parse.unquote_to_bytes(value)
    return found


def first_parameter(query: bytes, name: bytes) -> bytes | None:
    """The first value of a query's parameter, decoded; None without one."""
    return _parameters(query).get(name)


class MatchTable(Generic[T]):
    """The matches of one set of routes, to `find` in. `rules(route, index)` gives what is found."""

    def __init__(self, routes: Sequence[Route], rules: Callable[[Route, int], T]) -> None:
        pooled: list[tuple[tuple[Any, ...], RouteMatch, T]] = []
        for route in routes:
            for index, rule in enumerate(route.rules):
                value = rules(route, index)
                for number, match in enumerate(rule.matches or (RouteMatch(),)):
                    age = (route.created, route.key, index, number)
                    pooled.append(((*_precedence(match), *age), match, value))
        pooled.sort(key=lambda each: each[0])
        groups: dict[tuple[Any, ...], _Group[T]] = {}
        for rank, (_, match, value) in enumerate(pooled):
            _insert(groups, rank, match, value)
        # Ranks were given in order: the groups stand by their best one.
        self._groups = tuple(groups.values())
        self.size = len(pooled)

    def find(self, request: Request) -> T | None:
        """What the best match stands for; None when nothing matches."""
        features = _Features(request)
        best: _Entry[T] | None = None
        for group in self._groups:
            if best is not None and best.rank < group.first:
                break
            key = _key(group, features)
            if key is None:
                continue
            for entry in group.entries.get(key, ()):
                if best is not None and best.rank < entry.rank:
                    break
                if not entry.checks or all(check(features) for check in entry.checks):
                    best = entry
                    break
        return best.value if best is not None else None


def _precedence(match: RouteMatch) -> tuple[Any, ...]:
    """Smaller is better; routing.md of the specification: exact, longest prefix, method, headers,
    query parameters. gRPC: longest service, longest method, headers.
    """
    headers, queries = len(_first_of(match.headers, fold=True)), len(_first_of(match.query_params))
    if match.grpc is not None:
        return (-len(match.grpc.service), -len(match.grpc.method), -headers)
    kind = {"Exact": 0, "PathPrefix": 1, "RegularExpression": 2}[match.path.kind]
    length = 0 if kind == 0 else len(match.path.value.rstrip("/"))
    return (kind, -length, not match.method, -headers, -queries)


def _first_of(matches: Sequence[NamedMatch], *, fold: bool = False) -> dict[bytes, NamedMatch]:
    """Of duplicate names the first entry counts."""
    found: dict[bytes, NamedMatch] = {}
    for each in matches:
        name = each.name.lower() if fold else each.name
        found.setdefault(name.encode(), each)
    return found


def _insert(
    groups: dict[tuple[Any, ...], _Group[T]], rank: int, match: RouteMatch, value: T
) -> None:
    checks: list[Check] = []
    kind, depth, path = _path_key(match, checks)
    headers = _first_of(match.headers, fold=True)
    queries = _first_of(match.query_params)
    exact_headers = sorted(name for name, each in headers.items() if each.kind == "Exact")
    exact_queries = sorted(name for name, each in queries.items() if each.kind == "Exact")
    for name, each in headers.items():
        if each.kind != "Exact":
            checks.append(_regex_check(each.value, lambda f, n=name: f.header(n)))  # type: ignore[misc]
    for name, each in queries.items():
        if each.kind != "Exact":
            checks.append(_regex_check(each.value, lambda f, n=name: f.query(n)))  # type: ignore[misc]
    signature = (kind, depth, bool(match.method), tuple(exact_headers), tuple(exact_queries))
    group = groups.get(signature)
    if group is None:
        group = groups[signature] = _Group(*signature, first=rank)
    key = (
        path,
        match.method.encode(),
        *(headers[name].value.encode() for name in exact_headers),
        *(queries[name].value.encode() for name in exact_queries),
    )
    group.entries.setdefault(key, []).append(_Entry(rank, value, tuple(checks)))


def _path_key(match: RouteMatch, checks: list[Check]) -> tuple[int, int, bytes]:
    if match.grpc is not None:
        return _grpc_key(match, checks)
    value = match.path.value
    if match.path.kind == "Exact":
        return _EXACT, 0, value.encode()
    if match.path.kind == "PathPrefix":
        prefix = value.rstrip("/").encode()
        return _PREFIX, prefix.count(b"/"), prefix
    checks.append(_regex_check(value, lambda features: features.request.path))
    return _REGEX, 0, b""


def _grpc_key(match: RouteMatch, checks: list[Check]) -> tuple[int, int, bytes]:
    """A call's path is `/service/method`."""
    grpc = match.grpc
    assert grpc is not None  # noqa: S101 - the caller looked
    if grpc.kind == "RegularExpression":
        service, method = grpc.service or "[^/]+", grpc.method or "[^/]+"
        checks.append(_regex_check(f"/(?:{service})/(?:{method})", lambda f: f.request.path))
        return _REGEX, 0, b""
    if grpc.service and grpc.method:
        return _EXACT, 0, f"/{grpc.service}/{grpc.method}".encode()
    if grpc.service:
        return _PREFIX, 1, f"/{grpc.service}".encode()
    if grpc.method:
        return _GRPC_METHOD, 0, grpc.method.encode()
    return _PREFIX, 0, b""


def _regex_check(pattern: str, subject: Callable[[_Features], bytes | None]) -> Check:
    try:
        fullmatch = re2.compile(pattern.encode()).fullmatch
    except re2.error:
        return lambda _features: False

    def check(features: _Features) -> bool:
        value = subject(features)
        return value is not None and fullmatch(value) is not None

    return check


def _key(group: _Group[Any], features: _Features) -> tuple[Any, ...] | None:
    """What a request shows to a group; None when it lacks something."""
    request, kind = features.request, group.kind
    if kind == _PREFIX:
        depth = group.depth
        if not depth:
            path = b""
        elif len(features.parts) > depth:
            path = b"/".join(features.parts[: depth + 1])
        else:
            return None
    elif kind == _EXACT:
        path = request.path
    elif kind == _REGEX:
        path = b""
    else:
        path = features.parts[-1]
    method = request.method if group.has_method else b""
    if not group.headers and not group.queries:
        return (path, method)
    values: list[bytes] = [path, method]
    for name in group.headers:
        value = features.header(name)
        if value is None:
            return None
        values.append(value)
    for name in group.queries:
        value = features.query(name)
        if value is None:
            return None
        values.append(value)
    return tuple(values)
