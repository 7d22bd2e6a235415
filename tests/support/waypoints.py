"""A waypoint on loopback: the daemon itself (in this process), a scripted control plane, nodes that
accept tunnels for their workloads, real HTTP servers behind them, and callers with certificates.

Addresses: 127.0.0.3 is the waypoint, 127.0.0.2 the workloads' node, 10.96.0.x the services' VIPs.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h11
import trio

from mesh.hbone.connection import Tunnel, TunnelConnection
from mesh.hbone.head import ConnectHead, parse_authority
from mesh.identity import SpiffeId
from mesh.model.l7_policy import TrafficConfig
from mesh.model.route import Route
from mesh.model.service import AppProtocol, Service, ServicePort
from mesh.model.workload import (
    GatewayAddress,
    NamespacedHostname,
    NetworkAddress,
    TunnelProtocol,
    Workload,
)
from mesh.reactor import Reactor
from mesh.runtime.lifecycle import Shutdown
from mesh.sockets import SocketAddress
from mesh.tls.context import client_context, server_context, verify_client_peer, verify_server_peer
from tests.support.control_plane import ControlPlane, write_secrets
from tests.support.tunnels import tcp_pair
from waypoint.app import main
from waypoint.config import WaypointConfig

GATEWAY = "shop/waypoint"
NODE_IP = "127.0.0.2"
WAYPOINT_IP = "127.0.0.3"
_DOMAIN = "svc.cluster.local"
_WAYPOINT = GatewayAddress(NamespacedHostname("shop", f"waypoint.shop.{_DOMAIN}"), 15008)

Serve = Callable[[trio.SocketStream], Awaitable[None]]


def key(name: str, namespace: str = "shop") -> str:
    """`namespace/hostname`."""
    return f"{namespace}/{name}.{namespace}.{_DOMAIN}"


def service(
    name: str,
    number: int,
    *,
    protocol: AppProtocol = AppProtocol.HTTP11,
    ports: Sequence[int] = (80,),
    waypoint: GatewayAddress | None = _WAYPOINT,
) -> Service:
    """A service of namespace shop at 10.96.0.`number`."""
    return Service(
        name=name,
        namespace="shop",
        hostname=f"{name}.shop.{_DOMAIN}",
        addresses=(NetworkAddress("", f"10.96.0.{number}"),),
        ports={port: ServicePort(port, 0, protocol) for port in ports},
        waypoint=waypoint,
    )


def traffic(name: str, *routes: Route, **fields: object) -> TrafficConfig:
    """What our waypoint does for a service."""
    return TrafficConfig(GATEWAY, key(name), routes=routes, **fields)  # type: ignore[arg-type]


@dataclass
class Mesh:
    """Everything that runs."""

    control_plane: ControlPlane
    config: WaypointConfig
    reactor: Reactor
    nursery: trio.Nursery
    shutdown: Shutdown
    bugs: list[Exception] = field(default_factory=list)
    callers: list[SpiffeId] = field(default_factory=list)
    authorities: list[str] = field(default_factory=list)
    streams: list[trio.SocketStream] = field(default_factory=list)
    relayed: list[socket.socket] = field(default_factory=list)
    node_sockets: list[socket.socket] = field(default_factory=list)

    @property
    def waypoint(self) -> SocketAddress:
        """Where it accepts tunnels."""
        return SocketAddress(WAYPOINT_IP, self.config.hbone_port)

    async def connect(
        self, identity: str = "spiffe://cluster.local/ns/shop/sa/cart"
    ) -> TunnelConnection:
        """A caller's connection to the waypoint."""
        caller = SpiffeId.parse(identity)
        expected = frozenset({SpiffeId("cluster.local", "shop", "waypoint")})
        connection = await TunnelConnection.connect(
            self.reactor,
            socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK),
            self.waypoint,
            client_context(self.control_plane.issue(caller)),
            verify=lambda der: verify_server_peer(der, expected),
        )
        self.nursery.start_soon(connection.run)
        return connection

    async def open(
        self, authority: str, connection: TunnelConnection | None = None, **who: str
    ) -> trio.SocketStream:
        """A stream through a fresh tunnel to what `authority` names."""
        if connection is None:
            connection = await self.connect(**who)
        tunnel = connection.open_tunnel(ConnectHead(authority))
        response = await tunnel.wait_response()
        if response.status != 200:
            raise ConnectionRefusedError(response.status)
        near, far = tcp_pair()
        tunnel.relay(far)
        self.relayed.append(far)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(near))
        self.streams.append(stream)
        return stream

    async def close(self) -> None:
        """Close what callers have open; their relays close when they see it."""
        for stream in self.streams:
            stream.socket.close()
        with trio.move_on_after(5) as scope:
            scope.shield = True
            while any(sock.fileno() >= 0 for sock in self.relayed):
                await trio.sleep(0.005)

    async def listen(self, authority: str) -> int:
        """A port of 127.0.0.1 whose connections are tunnels to `authority`: for curl and others."""
        connection = await self.connect()
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def relay(stream: trio.SocketStream) -> None:
            tunnel = connection.open_tunnel(ConnectHead(authority))
            await tunnel.wait_response()
            fd = stream.socket.fileno()
            sock = socket.socket(fileno=socket.dup(fd))
            sock.setblocking(False)
            stream.socket.close()
            tunnel.relay(sock)

        self.nursery.start_soon(functools.partial(trio.serve_listeners, relay, listeners))
        port: int = listeners[0].socket.getsockname()[1]
        return port


