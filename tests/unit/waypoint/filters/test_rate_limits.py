"""RateLimitPolicy: keys, costs, overrides, shadow, what callers are told, failing closed."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.identity import SpiffeId
from mesh.model.l7_policy import (
    RateLimitKey,
    RateLimitOverride,
    RateLimitPolicy,
    RateLimitRule,
    RequestCondition,
    SharedLimiter,
)
from waypoint.filters.chain import Headers, Request, Respond, Response
from waypoint.filters.rate_limit.filter import RateLimits

WEB = SpiffeId("cluster.local", "shop", "web")
BOT = SpiffeId("cluster.local", "crawl", "bot")


def request(now: float = 100.0, **fields: Any) -> Request:
    given = {"method": b"GET", "scheme": b"http", "authority": b"api", "path": b"/", "source": WEB}
    return Request(now=now, **{**given, **fields})


def limits(*rules: RateLimitRule, **fields: Any) -> RateLimits:
    return RateLimits([RateLimitPolicy("shop", "calm", rules, **fields)])


def passed(filter_: RateLimits, count: int, **fields: Any) -> int:
    return sum(filter_.on_request(request(**fields)) is None for _ in range(count))


def test_a_limit_is_kept_and_refills() -> None:
    kept = limits(RateLimitRule("all", 5, 1.0))
    assert passed(kept, 20) == 5
    assert passed(kept, 20, now=100.2) == 1
    assert passed(kept, 20, now=200.0) == 5


def test_each_caller_has_a_bucket() -> None:
    kept = limits(RateLimitRule("each", 3, 60.0, keys=(RateLimitKey("Identity"),)))
    assert passed(kept, 10) == 3
    assert passed(kept, 10, source=BOT) == 3
    assert passed(kept, 10, source=None) == 3


@pytest.mark.parametrize(
    ("kind", "name", "one", "other"),
    [
        ("Namespace", "", {"source": WEB}, {"source": BOT}),
        ("SourceIP", "", {"source_ip": "10.0.0.1"}, {"source_ip": "10.0.0.2"}),
        (
            "Header",
            "X-Api-Key",
            {"headers": Headers([(b"x-api-key", b"a")])},
            {"headers": Headers([(b"x-api-key", b"b")])},
        ),
        ("Path", "", {"path": b"/a"}, {"path": b"/b"}),
        ("Method", "", {"method": b"GET"}, {"method": b"PUT"}),
        ("Host", "", {"authority": b"A"}, {"authority": b"b"}),
        ("Claim", "sub", {"claims": {"sub": "me"}}, {"claims": {"sub": "you"}}),
    ],
)
def test_what_a_key_is_made_of(kind: Any, name: str, one: Any, other: Any) -> None:
    kept = limits(RateLimitRule("each", 1, 60.0, keys=(RateLimitKey(kind, name),)))
    assert passed(kept, 3, **one) == 1
    assert passed(kept, 3, **other) == 1


def test_only_what_a_rule_concerns_is_counted() -> None:
    kept = limits(RateLimitRule("put", 1, 60.0, condition=RequestCondition(methods=("PUT",))))
    assert passed(kept, 5) == 5
    assert passed(kept, 5, method=b"PUT") == 1


def test_any_bucket_that_is_over_refuses() -> None:
    kept = limits(
        RateLimitRule("wide", 100, 1.0),
        RateLimitRule("narrow", 2, 60.0, keys=(RateLimitKey("Identity"),)),
    )
    answers = [kept.on_request(request()) for _ in range(3)]
    assert answers[:2] == [None, None]
    refused = answers[2]
    assert isinstance(refused, Respond)
    assert (refused.status, refused.flag, refused.grpc_status) == (429, "RL", 8)
    assert (refused.policy, refused.rule) == ("shop/calm", "narrow")
    assert dict(refused.headers) == {
        b"ratelimit-policy": b'"narrow";q=2;w=60',
        b"ratelimit": b'"narrow";r=0;t=30',
        b"retry-after": b"30",
    }


def test_overrides_costs_and_what_callers_say_of_theirs() -> None:
    rule = RateLimitRule(
        "each",
        10,
        60.0,
        keys=(RateLimitKey("Namespace"),),
        overrides=(RateLimitOverride(("crawl",), 2),),
        cost=2,
        cost_header="x-cost",
    )
    kept = limits(rule)
    assert passed(kept, 10) == 5
    assert passed(kept, 10, source=BOT) == 1
    free = [(b"x-cost", b"0")]
    assert passed(limits(rule), 10, headers=Headers(free)) == 5  # never less than the rule's
    dear = [(b"x-cost", b"5")]
    assert passed(limits(rule), 10, headers=Headers(dear)) == 2


def test_a_shadow_rule_only_notes() -> None:
    kept = limits(RateLimitRule("soon", 1, 60.0, is_shadow=True))
    asked = [request() for _ in range(2)]
    assert [kept.on_request(each) for each in asked] == [None, None]
    assert asked[1].notes["rate_limit.shadow"] == ["shop/calm soon"]


def test_callers_are_told_of_the_rule_with_the_least_left() -> None:
    kept = limits(RateLimitRule("wide", 100, 60.0), RateLimitRule("narrow", 4, 60.0))
    asked, answer = request(), Response(status=200)
    assert kept.on_request(asked) is None
    kept.on_response(asked, answer)
    assert answer.headers.get(b"ratelimit") == b'"narrow";r=3;t=15'
    theirs = Response(status=200, headers=Headers([(b"ratelimit", b'"origin";r=1')]))
    kept.on_response(asked, theirs)
    assert theirs.headers.get_all(b"ratelimit") == [b'"origin";r=1']
    quiet = limits(RateLimitRule("all", 1, 60.0), sends_headers=False)
    refused = [quiet.on_request(request()) for _ in range(2)][1]
    assert isinstance(refused, Respond)
    assert [name for name, _ in refused.headers] == [b"retry-after"]


@pytest.mark.parametrize(
    "policy",
    [
        RateLimitPolicy("shop", "p", problem="no such target"),
        RateLimitPolicy("shop", "p", (RateLimitRule("r", 1, 0.0),)),
        RateLimitPolicy("shop", "p", (RateLimitRule("r", -1, 1.0),)),
        RateLimitPolicy("shop", "p", shared=SharedLimiter("Redis", "redis://store:6379")),
        RateLimitPolicy(
            "shop", "p", (RateLimitRule("r", 1, 1.0, condition=RequestCondition(paths=("/{x",))),)
        ),
    ],
)
def test_a_policy_that_cannot_be_kept_refuses(policy: RateLimitPolicy) -> None:
    answer = RateLimits([policy]).on_request(request())
    assert isinstance(answer, Respond)
    assert (answer.status, answer.policy) == (500, "shop/p")
