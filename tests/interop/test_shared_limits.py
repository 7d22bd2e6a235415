"""Limits shared through a real Redis: exact over many callers, and what holds without it."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import h11
import pytest
import trio

from mesh.errors import Unavailable
from mesh.identity import SpiffeId
from mesh.model.l7_policy import (
    RateLimitKey,
    RateLimitOverride,
    RateLimitPolicy,
    RateLimitRule,
    SharedLimiter,
)
from mesh.model.service import Service
from mesh.model.workload import Workload
from tests.support.redis import RedisServer, redis_server
from tests.support.waypoints import fetch, key, running_app, running_waypoint, service, traffic
from waypoint.filters.chain import LOGGED, Headers, Request, Respond, Response, Wait
from waypoint.filters.rate_limit.gcra import NEVER, Rate, hit
from waypoint.filters.rate_limit.redis_store import RedisStore
from waypoint.filters.rate_limit.shared import SharedRateLimits
from waypoint.filters.rate_limit.stores import Stores

pytestmark = [
    pytest.mark.interop,
    # coredis leaves streams of broken connections to the collector.
    pytest.mark.filterwarnings("ignore:.*MemoryObject"),
]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Here, where that is known, and not in somebody else's test."""
    yield
    gc.collect()


TEN = Rate(10, 3600.0, 10)


@asynccontextmanager
async def stores_for(server: RedisServer, *, starts: bool = True) -> AsyncIterator[Stores]:
    if starts:
        await server.start()
    async with trio.open_nursery() as nursery:
        stores = Stores()
        nursery.start_soon(stores.run)
        yield stores
        nursery.cancel_scope.cancel()


def request(user: str = "alice", **headers: str) -> Request:
    pairs = [(b"x-user", user.encode())]
    pairs += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request(
        method=b"GET", scheme=b"http", authority=b"web", path=b"/", headers=Headers(pairs),
        source=SpiffeId("c", "shop", "web"), now=trio.current_time(),
    )  # fmt: skip


def policy(server: RedisServer, *, rule: dict[str, Any] | None = None, **shared: Any) -> Any:
    fields = {"requests": 10, "window_seconds": 3600.0, "keys": (RateLimitKey("Header", "x-user"),)}
    limiter = SharedLimiter("Redis", server.address, timeout_seconds=1.0)
    made = RateLimitRule("each", **{**fields, **(rule or {})})
    return RateLimitPolicy("shop", "calm", (made,), replace(limiter, **shared))


async def ask(limits: SharedRateLimits, asked: Request) -> Respond | None:
    verdict = limits.on_request(asked)
    return await verdict.ask() if isinstance(verdict, Wait) else verdict


async def answering(stores: Stores, server: RedisServer) -> None:
    with trio.fail_after(20):
        while not stores.redis(server.address).is_answering:
            await trio.sleep(0.01)


async def until(claim: Callable[[], Any], seconds: float = 20) -> None:
    with trio.fail_after(seconds):
        while not await claim():
            await trio.sleep(0.05)


async def test_the_script_is_the_algorithm() -> None:
    with redis_server() as server:
        async with stores_for(server) as stores:
            await answering(stores, server)
            store = stores.redis(server.address)
            full_at = 0.0
            for cost in (1, 3, 0, 5, 4, 1, 1, 20):
                (said,) = await store.hit("s", [("r", ("k",), TEN, cost)], 5)
                expected = hit(full_at, 0.0, TEN, cost)
                full_at = expected.full_at
                assert said.is_allowed == expected.is_allowed, cost
                assert said.remaining == expected.remaining
                assert said.retry_seconds == pytest.approx(expected.retry_seconds, abs=20)
            none, other = await store.hit(
                "s", [("r", ("k",), Rate(0, 1.0, 1), 1), ("r", ("other",), TEN, 1)], 5
            )
            assert (none.is_allowed, none.retry_seconds) == (False, NEVER)
            assert (other.is_allowed, other.remaining) == (True, 9)


async def test_of_many_at_once_exactly_as_many_pass_as_may() -> None:
    with redis_server() as server:
        async with stores_for(server) as stores, stores_for(server, starts=False) as second:
            passed: Counter[bool] = Counter()
            for each in (stores, second):
                await answering(each, server)

            async def one(limits: SharedRateLimits) -> None:
                passed[await ask(limits, request()) is None] += 1

            async with trio.open_nursery() as nursery:
                for each in (stores, second):
                    limits = SharedRateLimits(policy(server), each)
                    for _ in range(60):
                        nursery.start_soon(one, limits)
            assert passed == {True: 10, False: 110}
            # Nothing of the caller is stored.
            assert "alice" not in server.known()
            assert server.known().startswith("ambit:{")


