"""From policies to filters: all of them, in their order, and what they remember over an edit."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mesh.identity import SpiffeId
from mesh.model.l7_policy import (
    L7Authorization,
    L7Operation,
    L7Rule,
    RateLimitPolicy,
    RateLimitRule,
    RedactionPolicy,
    TrafficConfig,
)
from mesh.model.route import Cors, Fault, RouteFilter
from waypoint.assemble import Assembly
from waypoint.filters.chain import Filter, Request, Respond

DENY_PUT = L7Authorization(
    "shop", "no-put", "DENY", (L7Rule(operations=(L7Operation(methods=("PUT",)),)),)
)
CALM = RateLimitPolicy("shop", "calm", (RateLimitRule("all", 2, 60.0),))


def assembly() -> Assembly:
    return Assembly(lambda: 0.0, random.Random(1))


def ask(filters: Sequence[Filter], method: bytes = b"GET") -> int:
    request = Request(
        method=method,
        scheme=b"http",
        authority=b"a",
        path=b"/",
        source=SpiffeId("td", "shop", "web"),
        now=1.0,
    )
    for each in filters:
        verdict = each.on_request(request)
        if isinstance(verdict, Respond):
            return verdict.status
    return 200


def test_what_is_denied_is_not_counted() -> None:
    own = TrafficConfig("shop/w", "shop/api", authorizations=(DENY_PUT,), rate_limits=(CALM,))
    filters = assembly().make_filters(TrafficConfig("shop/w"), own)
    assert [ask(filters, b"PUT") for _ in range(5)] == [403] * 5
    assert [ask(filters) for _ in range(3)] == [200, 200, 429]


def test_what_holds_for_everything_holds_for_each_service() -> None:
    everywhere = TrafficConfig("shop/w", authorizations=(DENY_PUT,))
    made = assembly()
    assert ask(made.make_filters(everywhere, TrafficConfig("shop/w", "shop/api")), b"PUT") == 403
    assert ask(made.make_filters(everywhere, everywhere), b"PUT") == 403


def test_an_edit_beside_a_rate_limit_does_not_refill_it() -> None:
    made, nothing = assembly(), TrafficConfig("shop/w")
    own = TrafficConfig("shop/w", "shop/api", rate_limits=(CALM,))
    filters = made.make_filters(nothing, own)
    assert [ask(filters) for _ in range(3)] == [200, 200, 429]
    edited = TrafficConfig("shop/w", "shop/api", rate_limits=(CALM,), authorizations=(DENY_PUT,))
    assert ask(made.make_filters(nothing, edited)) == 429
    other = TrafficConfig("shop/w", "shop/other", rate_limits=(CALM,))
    assert ask(made.make_filters(nothing, other)) == 200


def test_a_policy_that_cannot_be_carried_out_answers_500() -> None:
    hide = RedactionPolicy("shop", "hide", problem="no such target")
    own = TrafficConfig("shop/w", "shop/api", redactions=(hide,))
    assert ask(assembly().make_filters(TrafficConfig("shop/w"), own)) == 500


def test_filters_of_routes() -> None:
    make = assembly().make_route_filter
    assert make(RouteFilter(cors=Cors())) is not None
    assert make(RouteFilter(fault=Fault(abort_status=503))) is not None
    assert make(RouteFilter(extension="x/Y/ns/z")) is None
