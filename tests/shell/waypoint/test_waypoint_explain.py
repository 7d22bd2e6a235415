"""`/explain/request` beside what really happens: every request is explained, sent, and compared."""

from __future__ import annotations

import json
import re
import urllib.parse
from typing import Any

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
    RequestCondition,
)
from mesh.model.route import (
    Backend,
    NamedMatch,
    PathChange,
    PathMatch,
    Redirect,
    Retry,
    Rewrite,
    Route,
    RouteFilter,
    RouteMatch,
    RouteRule,
)
from tests.conformance.mesh_http import prefix
from tests.support.tree import ROOT
from tests.support.waypoints import (
    Mesh,
    fetch,
    key,
    running_app,
    running_waypoint,
    service,
    settle,
    traffic,
)

pytestmark = pytest.mark.usefixtures("no_fd_leak")

CART = "spiffe://cluster.local/ns/shop/sa/cart"
ROUTE = Route(
    "HTTPRoute",
    "shop",
    "web",
    (
        RouteRule(
            name="beta",
            matches=(RouteMatch(headers=(NamedMatch("x-beta", "yes"),)),),
            filters=(RouteFilter(rewrite=Rewrite(path=PathChange("ReplacePrefixMatch", "/new"))),),
            backends=(Backend(key("two"), 80),),
            request_timeout=7.0,
        ),
        RouteRule(
            matches=(prefix("/split"),),
            backends=(Backend(key("one"), 80, 3), Backend(key("two"), 80, 1)),
            retry=Retry(3, (503,)),
        ),
        RouteRule(
            matches=(RouteMatch(path=PathMatch("Exact", "/old")),),
            filters=(RouteFilter(redirect=Redirect(hostname="elsewhere.example", status=301)),),
        ),
        RouteRule(
            matches=(prefix("/api"), prefix("/admin"), prefix("/few")),
            backends=(Backend(key("one"), 80),),
        ),
        RouteRule(matches=(prefix("/broken"),), backends=(Backend(key("none"), 80),)),
    ),
)
NO_ADMIN = L7Authorization(
    "shop", "no-admin", "DENY", (L7Rule(operations=(L7Operation(paths=("/admin*",)),)),)
)
FEW = RateLimitPolicy(
    "shop", "few", (RateLimitRule("two", 2, 3600.0, condition=RequestCondition(paths=("/few",))),)
)
HIDE = RedactionPolicy(
    "shop",
    "hide",
    direction="Request",
    rules=(RedactionRule("mail", detector="email", query_params=("mail",)),),
)


