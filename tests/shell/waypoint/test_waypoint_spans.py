"""Spans of requests, out to an OTLP receiver: tries as children, contexts passed on, nothing that
a policy redacts.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from mesh.model.l7_policy import RedactionPolicy, RedactionRule
from mesh.model.route import Backend, Retry, Route, RouteRule
from mesh.model.service import Service
from mesh.model.workload import Workload
from tests.support.otlp import Receiver
from tests.support.waypoints import (
    fetch,
    key,
    running_app,
    running_waypoint,
    service,
    traffic,
)

pytestmark = pytest.mark.usefixtures("no_fd_leak")
TRACE, SPAN = "12" * 16, "34" * 8


def retrying() -> Route:
    rule = RouteRule(
        "all", backends=(Backend(key("web"), 80),), retry=Retry(2, (503,), backoff_seconds=0.001)
    )
    return Route("HTTPRoute", "shop", "web", (rule,))


async def until(claim: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not claim():
            await trio.sleep(0.01)


def at(app_requests: list[object], name: bytes) -> list[str]:
    return [
        value.decode()
        for request in app_requests
        for found, value in request.headers  # type: ignore[attr-defined]
        if found == name
    ]


async def test_tries_are_children_and_nothing_redacted_is_told() -> None:
    hidden = RedactionPolicy("shop", "mails", "Request", rules=(RedactionRule("mail", "email"),))
    config = traffic("web", retrying(), redactions=(hidden,))
    with Receiver() as receiver:
        async with running_app("web", key("web")) as app:
            parts: list[Workload | Service] = [service("web", 1), app.workload]
            settings = {"otlp_endpoint": receiver.url, "span_delay_ms": 20}
            async with running_waypoint([*parts, config], **settings) as mesh:
                app.answers += [lambda _: (503, b""), lambda _: (503, b"")]
                async with await mesh.open("10.96.0.1:80") as stream:
                    sent = [("traceparent", f"00-{TRACE}-{SPAN}-01"), ("tracestate", "a=b")]
                    response, _ = await fetch(stream, "/of/bob@example.com?by=eve@example.com",
                                              headers=sent)  # fmt: skip
                assert response.status_code == 200
                await until(lambda: len(receiver.spans) == 4)
        server, *tries = sorted(receiver.spans, key=lambda each: each.start_ns)
        assert (server.trace_id, server.parent_id, server.kind) == (TRACE, SPAN, 2)
        assert {each.parent_id for each in tries} == {server.span_id}
        assert {each.kind for each in tries} == {3}
        assert [each.attributes.get("http.request.resend_count", 0) for each in tries] == [0, 1, 2]
        assert [bool(each.error) for each in tries] == [True, True, False]
        # Each try told the application its own span.
        told = [f"00-{TRACE}-{each.span_id}-01" for each in tries]
        assert at(list(app.requests), b"traceparent") == told
        assert at(list(app.requests), b"tracestate") == ["a=b"] * 3
        assert server.attributes["http.response.status_code"] == 200
        assert server.attributes["ambit.route"] == "shop/web"
        assert server.attributes["istio.source_principal"].startswith("spiffe://")
        assert "example.com" not in str(receiver.spans)


async def test_b3_is_read_and_written_and_what_nobody_samples_is_passed_on() -> None:
    with Receiver() as receiver:
        async with running_app("web", key("web")) as app:
            resources = [service("web", 1), app.workload, traffic("web", retrying())]
            settings = {"otlp_endpoint": receiver.url, "span_delay_ms": 20}
            async with (
                running_waypoint(resources, **settings) as mesh,
                await mesh.open("10.96.0.1:80") as stream,
            ):
                await fetch(stream, headers=[("b3", f"{TRACE}-{SPAN}-1")])
                await until(lambda: len(receiver.spans) == 2)
                not_sampled = f"00-{TRACE}-{SPAN}-00"
                async with await mesh.open("10.96.0.1:80") as second:
                    await fetch(second, headers=[("traceparent", not_sampled)])
        server, tried = sorted(receiver.spans, key=lambda each: each.start_ns)
        assert (server.trace_id, server.parent_id) == (TRACE, SPAN)
        assert at(list(app.requests), b"b3") == [f"{TRACE}-{tried.span_id}-1"]
        assert at(list(app.requests), b"traceparent") == [
            f"00-{TRACE}-{tried.span_id}-01",
            not_sampled,
        ]
