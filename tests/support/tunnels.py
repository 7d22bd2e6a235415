"""Two ends of a tunnel over loopback mTLS, with plain sockets as applications."""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import trio

from mesh.hbone.connection import Tunnel, TunnelConnection
from mesh.hbone.head import ConnectHead
from mesh.hbone.held import HeldBytes
from mesh.reactor import Reactor
from mesh.sockets import SocketAddress
from mesh.tls.context import (
    client_context,
    server_context,
    verify_client_peer,
    verify_server_peer,
)
from tests.support.certs import make_ca

CA = make_ca()
CLIENT = CA.issue("spiffe://cluster.local/ns/shop/sa/cart")
SERVER = CA.issue("spiffe://cluster.local/ns/shop/sa/web")
CLIENT_CONTEXT = client_context(CLIENT.certificate())
SERVER_CONTEXT = server_context(SERVER.certificate())


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected TCP sockets on loopback, non-blocking."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        a = socket.create_connection(listener.getsockname())
        b, _ = listener.accept()
    for sock in (a, b):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return a, b


@dataclass
class Link:
    """A client connection, the server connections, and what happened."""

    reactor: Reactor
    nursery: trio.Nursery
    address: SocketAddress
    client: TunnelConnection = None  # type: ignore[assignment]
    servers: list[TunnelConnection] = field(default_factory=list)
    tunnels: list[Tunnel] = field(default_factory=list)
    bugs: list[Exception] = field(default_factory=list)
    arrived: trio.Event = field(default_factory=trio.Event)
    applications: list[trio.SocketStream] = field(default_factory=list)
    pipe_lock: trio.Lock = field(default_factory=trio.Lock)

    def application(self, sock: socket.socket) -> trio.SocketStream:
        """The application's end as a trio stream, closed with the link."""
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self.applications.append(stream)
        return stream

    async def dial(self, **options: float) -> TunnelConnection:
        connection = await TunnelConnection.connect(
            self.reactor,
            socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK),
            self.address,
            CLIENT_CONTEXT,
            verify=lambda der: verify_server_peer(der, frozenset({SERVER.identity})),
            **options,
        )
        self.nursery.start_soon(connection.run)
        return connection

    async def pipe(
        self, connection: TunnelConnection | None = None
    ) -> tuple[trio.SocketStream, trio.SocketStream, Tunnel, Tunnel]:
        """Applications at both ends of a fresh tunnel (the server side must be `manual`)."""
        async with self.pipe_lock:
            self.arrived = trio.Event()
            tunnel = (connection or self.client).open_tunnel(ConnectHead("10.0.0.1:80"))
            await self.arrived.wait()
            served = self.tunnels[-1]
        near, near_proxy = tcp_pair()
        far, far_proxy = tcp_pair()
        served.respond(200)
        served.relay(far_proxy)
        assert (await tunnel.wait_response()).status == 200
        tunnel.relay(near_proxy)
        return self.application(near), self.application(far), tunnel, served


def _noted(link: Link, tunnel: Tunnel) -> None:
    link.tunnels.append(tunnel)
    link.arrived.set()


@contextlib.asynccontextmanager
async def open_link(
    *,
    on_tunnel: Callable[[Link, Tunnel], None] = _noted,
    dial: bool = True,
    server_options: dict[str, float] | None = None,
    held: HeldBytes | None = None,
) -> AsyncIterator[Link]:
    """A reactor, a listener and (with `dial`) one client connection."""
    bugs: list[Exception] = []
    with Reactor(on_bug=lambda error, _where: bugs.append(error)) as reactor:
        async with trio.open_nursery() as nursery:
            listener = socket.create_server(("127.0.0.1", 0))
            listener.setblocking(False)
            link = Link(
                reactor, nursery, SocketAddress("127.0.0.1", listener.getsockname()[1]), bugs=bugs
            )
            nursery.start_soon(reactor.run)

            async def serve_one(sock: socket.socket) -> None:
                connection = await TunnelConnection.accept(
                    reactor,
                    sock,
                    SERVER_CONTEXT,
                    verify=lambda der: verify_client_peer(der, "cluster.local"),
                    on_tunnel=functools.partial(on_tunnel, link),
                    held=held,
                    **(server_options or {}),
                )
                link.servers.append(connection)
                await connection.run()

            async def serve() -> None:
                with listener:
                    while True:
                        await trio.lowlevel.wait_readable(listener)
                        sock, _ = listener.accept()
                        sock.setblocking(False)
                        nursery.start_soon(serve_one, sock)

            nursery.start_soon(serve)
            try:
                if dial:
                    link.client = await link.dial()
                yield link
            finally:
                for stream in link.applications:
                    stream.socket.close()
                nursery.cancel_scope.cancel()
    if bugs:
        raise ExceptionGroup("bugs reported to the reactor", bugs)


def dialling(
    handler: Callable[[Tunnel], Awaitable[None]],
) -> Callable[[Link, Tunnel], None]:
    """An `on_tunnel` that runs an async handler per tunnel."""
    return lambda link, tunnel: link.nursery.start_soon(handler, tunnel)
