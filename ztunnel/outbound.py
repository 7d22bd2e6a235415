"""15001: connections that the application in a pod opened, carried to where they belong.

Original destination, workload, plan, then a tunnel or a plain dial, then the relay. The
application's connect has succeeded already, so a failure shows as a reset. Nothing is
decided here: see `ztunnel.plan`.
"""

from __future__ import annotations

import functools
import socket
from typing import TYPE_CHECKING

import trio
from mypy_extensions import mypyc_attr

from mesh import sockets
from mesh.errors import Denied, Refusal, Unavailable
from mesh.fiber import in_task
from mesh.hbone.connection import Tunnel
from mesh.hbone.head import ConnectResponse, traceparent_of
from mesh.hbone.relay import PlainRelay, RelayResult
from mesh.model.workload import Workload
from mesh.sockets import SocketAddress
from ztunnel.connections import Tracked
from ztunnel.dial import dial
from ztunnel.dns import dns_labels
from ztunnel.plan import NextHop, OutboundPlan
from ztunnel.record import Record
from ztunnel.routes import Route, TunnelRoute
from ztunnel.spans import note_acquired, note_dialled

if TYPE_CHECKING:
    from ztunnel.inpod import PodProxy

RESPONSE_SECONDS = 30.0
MAX_HOPS_TRIED = 3
_STATUS_OK = 200
_STATUS_DENIED = frozenset({401, 403})


async def serve(proxy: PodProxy, sock: socket.socket, peer: SocketAddress) -> None:
    """Carry one connection accepted from `peer`. If cancelled: both ends see a reset."""
    node = proxy.node
    record = proxy.new_record("outbound")
    record.source_address = str(peer)
    try:
        destination = sockets.original_destination(sock, peer)
        workload = proxy.workload
        if workload is None:
            record.original_destination = record.destination_address = str(destination)
            workload = await proxy.wait_workload()
    except Unavailable as exc:
        node.connections.failed(record, exc)
        return
    record.source, record.source_identity = workload, workload.identity
    route = proxy.routes.find(workload, peer.ip, destination)
    if isinstance(route, Refusal):
        record.original_destination = record.destination_address = str(destination)
        node.connections.refused(record, route)
        return
    destination = route.destination  # one object for all that go there
    _note_route(record, route)
    tracked = node.connections.track(record, proxy.pod.uid, workload)
    with node.connections.carrying(tracked) as work:
        if isinstance(route, TunnelRoute):
            work.result = await _tunnel(proxy, sock, peer, workload, route, tracked)
        else:
            work.result = await _passthrough(proxy, sock, route.plan, tracked)


def _note_route(record: Record, route: Route) -> None:
    plan = route.plan
    record.original_destination = route.asked
    record.destination, record.service = plan.workload, plan.service
    record.destination_address, record.hbone_address = route.next_hop, plan.authority
    record.protocol = route.protocol


async def _passthrough(
    proxy: PodProxy, sock: socket.socket, plan: OutboundPlan, tracked: Tracked
) -> RelayResult:
    node = proxy.node
    seconds = node.config.connect_timeout_seconds
    tracked.limit(seconds, lambda: Refusal("CONNECT", f"connect to {plan.next_hop}: timed out"))
    address = await _resolve(proxy, plan.next_hop, tracked)
    span = tracked.record.span
    asked = 0.0 if span is None else trio.current_time()
    upstream = await dial(proxy.namespace, address, proxy.nursery)
    tracked.unlimit()
    if span is not None:
        note_dialled(span, asked, trio.current_time())
    relay = PlainRelay(node.reactor, sock, upstream)
    node.connections.opened(tracked, lambda: (relay.a_to_b, relay.b_to_a))
    return await relay.wait_closed()


