"""Typed views of HTTPRoute, GRPCRoute, TCPRoute and TLSRoute, read strictly. Pure.

A view holds the model's rules already, with one thing left open: `Backend.service` is still
`namespace/name` of the Service referred to, and only what is wrong by itself (another kind) is
in `Backend.problem`. `istiod_lite.routes` looks Services and grants up.

What an API server would have defaulted is defaulted. A field or value that is not known here
refuses the route, because a route with a filter left out is another route; the state before
stays in force. Filters are in `mesh.cluster.route_filters`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from mesh.cluster.api import Object
from mesh.cluster.fields import Reader, shown
from mesh.cluster.gateways import GATEWAY_GROUP
from mesh.cluster.objects import Metadata, read_metadata
from mesh.cluster.route_filters import (
    read_backend,
    read_duration,
    read_expression,
    read_filters,
)
from mesh.model.route import (
    Backend,
    MethodMatch,
    NamedMatch,
    PathKind,
    PathMatch,
    Retry,
    RouteFilter,
    RouteKind,
    RouteMatch,
    RouteRule,
    SessionPersistence,
    ValueKind,
)

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
MAX_RULES = 16
MAX_BACKENDS = 16
MAX_MATCHES = 64
MAX_PARENTS = 32
_PCHARS = re.compile(r"/(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*")
_NOT_IN_PATH = re.compile(r"//|/\.\.?(?:/|$)|%2[fF]")
_HOSTNAME = re.compile(r"(?:\*\.)?[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class ParentRef:
    """What a route is attached to. `port` 0 and `section` "" are not given."""

    group: str
    kind: str
    namespace: str
    name: str
    section: str = ""
    port: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteView(Metadata):
    """A route of any kind; see the module for what is still open in its backends."""

    parents: tuple[ParentRef, ...] = ()
    hostnames: tuple[str, ...] = ()
    rules: tuple[RouteRule, ...] = ()

    @property
    def kind(self) -> RouteKind:
        """The kind, as the model has it."""
        return cast("RouteKind", self.ref.kind)


class HTTPRoute(RouteView):
    """An HTTPRoute."""

    __slots__ = ()


class GRPCRoute(RouteView):
    """A GRPCRoute."""

    __slots__ = ()


class TCPRoute(RouteView):
    """A TCPRoute."""

    __slots__ = ()


class TLSRoute(RouteView):
    """A TLSRoute."""

    __slots__ = ()


V = TypeVar("V", bound=RouteView)

#: In order of precedence: of several kinds on one port, the first applies.
ROUTES: tuple[type[RouteView], ...] = (GRPCRoute, HTTPRoute, TLSRoute, TCPRoute)
ROUTE_KINDS: tuple[RouteKind, ...] = ("GRPCRoute", "HTTPRoute", "TLSRoute", "TCPRoute")


def parse_http_route(obj: Object) -> HTTPRoute:
    """Read an HTTPRoute. Raises ConfigError naming the field."""
    return _route(obj, HTTPRoute, _http_rule, RouteRule())


def parse_grpc_route(obj: Object) -> GRPCRoute:
    """Read a GRPCRoute. Raises ConfigError naming the field."""
    default = RouteRule(matches=(RouteMatch(grpc=MethodMatch()),))
    return _route(obj, GRPCRoute, _grpc_rule, default)


def parse_tcp_route(obj: Object) -> TCPRoute:
    """Read a TCPRoute. Raises ConfigError naming the field."""
    return _route(obj, TCPRoute, _plain_rule, None)


def parse_tls_route(obj: Object) -> TLSRoute:
    """Read a TLSRoute. Raises ConfigError naming the field."""
    found = _route(obj, TLSRoute, _plain_rule, None)
    if not found.hostnames:
        Reader(obj).at("spec", "hostnames").fail("missing: a TLSRoute is matched by name")
    return found


def _route(
    obj: Object,
    view: type[V],
    rule: Callable[[Reader, str], RouteRule],
    default: RouteRule | None,
) -> V:
    common = read_metadata(obj)
    spec = Reader(obj).get("spec")
    spec.only("parentRefs", "hostnames", "rules", "useDefaultGateways")
    namespace = common["ref"].namespace
    rules = tuple(rule(each, namespace) for each in _bounded(spec.get("rules"), MAX_RULES))
    if default is None and len(rules) != 1:
        spec.get("rules").fail("a route of this kind has exactly one rule")
    names = [each.name for each in rules if each.name]
    if len(set(names)) != len(names):
        spec.get("rules").fail("two rules of one name")
    return view(
        **common,
        parents=read_parents(spec, namespace),
        hostnames=_hostnames(spec.get("hostnames")),
        rules=rules or ((default,) if default is not None else ()),
    )


def read_parents(spec: Reader, namespace: str) -> tuple[ParentRef, ...]:
    """The parentRefs of a route in `namespace`. Raises ConfigError."""
    found = []
    for each in spec.get("parentRefs").items():
        each.only("group", "kind", "namespace", "name", "sectionName", "port")
        group = each.get("group").value
        kind = each.get("kind").text("Gateway")
        # `core` is how some write the core group; only an absent group is defaulted.
        group = GATEWAY_GROUP if group is None else each.get("group").text()
        found.append(
            ParentRef(
                group="" if group == "core" else group,
                kind=kind,
                namespace=each.get("namespace").text() or namespace,
                name=each.get("name").name(),
                section=each.get("sectionName").text(),
                port=each.get("port").port() if each.get("port").exists else 0,
            )
        )
    if len(found) > MAX_PARENTS:
        spec.get("parentRefs").fail(f"more than {MAX_PARENTS}")
    if len(set(found)) != len(found):
        spec.get("parentRefs").fail("the same parent twice")
    return tuple(found)


def _hostnames(hostnames: Reader) -> tuple[str, ...]:
    for each in hostnames.items():
        if not _HOSTNAME.fullmatch(each.name()):
            each.fail(f"not a hostname: {shown(each.value)}")
    return hostnames.texts()


def _bounded(items: Reader, limit: int) -> list[Reader]:
    found = list(items.items())
    if len(found) > limit:
        items.fail(f"{len(found)} entries, allowed are {limit}")
    return found


def _http_rule(rule: Reader, namespace: str) -> RouteRule:
    rule.only(
        "name", "matches", "filters", "backendRefs", "timeouts", "retry", "sessionPersistence"
    )
    matches = tuple(_http_match(each) for each in _bounded(rule.get("matches"), MAX_MATCHES))
    matches = matches or (RouteMatch(),)
    filters = read_filters(rule.get("filters"), namespace, is_grpc=False)
    backends = _backends(rule, namespace, is_grpc=False)
    if any(each.redirect for each in filters) and backends:
        rule.get("filters").fail("a redirect beside backendRefs: it never reaches them")
    _check_prefixes(rule, matches, (*filters, *(f for b in backends for f in b.filters)))
    timeouts = rule.get("timeouts").only("request", "backendRequest")
    request = read_duration(timeouts.get("request"))
    backend = read_duration(timeouts.get("backendRequest"))
    if request and backend and backend > request:
        timeouts.get("backendRequest").fail("longer than the whole request may take")
    return RouteRule(
        name=rule.get("name").text(),
        matches=matches,
        filters=filters,
        backends=backends,
        request_timeout=request or None,
        backend_timeout=backend or None,
        retry=_retry(rule.get("retry")),
        session=read_session(rule.get("sessionPersistence")),
    )


def _check_prefixes(
    rule: Reader, matches: tuple[RouteMatch, ...], filters: tuple[RouteFilter, ...]
) -> None:
    for each in filters:
        change = each.redirect.path if each.redirect else None
        change = each.rewrite.path if each.rewrite else change
        is_prefix = len(matches) == 1 and matches[0].path.kind == "PathPrefix"
        if change is not None and change.kind == "ReplacePrefixMatch" and not is_prefix:
            rule.get("filters").fail(
                "ReplacePrefixMatch needs exactly one match, of type PathPrefix"
            )


def _http_match(match: Reader) -> RouteMatch:
    match.only("path", "headers", "queryParams", "method")
    method = match.get("method").choice(METHODS, "")
    return RouteMatch(
        path=_path(match.get("path")),
        headers=_named(match.get("headers"), ignores_case=True),
        query_params=_named(match.get("queryParams"), ignores_case=False),
        method=method,
    )


def _path(path: Reader) -> PathMatch:
    path.only("type", "value")
    kind = path.get("type").choice(("Exact", "PathPrefix", "RegularExpression"), "PathPrefix")
    value = path.get("value").text("/")
    if kind == "RegularExpression":
        read_expression(path.get("value"), value)
    elif not _PCHARS.fullmatch(value) or _NOT_IN_PATH.search(value) or len(value) > 1024:
        path.get("value").fail(f"not a path: {shown(value)}", hint="it starts with /, without ..")
    return PathMatch(cast("PathKind", kind), value)


def _named(entries: Reader, *, ignores_case: bool) -> tuple[NamedMatch, ...]:
    found: dict[str, NamedMatch] = {}
    for each in _bounded(entries, MAX_MATCHES):
        each.only("type", "name", "value")
        kind = each.get("type").choice(("Exact", "RegularExpression"), "Exact")
        name, value = each.get("name").name(), each.get("value").text()
        if kind == "RegularExpression":
            read_expression(each.get("value"), value)
        # Of two entries of one name the first counts.
        key = name.lower() if ignores_case else name
        found.setdefault(key, NamedMatch(key, value, cast("ValueKind", kind)))
    return tuple(found.values())


def _backends(rule: Reader, namespace: str, *, is_grpc: bool) -> tuple[Backend, ...]:
    found = []
    for each in _bounded(rule.get("backendRefs"), MAX_BACKENDS):
        filters = read_filters(each.get("filters"), namespace, is_grpc=is_grpc)
        found.append(read_backend(each, namespace, filters))
    return tuple(found)


def _retry(retry: Reader) -> Retry | None:
    if not retry.exists:
        return None
    retry.only("codes", "attempts", "backoff")
    codes = tuple(each.integer() for each in retry.get("codes").items())
    if any(not 400 <= code <= 599 for code in codes):
        retry.get("codes").fail("not all from 400 to 599")
    attempts = retry.get("attempts").integer(2)
    if not 1 <= attempts <= 100:
        retry.get("attempts").fail("not from 1 to 100")
    backoff = read_duration(retry.get("backoff"))
    return Retry(attempts, codes, backoff if backoff is not None else Retry().backoff_seconds)


def read_session(session: Reader) -> SessionPersistence | None:
    """A `sessionPersistence`, None if absent: as in v1.6.1 (`sessionName`, `cookieConfig`) and as
    after it (`cookie`, `header`). Raises ConfigError.
    """
    if not session.exists:
        return None
    session.only(
        "type", "sessionName", "cookie", "cookieConfig", "header", "absoluteTimeout", "idleTimeout"
    )
    kind = session.get("type").choice(("Cookie", "Header"), "Cookie")
    cookie = session.get("cookie") if session.get("cookie").exists else session.get("cookieConfig")
    cookie.only("name", "path", "lifetimeType")
    lifetime = cookie.get("lifetimeType").choice(("Session", "Permanent"), "Session")
    end = read_duration(session.get("absoluteTimeout"))
    if lifetime == "Permanent" and not end:
        session.get("absoluteTimeout").fail("missing: a permanent cookie needs it")
    named = session.get("header") if kind == "Header" else cookie
    name = named.get("name").text() or session.get("sessionName").text()
    return SessionPersistence(
        kind="Header" if kind == "Header" else "Cookie",
        name=name,
        path=cookie.get("path").text("/"),
        is_permanent=lifetime == "Permanent",
        absolute_seconds=end or None,
    )


def _grpc_rule(rule: Reader, namespace: str) -> RouteRule:
    rule.only("name", "matches", "filters", "backendRefs", "sessionPersistence")
    matches = tuple(_grpc_match(each) for each in _bounded(rule.get("matches"), MAX_MATCHES))
    return RouteRule(
        name=rule.get("name").text(),
        matches=matches or (RouteMatch(grpc=MethodMatch()),),
        filters=read_filters(rule.get("filters"), namespace, is_grpc=True),
        backends=_backends(rule, namespace, is_grpc=True),
        session=read_session(rule.get("sessionPersistence")),
    )


def _grpc_match(match: Reader) -> RouteMatch:
    match.only("method", "headers")
    method = match.get("method").only("type", "service", "method")
    kind = method.get("type").choice(("Exact", "RegularExpression"), "Exact")
    service, name = method.get("service").text(), method.get("method").text()
    if kind == "RegularExpression":
        read_expression(method.get("service"), service)
        read_expression(method.get("method"), name)
    return RouteMatch(
        headers=_named(match.get("headers"), ignores_case=True),
        grpc=MethodMatch(service, name, cast("ValueKind", kind)),
    )


def _plain_rule(rule: Reader, namespace: str) -> RouteRule:
    rule.only("name", "backendRefs")
    backends = tuple(
        read_backend(each.only("group", "kind", "namespace", "name", "port", "weight"), namespace)
        for each in _bounded(rule.get("backendRefs"), MAX_BACKENDS)
    )
    return RouteRule(name=rule.get("name").text(), backends=backends)
