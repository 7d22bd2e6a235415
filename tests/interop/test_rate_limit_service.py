"""Limits that a rate-limit service counts: a grpcio server is asked by the whole daemon, and by
Envoy beside it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import pytest
import trio

from mesh.model.l7_policy import (
    RateLimitKey,
    RateLimitOverride,
    RateLimitPolicy,
    RateLimitRule,
    RequestCondition,
    SharedLimiter,
)
from mesh.proto.rate_limit_pb2 import RateLimitResponse
from tests.support.envoy import asking_config, free_port, running_envoy
from tests.support.grpc_servers import RATE_LIMIT, GrpcServer, grpc_server
from tests.support.waypoints import (
    NODE_IP,
    App,
    Mesh,
    fetch,
    header,
    key,
    running_app,
    running_waypoint,
    service,
    traffic,
)

pytestmark = pytest.mark.interop

ADDRESS = "limits.shop:80"
PER_USER = (RateLimitKey("Header", "x-user"),)
OK, OVER = 1, 2
MINUTE = 2


def rule(name: str, path: str, **fields: Any) -> RateLimitRule:
    fields = {"requests": 10, "window_seconds": 60.0, **fields}
    return RateLimitRule(name, condition=RequestCondition(paths=(path,)), **fields)


def policy(*rules: RateLimitRule, **shared: Any) -> RateLimitPolicy:
    fields = {"timeout_seconds": 30.0, "on_failure": "Deny", **shared}
    limiter = SharedLimiter("RateLimitService", ADDRESS, **fields)
    return RateLimitPolicy("shop", f"{rules[0].name}s", rules, limiter)


@dataclass
class Shop:
    """Everybody."""

    mesh: Mesh
    web: App
    limits: GrpcServer
    stream: trio.SocketStream
    talk: h11.Connection

    async def ask(self, path: str, **headers: str) -> tuple[h11.Response, bytes]:
        pairs = [(name.replace("_", "-"), value) for name, value in headers.items()]
        return await fetch(self.stream, path, headers=pairs, connection=self.talk)


@asynccontextmanager
async def shop(*policies: RateLimitPolicy) -> AsyncIterator[Shop]:
    with grpc_server(RATE_LIMIT, NODE_IP) as limits:
        there = limits.workload("limits-1", key("limits"), NODE_IP)
        async with running_app("web-1", key("web")) as web:
            resources = [service("web", 1), service("limits", 2), web.workload, there]
            config = traffic("web", rate_limits=policies)
            async with running_waypoint([*resources, config]) as mesh:
                stream = await mesh.open("10.96.0.1:80")
                yield Shop(mesh, web, limits, stream, h11.Connection(h11.CLIENT))


def logged(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The access log."""
    written = capfd.readouterr().out.splitlines()
    return [json.loads(line) for line in written if line.startswith("{")]


def answer(code: int, *statuses: dict[str, Any], **more: Any) -> Any:
    made = RateLimitResponse(overall_code=code, statuses=statuses, **more)  # type: ignore[arg-type]
    return lambda _request, _context: made


def status(code: int, left: int = 0, *, seconds: int = 20, limit: int = 10) -> dict[str, Any]:
    return {
        "code": code,
        "current_limit": {"requests_per_unit": limit, "unit": MINUTE},
        "limit_remaining": left,
        "duration_until_reset": {"seconds": seconds},
    }