async def _resolve(proxy: PodProxy, hop: NextHop, tracked: Tracked) -> SocketAddress:
    if not hop.is_hostname:
        return SocketAddress(hop.host, hop.port)
    wants_v6 = tracked.record.source_address.startswith("[")
    resolve = functools.partial(proxy.forwarder.resolve, hop.host, wants_v6=wants_v6)
    source = tracked.record.source
    proxy.node.dns_metrics.on_demand(dns_labels("AAAA" if wants_v6 else "A", "udp", source))
    addresses = await in_task(proxy.nursery, resolve)
    return SocketAddress(proxy.node.rng.choice(addresses), hop.port)


async def _tunnel(
    proxy: PodProxy,
    sock: socket.socket,
    peer: SocketAddress,
    source: Workload,
    route: TunnelRoute,
    tracked: Tracked,
) -> RelayResult:
    node, record = proxy.node, tracked.record
    record.is_mutual_tls = True
    tracked.limit(RESPONSE_SECONDS, functools.partial(_late, record))
    tunnel, response = await _reach(proxy, peer, source, route, record)
    tracked.unlimit()
    if response.status != _STATUS_OK:
        raise _refused(record, response.status)
    tunnel.relay(sock, is_reset_on_close=True)
    node.connections.opened(tracked, tunnel.counts)
    return await tunnel.wait_closed()


def _late(record: Record) -> Refusal:
    return Refusal("CONNECT", f"no answer from {record.destination_address} in time")


def _refused(record: Record, status: int) -> Denied | Unavailable:
    next_hop, authority = record.destination_address, record.hbone_address
    if status in _STATUS_DENIED:
        return Denied(
            f"{next_hop} refused {authority} by policy ({status})",
            hint="its access log names the policy",
        )
    return Unavailable(
        f"{next_hop} could not serve {authority} ({status})", hint="its access log says why"
    )


async def _reach(
    proxy: PodProxy,
    peer: SocketAddress,
    source: Workload,
    route: TunnelRoute,
    record: Record,
) -> tuple[Tunnel, ConnectResponse]:
    """A tunnel as planned, or to somebody else if nobody is there: a replica that has just died is
    still in the plans of the moment.
    """
    unreached: set[str] = set()
    while True:
        try:
            return await _connect(proxy, route, record)
        except _Unreached as exc:
            workload = route.plan.workload
            unreached.add(workload.uid if workload is not None else "")
            other = None
            if len(unreached) < MAX_HOPS_TRIED:
                other = proxy.routes.elsewhere(source, peer.ip, route.destination, unreached)
            if other is None:
                raise exc.cause from exc
        route = other
        _note_route(record, route)


@mypyc_attr(native_class=False)
class _Unreached(Exception):
    """There is no connection to the next hop, and nothing was sent there."""

    def __init__(self, cause: Unavailable) -> None:
        super().__init__(str(cause))
        self.cause = cause


async def _connect(
    proxy: PodProxy, route: TunnelRoute, record: Record
) -> tuple[Tunnel, ConnectResponse]:
    """A tunnel and the answer to its CONNECT. Only what the peer surely did not look at, as it
    was going away or full, is sent once more, on another connection (RFC 9113 section 8.7).
    Raises _Unreached when there is no connection.
    """
    key, template = route.key, route.template
    block = template.block(record.connection_id, record.source_address, _trace(proxy, record))
    for may_try_again in (True, True, False):
        asked = 0.0 if record.span is None else trio.current_time()
        # Picked here and not by the task that waits, so that the pool's counts are true.
        while (connection := proxy.pool.acquire_nowait(key)) is None:
            try:
                await in_task(proxy.nursery, proxy.pool.wait_dialled, key)
            except Unavailable as exc:
                raise _Unreached(exc) from exc
        record.destination_identity = connection.peer
        if record.span is not None:
            note_acquired(record.span, connection, asked, trio.current_time())
        tunnel = connection.open_tunnel(template.head, block)
        try:
            return tunnel, await tunnel.wait_response()
        except Unavailable:
            if not (tunnel.was_refused and may_try_again):
                raise
    raise AssertionError


def _trace(proxy: PodProxy, record: Record) -> str:
    if record.span is not None:
        return record.span.traceparent
    return traceparent_of(record.id, proxy.node.rng.getrandbits(64))
