"""Routes, retries, timeouts, policies without a filter, opaque ports, metrics and drain, live."""

from __future__ import annotations

import contextlib

import h11
import pytest
import trio

from mesh.model.l7_policy import (
    L7Authorization,
    L7Operation,
    L7Rule,
    RateLimitPolicy,
    RateLimitRule,
    RedactionPolicy,
    RedactionRule,
)
from mesh.model.route import (
    Backend,
    HeaderChange,
    Retry,
    Route,
    RouteFilter,
    RouteRule,
)
from mesh.model.service import AppProtocol
from tests.conformance.mesh_http import prefix
from tests.support.waypoints import (
    NODE_IP,
    fetch,
    header,
    key,
    running_app,
    running_waypoint,
    service,
    settle,
    traffic,
)

pytestmark = pytest.mark.usefixtures("no_fd_leak")


def _route(*rules: RouteRule) -> Route:
    return Route("HTTPRoute", "shop", "web", rules)


def _to(name: str) -> tuple[Backend, ...]:
    return (Backend(key(name), 80),)


async def test_rules_change_heads_and_choose_backends_and_updates_take_hold() -> None:
    stamp = RouteFilter(response_headers=HeaderChange(set=(("X-Rule", "two"),)))
    rules = (
        RouteRule(matches=(prefix("/v2"),), filters=(stamp,), backends=_to("v2")),
        RouteRule(matches=(prefix("/v1"),), backends=_to("v1")),
    )
    services = [service("web", 1), service("v1", 2), service("v2", 3)]
    async with running_app("one", key("v1")) as one, running_app("two", key("v2")) as two:
        resources = [*services, one.workload, two.workload, traffic("web", _route(*rules))]
        async with running_waypoint(resources) as mesh:
            stream = await mesh.open("10.96.0.1:80")
            talk = h11.Connection(h11.CLIENT)
            response, body = await fetch(stream, "/v2/x", connection=talk)
            assert (body, header(response, "x-rule")) == (b"two", "two")
            assert (await fetch(stream, "/v1", connection=talk))[1] == b"one"
            assert (await fetch(stream, "/v3", connection=talk))[0].status_code == 404
            await mesh.control_plane.push(traffic("web", _route(RouteRule(backends=_to("v1")))))
            with trio.fail_after(20):
                while (await fetch(stream, "/v3", connection=talk))[0].status_code == 404:
                    await trio.sleep(0.01)


async def test_failed_tries_are_repeated_and_timeouts_answer_504() -> None:
    async def silent(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                while await stream.receive_some(65536):
                    pass

    retry = Retry(attempts=2, codes=(500,), backoff_seconds=0.001)
    rules = (
        RouteRule(matches=(prefix("/slow"),), backends=_to("slow"), request_timeout=0.1),
        RouteRule(backends=_to("web"), retry=retry),
    )
    async with (
        running_app("web-1", key("web")) as app,
        running_app("slow-1", key("slow"), serve=silent) as slow,
        running_waypoint(
            [service("web", 1), service("slow", 2), app.workload, slow.workload,
             traffic("web", _route(*rules))]
        ) as mesh,
    ):  # fmt: skip
        stream = await mesh.open("10.96.0.1:80")
        talk = h11.Connection(h11.CLIENT)
        app.answers = [lambda _request: (500, b"no")] * 2
        response, body = await fetch(stream, "/echo", method="POST", body=b"again", connection=talk)
        assert (response.status_code, body) == (200, b"again")
        assert app.bodies == [b"again"] * 3
        app.answers = [lambda _request: (500, b"no")] * 3
        assert (await fetch(stream, "/x", connection=talk))[0].status_code == 500
        app.answers = [lambda _request: (503, b"no")]
        assert (await fetch(stream, "/x", connection=talk))[0].status_code == 503
        assert (await fetch(stream, "/slow", connection=talk))[0].status_code == 504


async def test_a_policy_that_nobody_carries_out_fails_closed() -> None:
    broken = RedactionRule("names", grpc_fields=("$.user.name",))
    redactions = (RedactionPolicy("shop", "cards", rules=(broken,)),)
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint(
            [service("web", 1), app.workload, traffic("web", redactions=redactions)]
        ) as mesh,
    ):
        response, _ = await fetch(await mesh.open("10.96.0.1:80"))
        assert response.status_code == 500
    assert app.requests == []


