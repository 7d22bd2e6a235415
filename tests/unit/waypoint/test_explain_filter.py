"""Each kind of filter as a step: told by the filter itself, without its effects."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.identity import SpiffeId
from mesh.model.l7_policy import (
    ExternalAuthorizer,
    JwtRule,
    L7Authorization,
    L7Operation,
    L7Rule,
    RateLimitKey,
    RateLimitPolicy,
    RateLimitRule,
    RequestAuthentication,
    SharedLimiter,
    TrafficConfig,
)
from mesh.model.route import Cors, Fault
from waypoint.assemble import Assembly
from waypoint.explain_filter import explain_filter
from waypoint.filters.authorize import Authorize
from waypoint.filters.chain import Filter, Headers, PassingFilter, Request, Respond, Verdict
from waypoint.filters.cors import CorsFilter
from waypoint.filters.ext_authz import ExternalAuthorization
from waypoint.filters.fault import FaultFilter
from waypoint.filters.jwt import Jwt
from waypoint.filters.rate_limit.filter import RateLimits


def request(*pairs: tuple[bytes, bytes], method: bytes = b"GET", path: bytes = b"/") -> Request:
    return Request(
        method=method,
        scheme=b"http",
        authority=b"a",
        path=path,
        headers=Headers(list(pairs)),
        source=SpiffeId("td", "shop", "web"),
        now=1.0,
    )


def test_limits_are_rehearsed_and_not_taken() -> None:
    rules = (
        RateLimitRule("all", 2, 60.0),
        RateLimitRule("each", 1, 60.0, keys=(RateLimitKey("Identity"),), is_shadow=True),
    )
    limits = RateLimits([RateLimitPolicy("shop", "calm", rules)])
    for _ in range(3):
        step, respond = explain_filter(limits, request())
        assert (step["outcome"], respond) == ("passes", None)
        assert [(each["rule"], each["remaining"]) for each in step["limits"]] == [
            ("all", 1),
            ("each", 0),
        ]
        assert step["limits"][1]["key"] == ["spiffe://td/ns/shop/sa/web"]
    assert [limits.on_request(request()) for _ in range(2)] == [None, None]
    told, respond = explain_filter(limits, request())
    assert respond == limits.on_request(request())
    assert (told["outcome"], told["policy"], told["rule"]) == ("answers", "shop/calm", "all")


def test_a_policy_that_cannot_be_kept_answers() -> None:
    problem = RateLimitPolicy("shop", "broken", (), SharedLimiter(), problem="no such service")
    step, respond = explain_filter(RateLimits([problem]), request())
    assert respond is not None
    assert (respond.status, step["policy"]) == (500, "shop/broken")


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Fault(abort_status=503, abort_percent=100.0), "may answer"),
        (Fault(abort_status=503), "passes"),
        (Fault(delay_seconds=9.0, delay_percent=50.0), "passes"),
    ],
)
def test_faults_are_told_and_not_drawn(fault: Fault, outcome: str) -> None:
    class NoChance:
        def random(self) -> float:
            raise AssertionError

    step, respond = explain_filter(FaultFilter(fault, NoChance()), request())
    assert (step["outcome"], respond) == (outcome, None)
    assert ("50 % wait 9 s" in step["reason"]) == bool(fault.delay_percent)


def test_code_that_is_not_ours_is_not_run() -> None:
    class Counting(PassingFilter):
        name = "theirs"

        def on_request(self, request: Request) -> Verdict:
            raise AssertionError

    step, respond = explain_filter(Counting(), request())
    assert (step["filter"], step["outcome"], respond) == ("theirs", "not asked", None)


def test_authorization_names_what_allows_and_what_only_notes() -> None:
    allow = L7Authorization("shop", "all", "ALLOW", (L7Rule(),))
    audit = L7Authorization("shop", "seen", "AUDIT", (L7Rule(),))
    step, respond = explain_filter(Authorize([allow, audit]), request())
    assert respond is None
    assert (step["policy"], step["rule"], step["noted"]) == ("shop/all", "0", ["AUDIT shop/seen"])


def test_keys_are_not_fetched_for_an_explanation() -> None:
    class Away:
        def known(self, kid: str) -> Any:
            return None

        async def fetch(self, kid: str) -> Any:
            raise AssertionError

    policy = RequestAuthentication("shop", "ids", (JwtRule("https://issuer"),))
    jwt = Jwt([policy], lambda _: Away(), lambda: 0.0)
    step, respond = explain_filter(jwt, request())
    assert (step["outcome"], step["reason"], respond) == ("passes", "no token is sent", None)
    # {"alg":"ES256"} . {"iss":"https://issuer"} . nothing
    token = b"eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJodHRwczovL2lzc3VlciJ9.AA"
    step, respond = explain_filter(jwt, request((b"authorization", b"Bearer " + token)))
    assert (step["outcome"], respond) == ("not asked", None)
    step, respond = explain_filter(jwt, request((b"authorization", b"Bearer nonsense")))
    assert isinstance(respond, Respond)
    assert (respond.status, step["policy"]) == (401, "shop/ids")


def test_a_preflight_is_answered_by_cors() -> None:
    cors = CorsFilter(Cors(allow_origins=("https://shop.example",)))
    asked = request(
        (b"origin", b"https://shop.example"),
        (b"access-control-request-method", b"GET"),
        method=b"OPTIONS",
    )
    step, respond = explain_filter(cors, asked)
    assert respond is not None
    assert (step["outcome"], step["reason"]) == ("answers", f"answered {respond.status}")


PATHS = ("/", "/admin", "/admin/", "/a")
METHODS = ("GET", "PUT", "OPTIONS")


@given(
    denied=st.lists(st.tuples(st.sampled_from(METHODS), st.sampled_from(PATHS)), max_size=3),
    allowed=st.none() | st.lists(st.sampled_from(METHODS), max_size=2),
    burst=st.integers(1, 3),
    calls=st.lists(st.tuples(st.sampled_from(METHODS), st.sampled_from(PATHS)), max_size=8),
)
def test_what_is_explained_is_what_is_decided(
    denied: list[tuple[str, str]],
    allowed: list[str] | None,
    burst: int,
    calls: list[tuple[str, str]],
) -> None:
    def rule(methods: tuple[str, ...], paths: tuple[str, ...] = ()) -> L7Rule:
        return L7Rule(operations=(L7Operation(methods=methods, paths=paths),))

    policies = [
        L7Authorization("shop", f"d{n}", "DENY", (rule((method,), (path,)),))
        for n, (method, path) in enumerate(denied)
    ]
    if allowed is not None:
        rules = tuple(rule((each,)) for each in allowed)
        policies.append(L7Authorization("shop", "allow", "ALLOW", rules))
    limit = RateLimitRule("each", burst, 60.0, keys=(RateLimitKey("Path"),))
    config = TrafficConfig(
        "shop/w",
        "shop/a",
        authorizations=tuple(policies),
        rate_limits=(RateLimitPolicy("shop", "calm", (limit,)),),
    )
    assembly = Assembly(lambda: 0.0, random.Random(1))
    filters = assembly.make_filters(TrafficConfig("shop/w"), config)

    def decide(method: str, path: str, ask: Callable[[Filter, Request], object]) -> object:
        asked = request(method=method.encode())
        asked.path = path.encode()
        return next((found for each in filters if (found := ask(each, asked)) is not None), None)

    for method, path in calls:
        explained = decide(method, path, lambda each, asked: explain_filter(each, asked)[1])
        assert explained == decide(method, path, lambda each, asked: each.on_request(asked))


def test_external_authorizers_are_named_and_not_asked() -> None:
    async def ask(*_: Any) -> Any:
        raise AssertionError("asked")

    provider = ExternalAuthorizer("opa", "http", "auth/opa.auth", 8000)
    rule = L7Rule(operations=(L7Operation(paths=("/admin*",)),))
    policy = L7Authorization("shop", "p", "CUSTOM", (rule,), provider=provider)
    each = ExternalAuthorization([policy], ask)
    step, respond = explain_filter(each, request(path=b"/admin"))
    assert (step["outcome"], step["policy"], step["rule"], respond) == (
        "not asked", "shop/p", "0", None,
    )  # fmt: skip
    assert step["asks"] == [{"policy": "shop/p", "rule": "0", "provider": "opa"}]
    assert "opa would be asked" in step["reason"]
    step, respond = explain_filter(each, request(path=b"/"))
    assert (step["outcome"], step["asks"], respond) == ("passes", [], None)
