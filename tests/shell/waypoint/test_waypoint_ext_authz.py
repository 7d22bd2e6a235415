"""CUSTOM AuthorizationPolicy, live: an HTTP server in the mesh is asked, and heard."""

from __future__ import annotations

import h11
import pytest

from mesh.model.l7_policy import ExternalAuthorizer, L7Authorization, L7Operation, L7Rule
from tests.support.waypoints import (
    fetch,
    header,
    key,
    running_app,
    running_waypoint,
    service,
    traffic,
)

pytestmark = pytest.mark.usefixtures("no_fd_leak")


def _custom(name: str, path: str, provider: ExternalAuthorizer) -> L7Authorization:
    rule = L7Rule(operations=(L7Operation(paths=(path,)),))
    return L7Authorization("shop", name, "CUSTOM", (rule,), provider=provider)


async def test_an_external_authorizer_decides() -> None:
    judge = ExternalAuthorizer(
        "judge", "http", key("judge"), 80, timeout_seconds=30.0, path_prefix="/check",
        request_headers=("x-ask",), upstream_headers_on_allow=("x-user",),
    )  # fmt: skip
    gone = ExternalAuthorizer("gone", "http", key("gone"), 80, status_on_error=401)
    lenient = ExternalAuthorizer("lenient", "http", key("gone"), 80, is_fail_open=True)
    unspoken = ExternalAuthorizer("unspoken", "grpc", key("judge"), 80)
    policies = (
        _custom("asked", "/asked*", judge), _custom("gone", "/gone", gone),
        _custom("lenient", "/lenient", lenient), _custom("grpc", "/grpc", unspoken),
    )  # fmt: skip
    async with running_app("web-1", key("web")) as web, running_app("j-1", key("judge")) as court:
        resources = (service("web", 1), service("judge", 2), web.workload, court.workload)
        config = traffic("web", authorizations=policies)
        async with running_waypoint([*resources, config]) as mesh:
            stream = await mesh.open("10.96.0.1:80")
            talk = h11.Connection(h11.CLIENT)

            async def status(path: str) -> int:
                return (await fetch(stream, path, connection=talk))[0].status_code

            assert await status("/free") == 200
            assert court.requests == []
            assert await status("/asked?q=1") == 200
            (question,) = court.requests
            assert (question.method, question.target) == (b"GET", b"/check/asked?q=1")
            assert dict(question.headers)[b"host"] == b"web.shop"

            court.answers = [lambda _request: (429, b"not now")]
            response, body = await fetch(stream, "/asked/2", connection=talk)
            assert (response.status_code, body) == (429, b"not now")
            assert header(response, "content-length") == "7"
            court.answers = [lambda _request: (500, b"secret")]
            response, body = await fetch(stream, "/asked/3", connection=talk)
            assert (response.status_code, body) == (403, b"RBAC: access denied")
            assert await status("/gone") == 401
            assert await status("/lenient") == 200
            assert await status("/grpc") == 403
            assert len(web.requests) == 3
