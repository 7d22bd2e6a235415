"""TCPRoute and TLSRoute: connections that nobody looks into, by share and by name."""

from __future__ import annotations

import contextlib
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import trio
import trustme

from mesh.model.route import Backend, Route, RouteRule
from mesh.model.service import AppProtocol
from tests.support.waypoints import (
    Mesh,
    Serve,
    key,
    running_app,
    running_waypoint,
    service,
    settle,
    traffic,
)

pytestmark = pytest.mark.usefixtures("no_fd_leak")


def _greets(name: bytes) -> Serve:
    async def serve(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                await stream.send_all(b"220 " + name + b"\r\n")
                while data := await stream.receive_some(65536):
                    await stream.send_all(data)

    return serve


def _route(kind: str, *backends: Backend, name: str = "r", hosts: tuple[str, ...] = ()) -> Route:
    return Route(kind, "shop", name, (RouteRule(backends=backends),), hostnames=hosts)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def _running(
    protocol: AppProtocol, serves: dict[str, Serve], *routes: Route
) -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        apps = [
            await stack.enter_async_context(running_app(name, key(name), serve=serve))
            for name, serve in serves.items()
        ]
        services = [service(name, number, protocol=protocol)
                    for number, name in enumerate(["web", *serves], 1)]  # fmt: skip
        workloads = [each.workload for each in apps]
        yield await stack.enter_async_context(
            running_waypoint([*services, *workloads, traffic("web", *routes)])
        )


@pytest.mark.parametrize("protocol", [AppProtocol.TCP, AppProtocol.UNKNOWN, AppProtocol.HTTP11])
async def test_connections_are_shared_out_and_servers_may_speak_first(
    protocol: AppProtocol,
) -> None:
    route = _route("TCPRoute", Backend(key("a"), 80, 3), Backend(key("b"), 80, 1),
                   Backend(key("gone"), 80, 0, problem="BackendNotFound"))  # fmt: skip
    serves = {name: _greets(name.encode()) for name in "ab"}
    async with _running(protocol, serves, route) as mesh:
        connection = await mesh.connect()
        counts: Counter[bytes] = Counter()
        for _ in range(60):
            stream = await mesh.open("10.96.0.1:80", connection)
            counts[await settle(stream, b"\n")] += 1
            # Even what looks like HTTP stays what it is.
            await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
            assert await settle(stream, b"\r\n\r\n") == b"GET / HTTP/1.1\r\n\r\n"
        assert counts.keys() == {b"220 a\r\n", b"220 b\r\n"}
        assert counts[b"220 a\r\n"] > 30, counts
        broken = _route("TCPRoute", Backend(key("a"), 80, problem="BackendNotFound"))
        await mesh.control_plane.apply(traffic("web", broken))
        stream = await mesh.open("10.96.0.1:80", connection)
        assert await _is_cut(stream)


async def _is_cut(stream: trio.SocketStream) -> bool:
    try:
        return await settle(stream, b"never") == b""
    except trio.BrokenResourceError:
        return True


async def test_names_of_servers_choose_and_tls_passes_untouched() -> None:
    authority = trustme.CA()

    def secure(name: str) -> Serve:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("*.example.com", "a.example.com").configure_cert(context)

        async def serve(stream: trio.SocketStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                async with trio.SSLStream(stream, context, server_side=True) as talk:
                    await talk.receive_some(100)
                    await talk.send_all(name.encode())

        return serve

    routes = (
        _route("TLSRoute", Backend(key("any"), 80), name="any", hosts=("*.example.com",)),
        _route("TLSRoute", Backend(key("one"), 80), name="one", hosts=("a.example.com",)),
    )
    serves = {name: secure(name) for name in ("any", "one")}
    client = ssl.create_default_context()
    authority.configure_trust(client)
    async with _running(AppProtocol.TLS, serves, *routes) as mesh:
        for name, expected in (("a.example.com", b"one"), ("b.example.com", b"any")):
            stream = await mesh.open("10.96.0.1:80")
            talk = trio.SSLStream(stream, client, server_hostname=name)
            with trio.fail_after(20):
                await talk.send_all(b"hello")
                assert await talk.receive_some(100) == expected
        for name in ("example.com", "a.example.org"):
            stream = await mesh.open("10.96.0.1:80")
            talk = trio.SSLStream(stream, client, server_hostname=name)
            with trio.fail_after(20), pytest.raises(trio.BrokenResourceError):
                await talk.do_handshake()