async def _explain(mesh: Mesh, path: str, method: str = "GET", **headers: str) -> dict[str, Any]:
    query = {
        "identity": CART,
        "source": "127.0.0.1",
        "authority": "10.96.0.1:80",
        "method": method,
        "path": path,
        "host": "web.shop",
        "headers": "\n".join(f"{name.replace('_', '-')}: {v}" for name, v in headers.items()),
    }
    host, _, port = mesh.config.admin_address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as admin:
        target = f"/explain/request?{urllib.parse.urlencode(query)}"
        await admin.send_all(f"GET {target} HTTP/1.0\r\nhost: x\r\n\r\n".encode())
        head, _, body = (await settle(admin, b"never")).partition(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n")[0], body
    answer = json.loads(body)
    assert isinstance(answer, dict)
    return answer


async def _send(
    mesh: Mesh, path: str, method: str = "GET", **headers: str
) -> tuple[h11.Response, bytes]:
    stream = await mesh.open("10.96.0.1:80")
    fields = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return await fetch(stream, path, method=method, headers=fields)


async def test_explained_is_what_happens(capfd: pytest.CaptureFixture[str]) -> None:
    services = [service("web", 1), service("one", 2), service("two", 3)]
    config = traffic(
        "web", ROUTE, authorizations=(NO_ADMIN,), rate_limits=(FEW,), redactions=(HIDE,)
    )
    async with (
        running_app("one-1", key("one")) as one,
        running_app("two-1", key("two")) as two,
        running_waypoint([*services, one.workload, two.workload, config]) as mesh,
    ):
        # Weights: both ways, with their shares; retries are told.
        ways = (await _explain(mesh, "/split"))["ways"]
        assert {(each["backend"]["service"], each["share"]) for each in ways} == {
            (key("one"), 0.75),
            (key("two"), 0.25),
        }
        assert {each["attempts"] for each in ways} == {4}
        names = {each["endpoints"][0]["workload"]["name"] for each in ways}
        assert (await _send(mesh, "/split"))[1].decode() in names == {"one-1", "two-1"}

        # A rule by header, its rewrite and its timeout; redaction of what is sent.
        (way,) = (await _explain(mesh, "/x?mail=ann@example.org", x_beta="yes"))["ways"]
        assert way["route"] == {"kind": "HTTPRoute", "name": "shop/web", "rule": "beta"}
        assert (way["outcome"], way["timeouts"]["request"]) == ("forward", 7.0)
        redaction = next(each for each in way["steps"] if each["filter"] == "redaction")
        assert redaction["found"][0]["rule"] == "mail"
        assert "ann@" not in json.dumps(redaction)
        assert (await _send(mesh, "/x?mail=ann@example.org", x_beta="yes"))[1] == b"two-1"
        path = two.requests[-1].target.decode()
        assert path == way["sends"]["path"]
        assert "ann@" not in path

        # Answers of the waypoint itself, of every kind.
        for path, headers, status in (
            ("/old", {}, 301),
            ("/nowhere", {}, 404),
            ("/admin/users", {}, 403),
            ("/api/../admin", {}, 403),
            ("/broken", {}, 503),
            ("/api", {"content_length": "1, 2"}, 400),
        ):
            (way,) = (await _explain(mesh, path, **headers))["ways"]
            assert (way["outcome"], way["decision"]["status"]) == ("answer", status), path
            if status != 400:  # h11 does not send that
                assert (await _send(mesh, path, **headers))[0].status_code == status, path
        (way,) = (await _explain(mesh, "/admin"))["ways"]
        assert (way["decision"]["policy"], way["decision"]["rule"]) == ("shop/no-admin", "0")

        # To ask costs nothing of a limit, however often; to send does.
        for left, status in ((1, 200), (0, 200), (0, 429)):
            for _ in range(4):
                (way,) = (await _explain(mesh, "/few"))["ways"]
                limits = next(e for e in way["steps"] if e["filter"] == "RateLimitPolicy")
                (limit,) = limits["limits"]
                assert (limit["remaining"], limit["allowed"]) == (left, status == 200)
            assert (await _send(mesh, "/few"))[0].status_code == status
        assert (way["decision"]["status"], way["decision"]["policy"]) == (429, "shop/few")
    _compare_with_page(capfd.readouterr().out)


def _compare_with_page(lines: str) -> None:
    """Every field of the access log is told in its page, and the page tells of no other."""
    records = [json.loads(each) for each in lines.splitlines() if each.startswith("{")]
    assert records
    written = {name for record in records for name in record}
    page = (ROOT / "docs" / "reference" / "access-log.md").read_text()
    own = page.partition("## A waypoint's requests\n")[2]
    rows = re.findall(r"^\| (`[^|]+`) \|", own, re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    above = set(re.findall(r"^\| `([^`]+)` \|", page.partition(own)[0], re.MULTILINE))
    assert not written - told - above
    elsewhere = {"connection.id", "ext_authz", "grpc_status", "rate_limit.without_store"}
    assert told - written <= {*elsewhere, "uninspected"}


async def test_nonsense_is_refused() -> None:
    async with running_waypoint([service("web", 1)]) as mesh:
        host, _, port = mesh.config.admin_address.rpartition(":")
        for query in ("", f"identity={CART}", f"identity={CART}&authority=web:80&path=/%0d%0ax"):
            async with await trio.open_tcp_stream(host, int(port)) as admin:
                await admin.send_all(f"GET /explain/request?{query} HTTP/1.0\r\n\r\n".encode())
                said = await settle(admin, b"never")
            assert b" 400 " in said.split(b"\r\n")[0] or b'"status": 400' in said, said
        (way,) = (await _explain(mesh, "/"))["ways"]
        assert way["decision"]["flag"] == "UH"