async def settle(stream: trio.SocketStream, until: bytes) -> bytes:
    """Read until `until` has come, or the end."""
    data = b""
    with trio.fail_after(20):
        while until not in data:
            piece = await stream.receive_some(65536)
            if not piece:
                break
            data += piece
    return data


async def fetch(
    stream: trio.SocketStream,
    target: str = "/",
    *,
    method: str = "GET",
    headers: Sequence[tuple[str, str]] = (),
    body: bytes = b"",
    connection: h11.Connection | None = None,
    host: str = "web.shop",
) -> tuple[h11.Response, bytes]:
    """One request over HTTP/1.1, spoken by h11."""
    talk = connection or h11.Connection(h11.CLIENT)
    fields = [("host", host), *headers]
    if body and not any(name == "transfer-encoding" for name, _ in headers):
        fields.append(("content-length", str(len(body))))
    out = talk.send(h11.Request(method=method, target=target, headers=fields)) or b""
    if body:
        out += talk.send(h11.Data(body)) or b""
    out += talk.send(h11.EndOfMessage()) or b""
    response: h11.Response | None = None
    received = b""
    with trio.fail_after(20):
        await stream.send_all(out)
        while True:
            event = talk.next_event()
            if event is h11.NEED_DATA:
                talk.receive_data(await stream.receive_some(65536))
            elif isinstance(event, h11.Response):
                response = event
            elif isinstance(event, h11.Data):
                received += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                break
            elif isinstance(event, h11.ConnectionClosed):
                raise ConnectionResetError
    assert response is not None
    if connection is not None and talk.our_state is h11.DONE:
        talk.start_next_cycle()
    return response, received


async def scrape(mesh: Mesh) -> str:
    """The waypoint's metrics, as text."""
    host, _, port = mesh.config.stats_address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stats:
        await stats.send_all(b"GET /metrics HTTP/1.0\r\nhost: x\r\n\r\n")
        return (await settle(stats, b"never")).decode()


def header(response: h11.Response, name: str) -> str:
    """The values of a header, joined."""
    return ",".join(v.decode() for k, v in response.headers if k == name.encode())


@contextlib.asynccontextmanager
async def running_waypoint(
    resources: Sequence[Workload | Service | TrafficConfig] = (), **settings: object
) -> AsyncIterator[Mesh]:
    """The daemon, ready."""
    bugs: list[Exception] = []
    plane = ControlPlane(resources)
    plane.own_identity = "spiffe://cluster.local/ns/shop/sa/waypoint"
    with (
        tempfile.TemporaryDirectory() as directory,
        Reactor(lambda error, _where: bugs.append(error)) as reactor,
    ):
        async with trio.open_nursery() as nursery:
            listener = socket.create_server(("127.0.0.1", 0))
            await nursery.start(plane.serve_on, listener)
            write_secrets(Path(directory), plane.root_pem, "a.b.c")
            secrets = f"{directory}/var/run/secrets"
            port = listener.getsockname()[1]
            hbone, *free = _free_ports(4)
            config = WaypointConfig(
                xds_address=f"https://127.0.0.1:{port}",
                ca_address=f"https://127.0.0.1:{port}",
                xds_root_ca=f"{secrets}/istio/root-cert.pem",
                ca_root_ca=f"{secrets}/istio/root-cert.pem",
                auth_token=f"{secrets}/tokens/istio-token",
                pod_namespace="shop",
                service_account="waypoint",
                instance_ip=WAYPOINT_IP,
                hbone_address=f"{WAYPOINT_IP}:{hbone}",
                hbone_port=hbone,
                admin_address=f"127.0.0.1:{free[0]}",
                stats_address=f"127.0.0.1:{free[1]}",
                readiness_address=f"127.0.0.1:{free[2]}",
                termination_deadline_seconds=5.0,
                **settings,  # type: ignore[arg-type]
            )
            shutdown = Shutdown()
            mesh = Mesh(plane, config, reactor, nursery, shutdown, bugs)
            nursery.start_soon(reactor.run)
            await nursery.start(_serve_node, mesh, SocketAddress(NODE_IP, hbone))
            nursery.start_soon(main, config, shutdown)
            try:
                await _wait_port(mesh.waypoint)
                yield mesh
            finally:
                await mesh.close()
                nursery.cancel_scope.cancel()
    for sock in mesh.node_sockets:
        sock.close()
    if bugs:
        raise ExceptionGroup("bugs reported to the reactor", bugs)


