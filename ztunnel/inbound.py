"""15008 and 15006: connections that reach a pod, judged and handed to the application.

HBONE: mutual TLS in the pod's own name, then per tunnel plan, policy, dial, answer, relay.
Plaintext: the same without an identity, so that STRICT and every policy that asks for one
refuse it. The application is dialled from the caller's address. Nothing is decided
here: see `ztunnel.plan` and `mesh.authz`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio

from mesh import sockets
from mesh.errors import MeshError, Refusal, Unavailable
from mesh.hbone.connection import Tunnel, TunnelConnection
from mesh.hbone.head import ConnectHead, parse_authority
from mesh.hbone.relay import PlainRelay, RelayResult
from mesh.identity import SpiffeId
from mesh.model.workload import Workload
from mesh.sockets import SocketAddress
from mesh.tls.context import verify_client_peer
from ztunnel.admission import Admissions, Admitted, Rejected
from ztunnel.connections import Tracked
from ztunnel.dial import dial
from ztunnel.plan import InboundConnection, InboundPlan, plan_plaintext
from ztunnel.record import Record, baggage_of
from ztunnel.spans import note_accepted, note_dialled

if TYPE_CHECKING:
    from ztunnel.inpod import PodProxy

HANDSHAKES_PER_SOURCE = 64
"""One peer cannot keep others out by handshakes that it never ends."""
_STATUS_DENIED = 401
_STATUS_UNAVAILABLE = 503

_PROXY_V2 = b"\r\n\r\n\0\r\nQUIT\n\x21"
_PROXY_TLV_IDENTITY = 0xD0


# -- plaintext -----------------------------------------------------------------------


async def serve_plaintext(proxy: PodProxy, sock: socket.socket, peer: SocketAddress) -> None:
    """Carry one plaintext connection accepted from `peer`. If cancelled: both ends see a reset."""
    node = proxy.node
    record = proxy.new_record("inbound")
    try:
        record.source_address = str(peer)
        destination = sockets.original_destination(sock, peer)
        record.original_destination = record.destination_address = str(destination)
        workload = await proxy.wait_workload()
    except (Unavailable, OSError) as exc:
        node.connections.failed(record, _gone(exc))
        return
    record.destination = workload
    verdict = _admit_plaintext(proxy, record, InboundConnection(None, peer, destination), workload)
    if isinstance(verdict, Refusal):
        node.connections.refused(record, verdict)
        return
    tracked, plan = verdict
    with node.connections.carrying(tracked) as work:
        work.result = await _relay_plaintext(proxy, sock, plan, tracked)


def _admit_plaintext(
    proxy: PodProxy, record: Record, arrived: InboundConnection, workload: Workload
) -> tuple[Tracked, InboundPlan] | Refusal:
    """Plan, then policy, then admission: nothing may come between the last two."""
    plan = plan_plaintext(arrived, workload, proxy.node.store)
    if isinstance(plan, Refusal):
        return plan
    record.source, record.service = plan.source_workload, plan.service
    permit = proxy.node.judges.evaluate(workload, plan.context)
    if isinstance(permit, Refusal):
        return permit
    return _enter(proxy, record, Admitted(workload, plan, permit)), plan


async def _relay_plaintext(
    proxy: PodProxy, sock: socket.socket, plan: InboundPlan, tracked: Tracked
) -> RelayResult:
    upstream = await _dial_application(proxy, plan, tracked)
    relay = PlainRelay(proxy.node.reactor, upstream, sock)
    proxy.node.connections.opened(tracked, lambda: (relay.a_to_b, relay.b_to_a))
    return await relay.wait_closed()


# -- HBONE ---------------------------------------------------------------------------


async def serve_hbone(proxy: PodProxy, sock: socket.socket) -> None:
    """Serve one tunnel connection until it ends. If cancelled: its tunnels are cut."""
    node = proxy.node
    record = proxy.new_record("inbound")
    try:
        with _handshake_in_flight(proxy, _peer(record, sock).ip):
            connection = await _accept_connection(proxy, record, sock)
    except (MeshError, OSError) as exc:
        # Before there is a tunnel this line is all that anybody will ever see of it.
        node.connections.failed(record, _gone(exc))
        return
    proxy.inbound_connections.add(connection)
    if proxy.is_draining:
        # It shook hands while we stopped accepting: the peer is sent on to our successor.
        connection.goaway()
    try:
        await connection.run()
    finally:
        proxy.inbound_connections.discard(connection)


@contextlib.contextmanager
def _handshake_in_flight(proxy: PodProxy, source: str) -> Iterator[None]:
    in_flight = proxy.handshakes
    if in_flight[source] >= HANDSHAKES_PER_SOURCE:
        raise Unavailable(
            f"{source} has {HANDSHAKES_PER_SOURCE} handshakes in flight already",
            hint="it opens connections to 15008 and does not go on with TLS",
            flag="TLS_FAILURE",
        )
    in_flight[source] += 1
    try:
        yield
    finally:
        in_flight[source] -= 1
        if not in_flight[source]:
            del in_flight[source]


async def _accept_connection(
    proxy: PodProxy, record: Record, sock: socket.socket
) -> TunnelConnection:
    record.destination_address = str(sockets.from_sockaddr(sock.getsockname()))
    workload = record.destination = await proxy.wait_workload()
    certificate = await proxy.certificate(workload.identity)
    trust_domain = certificate.identity.trust_domain
    return await TunnelConnection.accept(
        proxy.node.reactor,
        sock,
        proxy.node.contexts.server(certificate),
        verify=lambda leaf: verify_client_peer(leaf, trust_domain),
        on_tunnel=_Tunnels(proxy, workload.identity).start,
        budget=proxy.windows,
        held=proxy.held,
    )


class _Tunnels:
    """Starts the tunnels of one connection, which we accepted as `own`."""

    def __init__(self, proxy: PodProxy, own: SpiffeId) -> None:
        self._proxy = proxy
        self._own = own
        self._admissions: Admissions | None = None

    def start(self, tunnel: Tunnel) -> None:
        proxy, admissions = self._proxy, self._admissions
        if admissions is None:
            link = tunnel.connection
            arrived = InboundConnection(link.peer, link.peer_address, link.local_address)
            admissions = Admissions(arrived, self._own, proxy.node.store, proxy.node.judges)
            self._admissions = admissions
        proxy.fibers.start(_serve_tunnel(proxy, admissions, tunnel))


async def _serve_tunnel(proxy: PodProxy, admissions: Admissions, tunnel: Tunnel) -> None:
    """Serve one CONNECT. If cancelled: the tunnel is reset."""
    node = proxy.node
    proxy.inbound_tunnels += 1
    try:
        connection, head = tunnel.connection, tunnel.head
        record = proxy.new_record("inbound", head.traceparent, head.connection_id)
        record.source_address = admissions.source
        record.destination_address = admissions.destination
        record.hbone_address = head.authority
        record.protocol = "HBONE"
        record.is_mutual_tls = True
        record.source_identity, record.peer_baggage = connection.peer, head.baggage
        if head.forwarded is not None:
            record.original_destination = head.forwarded.host
        if record.span is not None:
            note_accepted(record.span, connection)
        verdict = _admit_tunnel(proxy, record, admissions, head)
        if isinstance(verdict, Refusal):
            tunnel.refuse(verdict.http_status)
            node.connections.refused(record, verdict)
            return
        tracked, admitted = verdict
        with node.connections.carrying(tracked) as work:
            work.result = await _relay_tunnel(proxy, tunnel, admitted, tracked)
    finally:
        proxy.inbound_tunnels -= 1
        # Whoever was not answered hears something, whatever happened here.
        if not tunnel.is_closed:
            tunnel.refuse(_STATUS_UNAVAILABLE)


def _admit_tunnel(
    proxy: PodProxy, record: Record, admissions: Admissions, head: ConnectHead
) -> tuple[Tracked, Admitted] | Refusal:
    """Plan, then policy, then admission: nothing may come between the last two."""
    if proxy.inbound_tunnels > proxy.node.config.max_connections_per_pod:
        return Refusal(
            "CONNECT",
            f"this pod has {proxy.inbound_tunnels - 1} tunnels open already",
            http_status=503,
        )
    host = head.forwarded.host if head.forwarded is not None else ""
    decided = admissions.decide(proxy.workload, head.authority, host)
    workload, plan = decided.workload, decided.plan
    if workload is not None:
        record.destination, record.destination_identity = workload, workload.identity
    if plan is not None:
        record.source, record.service = plan.source_workload, plan.service
    if isinstance(decided, Rejected):
        return decided.refusal
    return _enter(proxy, record, decided), decided


async def _relay_tunnel(
    proxy: PodProxy, tunnel: Tunnel, admitted: Admitted, tracked: Tracked
) -> RelayResult:
    plan = admitted.plan
    upstream = None
    try:
        upstream = await _dial_application(proxy, plan, tracked)
        if plan.sends_proxy_header:
            upstream.send(_proxy_header(plan, tunnel))
    except OSError as exc:
        raise Unavailable(f"the application left: {exc.strerror}") from exc
    finally:
        if upstream is None and not tunnel.is_closed:
            cut_by_policy = tracked.cut is not None
            tunnel.refuse(_STATUS_DENIED if cut_by_policy else _STATUS_UNAVAILABLE)
    tunnel.respond(baggage=baggage_of(admitted.workload))
    tunnel.relay(upstream, has_spoken=False)
    proxy.node.connections.opened(tracked, tunnel.counts)
    return await tunnel.wait_closed()


# -- both ----------------------------------------------------------------------------


def _enter(proxy: PodProxy, record: Record, admitted: Admitted) -> Tracked:
    return proxy.node.connections.admit(
        admitted.permit, record, proxy.pod.uid, admitted.workload, admitted.plan.context
    )


async def _dial_application(proxy: PodProxy, plan: InboundPlan, tracked: Tracked) -> socket.socket:
    config = proxy.node.config

    def late() -> Refusal:
        return Refusal("CONNECT", f"the application at {plan.upstream} does not answer")

    def limit() -> None:
        tracked.limit(config.connect_timeout_seconds, late)

    source = plan.spoofed_source if config.keeps_source_address else None
    span = tracked.record.span
    asked = 0.0 if span is None else trio.current_time()
    upstream = await dial(
        proxy.namespace,
        plan.upstream,
        proxy.nursery,
        source=source,
        stays_inside=True,
        on_wait=limit,
    )
    tracked.unlimit()
    if span is not None:
        note_dialled(span, asked, trio.current_time())
    return upstream


def _peer(record: Record, sock: socket.socket) -> SocketAddress:
    peer = sockets.from_sockaddr(sock.getpeername())
    record.source_address = str(peer)
    return peer


def _gone(exc: MeshError | OSError) -> MeshError:
    return exc if isinstance(exc, MeshError) else Unavailable(f"the peer left: {exc.strerror}")


def _proxy_header(plan: InboundPlan, tunnel: Tunnel) -> bytes:
    """PROXY protocol v2: who calls whom, and as TLV 0xD0 the proven identity."""
    source = tunnel.connection.peer_address
    destination = _proxied_destination(plan, tunnel)
    source_ip = ipaddress.ip_address(source.ip)
    destination_ip = ipaddress.ip_address(destination.ip)
    if source_ip.version != destination_ip.version:
        # The header has room for one family; IPv4 fits into IPv6.
        source_ip, destination_ip = _as_v6(source_ip), _as_v6(destination_ip)
    family = 0x11 if source_ip.version == 4 else 0x21
    identity = str(tunnel.connection.peer).encode()
    body = (
        source_ip.packed
        + destination_ip.packed
        + struct.pack("!HH", source.port, destination.port)
        + struct.pack("!BH", _PROXY_TLV_IDENTITY, len(identity))
        + identity
    )
    return _PROXY_V2 + struct.pack("!BH", family, len(body)) + body


def _proxied_destination(plan: InboundPlan, tunnel: Tunnel) -> SocketAddress:
    authority = parse_authority(tunnel.head.authority)
    if authority.is_ip:
        return SocketAddress(authority.host, authority.port)
    addresses = [each.address for each in plan.service.addresses] if plan.service else []
    addresses.sort(key=lambda each: ":" in each)
    ip = addresses[0] if addresses else plan.context.destination_ip
    return SocketAddress(ip, authority.port)


def _as_v6(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv6Address:
    return ip if ip.version == 6 else ipaddress.IPv6Address(b"\0" * 10 + b"\xff\xff" + ip.packed)
