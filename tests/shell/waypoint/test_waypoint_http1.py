"""HTTP/1.1 through the whole daemon: tunnel in, tunnel or plain TCP out, real peers."""

from __future__ import annotations

import shutil

import h11
import pytest
import trio

from mesh.model.l7_policy import L7Authorization, L7Operation, L7Rule
from tests.support.waypoints import (
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


async def test_requests_reach_an_endpoint_through_its_tunnel() -> None:
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        stream = await mesh.open("10.96.0.1:80")
        talk = h11.Connection(h11.CLIENT)
        for path in ("/a?x=1", "/b"):
            response, body = await fetch(stream, path, connection=talk)
            assert (response.status_code, body) == (200, b"web-1")
        response, body = await fetch(
            stream, "/echo", method="POST", body=b"x" * 300_000, connection=talk
        )
        assert body == b"x" * 300_000
        assert [each.target for each in app.requests] == [b"/a?x=1", b"/b", b"/echo"]
        names = dict(app.requests[0].headers)
        assert names[b"host"] == b"web.shop"
        assert names[b"traceparent"].startswith(b"00-")
        assert names[b"x-request-id"]
        # One tunnel, kept alive, under the waypoint's own identity.
        assert app.connections == 1
        assert [str(each) for each in mesh.callers] == [
            "spiffe://cluster.local/ns/shop/sa/waypoint"
        ]


async def test_plain_endpoints_hostnames_and_chunked_bodies() -> None:
    async with (
        running_app("web-1", key("web"), in_mesh=False) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        stream = await mesh.open("web.shop.svc.cluster.local:80")
        chunked = (("transfer-encoding", "chunked"),)
        response, body = await fetch(stream, "/echo", method="POST", body=b"hello", headers=chunked)
        assert (response.status_code, body) == (200, b"hello")
        assert mesh.authorities == []


async def test_what_is_not_ours_is_refused() -> None:
    other = service("other", 2, waypoint=None)
    async with running_waypoint([service("web", 1), other]) as mesh:
        connection = await mesh.connect()
        for authority in ("10.96.0.9:80", "10.96.0.2:80", "10.96.0.1:81", "nobody.shop:80"):
            with pytest.raises(ConnectionRefusedError, match="404"):
                await mesh.open(authority, connection)
        stream = await mesh.open("10.96.0.1:80", connection)
        response, _ = await fetch(stream)
        assert response.status_code == 503


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        stream = await mesh.open("10.96.0.1:80")
        one = b"GET /%d HTTP/1.1\r\nhost: web\r\n\r\n"
        last = b"GET /9 HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n"
        await stream.send_all(b"".join(one % number for number in range(9)) + last)
        answer = await settle(stream, b"never")
        assert answer.count(b"HTTP/1.1 200 OK") == 10
        assert [each.target for each in app.requests] == [b"/%d" % number for number in range(10)]


async def test_malformed_requests_are_answered_and_never_forwarded() -> None:
    bad = (
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
        b"GET / HTTP/1.1\nhost: a\n\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx : y\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx: y\r\n z\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    )
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        connection = await mesh.connect()
        for data in bad:
            stream = await mesh.open("10.96.0.1:80", connection)
            await stream.send_all(data)
            assert (await settle(stream, b"never")).startswith(b"HTTP/1.1 400"), data
        assert (await fetch(await mesh.open("10.96.0.1:80", connection)))[1] == b"web-1"
        assert len(app.bodies) == 1


async def test_continue_head_and_early_answers() -> None:
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        stream = await mesh.open("10.96.0.1:80")
        head = (
            b"POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\nexpect: 100-continue\r\n\r\n"
        )
        await stream.send_all(head)
        assert b"100 Continue" in await settle(stream, b"\r\n\r\n")
        await stream.send_all(b"abc")
        assert b"abc" in await settle(stream, b"abc")
        response, body = await fetch(stream, method="HEAD")
        assert (header(response, "content-length"), body) == ("5", b"")
        assert (await fetch(stream))[1] == b"web-1"


async def test_old_callers_odd_methods_and_expectations() -> None:
    denied = L7Rule(operations=(L7Operation(methods=("TRACE",), paths=("/admin",)),))
    both = L7Rule(operations=(L7Operation(paths=("/admin",)),))
    config = traffic("web", authorizations=(L7Authorization("shop", "d", "DENY", (denied, both)),))
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload, config]) as mesh,
    ):
        connection = await mesh.connect()

        async def say(data: bytes) -> bytes:
            stream = await mesh.open("10.96.0.1:80", connection)
            await stream.send_all(data)
            return await settle(stream, b"never")

        # HTTP/1.0 ends with the connection, unless it asks; it hears nothing of chunks or 100.
        answer = await say(b"GET /a HTTP/1.0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"\r\n\r\nweb-1")
        answer = await say(
            b"GET /b HTTP/1.0\r\nhost: a\r\nconnection: keep-alive\r\n\r\n"
            b"POST /c HTTP/1.0\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\nx"
        )
        assert answer.count(b"HTTP/1.1 200") == 2
        assert answer.count(b"connection: keep-alive") == 1
        assert b" 100 " not in answer
        # Methods are the endpoint's business, but where policy or the protocol say no.
        for line in (b"OPTIONS * ", b"TRACE / ", b"BREW /pot ", b"get / "):
            answer = await say(line + b"HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200"), line
        answer = await say(b"CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\nGET / HTTP/1.1\r\n")
        assert answer.startswith(b"HTTP/1.1 405")
        # Who is denied is not told to go on, and its body is not taken for a request.
        smuggled = b"GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n"
        answer = await say(
            b"POST /admin HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: "
            + b"%d\r\n\r\n" % len(smuggled) + smuggled
        )  # fmt: skip
        assert answer.startswith(b"HTTP/1.1 403")
        assert answer.count(b"HTTP/1.1") == 1
        assert b"connection: close" in answer
        assert not any(each.target == b"/smuggled" for each in app.requests)


async def test_websocket_style_upgrades_pass_both_ways() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            head = await settle(stream, b"\r\n\r\n")
            assert b"upgrade: websocket" in head.lower()
            await stream.send_all(
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\n"
                b"upgrade: websocket\r\n\r\nfirst"
            )
            while piece := await stream.receive_some(65536):
                await stream.send_all(piece.upper())

    async with (
        running_app("web-1", key("web"), serve=serve) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        stream = await mesh.open("10.96.0.1:80")
        await stream.send_all(
            b"GET /chat HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n"
        )
        answer = await settle(stream, b"first")
        assert b"101" in answer
        assert b"upgrade: websocket" in answer
        await stream.send_all(b"abc" * 50_000)
        received = b""
        while len(received) < 150_000:
            received += await stream.receive_some(65536)
        assert received == b"ABC" * 50_000
        await stream.send_eof()
        assert await settle(stream, b"never") == b""


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_gets_and_uploads() -> None:
    async with (
        running_app("web-1", key("web")) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        port = await mesh.listen("10.96.0.1:80")
        url = f"http://127.0.0.1:{port}"
        done = await trio.run_process(
            ["curl", "-sS", "-m", "20", url + "/a", url + "/b"], capture_stdout=True
        )
        assert done.stdout == b"web-1web-1"
        done = await trio.run_process(
            ["curl", "-sS", "-m", "20", "-T", "-", url + "/echo"],
            stdin=b"y" * 2_000_000,
            capture_stdout=True,
        )
        assert done.stdout == b"y" * 2_000_000
