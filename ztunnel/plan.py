"""DECIDES: where a captured connection goes. Values in, a plan or a Refusal out; no I/O.

Outbound, in this order: the waypoint of the service that was addressed, else an endpoint
of that service, else the workload at that address (through its waypoint, if it has one),
else passthrough to the original destination. What the mesh knows but cannot serve is
refused, never passed through. Inbound: the authority must name this pod, or something whose
waypoint this pod is.

Not here: policy (`mesh.authz`), and doing it (`ztunnel.outbound`, `ztunnel.inbound`).
Other networks are not reachable yet and are refused by name.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass

from mesh.authz import ConnectionContext
from mesh.errors import Refusal
from mesh.hbone.head import Authority
from mesh.identity import SpiffeId
from mesh.model.balancing import Random, choose_address
from mesh.model.service import IpFamilies, Mode, Service
from mesh.model.store import Store
from mesh.model.workload import (
    GatewayAddress,
    NetworkAddress,
    TunnelProtocol,
    Workload,
)
from mesh.sockets import HBONE_PORT, PRIVATE_PORTS, SocketAddress, is_loopback
from ztunnel.upstreams import (
    Upstream,
    expected_identities,
    is_waypoint,
    refuse_other_network,
    refuse_without_address,
    resolve_endpoint,
    resolve_gateway,
    service_waypoint,
)

PROXY_PROTOCOL = "PROXY"


class Carrier(enum.Enum):
    """How the bytes travel to the next hop."""

    TCP = "TCP"
    HBONE = "HBONE"


@dataclass(frozen=True, slots=True)
class NextHop:
    """What to dial: an address, or (for endpoints known by name) a hostname to resolve."""

    host: str
    port: int
    is_hostname: bool = False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class OutboundPlan:
    """How to carry one connection. `authority` and `expected` are empty for TCP; `workload`
    is what answers at the next hop (a waypoint, where there is one), None for passthrough.
    """

    carrier: Carrier
    next_hop: NextHop
    authority: str = ""
    expected: frozenset[SpiffeId] = frozenset()
    workload: Workload | None = None
    service: Service | None = None
    is_via_waypoint: bool = False


@dataclass(frozen=True, slots=True)
class InboundConnection:
    """Who reached this pod, and at which address. `peer` is proven by mTLS, or None."""

    peer: SpiffeId | None
    source: SocketAddress
    destination: SocketAddress


@dataclass(frozen=True, slots=True)
class InboundPlan:
    """How to hand one connection to the application.

    `context` is what policy judges. `spoofed_source` is the address to dial from, None for
    our own. With `sends_proxy_header` the application reads a PROXY v2 header first.
    """

    upstream: SocketAddress
    context: ConnectionContext
    spoofed_source: str | None
    source_workload: Workload | None
    service: Service | None
    sends_proxy_header: bool = False


# -- outbound ------------------------------------------------------------------------


def plan_outbound(
    source: Workload,
    destination: SocketAddress,
    store: Store,
    rng: Random,
    avoid: Collection[str] = (),
) -> OutboundPlan | Refusal:
    """Where a connection goes that a pod (`source`) opened to `destination`. Of several endpoints
    or replicas of a waypoint those in `avoid` (uids) come last: they could not be reached.
    """
    if destination.port in PRIVATE_PORTS and _is_own_address(source, destination.ip):
        return Refusal("CONNECT", f"{destination} is a port of this proxy")
    address = NetworkAddress(source.network, destination.ip)
    workload = store.workload_by_address(address)
    service = store.service_by_vip(address, source.namespace)
    is_service_addressed = workload is None and service is not None
    if is_service_addressed and service is not None:
        waypoint = service_waypoint(service, rng)
        if waypoint is not None:
            return _to_waypoint(waypoint, source, destination, service, store, rng, avoid)
    if service is not None:
        if service.load_balancing.mode is Mode.PASSTHROUGH:
            return _passthrough(destination, service)
        chosen = resolve_endpoint(service, destination.port, source, store, rng, avoid)
        if isinstance(chosen, Refusal):
            return chosen
        upstream = chosen
    elif workload is not None:
        upstream = Upstream(workload, destination.port, None)
    else:
        return _passthrough(destination, None)
    gateway = upstream.workload.waypoint
    if gateway is not None and not is_service_addressed and not is_waypoint(source, gateway, store):
        return _to_waypoint(gateway, source, destination, upstream.service, store, rng, avoid)
    return _direct(upstream, destination)


def plan_elsewhere(
    source: Workload,
    destination: SocketAddress,
    store: Store,
    rng: Random,
    unreached: Collection[str],
) -> OutboundPlan | None:
    """Another way for a connection whose next hops so far (uids of `unreached`) could not be
    reached, so that nothing was sent to any of them: another tunnel to another workload. None if
    there is none: a connection never leaves the tunnels for want of one.
    """
    plan = plan_outbound(source, destination, store, rng, unreached)
    if isinstance(plan, Refusal) or plan.carrier is not Carrier.HBONE or plan.workload is None:
        return None
    return None if plan.workload.uid in unreached else plan


def _is_own_address(workload: Workload, ip: str) -> bool:
    return ip in workload.addresses or is_loopback(ip)


def _passthrough(destination: SocketAddress, service: Service | None) -> OutboundPlan:
    return OutboundPlan(Carrier.TCP, NextHop(destination.ip, destination.port), service=service)


def _to_waypoint(
    gateway: GatewayAddress,
    source: Workload,
    destination: SocketAddress,
    service: Service | None,
    store: Store,
    rng: Random,
    avoid: Collection[str],
) -> OutboundPlan | Refusal:
    found = resolve_gateway(gateway, source, store, rng, avoid)
    if isinstance(found, Refusal):
        return found
    elsewhere = refuse_other_network(source, found.workload)
    if elsewhere is not None:
        return elsewhere
    families = found.service.ip_families if found.service else IpFamilies.AUTOMATIC
    requested = destination.ip
    if isinstance(gateway.destination, NetworkAddress):
        requested = gateway.destination.address
    ip = choose_address(found.workload, requested, families)
    if ip is None:
        return refuse_without_address(found.workload)
    expected = expected_identities(found)
    if isinstance(expected, Refusal):
        return expected
    return OutboundPlan(
        Carrier.HBONE,
        NextHop(ip, found.port),
        authority=str(destination),
        expected=expected,
        workload=found.workload,
        service=service,
        is_via_waypoint=True,
    )


def _direct(upstream: Upstream, destination: SocketAddress) -> OutboundPlan | Refusal:
    workload, port = upstream.workload, upstream.port
    families = upstream.service.ip_families if upstream.service else IpFamilies.AUTOMATIC
    ip = choose_address(workload, destination.ip, families)
    if workload.tunnel_protocol is TunnelProtocol.NONE:
        hop = NextHop(ip, port) if ip else NextHop(workload.hostname, port, is_hostname=True)
        if not hop.host:
            return refuse_without_address(workload)
        return OutboundPlan(Carrier.TCP, hop, workload=workload, service=upstream.service)
    if ip is None:
        return refuse_without_address(workload)
    expected = expected_identities(upstream)
    if isinstance(expected, Refusal):
        return expected
    return OutboundPlan(
        Carrier.HBONE,
        NextHop(ip, HBONE_PORT),
        authority=str(SocketAddress(ip, port)),
        expected=expected,
        workload=workload,
        service=upstream.service,
    )


# -- inbound -------------------------------------------------------------------------


def plan_inbound(
    connection: InboundConnection,
    authority: Authority,
    local: Workload,
    store: Store,
    forwarded_host: str = "",
) -> InboundPlan | Refusal:
    """How to serve a tunnel that asks this pod (`local`) for `authority`."""
    destination = connection.destination
    service: Service | None = None
    if authority.is_ip:
        if not _may_ask(authority.host, destination, local, store):
            return Refusal(
                "CONNECT",
                f"authority {authority} is not {destination.ip}, where the tunnel arrived",
                http_status=400,
            )
        port = authority.port
    else:
        named = _service_port(authority, local, store)
        if isinstance(named, Refusal):
            return named
        service, port = named
    if port in PRIVATE_PORTS:
        return Refusal("CONNECT", f"{authority} leads to a port of this proxy")
    tunnel = local.application_tunnel
    if tunnel is not None and tunnel.port:
        port = tunnel.port
        if port in PRIVATE_PORTS:
            return Refusal("CONNECT", f"the application tunnel's port {port} is this proxy's")
    sends_proxy_header = tunnel is not None and tunnel.protocol == PROXY_PROTOCOL
    if service is None:
        service = _guess_service(local, port, forwarded_host, store)
    target = SocketAddress(destination.ip, port)
    if sends_proxy_header:
        upstream = SocketAddress("::1" if ":" in destination.ip else "127.0.0.1", port)
    else:
        upstream = target
    return InboundPlan(
        upstream,
        ConnectionContext(connection.peer, connection.source.ip, target.ip, target.port),
        None if sends_proxy_header else _spoofable(connection.source.ip, upstream),
        _source_workload(connection, local, store),
        service,
        sends_proxy_header,
    )


def plan_plaintext(
    connection: InboundConnection, local: Workload, store: Store
) -> InboundPlan | Refusal:
    """How to serve a connection that came without a tunnel, to its original destination."""
    target = connection.destination
    if target.port in PRIVATE_PORTS or is_loopback(target.ip):
        return Refusal("CONNECT", f"{target} is not an address that may be captured")
    return InboundPlan(
        target,
        ConnectionContext(None, connection.source.ip, target.ip, target.port),
        _spoofable(connection.source.ip, target),
        _source_workload(connection, local, store),
        _guess_service(local, target.port, "", store),
    )


def _may_ask(ip: str, destination: SocketAddress, local: Workload, store: Store) -> bool:
    if ip == destination.ip or local.application_tunnel is not None:
        return True
    address = NetworkAddress(local.network, ip)
    workload = store.workload_by_address(address)
    if workload is not None:
        return workload.waypoint is not None and is_waypoint(local, workload.waypoint, store)
    service = store.service_by_vip(address, local.namespace)
    if service is None:
        return False
    gateways = [each.destination for each in service.weighted_waypoints]
    if service.waypoint is not None:
        gateways.append(service.waypoint)
    return any(is_waypoint(local, each, store) for each in gateways)


def _service_port(
    authority: Authority, local: Workload, store: Store
) -> tuple[Service, int] | Refusal:
    service = store.service_by_hostname(authority.host, local.namespace)
    if service is None:
        return Refusal("CONNECT", f"{authority.host} is no service that this pod can see")
    port = local.services.get(str(service.key), {}).get(authority.port)
    if not port:
        described = service.ports.get(authority.port)
        port = described.target_port if described else 0
    if not port:
        return Refusal("CONNECT", f"{authority} leads to no port of {local.namespace}/{local.name}")
    return service, port


def _spoofable(source_ip: str, upstream: SocketAddress) -> str | None:
    # A pod that calls itself must be answered by itself; the kernel refuses the other families.
    if source_ip == upstream.ip or (":" in source_ip) != (":" in upstream.ip):
        return None
    return source_ip


def _source_workload(
    connection: InboundConnection, local: Workload, store: Store
) -> Workload | None:
    """Whose address the peer has, for labels; a proven identity that disagrees wins."""
    found = store.workload_by_address(NetworkAddress(local.network, connection.source.ip))
    if found is None or connection.peer is None:
        return found
    same = (found.namespace, found.service_account) == (
        connection.peer.namespace,
        connection.peer.service_account,
    )
    return found if same else None


def _guess_service(local: Workload, port: int, forwarded_host: str, store: Store) -> Service | None:
    """Which service was probably meant, for labels only: nothing is decided by it."""
    services = list(store.services_of(local))
    for service in services:
        if forwarded_host and service.hostname.lower() == forwarded_host.lower():
            return service
    for service in services:
        if port in local.services.get(str(service.key), {}).values():
            return service
    return None
