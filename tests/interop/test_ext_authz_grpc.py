"""ext_authz over gRPC: a grpcio server is asked by the whole daemon, and by Envoy beside it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import h11
import pytest
import trio

from mesh.model.l7_policy import ExternalAuthorizer, L7Authorization, L7Operation, L7Rule
from mesh.proto.ext_authz_pb2 import CheckResponse
from tests.support.envoy import asking_config, free_port, running_envoy
from tests.support.grpc_servers import AUTHORIZATION, GrpcServer, grpc_server
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
    settle,
    traffic,
)

pytestmark = pytest.mark.interop

ALLOW = CheckResponse()
TOUCHED = {b"x-user", b"x-tag", b"x-secret", b"x-a", b"x-b", b"content-length", b"host"}


def custom(path: str, **fields: Any) -> L7Authorization:
    fields = {"timeout_seconds": 30.0, **fields}
    judge = ExternalAuthorizer("judge", "grpc", key("judge"), 80, **fields)
    rule = L7Rule(operations=(L7Operation(paths=(path,)),))
    return L7Authorization("shop", path.strip("/*"), "CUSTOM", (rule,), provider=judge)


@dataclass
class Court:
    """Everybody."""

    mesh: Mesh
    web: App
    judge: GrpcServer
    stream: trio.SocketStream
    talk: h11.Connection

    async def ask(self, path: str, body: bytes = b"", **headers: str) -> tuple[h11.Response, bytes]:
        pairs = [(name.replace("_", "-"), value) for name, value in headers.items()]
        method = "POST" if body else "GET"
        return await fetch(
            self.stream, path, method=method, headers=pairs, body=body, connection=self.talk
        )

    def seen(self) -> dict[str, str]:
        """The fields of the last request that came to the application."""
        return {name.decode(): value.decode() for name, value in self.web.requests[-1].headers}


@asynccontextmanager
async def court(*policies: L7Authorization, in_mesh: bool = True) -> AsyncIterator[Court]:
    with grpc_server(AUTHORIZATION, NODE_IP) as judge:
        judge.answer = lambda _request, _context: ALLOW
        at_court = judge.workload("judge-1", key("judge"), NODE_IP, in_mesh=in_mesh)
        async with running_app("web-1", key("web")) as web:
            resources = [service("web", 1), service("judge", 2), web.workload, at_court]
            config = traffic("web", authorizations=policies)
            async with running_waypoint([*resources, config]) as mesh:
                stream = await mesh.open("10.96.0.1:80")
                yield Court(mesh, web, judge, stream, h11.Connection(h11.CLIENT))


def answer(text: dict[str, Any]) -> Any:
    made = CheckResponse(**text)
    return lambda _request, _context: made


def option(name: str, value: str, **more: Any) -> dict[str, Any]:
    return {"header": {"key": name, "value": value}, **more}


@pytest.mark.parametrize("in_mesh", [True, False])
async def test_what_is_asked_and_what_an_answer_does(in_mesh: bool) -> None:
    async with court(custom("/asked*"), in_mesh=in_mesh) as here:
        response, _ = await here.ask("/free")
        assert (response.status_code, here.judge.asked) == (200, [])
        headers = [option("x-user", "alice"), option("x-tag", "b", append={"value": True})]
        here.judge.answer = answer({
            "ok_response": {
                "headers": [*headers, option("content-length", "9"), option(":path", "/x")],
                "headers_to_remove": ["X-Secret", "host"],
                "response_headers_to_add": [option("x-judged", "yes")],
            }
        })  # fmt: skip
        response, _ = await here.ask(
            "/asked?a=1", x_user="root", x_tag="a", x_secret="s", x_request_id="id-1"
        )
        assert (response.status_code, header(response, "x-judged")) == (200, "yes")
        seen = here.seen()
        assert (seen["x-user"], seen["host"]) == ("alice", "web.shop")
        assert not {"x-secret", "content-length"} & seen.keys()
        tags = [value for name, value in here.web.requests[-1].headers if name == b"x-tag"]
        assert tags == [b"a", b"b"]

        (asked,) = here.judge.asked
        attributes = asked.attributes
        assert attributes.source.principal == "spiffe://cluster.local/ns/shop/sa/cart"
        destination = attributes.destination.address.socket_address
        assert (destination.address, destination.port_value) == ("10.96.0.1", 80)
        http = attributes.request.http
        assert (http.method, http.path, http.host) == ("GET", "/asked?a=1", "web.shop")
        assert (http.scheme, http.protocol, http.size) == ("http", "HTTP/1.1", -1)
        assert (http.id, http.headers[":path"], http.headers["x-user"]) == (
            "id-1", "/asked?a=1", "root",
        )  # fmt: skip
        assert attributes.request.time.seconds > 0
        assert dict(attributes.context_extensions) == {
            "policy": "shop/asked", "rule": "0", "service": key("web"),
        }  # fmt: skip


async def test_denials_and_errors() -> None:
    policies = (
        custom("/asked"),
        custom("/lenient", is_fail_open=True),
        custom("/teapot", status_on_error=418),
    )
    async with court(*policies) as here:
        judge = here.judge
        judge.answer = answer({
            "status": {"code": 16},
            "denied_response": {
                "status": {"code": 401}, "body": "who?",
                "headers": [option("www-authenticate", "Basic"), option("connection", "x")],
            },
        })  # fmt: skip
        response, body = await here.ask("/asked")
        assert (response.status_code, body) == (401, b"who?")
        assert header(response, "www-authenticate") == "Basic"
        judge.answer = answer({"status": {"code": 7}})
        response, body = await here.ask("/lenient")
        assert (response.status_code, body) == (403, b"RBAC: access denied")

        def fail(_request: Any, context: grpc.ServicerContext) -> None:
            context.abort(grpc.StatusCode.INTERNAL, "oh")

        split = answer({"ok_response": {"headers": [option("x-a", "b\r\nc: d")]}})
        for broken in (fail, split):
            judge.answer = broken
            assert (await here.ask("/asked"))[0].status_code == 403
            assert (await here.ask("/teapot"))[0].status_code == 418
            assert (await here.ask("/lenient"))[0].status_code == 200
        assert "c" not in here.seen()


async def test_bodies_go_along_as_far_as_they_are_wanted() -> None:
    policies = (
        custom("/echo/all", max_body_bytes=200_000),
        custom("/echo/some", max_body_bytes=100_000, allows_partial_body=True),
        custom("/echo/raw", max_body_bytes=10, allows_partial_body=True, packs_body_as_bytes=True),
    )
    async with court(*policies) as here:
        text = b"0123456789" * 15_000

        async def judged(path: str, body: bytes) -> Any:
            response, echoed = await here.ask(path, body)
            assert (response.status_code, echoed == body) == (200, True)
            return here.judge.asked[-1].attributes.request.http

        http = await judged("/echo/all", text)
        assert (http.body.encode() == text, http.size) == (True, 150_000)
        assert http.headers["x-envoy-auth-partial-body"] == "false"
        http = await judged("/echo/some", text)
        assert http.body.encode() == text[:100_000]
        assert http.headers["x-envoy-auth-partial-body"] == "true"
        http = await judged("/echo/raw", b"\xff" * 11)
        assert (http.raw_body, http.body) == (b"\xff" * 10, "")
        assert (await judged("/echo/all", b"")).body == ""
        count = len(here.judge.asked)

        # Who waits for leave gets it.
        stream = await here.mesh.open("10.96.0.1:80")
        head = b"PUT /echo/all HTTP/1.1\r\nhost: web.shop\r\ncontent-length: 4\r\n"
        await stream.send_all(head + b"expect: 100-continue\r\n\r\n")
        assert b"100 Continue" in await settle(stream, b"\r\n\r\n")
        await stream.send_all(b"body")
        assert b"200 OK" in await settle(stream, b"body")
        assert here.judge.asked[-1].attributes.request.http.body == "body"
        response, _ = await here.ask("/echo/all", text * 2)
        assert response.status_code == 413
        assert len(here.judge.asked) == count + 1


async def test_a_dead_authorizer_is_left_alone_and_found_again() -> None:
    port = free_port()
    policies = (custom("/asked"), custom("/lenient", is_fail_open=True))
    at_court = GrpcServer(port).workload("judge-1", key("judge"), NODE_IP)
    async with running_app("web-1", key("web")) as web:
        resources = [service("web", 1), service("judge", 2), web.workload, at_court]
        config = traffic("web", authorizations=policies)
        async with running_waypoint([*resources, config]) as mesh:
            stream = await mesh.open("10.96.0.1:80")
            talk = h11.Connection(h11.CLIENT)

            async def status(path: str) -> int:
                return (await fetch(stream, path, connection=talk))[0].status_code

            def tried() -> int:
                return sum(each.endswith(f":{port}") for each in mesh.authorities)

            for _ in range(3):
                assert await status("/asked") == 403
            count = tried()
            assert count
            assert await status("/lenient") == 200
            with grpc_server(AUTHORIZATION, NODE_IP, port) as revived:
                revived.answer = lambda _request, _context: ALLOW
                with trio.fail_after(60):
                    while await status("/asked") != 200:
                        await trio.sleep(0.05)
            assert tried() > count


def envoy_config(listen: int, judge: int, web: int) -> str:
    """Envoy's own ext_authz filter, before the same application."""
    ext_authz = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
        "transport_api_version": "V3",
        "grpc_service": {"envoy_grpc": {"cluster_name": "asked"}, "timeout": "20s"},
        "with_request_body": {"max_request_bytes": 8, "allow_partial_message": True},
    }
    return asking_config(listen, "ext_authz", ext_authz, (NODE_IP, judge), (NODE_IP, web))


