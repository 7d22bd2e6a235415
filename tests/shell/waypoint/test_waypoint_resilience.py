"""Sessions, bounds, budgets and ejection, live."""

from __future__ import annotations

import contextlib

import h11
import pytest
import trio

from mesh.model.route import (
    Backend,
    BackendSettings,
    ConnectionLimits,
    LoadBalancing,
    OutlierDetection,
    Retry,
    Route,
    RouteRule,
    SessionPersistence,
)
from tests.conformance.mesh_http import prefix
from tests.support.waypoints import (
    Mesh,
    fetch,
    header,
    key,
    running_app,
    running_waypoint,
    scrape,
    service,
    traffic,
)

pytestmark = pytest.mark.usefixtures("no_fd_leak")


async def test_sessions_and_hashes_go_before_load_and_weights() -> None:
    one, two = Backend(key("one"), 80, 1), Backend(key("two"), 80, 0)
    rules = (
        RouteRule(matches=(prefix("/s"),), backends=(one, two),
                  session=SessionPersistence(name="sid")),
        RouteRule(matches=(prefix("/two"),), backends=(Backend(key("two"), 80),)),
        RouteRule(backends=(one,)),
    )  # fmt: skip
    hashed = BackendSettings(balancing=LoadBalancing("CONSISTENT_HASH", "header:x-user"))
    config = traffic("web", Route("HTTPRoute", "shop", "web", rules),
                     backends=((key("one"), hashed),))  # fmt: skip
    async with (
        running_app("a", key("one")) as a,
        running_app("b", key("one")) as b,
        running_app("c", key("two")) as c,
    ):
        services = [service("web", 1), service("one", 2), service("two", 3)]
        workloads = [each.workload for each in (a, b, c)]
        async with running_waypoint([*services, *workloads, config]) as mesh:
            stream, talk = await mesh.open("10.96.0.1:80"), h11.Connection(h11.CLIENT)
            first, body = await fetch(stream, "/s", connection=talk)
            kept = header(first, "set-cookie").split(";")[0]
            for _ in range(8):
                again = await fetch(stream, "/s", headers=[("cookie", kept)], connection=talk)
                assert (again[1], header(again[0], "set-cookie")) == (body, "")
            users = {}
            for _ in range(3):
                for user in "abcdefgh":
                    got = await fetch(stream, "/h", headers=[("x-user", user)], connection=talk)
                    assert users.setdefault(user, got[1]) == got[1]
            assert set(users.values()) == {b"a", b"b"}
            # A weight of nothing takes no new session, and keeps those that there are.
            flipped = (
                RouteRule(matches=(prefix("/s"),), session=SessionPersistence(name="sid"),
                          backends=(Backend(key("one"), 80, 0), Backend(key("two"), 80, 1))),
            )  # fmt: skip
            await mesh.control_plane.push(
                traffic("web", Route("HTTPRoute", "shop", "web", flipped))
            )
            with trio.fail_after(20):
                while (await fetch(stream, "/s", connection=talk))[1] != b"c":
                    await trio.sleep(0.01)
            old = await fetch(stream, "/s", headers=[("cookie", kept)], connection=talk)
            assert old[1] == body


async def _many(mesh: Mesh, count: int, path: str = "/") -> list[int]:
    """The answers to requests at once, each over a tunnel of its own."""
    connection = await mesh.connect()
    codes: list[int] = []

    async def ask() -> None:
        stream = await mesh.open("10.96.0.1:80", connection)
        codes.append((await fetch(stream, path))[0].status_code)

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(ask)
    return codes


