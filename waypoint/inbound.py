"""15008: tunnels that reach this waypoint, and what is spoken inside them.

A tunnel is accepted once its target is known; then the first bytes, or the port's declared
protocol, choose the codec. Ports of unknown protocol are sniffed for a bounded time: whoever waits
for the server to speak first is carried untouched. Nothing is decided here: see `target`, `detect`,
`plan`.
"""

from __future__ import annotations

import functools
import random
import socket
from collections import Counter
from typing import TYPE_CHECKING, Protocol

import trio

from mesh import sockets
from mesh.errors import MeshError, Refusal, RemoteProtocolError
from mesh.hbone.connection import Tunnel, TunnelConnection
from mesh.hbone.head import parse_authority
from mesh.identity import SpiffeId
from mesh.model.service import AppProtocol
from mesh.model.workload import NamespacedHostname, NetworkAddress, Workload
from mesh.runtime import log
from mesh.tls.context import verify_client_peer
from waypoint.detect import Speech, is_nonsense, server_name, sniff
from waypoint.h1_down import H1Down
from waypoint.h2_down import H2Down
from waypoint.idle import IdleWatch, Kind, Watched
from waypoint.pipe import serve_opaque
from waypoint.target import Own, Target, plan_tunnel
from waypoint.timers import Timer
from waypoint.traffic import Traffic
from waypoint.transport import Transport, TunnelTransport

if TYPE_CHECKING:
    from waypoint.proxy import Proxy
    from waypoint.record import Told

_log = log.get("inbound")
_HTTP = frozenset({AppProtocol.HTTP11, AppProtocol.HTTP2, AppProtocol.GRPC})
_HTTP2 = frozenset({AppProtocol.HTTP2, AppProtocol.GRPC})
_ROUTED = frozenset({"HTTPRoute", "GRPCRoute"})


HANDSHAKES_PER_SOURCE = 64
"""One peer cannot keep others out by handshakes that it never ends."""


class Drainable(Watched, Protocol):
    """A caller's connection."""

    def drain(self) -> None:
        """No further request; end when idle."""
        ...


class Judged(Protocol):
    """A connection that policy let pass."""

    def rejudge(self) -> None:
        """Cut it if policy would not any more."""
        ...


class Inbound:
    """One tunnel: who calls, and what. Requests inside it share these facts."""

    def __init__(self, proxy: Proxy, tunnel: Tunnel, target: Target) -> None:
        self.proxy = proxy
        self.target = target
        self.source: SpiffeId = tunnel.connection.peer
        self.source_namespace = self.source.namespace
        self.source_ip = tunnel.connection.peer_address.ip
        self.source_port = tunnel.connection.peer_address.port
        self.baggage = tunnel.head.baggage
        self.traceparent = tunnel.head.traceparent
        self.connection_id = tunnel.head.connection_id or self.traceparent[3:35]
        self.destination_ip = target.ip
        self.port = target.port
        self.service_key = target.key
        self.active = 0
        self.connections: set[Drainable] = set()
        self.pipes: set[Judged] = set()
        self.told: Told | None = None
        self._traffic: Traffic | None = None
        self._version = -1

    @property
    def rng(self) -> random.Random:
        """For weights and trace ids."""
        return self.proxy.rng

    @property
    def workload(self) -> Workload | None:
        """The workload that was called itself."""
        return self.target.workload

    @property
    def workload_uid(self) -> str:
        """Its uid."""
        return self.target.workload.uid if self.target.workload is not None else ""

    def traffic(self) -> Traffic:
        """What is done for the target, as of now."""
        store = self.proxy.traffic
        if self._traffic is None or self._version != store.version:
            self._version = store.version
            self._traffic = store.traffic(self.service_key)
        return self._traffic

    def source_workload(self) -> Workload | None:
        """The caller's workload, if what we know of its address agrees with its identity."""
        address = NetworkAddress(self.proxy.config.network, self.source_ip)
        workload = self.proxy.store.workload_by_address(address)
        return workload if workload is not None and workload.identity == self.source else None

    def refused(self, error: RemoteProtocolError) -> None:
        """A request that could not be read was answered by its codec."""
        self.proxy.journal.malformed(self, error)


