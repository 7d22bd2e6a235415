"""DECIDES where a request goes: routes of one service, compiled. Pure.

Routes on a Service are three groups that never mix: a caller whose namespace holds consumer routes
for the Service meets only those, everybody else the producer's (routes in the Service's namespace).
Without any route the Service itself answers; with one, what matches nothing is 404. A backend that
cannot be used keeps its share, which is answered 500.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mesh.model.route import (
    Backend,
    HeaderChange,
    Mirror,
    Retry,
    Rewrite,
    Route,
    RouteFilter,
    RouteRule,
)
from waypoint import heads
from waypoint.balance.session import AFFINITY, Session
from waypoint.filters.chain import Filter, Request, Respond, Response
from waypoint.match import MatchTable

MakeFilter = Callable[[RouteFilter], Filter | None]
"""A filter for an entry that the plan does not carry out itself; None: nobody knows it."""


class Random(Protocol):
    """The part of `random.Random` used here."""

    def random(self) -> float:
        """At least 0, below 1."""
        ...


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Chance that has been drawn already."""

    value: float

    def random(self) -> float:
        return self.value


@dataclass(frozen=True, slots=True)
class Answer:
    """Answered here."""

    respond: Respond
    route: str = ""
    rule: str = ""


@dataclass(frozen=True, slots=True)
class Forward:
    """Sent to `backend`; made once for each rule and backend, shared by all requests."""

    backend: Backend
    route: str = ""
    rule: str = ""
    request_changes: tuple[HeaderChange | Rewrite, ...] = ()
    response_changes: tuple[HeaderChange, ...] = ()
    prefix: str = ""
    filters: tuple[Filter, ...] = ()
    request_timeout: float | None = None
    backend_timeout: float | None = None
    retry: Retry | None = None
    session: Session | None = None
    mirrors: tuple[Mirror, ...] = ()

    def filters_with(self, others: Sequence[Filter]) -> Sequence[Filter]:
        """The rule's filters, then the service's."""
        return [*self.filters, *others] if self.filters else others

    def change_request(self, request: Request) -> None:
        """Header changes and rewrites, in their order."""
        for change in self.request_changes:
            if isinstance(change, HeaderChange):
                heads.change(request.headers, change)
                continue
            if change.hostname:
                request.authority = change.hostname.encode()
            if change.path is not None:
                request.path = heads.new_path(request.path, change.path, self.prefix)

    def change_response(self, request: Request, response: Response) -> None:
        """The backend's, then the rule's; what begins a session comes first."""
        if request.notes and AFFINITY in request.notes:
            response.headers.add(*request.notes.pop(AFFINITY))
        for change in self.response_changes:
            heads.change(response.headers, change)

    def backoff(self, tries: int, rng: Random) -> float:
        """Seconds before the next try: never less than was asked for, up to half more."""
        base = self.retry.backoff_seconds if self.retry is not None else 0.025
        return min(base * float(2 ** (tries - 1)), max(base, 10.0)) * (1.0 + rng.random() / 2)


Plan = Forward | Answer

_NOT_FOUND = Answer(Respond(404, flag="NR", reason="no rule of the service's routes matches"))
_BROKEN = Respond(500, flag="NC")