async def test_bounds_queue_or_answer_503_and_the_rest_is_served() -> None:
    release = trio.Event()
    open_now = most = 0

    async def slow(stream: trio.SocketStream) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                while await stream.receive_some(65536):
                    await release.wait()
                    await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        open_now -= 1

    limits = ConnectionLimits(max_connections=2, max_pending=3)
    backend = BackendSettings(limits=limits)
    async with (
        running_app("web-1", key("web"), serve=slow) as app,
        running_waypoint([service("web", 1), app.workload, traffic("web", backend=backend)],
                         max_active_requests=7) as mesh,
    ):  # fmt: skip
        codes: list[int] = []

        async def load() -> None:
            codes.extend(await _many(mesh, 9))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            with trio.fail_after(20):
                while 'bound="pending"' not in (page := await scrape(mesh)):
                    await trio.sleep(0.01)
            # Two are with the endpoint, three wait; health and metrics answer meanwhile.
            release.set()
        assert sorted(set(codes)) == [200, 503]
        assert codes.count(200) == 5
        assert most == 2
        assert 'ambit_shed_requests_total{bound="pending"}' in page

        release = trio.Event()
        await mesh.control_plane.push(traffic("web", backend=BackendSettings()))
        codes.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            with trio.fail_after(20):
                while 'bound="active"' not in await scrape(mesh):
                    await trio.sleep(0.01)
            release.set()
        assert 503 in codes
        assert codes.count(200) >= 7


async def test_spent_budgets_and_ejection() -> None:
    retry = Retry(attempts=3, codes=(500,), backoff_seconds=0.001)
    rules = (RouteRule(backends=(Backend(key("web"), 80),), retry=retry),)
    backend = BackendSettings(
        limits=ConnectionLimits(
            retry_interval_seconds=3600.0, retry_minimum_seconds=3600.0,
            retry_budget_minimum=4, retry_budget_percent=0.0, max_requests_per_connection=2,
        ),
        outlier=OutlierDetection(0, base_ejection_seconds=900.0, consecutive_5xx=3),
    )  # fmt: skip
    route = Route("HTTPRoute", "shop", "web", rules)
    async with running_app("a", key("web")) as a, running_app("b", key("web")) as b:
        bad = [lambda _request: (500, b"no")] * 50
        a.answers = list(bad)
        async with running_waypoint(
            [service("web", 1), a.workload, traffic("web", route, backend=backend)]
        ) as mesh:
            stream, talk = await mesh.open("10.96.0.1:80"), h11.Connection(h11.CLIENT)
            # Three retries of four, then one, then none.
            codes = [(await fetch(stream, connection=talk))[0].status_code for _ in range(3)]
            assert (codes, len(a.requests)) == ([500, 503, 503], 4 + 2 + 1)
            assert 'ambit_shed_requests_total{bound="retries"} 2.0' in await scrape(mesh)
            # Two requests for each connection, then a new one.
            assert a.connections >= 3
            await mesh.control_plane.push(b.workload)
            with trio.fail_after(20):
                while (await fetch(stream, connection=talk))[1] != b"b":
                    await trio.sleep(0.01)
            asked = len(a.requests)
            for _ in range(20):
                assert (await fetch(stream, connection=talk))[0].status_code == 200
            assert len(a.requests) == asked, "it is ejected"


async def test_an_endpoint_that_dies_is_hidden_by_another_try() -> None:
    killed = trio.Event()

    async def mortal(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                while not killed.is_set() and await stream.receive_some(65536):
                    if killed.is_set():
                        return  # with the request in its hands
                    await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\na")

    async with (
        running_app("a", key("web"), serve=mortal) as a,
        running_app("b", key("web")) as b,
        running_waypoint([service("web", 1), a.workload, b.workload]) as mesh,
    ):
        stream, talk = await mesh.open("10.96.0.1:80"), h11.Connection(h11.CLIENT)
        bodies = set()
        with trio.fail_after(20):
            while len(bodies) < 2:
                bodies.add((await fetch(stream, connection=talk))[1])
        killed.set()
        asked = len(b.requests)
        for _ in range(40):
            response, body = await fetch(stream, connection=talk)
            assert (response.status_code, body) == (200, b"b")
        assert len(b.requests) == asked + 40
