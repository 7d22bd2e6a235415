from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from mesh.errors import ConfigError, Denied, Unavailable
from mesh.runtime import admin, log, metrics
from mesh.runtime.admin import AdminApp, Readiness, Request, Response
from mesh.runtime.lifecycle import Shutdown

pytestmark = pytest.mark.usefixtures("no_fd_leak")


async def echo(request: Request) -> Response:
    return Response.text(f"{request.method} {request.body.decode()}")


async def exchange(path: Path, data: bytes) -> bytes:
    async with await trio.open_unix_socket(str(path)) as stream:
        await stream.send_all(data)
        return b"".join([bytes(chunk) async for chunk in stream])


async def with_app(app: AdminApp, path: Path, client: Callable[[], Awaitable[None]]) -> None:
    listener = admin.open_unix_listener(path)
    async with trio.open_nursery() as nursery:
        await nursery.start(app.serve, [listener])
        with trio.fail_after(20):
            await client()
        nursery.cancel_scope.cancel()


def get(path: str, *extra: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *extra, "", ""]).encode()


CLOSE = "Connection: close"


async def test_requests_on_one_connection_and_pipelined(tmp_path: Path) -> None:
    app = AdminApp()
    app.route("/echo", echo, methods=("GET", "POST"))

    async def client() -> None:
        post = b"POST /echo HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi"
        data = await exchange(tmp_path / "s", get("/echo") + post + get("/echo", CLOSE))
        assert data.count(b"HTTP/1.1 200 OK") == 3
        assert b"POST hi\n" in data

    await with_app(app, tmp_path / "s", client)


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (get("/nowhere", CLOSE), b"HTTP/1.1 404 Not Found"),
        (get("/echo", CLOSE, method="DELETE"), b"HTTP/1.1 405 Method Not Allowed"),
        (get("/echo", CLOSE, "Origin: http://evil", method="POST"), b"HTTP/1.1 403 Forbidden"),
        (get("/echo", CLOSE, "Origin: http://evil"), b"HTTP/1.1 200 OK"),
        (b"rubbish\r\n\r\n", b"HTTP/1.1 400 Bad Request"),
        (get("/echo", "A: " + "b" * 20000), b"HTTP/1.1 431 "),
        (
            b"POST /echo HTTP/1.1\r\nContent-Length: 2000000\r\n\r\n" + b"x" * 2000000,
            b"HTTP/1.1 413 ",
        ),
    ],
)
async def test_what_is_refused(tmp_path: Path, request_bytes: bytes, expected: bytes) -> None:
    app = AdminApp()
    app.route("/echo", echo, methods=("GET", "POST"))

    async def client() -> None:
        stream = await trio.open_unix_socket(str(tmp_path / "s"))
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(send_what_is_taken, stream, request_bytes)
            answer = b"".join([bytes(chunk) async for chunk in stream])
            nursery.cancel_scope.cancel()
        assert answer.startswith(expected), answer[:200]

    async def send_what_is_taken(stream: trio.SocketStream, data: bytes) -> None:
        try:
            await stream.send_all(data)
        except trio.BrokenResourceError:
            return

    await with_app(app, tmp_path / "s", client)


async def test_head_has_the_length_and_no_body(tmp_path: Path) -> None:
    app = AdminApp()
    app.route("/echo", echo)

    async def client() -> None:
        data = await exchange(tmp_path / "s", get("/echo", CLOSE, method="HEAD"))
        assert b"content-length: 6" in data
        assert data.endswith(b"\r\n\r\n")

    await with_app(app, tmp_path / "s", client)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ConfigError("bad", field="level"), 400, b"level: bad\n"),
        (Denied("no"), 403, b"no\n"),
        (Unavailable("later", hint="wait"), 503, b"later\nhint: wait\n"),
        (ZeroDivisionError("secret detail"), 500, b"internal error, see the log\n"),
    ],
)
async def test_errors_of_a_handler(error: Exception, status: int, text: bytes) -> None:
    app = AdminApp()

    async def fail(_request: Request) -> Response:
        raise error

    app.route("/", fail)
    answer = await app.handle(Request("GET", "/"))
    assert (answer.status, answer.body) == (status, text)


async def test_slow_handler_is_ended(autojump_clock: MockClock) -> None:
    app = AdminApp(handler_seconds=5.0)

    async def hang(_request: Request) -> Response:
        await trio.sleep_forever()

    app.route("/", hang)
    assert (await app.handle(Request("GET", "/"))).status == 503
    assert trio.current_time() == pytest.approx(5.0, abs=0.1)


async def test_bug_in_one_request_leaves_the_server_up(tmp_path: Path) -> None:
    app = AdminApp()

    async def broken(_request: Request) -> Response:
        return Response(status=999)  # no such status: fails while it is encoded

    app.route("/broken", broken)
    app.route("/echo", echo)

    async def client() -> None:
        assert await exchange(tmp_path / "s", get("/broken", CLOSE)) == b""
        assert b"200 OK" in await exchange(tmp_path / "s", get("/echo", CLOSE))

    await with_app(app, tmp_path / "s", client)


async def test_expect_continue(tmp_path: Path) -> None:
    app = AdminApp()
    app.route("/echo", echo, methods=("POST",))

    async def client() -> None:
        async with await trio.open_unix_socket(str(tmp_path / "s")) as stream:
            await stream.send_all(
                get("/echo", "Expect: 100-continue", "Content-Length: 2", CLOSE, method="POST")
            )
            assert await stream.receive_some() == b"HTTP/1.1 100 Continue\r\n\r\n"
            await stream.send_all(b"ok")
            assert b"POST ok" in b"".join([bytes(chunk) async for chunk in stream])

    await with_app(app, tmp_path / "s", client)