class _Rule:
    """A rule, ready: a redirect, or its backends by weight."""

    __slots__ = (
        "_cumulative",
        "_of_session",
        "_only",
        "_outcomes",
        "_redirect",
        "_session",
        "_total",
    )

    def __init__(self, route: Route, index: int, make: MakeFilter) -> None:
        rule = route.rules[index]
        name = rule.name or str(index)
        self._redirect = next((f.redirect for f in rule.filters if f.redirect is not None), None)
        self._only: Answer | None = None
        self._session: Session | None = None
        self._of_session: dict[bytes, Plan] = {}
        if rule.session is not None:
            self._session = Session(rule.session, f"{route.kind} {route.key} {index}")
        made, missing = _make_filters(rule.filters, make)
        usable = [each for each in rule.backends if each.weight > 0]
        if missing:
            self._only = Answer(_because(f"filter {missing} is not known"), route.key, name)
        elif self._redirect is None and not usable:
            self._only = Answer(_because("the rule has no backend"), route.key, name)
        outcomes = [
            _outcome(route, rule, name, backend, made, make, self._session)
            for backend in rule.backends
        ]
        self._outcomes: list[Plan] = [
            each
            for each, backend in zip(outcomes, rule.backends, strict=True)
            if backend.weight > 0
        ]
        for each in outcomes if self._session is not None else ():
            if isinstance(each, Forward) and self._session is not None:
                token = self._session.backend_token(each.backend.service, each.backend.port)
                self._of_session.setdefault(token, each)
        self._cumulative = list(itertools.accumulate(each.weight for each in usable))
        self._total = self._cumulative[-1] if usable else 0
        if self._redirect is not None and self._only is None:
            forward = Forward(Backend("", 0), route.key, name, filters=made, prefix=_prefix(rule))
            self._outcomes = [forward]

    def choose(self, request: Request, rng: Random) -> Plan:
        """What to do with a request that met this rule."""
        if self._only is not None:
            return self._only
        if self._redirect is not None:
            stub = self._outcomes[0]
            prefix = stub.prefix if isinstance(stub, Forward) else ""
            respond = heads.redirect(request, self._redirect, prefix)
            return Answer(respond, stub.route, stub.rule)
        if self._session is not None:
            # A session that lives goes before weights, a weight of nothing too.
            brought = self._session.read(request)
            known = self._of_session.get(brought[0]) if brought is not None else None
            if known is not None:
                return known
        if len(self._outcomes) == 1:
            return self._outcomes[0]
        return self._outcomes[bisect.bisect_right(self._cumulative, rng.random() * self._total)]

    def draws(self) -> list[tuple[float, float]]:
        """A number of chance for each backend that it may choose, and that backend's share."""
        ends = [each / self._total for each in self._cumulative] or [1.0]
        return [((low + high) / 2, high - low) for low, high in itertools.pairwise([0.0, *ends])]


def _because(reason: str) -> Respond:
    return Respond(_BROKEN.status, flag=_BROKEN.flag, reason=reason)


def _prefix(rule: RouteRule) -> str:
    """What ReplacePrefixMatch replaces: the rule has one match then, and it is a prefix."""
    for match in rule.matches:
        if match.path.kind == "PathPrefix":
            return match.path.value
    return "/"


def _make_filters(
    filters: Sequence[RouteFilter], make: MakeFilter
) -> tuple[tuple[Filter, ...], str]:
    """Filters of the kinds that are not carried out here, and the name of one nobody knows."""
    made: list[Filter] = []
    for each in filters:
        own = (
            each.request_headers,
            each.response_headers,
            each.redirect,
            each.rewrite,
            each.mirror,
        )
        if any(part is not None for part in own):
            continue
        found = make(each)
        if found is None:
            kinds = {"cors": each.cors, "fault": each.fault}
            return (), each.extension or next(
                (name for name, part in kinds.items() if part is not None), "without a type"
            )
        made.append(found)
    return tuple(made), ""


def _outcome(
    route: Route,
    rule: RouteRule,
    name: str,
    backend: Backend,
    made: tuple[Filter, ...],
    make: MakeFilter,
    session: Session | None,
) -> Plan:
    if backend.problem:
        status = 503 if route.kind == "GRPCRoute" else 500
        problem = Respond(status, flag="NC", reason=backend.problem)
        return Answer(problem, route.key, name)
    own, missing = _make_filters(backend.filters, make)
    if missing:
        return Answer(_because(f"filter {missing} is not known"), route.key, name)
    changes: list[HeaderChange | Rewrite] = []
    for each in (*rule.filters, *backend.filters):
        if each.request_headers is not None:
            changes.append(each.request_headers)
        elif each.rewrite is not None:
            changes.append(each.rewrite)
    return Forward(
        backend=backend,
        route=route.key,
        rule=name,
        request_changes=tuple(changes),
        response_changes=tuple(
            each.response_headers
            for each in (*backend.filters, *rule.filters)
            if each.response_headers is not None
        ),
        prefix=_prefix(rule),
        filters=made + own,
        request_timeout=rule.request_timeout or None,
        backend_timeout=rule.backend_timeout or None,
        retry=rule.retry,
        session=session,
        mirrors=tuple(
            each.mirror for each in (*rule.filters, *backend.filters) if each.mirror is not None
        ),
    )


