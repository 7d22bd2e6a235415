"""RequestMirror, live: copies that arrive, and callers who never notice."""

from __future__ import annotations

import contextlib

import h11
import pytest
import trio

from mesh.model.route import Backend, HeaderChange, Mirror, Route, RouteFilter, RouteRule
from tests.conformance.mesh_http import prefix
from tests.support.waypoints import (
    App,
    fetch,
    key,
    running_app,
    running_waypoint,
    scrape,
    service,
    traffic,
)
from waypoint.mirror import MAX_BODY

pytestmark = pytest.mark.usefixtures("no_fd_leak")


def _copy_to(name: str, *share: int, problem: str = "") -> RouteFilter:
    return RouteFilter(mirror=Mirror(Backend(key(name), 80, problem=problem), *share))


async def _until(app: App, count: int) -> None:
    with trio.fail_after(20):
        while len(app.bodies) < count:
            await trio.sleep(0.005)


async def test_copies_are_what_the_backend_gets_and_disturb_nobody() -> None:
    async def silent(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                while await stream.receive_some(65536):
                    pass

    stamp = RouteFilter(request_headers=HeaderChange(set=(("X-Stamp", "yes"),)))
    web = (Backend(key("web"), 80),)
    rules = (
        RouteRule(matches=(prefix("/two"),), backends=web,
                  filters=(_copy_to("one"), stamp, _copy_to("two"))),
        RouteRule(matches=(prefix("/none"),), backends=web, filters=(_copy_to("one", 0, 100),)),
        RouteRule(matches=(prefix("/broken"),), backends=web,
                  filters=(_copy_to("gone"), _copy_to("bad", problem="BackendNotFound"),
                           _copy_to("silent"), _copy_to("one"))),
    )  # fmt: skip
    services = [service(name, number) for number, name in
                enumerate(("web", "one", "two", "silent"), 1)]  # fmt: skip
    async with (
        running_app("web-1", key("web")) as web_app,
        running_app("one-1", key("one")) as one,
        running_app("two-1", key("two")) as two,
        running_app("silent-1", key("silent"), serve=silent) as deaf,
    ):
        workloads = [each.workload for each in (web_app, one, two, deaf)]
        route = Route("HTTPRoute", "shop", "web", rules)
        async with running_waypoint([*services, *workloads, traffic("web", route)]) as mesh:
            stream = await mesh.open("10.96.0.1:80")
            talk = h11.Connection(h11.CLIENT)
            one.answers = [lambda _request: (500, b"nobody hears this")]
            response, body = await fetch(
                stream, "/two?q=1", method="POST", body=b"payload", connection=talk
            )
            assert (response.status_code, body) == (200, b"web-1")
            for app in (one, two):
                await _until(app, 1)
                assert app.bodies == [b"payload"]
                (request,) = app.requests
                fields = dict(request.headers)
                assert (request.method, request.target) == (b"POST", b"/two?q=1")
                assert (fields[b"host"], fields[b"x-stamp"]) == (b"web.shop", b"yes")
                assert fields[b"content-length"] == b"7"
            # Framed as the caller framed it: a copy does not make chunks of the original.
            assert dict(web_app.requests[0].headers)[b"content-length"] == b"7"

            assert (await fetch(stream, "/none", connection=talk))[0].status_code == 200
            big = bytes(MAX_BODY + 1)
            sent = await fetch(stream, "/two", method="POST", body=big, connection=talk)
            assert sent[0].status_code == 200
            assert web_app.bodies[-1] == big
            assert (await fetch(stream, "/broken", connection=talk))[0].status_code == 200
            await _until(one, 2)
            assert (one.bodies[-1], len(two.bodies)) == (b"", 1)
            with trio.fail_after(20):
                while 'outcome="answered"' not in (page := await scrape(mesh)):
                    await trio.sleep(0.01)
    for outcome in ('gone.shop.svc.cluster.local",outcome="no_endpoint"} 1.0',
                    'bad.shop.svc.cluster.local",outcome="no_backend"} 1.0',
                    'two.shop.svc.cluster.local",outcome="too_large"} 1.0'):  # fmt: skip
        assert outcome in page.replace('", outcome', '",outcome'), outcome