async def test_envoy_asks_the_same_and_does_the_same(tmp_path: Path) -> None:
    async with court(custom("/*", max_body_bytes=8, allows_partial_body=True)) as here:
        here.judge.answer = answer({
            "ok_response": {
                "headers": [
                    option("x-user", "alice"), option("x-tag", "b", append={"value": True}),
                    option("x-a", "new", append_action=1), option("x-b", "new", append_action=2),
                ],
                "headers_to_remove": ["x-secret"],
                "response_headers_to_add": [option("x-judged", "yes")],
            }
        })  # fmt: skip
        told = {
            "x_user": "root", "x_tag": "a", "x_secret": "s", "x_a": "old", "x_b": "old",
            "x_request_id": "3d3a4c5e-0000-4000-8000-000000000000",
        }  # fmt: skip
        listen = free_port()
        web_port = here.web.workload.services[key("web")][80]
        config = envoy_config(listen, here.judge.port, web_port)
        seen, heard = [], []
        async with running_envoy(tmp_path, config, listen):
            envoy = await trio.open_tcp_stream("127.0.0.1", listen)
            async with envoy:
                for stream in (here.stream, envoy):
                    pairs = [(name.replace("_", "-"), value) for name, value in told.items()]
                    response, _ = await fetch(
                        stream, "/x?a=1", method="POST", headers=pairs, body=b"0123456789"
                    )
                    assert response.status_code == 200
                    heard.append(header(response, "x-judged"))
                    fields = here.web.requests[-1].headers
                    seen.append({
                        name: b",".join(value for key, value in fields if key == name)
                        for name in TOUCHED
                    })  # fmt: skip
        assert heard == ["yes", "yes"]
        assert seen[0] == seen[1]
        ours, theirs = (each.attributes for each in here.judge.asked)
        mine, others = ours.request.http, theirs.request.http
        for name in ("method", "path", "host", "scheme", "query", "size", "protocol", "body"):
            assert getattr(mine, name) == getattr(others, name), name
        added = {"x-forwarded-proto", "x-envoy-internal", "x-envoy-expected-rq-timeout-ms"}
        expected = {k: v for k, v in others.headers.items() if k not in added}
        assert {k: v for k, v in mine.headers.items() if k in expected} == expected
        assert mine.headers.keys() - expected.keys() <= {"traceparent"}
        assert theirs.source.address.socket_address.address == "127.0.0.1"
        assert ours.source.address.socket_address.address
        assert theirs.request.time.seconds - ours.request.time.seconds < 3600