class Routes:
    """The routes of one service, as `TrafficConfig.routes` has them. `service` may be empty (a
    workload was called): then there is nothing to route.
    """

    def __init__(
        self, service: str, routes: Sequence[Route] = (), make: MakeFilter = lambda _entry: None
    ) -> None:
        self._service = service
        self._routes = tuple(routes)
        self._make = make
        self._tables: dict[tuple[int, str], MatchTable[_Rule] | None] = {}
        self._defaults: dict[int, Forward] = {}
        self._consumers = {route.namespace for route in routes if route.is_consumer}

    def plan(self, request: Request, namespace: str, rng: Random) -> Plan:
        """Where a request of a caller in `namespace` goes."""
        if self._routes:
            table = self._table(request.destination_port, namespace)
            if table is not None:
                rule = table.find(request)
                return rule.choose(request, rng) if rule is not None else _NOT_FOUND
        return self._default(request.destination_port)

    def kind(self, port: int, namespace: str) -> str:
        """The kind of routes that hold for a caller, or empty text."""
        found = self._set(port, namespace)
        return found[0].kind if found else ""

    def plan_connection(
        self, port: int, namespace: str, server_name: str, rng: Random
    ) -> Backend | None:
        """TLSRoute and TCPRoute: the backend of a connection; None: it is refused."""
        routes = self._set(port, namespace)
        if not routes:
            return self._default(port).backend
        if routes[0].kind == "TLSRoute":
            # The most specific name goes first; of equals the older route, as they stand.
            fits = [(_fit(route.hostnames, server_name), route) for route in routes]
            routes = [r for fit, r in sorted(fits, key=lambda each: -each[0]) if fit]
        for route in routes:
            backends = [b for rule in route.rules for b in rule.backends if b.weight > 0]
            total = list(itertools.accumulate(each.weight for each in backends))
            if not total:
                return None
            chosen = backends[bisect.bisect_right(total, rng.random() * total[-1])]
            return None if chosen.problem else chosen
        return None

    def ways(self, request: Request, namespace: str) -> list[tuple[Plan, float]]:
        """Every plan that `plan` may make of the request, with its share of 1."""
        table = self._table(request.destination_port, namespace) if self._routes else None
        rule = table.find(request) if table is not None else None
        if rule is None:
            return [(self.plan(request, namespace, _Drawn(0.0)), 1.0)]
        found: list[tuple[Plan, float]] = []
        for drawn, share in rule.draws():
            plan = self.plan(request, namespace, _Drawn(drawn))
            known = next((index for index, each in enumerate(found) if each[0] == plan), None)
            if known is None:
                found.append((plan, share))
            else:
                found[known] = (plan, found[known][1] + share)
        return found

    def _default(self, port: int) -> Forward:
        default = self._defaults.get(port)
        if default is None:
            default = self._defaults[port] = Forward(Backend(self._service, port))
        return default

    def _table(self, port: int, namespace: str) -> MatchTable[_Rule] | None:
        key = (port, namespace if namespace in self._consumers else "")
        if key not in self._tables:
            routes = self._set(port, namespace)
            self._tables[key] = (
                MatchTable(routes, lambda route, index: _Rule(route, index, self._make))
                if routes
                else None
            )
        return self._tables[key]

    def _set(self, port: int, namespace: str) -> list[Route]:
        """The routes of one kind that hold for a caller: GRPC before HTTP before TLS and TCP."""
        here = [route for route in self._routes if not route.ports or port in route.ports]
        own = [route for route in here if route.is_consumer and route.namespace == namespace]
        chosen = own or [route for route in here if not route.is_consumer]
        for kind in ("GRPCRoute", "HTTPRoute", "TLSRoute", "TCPRoute"):
            found = [route for route in chosen if route.kind == kind]
            if found:
                return sorted(found, key=lambda route: (route.created, route.key))
        return []


def _fit(hostnames: Sequence[str], server_name: str) -> int:
    """How well a TLSRoute names a server: 0 not at all, most as it is called. `*.` stands for one
    or more labels; the longer what follows it, the better.
    """
    name, best = server_name.lower(), 0
    for each in map(str.lower, hostnames):
        if name == each:
            return 1000
        if each[:2] == "*." and name.endswith(each[1:]) and len(name) > len(each) - 1:
            best = max(best, len(each))
    return best
