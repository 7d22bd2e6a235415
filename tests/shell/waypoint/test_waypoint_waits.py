"""A body that comes while a filter waits for somebody is judged like any other."""

from __future__ import annotations

import shutil

import h11
import pytest
import trio

from mesh.model.l7_policy import RedactionPolicy, RedactionRule
from mesh.model.route import Backend, Fault, Mirror, Route, RouteFilter, RouteRule
from tests.support.waypoints import (
    fetch,
    key,
    running_app,
    running_waypoint,
    service,
    traffic,
)

pytestmark = pytest.mark.usefixtures("no_fd_leak")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_what_came_early_is_redacted_and_copied_too() -> None:
    mail = RedactionPolicy(
        "shop", "mail", direction="Request", rules=(RedactionRule(name="mail", detector="email"),)
    )
    wait = RouteFilter(fault=Fault(delay_seconds=0.2, delay_percent=100.0))
    copy = RouteFilter(mirror=Mirror(Backend(key("copy"), 80)))
    rule = RouteRule(filters=(wait, copy), backends=(Backend(key("web"), 80),))
    route = Route("HTTPRoute", "shop", "web", (rule,))
    body = b"write to someone@example.com today"
    async with (
        running_app("web-1", key("web")) as app,
        running_app("copy-1", key("copy")) as copied,
        running_waypoint(
            [service("web", 1), service("copy", 2), app.workload, copied.workload,
             traffic("web", route, redactions=(mail,))]
        ) as mesh,
    ):  # fmt: skip
        stream, talk = await mesh.open("10.96.0.1:80"), h11.Connection(h11.CLIENT)
        text = [("content-type", "text/plain")]
        done = await fetch(stream, method="POST", headers=text, body=body, connection=talk)
        assert done[0].status_code == 200
        port = await mesh.listen("10.96.0.1:80")
        command = ["curl", "-sS", "-m", "30", "--http2-prior-knowledge", "-H",
                   "content-type: text/plain", "--data-binary", body.decode(),
                   f"http://127.0.0.1:{port}/"]  # fmt: skip
        await trio.run_process(command, capture_stdout=True)
        with trio.fail_after(20):
            while len(copied.bodies) < 2:
                await trio.sleep(0.005)
    assert len(app.bodies) == 2
    for each in app.bodies + copied.bodies:
        assert b"someone@" not in each
        assert each.startswith(b"write to ")
        assert each.endswith(b" today")