async def test_what_is_asked_and_what_an_answer_does(capfd: pytest.CaptureFixture[str]) -> None:
    each = rule(
        "each", "/asked*", keys=(*PER_USER, RateLimitKey("SourceIP"), RateLimitKey("Path")),
        overrides=(RateLimitOverride(("vip", "10.0.0.7", "/asked"), 99),),
    )  # fmt: skip
    own = rule(
        "own", "/asked*", requests=0, window_seconds=0.0, descriptor=(("tenant", "shop"),),
        keys=(RateLimitKey("Method", descriptor_key="verb"),),
    )  # fmt: skip
    dear = rule("dear", "/asked/dear", cost=5)
    async with shop(policy(each, own, dear, domain="shops")) as here:
        assert (await here.ask("/free"))[0].status_code == 200
        assert here.limits.asked == []

        here.limits.answer = answer(
            OK, status(OK, 7), {"code": OK},
            response_headers_to_add=[{"key": "x-limiter", "value": "a"}],
            request_headers_to_add=[
                {"key": "X-Plan", "value": "gold"}, {"key": "content-length", "value": "9"},
            ],
        )  # fmt: skip
        response, _ = await here.ask("/asked", x_user="alice")
        assert (response.status_code, header(response, "x-limiter")) == (200, "a")
        assert header(response, "ratelimit") == '"each";r=7;t=20'
        assert header(response, "ratelimit-policy") == '"each";q=10;w=60'
        seen = dict(here.web.requests[-1].headers)
        assert seen[b"x-plan"] == b"gold"
        assert b"content-length" not in seen
        (asked,) = here.limits.asked
        assert (asked.domain, asked.hits_addend) == ("shops", 1)
        source = asked.descriptors[0].entries[2].value
        assert [[(e.key, e.value) for e in d.entries] for d in asked.descriptors] == [
            [("generic_key", "each"), ("x-user", "alice"), ("remote_address", source),
             ("path", "/asked")],
            [("tenant", "shop"), ("verb", "GET")],
        ]  # fmt: skip
        first, second = asked.descriptors
        assert (first.limit.requests_per_unit, first.limit.unit) == (10, MINUTE)
        assert not second.HasField("limit")

        # Rules of another cost are asked about by themselves.
        here.limits.asked.clear()
        here.limits.answer = answer(OK)
        assert (await here.ask("/asked/dear"))[0].status_code == 200
        assert [(a.hits_addend, len(a.descriptors)) for a in here.limits.asked] == [(1, 2), (5, 1)]

        here.limits.answer = answer(
            OVER, status(OK, 3), status(OVER, seconds=9, limit=4), raw_body=b"slowly",
            response_headers_to_add=[{"key": "x-limiter", "value": "b"}],
        )  # fmt: skip
        count = len(here.web.requests)
        response, body = await here.ask("/asked")
        assert (response.status_code, body) == (429, b"slowly")
        assert (header(response, "retry-after"), header(response, "x-limiter")) == ("9", "b")
        assert header(response, "ratelimit") == '"own";r=0;t=9'
        assert header(response, "ratelimit-policy") == '"own";q=4;w=60'
        # One that does not say which.
        here.limits.answer = answer(OVER)
        response, body = await here.ask("/asked")
        assert (response.status_code, body) == (429, b"rate limit exceeded")
        assert header(response, "retry-after") == "60"
        assert len(here.web.requests) == count
    lines = [line for line in logged(capfd) if line["status"] == 429]
    assert [(line["policy"], line["rule"]) for line in lines] == [
        ("shop/eachs", "own"), ("shop/eachs", "each"),
    ]  # fmt: skip
    assert {line["error"] for line in lines} == {f"{ADDRESS} says it is over the limit"}


async def test_a_shadow_counts_and_throttles_nobody() -> None:
    async with shop(policy(rule("each", "/*"), rule("shadow", "/*", is_shadow=True))) as here:
        here.limits.answer = answer(OVER, status(OK, 3), status(OVER))
        assert (await here.ask("/"))[0].status_code == 200
        here.limits.answer = answer(OVER, status(OVER), status(OK, 1))
        assert (await here.ask("/"))[0].status_code == 429
        # Over, but none of those it was asked about: nobody is let pass for want of an explanation.
        here.limits.answer = answer(OVER, status(OK), status(OK))
        assert (await here.ask("/"))[0].status_code == 429


@pytest.mark.parametrize(
    "said",
    [
        answer(0),
        answer(OK, response_headers_to_add=[{"key": "a b", "value": "c"}]),
        lambda _request, context: context.abort(13, "broken"),
    ],
    ids=["no verdict", "a field that cannot be sent", "an error"],
)
async def test_what_is_no_answer(said: Any, capfd: pytest.CaptureFixture[str]) -> None:
    denies = policy(rule("deny", "/deny"))
    allows = policy(rule("allow", "/allow"), on_failure="Allow")
    share = policy(rule("share", "/share", requests=4), on_failure="LocalShare", replicas=2)
    async with shop(denies, allows, share) as here:
        here.limits.answer = said
        assert (await here.ask("/deny"))[0].status_code == 503
        assert (await here.ask("/allow"))[0].status_code == 200
        statuses = [(await here.ask("/share"))[0].status_code for _ in range(4)]
        assert statuses == [200, 200, 429, 429]
    said_so = {line["rate_limit.without_store"] for line in logged(capfd)}
    assert said_so == {"shop/denys Deny", "shop/allows Allow", "shop/shares LocalShare"}