async def test_denied_is_403_and_too_many_is_429() -> None:
    rules = (L7Rule(operations=(L7Operation(paths=("/admin/*",)),)),)
    config = traffic(
        "web",
        authorizations=(L7Authorization("shop", "no-admin", "DENY", rules),),
        rate_limits=(RateLimitPolicy("shop", "slow", (RateLimitRule("all", 2, 3600.0),)),),
    )
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload, config]) as mesh,
    ):
        stream = await mesh.open("10.96.0.1:80")
        talk = h11.Connection(h11.CLIENT)
        for path in ("/admin/x", "/a/../admin/x", "/%61dmin/x"):
            assert (await fetch(stream, path, connection=talk))[0].status_code == 403, path
        codes = [(await fetch(stream, connection=talk))[0].status_code for _ in range(3)]
        assert codes == [200, 200, 429]
    assert len(app.requests) == 2


@pytest.mark.parametrize("protocol", [AppProtocol.TCP, AppProtocol.UNKNOWN])
async def test_servers_that_speak_first_are_carried_untouched(protocol: AppProtocol) -> None:
    async def greet(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(b"220 hello\r\n")
            await stream.send_all(await settle(stream, b"\n"))

    async with (
        running_app("mail-1", key("mail"), serve=greet) as app,
        running_waypoint([service("mail", 1, protocol=protocol), app.workload]) as mesh,
    ):
        stream = await mesh.open("10.96.0.1:80")
        assert await settle(stream, b"\n") == b"220 hello\r\n"
        await stream.send_all(b"\x00EHLO\n")
        assert await settle(stream, b"never") == b"\x00EHLO\n"


async def test_metrics_have_istios_names_and_a_drain_ends_idle_connections() -> None:
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        stream = await mesh.open("10.96.0.1:80")
        assert (await fetch(stream))[0].status_code == 200
        host, _, port = mesh.config.stats_address.rpartition(":")
        stats = await trio.open_tcp_stream(host, int(port))
        async with stats:
            await stats.send_all(b"GET /metrics HTTP/1.0\r\nhost: x\r\n\r\n")
            page = (await settle(stats, b"never")).decode()
        line = next(each for each in page.splitlines() if each.startswith("istio_requests_total"))
        for label in (
            'reporter="waypoint"', 'response_code="200"', 'request_protocol="http"',
            'source_principal="spiffe://cluster.local/ns/shop/sa/cart"',
            'destination_service="web.shop.svc.cluster.local"', 'destination_workload="web-1"',
        ):  # fmt: skip
            assert label in line
        assert "istio_request_duration_milliseconds_bucket" in page
        mesh.shutdown.request()
        assert await settle(stream, b"never") == b""
    assert app.workload.addresses == (NODE_IP,)


async def test_services_that_share_a_port_keep_their_own_protocol() -> None:
    services = [service("web", 1), service("other", 2, protocol=AppProtocol.HTTP2)]
    async with (
        running_app("one", key("web"), key("other")) as app,
        running_waypoint([app.workload, *services, traffic("web"), traffic("other")]) as mesh,
    ):
        response, _ = await fetch(await mesh.open("10.96.0.1:80"))
        assert response.status_code == 200
        # The application speaks HTTP/1.1 only: asked as HTTP/2 it ends the connection.
        response, _ = await fetch(await mesh.open("10.96.0.2:80"))
        assert response.status_code == 503
        response, _ = await fetch(await mesh.open("10.96.0.1:80"))
        assert response.status_code == 200


async def test_nobody_but_us_says_who_calls() -> None:
    spoofed = [
        ("x-forwarded-client-cert", "By=me;URI=spiffe://cluster.local/ns/shop/sa/admin"),
        ("X-Forwarded-Client-Cert", "URI=spiffe://cluster.local/ns/shop/sa/root"),
        ("x_forwarded-client_cert", "URI=spiffe://cluster.local/ns/shop/sa/root"),
    ]
    shown = traffic("shown", shows_client_identity=True)
    async with (
        running_app("one", key("web"), key("shown")) as app,
        running_waypoint(
            [app.workload, service("web", 1), service("shown", 2), traffic("web"), shown]
        ) as mesh,
    ):
        for address in ("10.96.0.1:80", "10.96.0.2:80"):
            await fetch(await mesh.open(address), headers=spoofed)
    hidden, told = (
        [(name, value) for name, value in each.headers if b"client" in name.lower()]
        for each in app.requests
    )
    assert hidden == []
    assert told == [
        (
            b"x-forwarded-client-cert",
            b"By=spiffe://cluster.local/ns/shop/sa/waypoint;"
            b"URI=spiffe://cluster.local/ns/shop/sa/cart",
        )
    ]
