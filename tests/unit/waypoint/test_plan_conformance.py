"""waypoint.plan and .match: the mesh conformance cases, weights, problems, and a naive twin."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from mesh.model.route import (
    Backend,
    MethodMatch,
    PathMatch,
    Route,
    RouteFilter,
    RouteMatch,
    RouteRule,
)
from tests.conformance.mesh_http import (
    NAMESPACE,
    TESTS,
    V1,
    V2,
    Case,
    Test,
    prefix,
    route,
    rule,
    to,
)
from waypoint import heads
from waypoint.assemble import Assembly
from waypoint.filters.chain import Headers, Request, Response
from waypoint.match import MatchTable
from waypoint.plan import Answer, Forward, Plan, Routes


def ask(routes: Routes, case: Case) -> tuple[Plan, Request]:
    path, _, query = case.target.partition("?")
    pairs = [(name.encode(), value.encode()) for name, value in case.headers]
    request = Request(
        method=b"GET", scheme=b"http", authority=b"echo", path=path.encode(),
        query=query.encode(), headers=Headers(pairs), destination_port=case.port,
    )  # fmt: skip
    return routes.plan(request, case.namespace, random.Random(1)), request


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_conformance(test: Test) -> None:
    routes = Routes(f"{NAMESPACE}/echo", test.routes)
    for case in test.cases:
        plan, request = ask(routes, case)
        if case.status != 200:
            assert isinstance(plan, Answer), case
            assert plan.respond.status == case.status, case
            if case.location:
                assert dict(plan.respond.headers)[b"location"].decode() == case.location
            continue
        assert isinstance(plan, Forward), case
        assert plan.backend.service == f"{NAMESPACE}/{case.backend}", case
        plan.change_request(request)
        response = Response(status=200)
        plan.change_response(request, response)
        for headers, wanted in ((request.headers, case.sees), (response.headers, case.response)):
            for name, value in wanted:
                assert headers.get(name.encode()) == (value.encode() if value else None), case
        if case.path:
            assert request.path.decode() == case.path


def test_weights_and_the_share_of_a_backend_with_a_problem() -> None:
    broken = Backend("", 80, 20, problem="no such Service")
    backends = (to("echo-v1", 50), to("echo-v2", 30), broken, to("echo-v3", 0))
    routes = Routes("ns/echo", (route(RouteRule(backends=backends)),))
    rng = random.Random(7)
    seen: Counter[str] = Counter()
    request = Request(method=b"GET", scheme=b"http", authority=b"echo", path=b"/",
                      destination_port=80)  # fmt: skip
    for _ in range(4000):
        plan = routes.plan(request, "", rng)
        seen[plan.backend.service if isinstance(plan, Forward) else str(plan.respond.status)] += 1
    share = {name: count / 4000 for name, count in seen.items()}
    assert share[f"{NAMESPACE}/echo-v1"] == pytest.approx(0.5, abs=0.05)
    assert share[f"{NAMESPACE}/echo-v2"] == pytest.approx(0.3, abs=0.05)
    assert share["500"] == pytest.approx(0.2, abs=0.05)
    assert len(share) == 3


def test_rules_without_backends_or_with_unknown_filters_answer_500() -> None:
    make = Assembly(lambda: 0.0, random.Random(1)).make_route_filter
    for each in (rule(), rule(to=V1, filters=(RouteFilter(extension="x/Y/ns/z"),))):
        plan, _ = ask(Routes("ns/echo", (route(each),), make), Case("/"))
        assert isinstance(plan, Answer)
        assert plan.respond.status == 500


@pytest.mark.parametrize(
    ("path", "before", "value", "after"),
    [
        ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
        ("/foo", "/foo", "/xyz", "/xyz"),
        ("/foo/", "/foo", "/xyz", "/xyz/"),
        ("/foo/bar", "/foo", "", "/bar"),
        ("/foo/", "/foo", "", "/"),
        ("/foo", "/foo", "", "/"),
        ("/foo/", "/foo", "/", "/"),
        ("/foo", "/foo", "/", "/"),
    ],
)
def test_replace_prefix_match(path: str, before: str, value: str, after: str) -> None:
    from mesh.model.route import PathChange

    change = PathChange("ReplacePrefixMatch", value)
    assert heads.new_path(path.encode(), change, before).decode() == after


def test_grpc_methods_by_precedence() -> None:
    def on(**fields: str) -> RouteMatch:
        return RouteMatch(grpc=MethodMatch(**fields))  # type: ignore[arg-type]

    rules = (
        rule(on(), to=to("any")),
        rule(on(service="pb.Echo"), to=to("service")),
        rule(on(service="pb.Echo", method="Say"), to=to("both")),
        rule(on(service="pb\\..*", method="Shout", kind="RegularExpression"), to=to("regex")),
    )
    routes = Routes("ns/echo", (Route("GRPCRoute", "ns", "g", rules),))
    for target, name in (
        ("/pb.Echo/Say", "both"),
        ("/pb.Echo/Other", "service"),
        ("/pb.Other/Shout", "regex"),
        ("/pb.Other/Say", "any"),
    ):
        plan, _ = ask(routes, Case(target))
        assert isinstance(plan, Forward)
        assert plan.backend.service.endswith(name), target


def test_ten_thousand_rules_are_looked_up_not_scanned() -> None:
    rules = tuple(
        rule(prefix(f"/api/v{n % 7}/thing-{n}"), to=V1 if n % 2 else V2) for n in range(10_000)
    )
    table = MatchTable((route(*rules),), lambda _route, index: index)
    request = Request(method=b"GET", scheme=b"http", authority=b"a", path=b"/api/v0/thing-9996/x")
    assert table.find(request) == 9996
    assert len(table._groups) == 1


def test_regular_expressions_rank_after_prefixes() -> None:
    regex = RouteMatch(PathMatch("RegularExpression", "/a[0-9]+"))
    routes = Routes("ns/echo", (route(rule(regex, to=V2), rule(prefix("/b"), to=V1)),))
    assert isinstance(ask(routes, Case("/a12"))[0], Forward)
    assert isinstance(ask(routes, Case("/a12x"))[0], Answer)