async def test_a_dead_service_is_left_alone_and_found_again() -> None:
    port = free_port()
    there = GrpcServer(port).workload("limits-1", key("limits"), NODE_IP)
    async with running_app("web-1", key("web")) as web:
        resources = [service("web", 1), service("limits", 2), web.workload, there]
        config = traffic("web", rate_limits=(policy(rule("each", "/*")),))
        async with running_waypoint([*resources, config]) as mesh:
            stream = await mesh.open("10.96.0.1:80")
            talk = h11.Connection(h11.CLIENT)

            async def status_now() -> int:
                return (await fetch(stream, "/", connection=talk))[0].status_code

            for _ in range(4):
                assert await status_now() == 503
            with grpc_server(RATE_LIMIT, NODE_IP, port) as limits:
                limits.answer = answer(OK)
                with trio.fail_after(60):
                    while await status_now() != 200:
                        await trio.sleep(0.05)
                limits.answer = answer(OVER)
                assert await status_now() == 429


async def test_a_slow_service_is_waited_for_no_longer_than_said() -> None:
    async with shop(policy(rule("each", "/*"), timeout_seconds=0.05)) as here:
        waits = trio.Event()

        def slow(_request: Any, context: Any) -> RateLimitResponse:
            trio.from_thread.run_sync(waits.set, trio_token=token)
            while context.is_active():
                pass
            return RateLimitResponse(overall_code=OK)  # type: ignore[arg-type]

        token = trio.lowlevel.current_trio_token()
        here.limits.answer = slow
        assert (await here.ask("/"))[0].status_code == 503
        assert waits.is_set()


async def test_envoy_asks_the_same_and_does_the_same(tmp_path: Path) -> None:
    each = rule("each", "/*", requests=10, keys=PER_USER)
    async with shop(policy(each, domain="shops")) as here:
        kind = "type.googleapis.com/envoy.extensions.filters.http.ratelimit.v3.RateLimit"
        asking = {
            "@type": kind,
            "domain": "shops",
            "failure_mode_deny": True,
            "timeout": "20s",
            "enable_x_ratelimit_headers": "DRAFT_VERSION_03",
            "rate_limit_service": {
                "transport_api_version": "V3",
                "grpc_service": {"envoy_grpc": {"cluster_name": "asked"}},
            },
        }
        actions = [
            {"generic_key": {"descriptor_value": "each"}},
            {"request_headers": {"header_name": "x-user", "descriptor_key": "x-user"}},
        ]
        listen = free_port()
        web_port = here.web.workload.services[key("web")][80]
        config = asking_config(
            listen, "ratelimit", asking, (NODE_IP, here.limits.port), (NODE_IP, web_port),
            {"rate_limits": [{"actions": actions}]},
        )  # fmt: skip
        async with running_envoy(tmp_path, config, listen):
            envoy = await trio.open_tcp_stream("127.0.0.1", listen)
            async with envoy:
                here.limits.answer = answer(
                    OK, status(OK, 7),
                    response_headers_to_add=[{"key": "x-limiter", "value": "a"}],
                    request_headers_to_add=[{"key": "x-plan", "value": "gold"}],
                )  # fmt: skip
                for stream in (here.stream, envoy):
                    talk = here.talk if stream is here.stream else h11.Connection(h11.CLIENT)
                    response, _ = await fetch(
                        stream, "/", headers=[("x-user", "alice")], connection=talk
                    )
                    assert (response.status_code, header(response, "x-limiter")) == (200, "a")
                    assert dict(here.web.requests[-1].headers)[b"x-plan"] == b"gold"
                # What Envoy reads out of the answer shows that it means the same.
                assert header(response, "x-ratelimit-remaining") == "7"
                assert header(response, "x-ratelimit-reset") == "20"
                assert header(response, "x-ratelimit-limit") == "10, 10;w=60"
                ours, theirs = here.limits.asked
                assert ours.domain == theirs.domain
                assert [d.entries for d in ours.descriptors] == [
                    d.entries for d in theirs.descriptors
                ]
                here.limits.answer = answer(OVER, status(OVER))
                for stream in (here.stream, envoy):
                    talk = here.talk if stream is here.stream else h11.Connection(h11.CLIENT)
                    response, _ = await fetch(
                        stream, "/", headers=[("x-user", "alice")], connection=talk
                    )
                    assert response.status_code == 429