class Inbounds:
    """Accepts connections and tunnels."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        config = proxy.config
        hostname = f"{config.gateway_name}.{config.pod_namespace}.svc.{config.cluster_domain}"
        self.own = Own(
            NamespacedHostname(config.pod_namespace, hostname),
            config.network,
            config.instance_ip,
            proxy.traffic.has_config,
        )
        self._connections: set[TunnelConnection] = set()
        self._inbounds: set[Inbound] = set()
        self._handshakes: Counter[str] = Counter()
        body, idle = config.stream_idle_seconds, config.connection_idle_seconds
        head = config.head_timeout_seconds
        limits: dict[Kind, float] = {
            "body": body, "unread": body, "left": body, "head": head, "idle": idle,
        }  # fmt: skip
        self._idle_watch = IdleWatch(limits)
        self._idle_step = max(0.05, min(5.0, *(each / 4 for each in limits.values())))

    @property
    def tunnel_count(self) -> int:
        """Tunnels open now."""
        return sum(each.tunnel_count for each in self._connections)

    async def serve(self, sock: socket.socket) -> None:
        """Serve one connection until it ends. If cancelled: its tunnels are cut."""
        proxy = self._proxy
        try:
            source = str(sock.getpeername()[0])
        except OSError:
            sock.close()
            return
        if self._handshakes[source] >= HANDSHAKES_PER_SOURCE:
            sock.close()
            _log.info("tunnel_connection_failed", error=f"{source} has too many handshakes open")
            return
        self._handshakes[source] += 1
        try:
            certificate = await proxy.secrets.get(proxy.identity)
            connection = await TunnelConnection.accept(
                proxy.reactor,
                sock,
                proxy.contexts.server(certificate),
                verify=lambda leaf: verify_client_peer(leaf, proxy.config.trust_domain),
                on_tunnel=self._on_tunnel,
                budget=proxy.windows,
            )
        except (MeshError, OSError) as exc:
            sock.close()
            _log.info("tunnel_connection_failed", error=str(exc))
            return
        finally:
            self._handshakes[source] -= 1
            if not self._handshakes[source]:
                del self._handshakes[source]
        self._connections.add(connection)
        if proxy.is_draining:
            connection.goaway()
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)

    def _on_tunnel(self, tunnel: Tunnel) -> None:
        proxy = self._proxy
        namespace = tunnel.connection.peer.namespace
        target = plan_tunnel(parse_authority(tunnel.head.authority), namespace, self.own,
                             proxy.store)  # fmt: skip
        if isinstance(target, Refusal):
            tunnel.refuse(target.http_status)
            peer = sockets.SocketAddress(*tunnel.connection.peer_address)
            proxy.journal.refused(tunnel.connection.peer, str(peer), tunnel.head.authority, target)
            return
        inbound = Inbound(proxy, tunnel, target)
        self._inbounds.add(inbound)
        transport = TunnelTransport(tunnel)
        tunnel.respond()
        begin(inbound, transport)
        proxy.start(functools.partial(self._until_closed, tunnel, inbound))

    async def _until_closed(self, tunnel: Tunnel, inbound: Inbound) -> None:
        try:
            await tunnel.wait_closed()
        finally:
            self._inbounds.discard(inbound)

    def rejudge(self) -> None:
        """Policies, or what they name, may have changed: open connections are judged again."""
        for inbound in self._inbounds:
            for each in list(inbound.pipes):
                each.rejudge()

    async def watch(self) -> None:
        """End what callers keep open without going on, for ever. If cancelled: they may."""
        while True:
            await trio.sleep(self._idle_step)
            found = [each for inbound in self._inbounds for each in inbound.connections]
            self._idle_watch.sweep(found, trio.current_time())

    def drain(self) -> None:
        """No more tunnels, no more requests on those there are."""
        for connection in self._connections:
            connection.goaway()
        for inbound in self._inbounds:
            for each in list(inbound.connections):
                each.drain()

    async def wait_drained(self) -> None:
        """Until every connection has ended. If cancelled: they go on."""
        for connection in list(self._connections):
            await connection.wait_closed()


def begin(inbound: Inbound, transport: TunnelTransport) -> None:
    """Choose the codec of a tunnel and start it."""
    protocol = inbound.target.protocol
    kind = inbound.traffic().routes.kind(inbound.port, inbound.source_namespace)
    if kind in _ROUTED or (not kind and protocol in _HTTP):
        transport.start(_Sniffer(inbound, transport, is_http=True))
    elif kind == "TLSRoute":
        transport.start(_Sniffer(inbound, transport, is_http=False))
    elif kind or protocol in {AppProtocol.TCP, AppProtocol.TLS}:
        serve_opaque(inbound, transport, b"")
    else:
        transport.start(_Sniffer(inbound, transport, is_http=False))


class _Sniffer:
    """The first codec of a tunnel whose speech is not known: reads until it is."""

    def __init__(self, inbound: Inbound, transport: Transport, *, is_http: bool) -> None:
        self._inbound = inbound
        self._transport = transport
        self._is_http = is_http
        self._data = b""
        self._timer: Timer | None = None
        if not is_http:
            seconds = inbound.proxy.config.detection_timeout_seconds
            self._timer = inbound.proxy.timers.after(seconds, self._give_up)

    def on_data(self, data: memoryview) -> None:
        """The first bytes."""
        self._data += bytes(data)
        speech = sniff(self._data, is_http=self._is_http)
        if speech is Speech.TLS and server_name(self._data) is None:
            return  # a TLSRoute goes by a name that has not come yet
        if speech is not Speech.NEED_DATA:
            self._become(speech)
        elif self._timer is None:
            proxy = self._inbound.proxy
            self._timer = proxy.timers.after(proxy.config.head_timeout_seconds, self._give_up)

    def _become(self, speech: Speech) -> None:
        if self._timer is not None:
            self._timer.cancel()
        data, transport = self._data, self._transport
        if speech is Speech.HTTP1 and self._inbound.target.protocol in _HTTP2 and is_nonsense(data):
            # An answer in HTTP/1.1 would be nonsense to who meant HTTP/2 (RFC 9113 section 3.4).
            self._inbound.refused(RemoteProtocolError("neither a preface nor a request line"))
            transport.close()
        elif speech is Speech.HTTP1:
            transport.codec = codec = H1Down(self._inbound, transport)
            codec.on_data(memoryview(data))
        elif speech is Speech.HTTP2:
            transport.codec = channel = H2Down(self._inbound, transport)
            channel.on_data(memoryview(data))
        else:
            serve_opaque(self._inbound, transport, data)

    def _give_up(self) -> None:
        if not self._transport.is_closed and self._transport.codec is self:
            # Half a preface of HTTP/2 is answered by the parser of HTTP/1.1: it never ends.
            self._become(Speech.HTTP1 if self._is_http else Speech.OPAQUE)

    def on_end(self) -> None:
        """It ended before it was understood."""
        if self._timer is not None:
            self._timer.cancel()
        if self._data and not self._is_http:
            self._become(Speech.OPAQUE)
            self._transport.codec.on_end()
        else:
            self._transport.close()

    def on_lost(self, reason: str) -> None:
        """It was cut."""
        del reason
        if self._timer is not None:
            self._timer.cancel()

    def on_writable(self) -> None:
        """Nothing was written."""
