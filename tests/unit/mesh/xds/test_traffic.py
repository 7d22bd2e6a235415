"""A waypoint's resource survives the wire, and broken ones are named."""

from __future__ import annotations

import pytest

from mesh.errors import ConfigError
from mesh.model.l7_policy import (
    L7Authorization,
    L7Operation,
    L7Rule,
    RateLimitKey,
    RateLimitPolicy,
    RateLimitRule,
    RedactionPolicy,
    RedactionRule,
    TrafficConfig,
)
from mesh.model.route import (
    Backend,
    HeaderChange,
    Mirror,
    PathMatch,
    Retry,
    Route,
    RouteFilter,
    RouteMatch,
    RouteRule,
)
from mesh.proto.waypoint_pb2 import TrafficConfig as TrafficMessage
from mesh.xds.traffic import traffic_from_proto, traffic_to_proto

REVIEWS = Backend("shop/reviews.shop.svc.cluster.local", 9080, weight=3)
FULL = TrafficConfig(
    gateway="shop/waypoint",
    service="shop/reviews.shop.svc.cluster.local",
    routes=(
        Route(
            "HTTPRoute",
            "shop",
            "split",
            rules=(
                RouteRule(
                    matches=(RouteMatch(PathMatch("Exact", "/v2"), method="GET"),),
                    filters=(
                        RouteFilter(request_headers=HeaderChange(set=(("x-a", "b"),))),
                        RouteFilter(mirror=Mirror(REVIEWS, 1, 3)),
                    ),
                    backends=(REVIEWS,),
                    request_timeout=1.5,
                    retry=Retry(codes=(503,)),
                ),
            ),
            ports=(9080,),
            source="routes.yaml:3",
        ),
    ),
    authorizations=(
        L7Authorization(
            "shop", "readers", rules=(L7Rule(operations=(L7Operation(methods=("GET",)),)),)
        ),
    ),
    rate_limits=(
        RateLimitPolicy(
            "shop",
            "calm",
            rules=(RateLimitRule("each", 10, 1.0, keys=(RateLimitKey("Identity"),)),),
        ),
    ),
    redactions=(RedactionPolicy("shop", "hide", rules=(RedactionRule("mail", detector="email"),)),),
)


_WITH_MORE = traffic_to_proto(FULL).model.replace(b'"burst":0', b'"burst":0,"queue":5')


def test_everything_survives_the_wire() -> None:
    assert traffic_from_proto(traffic_to_proto(FULL)) == FULL
    assert traffic_from_proto(traffic_to_proto(TrafficConfig("a/b"))) == TrafficConfig("a/b")


def test_equal_values_have_equal_bytes() -> None:
    again = traffic_from_proto(traffic_to_proto(FULL))
    assert traffic_to_proto(again).SerializeToString() == traffic_to_proto(FULL).SerializeToString()


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (TrafficMessage(schema=9, model=b"{}"), "schema 9"),
        (TrafficMessage(schema=1, model=b"{"), "truncated"),
        (TrafficMessage(schema=1, model=b"[" * 100_000), "TrafficConfig"),
        (TrafficMessage(schema=1, model=b'{"service":"a"}'), "gateway"),
        (TrafficMessage(schema=1, model=b'{"gateway":"a"}'), "lacks"),
        (TrafficMessage(schema=1, model=_WITH_MORE), "not known here"),
        (
            TrafficMessage(schema=1, model=b'{"gateway":"a","routes":[{"kind":"X"}]}'),
            r"routes\[0\]",
        ),
    ],
)
def test_what_cannot_be_read_says_where(message: TrafficMessage, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        traffic_from_proto(message)
