"""`Routes.ways`: chance never makes a plan that was not told, and shares are what weights say."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.model.route import Backend, Redirect, Route, RouteFilter, RouteRule, SessionPersistence
from waypoint.filters.chain import Request
from waypoint.plan import Answer, Forward, Routes

CALL = {"method": b"GET", "scheme": b"http", "authority": b"a", "path": b"/", "query": b""}


def routes(*backends: Backend, session: bool = False) -> Routes:
    kept = SessionPersistence() if session else None
    rule = RouteRule("x", backends=backends, session=kept)
    return Routes("shop/a", [Route("HTTPRoute", "shop", "r", (rule,))])


def request() -> Request:
    return Request(**CALL, destination_port=80)  # type: ignore[arg-type]


@given(
    weights=st.lists(st.integers(0, 5), max_size=6),
    broken=st.sets(st.integers(0, 5)),
    session=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
def test_every_plan_is_told(weights: list[int], broken: set[int], session: bool, seed: int) -> None:
    made = routes(
        *(
            Backend(f"shop/{index}", 80, weight, problem="gone" if index in broken else "")
            for index, weight in enumerate(weights)
        ),
        session=session,
    )
    told = made.ways(request(), "shop")
    assert sum(share for _, share in told) == pytest.approx(1.0)
    rng = random.Random(seed)
    for _ in range(20):
        assert made.plan(request(), "shop", rng) in [plan for plan, _ in told]
    for plan, share in told:
        if isinstance(plan, Forward) and any(weights):
            index = int(plan.backend.service[5:])
            assert share == pytest.approx(weights[index] / sum(weights))


def test_what_chance_does_not_choose_has_one_way() -> None:
    (only,) = Routes("shop/a").ways(request(), "shop")
    assert (only[0], only[1]) == (Forward(Backend("shop/a", 80)), 1.0)
    rule = RouteRule(filters=(RouteFilter(redirect=Redirect(status=301)),))
    made = Routes("shop/a", [Route("HTTPRoute", "shop", "r", (rule,))])
    ((plan, share),) = made.ways(request(), "shop")
    assert isinstance(plan, Answer)
    assert (plan.respond.status, share) == (301, 1.0)