@dataclass
class App:
    """An application of one workload: an HTTP server that tells what it received."""

    workload: Workload
    answers: list[Callable[[h11.Request], tuple[int, bytes]]] = field(default_factory=list)
    requests: list[h11.Request] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    connections: int = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answers each request with the workload's name, or as `answers` say."""
        self.connections += 1
        talk = h11.Connection(h11.SERVER)
        body = b""
        gone = (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError)
        with contextlib.suppress(*gone):
            async with stream:
                while True:
                    event = talk.next_event()
                    if event is h11.NEED_DATA:
                        if talk.they_are_waiting_for_100_continue:
                            go = h11.InformationalResponse(status_code=100, headers=[])
                            await stream.send_all(talk.send(go) or b"")
                        talk.receive_data(await stream.receive_some(65536))
                    elif isinstance(event, h11.Request):
                        self.requests.append(event)
                        body = b""
                    elif isinstance(event, h11.Data):
                        body += bytes(event.data)
                    elif isinstance(event, h11.EndOfMessage):
                        self.bodies.append(body)
                        await self._answer(stream, talk, body)
                        if talk.our_state is not h11.DONE:
                            return
                        talk.start_next_cycle()
                    else:
                        return

    async def _answer(self, stream: trio.SocketStream, talk: h11.Connection, body: bytes) -> None:
        request = self.requests[-1]
        status, text = 200, self.workload.name.encode()
        if self.answers:
            status, text = self.answers.pop(0)(request)
        if request.target.startswith(b"/echo"):
            text = body
        fields = [("content-length", str(len(text))), ("x-backend", self.workload.name)]
        out = talk.send(h11.Response(status_code=status, headers=fields)) or b""
        if request.method != b"HEAD":
            out += talk.send(h11.Data(text)) or b""
        out += talk.send(h11.EndOfMessage()) or b""
        await stream.send_all(out)


@contextlib.asynccontextmanager
async def running_app(
    name: str,
    *services: str,
    in_mesh: bool = True,
    serve: Serve | None = None,
    account: str = "web",
) -> AsyncIterator[App]:
    """An application on a port of the node, as a workload of namespace shop."""
    listeners = await trio.open_tcp_listeners(0, host=NODE_IP)
    port = listeners[0].socket.getsockname()[1]
    workload = Workload(
        uid=f"Kubernetes//Pod/shop/{name}",
        name=name,
        namespace="shop",
        addresses=(NODE_IP,),
        tunnel_protocol=TunnelProtocol.HBONE if in_mesh else TunnelProtocol.NONE,
        service_account=account,
        services={each: {80: port, 7070: port, 8080: port, 9090: port} for each in services},
    )
    app = App(workload)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(trio.serve_listeners, serve or app.serve, listeners))
        yield app
        nursery.cancel_scope.cancel()


async def _serve_node(
    mesh: Mesh, address: SocketAddress, *, task_status: trio.TaskStatus[None]
) -> None:
    """Stands for the workloads' node proxy: accepts tunnels, dials what they name."""
    identity = SpiffeId("cluster.local", "shop", "web")
    context = server_context(mesh.control_plane.issue(identity))

    async def relay(tunnel: Tunnel) -> None:
        mesh.authorities.append(tunnel.head.authority)
        mesh.callers.append(tunnel.connection.peer)
        authority = parse_authority(tunnel.head.authority)
        try:
            upstream = socket.create_connection((authority.host, authority.port))
        except OSError:
            tunnel.refuse(503)
            return
        upstream.setblocking(False)
        mesh.node_sockets.append(upstream)
        tunnel.respond()
        tunnel.relay(upstream)

    async def serve_one(sock: socket.socket) -> None:
        connection = await TunnelConnection.accept(
            mesh.reactor,
            sock,
            context,
            verify=lambda der: verify_client_peer(der, "cluster.local"),
            on_tunnel=lambda tunnel: mesh.nursery.start_soon(relay, tunnel),
        )
        await connection.run()

    with socket.create_server(tuple(address)) as listener:
        listener.setblocking(False)
        task_status.started()
        while True:
            await trio.lowlevel.wait_readable(listener)
            sock, _ = listener.accept()
            sock.setblocking(False)
            mesh.nursery.start_soon(serve_one, sock)


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


async def _wait_port(address: SocketAddress) -> None:
    with trio.fail_after(60):
        while True:
            with contextlib.suppress(OSError), socket.create_connection(tuple(address), 1):
                return
            await trio.sleep(0.02)