async def test_refusals_headers_overrides_costs_and_shadows() -> None:
    with redis_server() as server:
        async with stores_for(server) as stores:
            await answering(stores, server)
            rule = {
                "requests": 2,
                "overrides": (RateLimitOverride(("vip",), 4),),
                "cost_header": "x-cost",
            }
            limits = SharedRateLimits(policy(server, rule=rule), stores)
            asked = request()
            assert await ask(limits, asked) is None
            response = Response(status=200, headers=Headers([]))
            limits.on_response(asked, response)
            assert response.headers.get(b"ratelimit") is not None
            assert await ask(limits, request(x_cost="2")) is not None
            assert await ask(limits, request()) is None
            refused = await ask(limits, request())
            assert refused is not None
            assert (refused.status, refused.flag, refused.policy) == (429, "RL", "shop/calm")
            assert int(dict(refused.headers)[b"retry-after"]) > 1000
            assert [await ask(limits, request("vip")) is None for _ in range(5)] == [True] * 4 + [
                False
            ]
            shadow = SharedRateLimits(policy(server, rule={**rule, "is_shadow": True}), stores)
            asked = request()
            assert await ask(shadow, asked) is None
            assert asked.notes["rate_limit.shadow"] == ["shop/calm each"]


@pytest.mark.parametrize(
    ("on_failure", "answers"),
    [
        ("Allow", [None] * 12),
        ("Deny", [503] * 12),
        ("LocalShare", [None] * 5 + [429] * 7),
    ],
)
async def test_gone_and_back(on_failure: Any, answers: list[int | None]) -> None:
    with redis_server() as server:
        async with stores_for(server) as stores:
            await answering(stores, server)
            limits = SharedRateLimits(policy(server, on_failure=on_failure, replicas=2), stores)
            before = request("before")
            assert await ask(limits, before) is None
            assert LOGGED not in before.notes
            server.kill()
            asked = [request() for _ in range(12)]
            found = [await ask(limits, each) for each in asked]
            assert [each and each.status for each in found] == answers
            for each in asked:
                assert each.notes[LOGGED] == {"rate_limit.without_store": f"shop/calm {on_failure}"}
            await server.start()

            async def is_shared_again() -> bool:
                asked = request("after")
                said = await ask(limits, asked)
                return said is None and stores.redis(server.address).is_answering

            await until(is_shared_again)
            assert server.known()


async def test_a_silent_one_costs_its_timeout_once() -> None:
    with redis_server() as server:
        async with stores_for(server) as stores:
            await answering(stores, server)
            limits = SharedRateLimits(
                policy(server, on_failure="Allow", timeout_seconds=0.05), stores
            )
            assert await ask(limits, request()) is None
            server.pause()
            waited = [isinstance(limits.on_request(request()), Wait)]
            await ask(limits, request())
            waited.append(isinstance(limits.on_request(request()), Wait))
            server.resume()
            assert waited == [True, False]

            async def answers() -> bool:
                await ask(limits, request())
                return stores.redis(server.address).is_answering

            await until(answers)


async def test_a_password_is_needed_and_is_no_part_of_the_policy(tmp_path: Any) -> None:
    file = tmp_path / "credentials"
    with redis_server("s3cret") as server:
        await server.start()
        async with trio.open_nursery() as nursery:
            stores = Stores(str(file))
            nursery.start_soon(stores.run)
            await answering(stores, server)
            store = stores.redis(server.address)

            async def is_let_in() -> bool:
                try:
                    return (await store.hit("s", [("r", (), TEN, 1)], 5))[0].is_allowed
                except Unavailable:
                    return False

            # There is none yet, then a wrong one, then the right one: nothing is restarted.
            assert not await is_let_in()
            file.write_text("wrong\n")
            await trio.sleep(1)
            assert not await is_let_in()
            file.write_text("default:s3cret\n")
            await until(is_let_in)
            nursery.cancel_scope.cancel()


async def test_two_waypoints_keep_one_limit() -> None:
    with redis_server() as server:
        await server.start()
        config = traffic("web", rate_limits=(policy(server),))
        async with running_app("web", key("web")) as app:
            parts: list[Workload | Service] = [service("web", 1), app.workload]
            resources = [*parts, config]
            async with running_waypoint(resources) as one, running_waypoint(resources) as two:
                statuses: Counter[int] = Counter()
                for mesh in (one, two, one):
                    async with await mesh.open("10.96.0.1:80") as stream:
                        talk = h11.Connection(h11.CLIENT)
                        for _ in range(6):
                            response, _ = await fetch(
                                stream, headers=[("x-user", "alice")], connection=talk
                            )
                            statuses[response.status_code] += 1
                # Nothing was let pass or refused before the store was connected.
                assert statuses == {200: 10, 429: 8}


@pytest.mark.parametrize(
    "address", ["http://a:1", "redis://", "redis://u:p@h:1", "redis://h:99999", "unix:///x"]
)
def test_what_is_no_address_refuses_what_it_targets(address: str) -> None:
    shared = SharedLimiter("Redis", address)
    made = RateLimitPolicy("shop", "calm", (RateLimitRule("r", 1, 1.0),), shared)
    refused = SharedRateLimits(made, Stores()).on_request(Request(
        method=b"GET", scheme=b"http", authority=b"a", path=b"/"))  # fmt: skip
    assert isinstance(refused, Respond)
    assert refused.status == 500


def test_addresses_with_a_port_or_none() -> None:
    assert RedisStore("redis.shop").address == "redis.shop"
    assert RedisStore("rediss://redis.shop:6380/3").address.endswith("/3")