async def test_too_many_connections_are_turned_away(tmp_path: Path) -> None:
    app = AdminApp()
    app.route("/echo", echo)

    async def client() -> None:
        async with trio.open_nursery():
            held = [
                await trio.open_unix_socket(str(tmp_path / "s"))
                for _ in range(admin.MAX_CONNECTIONS)
            ]
            await trio.sleep(0.05)
            assert b"HTTP/1.1 503" in await exchange(tmp_path / "s", get("/echo", CLOSE))
            for stream in held:
                await stream.aclose()
        await trio.sleep(0.05)
        assert b"HTTP/1.1 200" in await exchange(tmp_path / "s", get("/echo", CLOSE))

    await with_app(app, tmp_path / "s", client)


async def test_tcp_listener_of_the_caller_is_closed_at_the_end() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    app = AdminApp()
    app.route("/echo", echo)
    async with trio.open_nursery() as nursery:
        await nursery.start(app.serve, [listener])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(get("/echo", CLOSE))
            assert b"200 OK" in b"".join([bytes(chunk) async for chunk in stream])
        nursery.cancel_scope.cancel()
    with pytest.raises(OSError, match="all attempts to connect"):
        await trio.open_tcp_stream("127.0.0.1", port)


async def test_cancel_while_a_request_runs_closes_its_connection(tmp_path: Path) -> None:
    app = AdminApp()
    started = trio.Event()

    async def hang(_request: Request) -> Response:
        started.set()
        await trio.sleep_forever()

    app.route("/", hang)
    async with trio.open_nursery() as outer:
        serving = await outer.start(app.serve, [admin.open_unix_listener(tmp_path / "s")])
        assert serving
        async with await trio.open_unix_socket(str(tmp_path / "s")) as stream:
            await stream.send_all(get("/"))
            await started.wait()
            outer.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                assert await stream.receive_some() == b""


async def test_unix_listener_replaces_a_stale_socket_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "s"
    admin.open_unix_listener(path).close()
    listener = admin.open_unix_listener(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    listener.close()


async def test_readiness_names_what_is_pending() -> None:
    readiness = Readiness()
    xds, dns = readiness.task("state manager"), readiness.task("dns proxy")
    app = admin.readiness_app(readiness)
    answer = await app.handle(Request("GET", "/healthz/ready"))
    assert (answer.status, answer.body) == (
        500,
        b"not ready, pending: state manager, dns proxy\n",
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(readiness.wait)
        xds.done()
        xds.done()
        assert readiness.pending() == ["dns proxy"]
        dns.done()
    answer = await app.handle(Request("GET", "/healthz/ready"))
    assert (answer.status, answer.body) == (200, b"ready\n")


async def test_metrics_page() -> None:
    app = admin.metrics_app(metrics.new_registry("test", "1"))
    for path in ("/metrics", "/stats/prometheus"):
        answer = await app.handle(Request("GET", path))
        assert answer.status == 200
        assert b'istio_build{component="test",tag="1"} 1.0' in answer.body
        assert answer.content_type.startswith("text/plain")


async def test_standard_admin_pages() -> None:
    shutdown = Shutdown()
    app = admin.admin_app("ztunnel", shutdown)
    before = log.level_text()
    index = await app.handle(Request("GET", "/"))
    assert index.body.decode().splitlines()[1:] == ["/", "/logging", "/quitquitquit"]
    answer = await app.handle(Request("POST", "/logging", {"level": "debug,xds=off"}))
    assert answer.body == b"current log level is debug,xds=off\n"
    assert (await app.handle(Request("POST", "/logging", {"level": "loud"}))).status == 400
    answer = await app.handle(Request("POST", "/logging", {"reset": ""}))
    assert answer.body == b"current log level is info\n"
    log.set_level(before)
    assert (await app.handle(Request("GET", "/quitquitquit"))).status == 405
    assert not shutdown.requested.is_set()
    await app.handle(Request("POST", "/quitquitquit"))
    assert shutdown.requested.is_set()


def test_json_answers() -> None:
    answer = Response.json({"path": Path("/x"), "name": "ü"})
    assert answer.content_type == "application/json"
    assert json.loads(answer.body) == {"path": "/x", "name": "ü"}


async def test_readiness_of_one_of_two_processes_on_a_port() -> None:
    app = admin.readiness_app(Readiness())
    mine = Request("GET", "/healthz/ready", {"process": str(os.getpid())})
    other = Request("GET", "/healthz/ready", {"process": str(os.getpid() + 1)})
    assert (await app.handle(mine)).status == 200
    assert (await app.handle(other)).status == 421


async def test_local_pages_are_for_callers_from_here() -> None:
    app = AdminApp()
    app.route("/debug", echo, is_local=True)
    assert (await app.handle(Request("GET", "/debug"), is_local=False)).status == 403
    assert (await app.handle(Request("GET", "/debug"))).status == 200
    # A caller over IPv4 has a mapped address at a listener for both.
    listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    port = listener.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(app.serve, [listener])
        for host in ("127.0.0.1", "::1"):
            async with await trio.open_tcp_stream(host, port) as stream:
                await stream.send_all(get("/debug", CLOSE))
                with trio.fail_after(20):
                    assert b" 200 " in b"".join([bytes(chunk) async for chunk in stream])
        nursery.cancel_scope.cancel()
