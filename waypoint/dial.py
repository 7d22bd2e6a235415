"""Opening connections to endpoints: a tunnel to a workload of the mesh, else plain TCP.

Only that: who is dialled was decided before. The tunnel's server must prove the workload's very
identity, not just one of our trust domain.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING

import trio

from mesh.errors import Denied, KernelError, Unavailable
from mesh.hbone.connection import TunnelConnection
from mesh.hbone.head import Authority, ConnectHead
from mesh.hbone.pool import Pool, PoolKey
from mesh.model.balancing import Candidate, choose_address
from mesh.model.service import IpFamilies
from mesh.model.workload import TunnelProtocol
from mesh.sockets import SocketAddress, open_outgoing
from mesh.tls.context import verify_server_peer
from waypoint.filters.jwks import leads_to_forbidden
from waypoint.transport import SocketTransport, Transport, TunnelTransport

if TYPE_CHECKING:
    from waypoint.proxy import Proxy


class Dialler:
    """Opens transports; the tunnels' connections are pooled."""

    def __init__(self, proxy: Proxy, nursery: trio.Nursery) -> None:
        self._proxy = proxy
        self._sockets: set[SocketTransport] = set()
        self.pool = Pool(self._dial_tunnels, nursery, max_streams=proxy.config.pool_max_streams)

    async def dial(
        self, candidate: Candidate, seconds: float = 0.0, traceparent: str = ""
    ) -> Transport:
        """A transport to an endpoint's port, not started, within `seconds` (0: as configured). A
        tunnel belongs to the trace of `traceparent`, if there is one.
        Raises Unavailable, Denied, IdentityError. If cancelled: nothing is left open.
        """
        proxy, workload = self._proxy, candidate.workload
        seconds = seconds or proxy.config.connect_timeout_seconds
        ip = choose_address(workload, proxy.config.instance_ip, IpFamilies.AUTOMATIC)
        if ip is None and not workload.hostname:
            raise Unavailable(f"workload {workload.uid} has no address")
        with trio.move_on_after(seconds):
            if ip is None:
                ip = await _resolve(workload.hostname)
            if workload.tunnel_protocol is not TunnelProtocol.HBONE:
                sock = await _connect(SocketAddress(ip, candidate.port))
                return SocketTransport(proxy.reactor, sock, self._sockets)
            key = PoolKey(
                source=proxy.identity,
                expected=frozenset({workload.identity}),
                address=SocketAddress(ip, proxy.config.hbone_port),
                source_ip="",
            )
            connection = self.pool.acquire_nowait(key) or await self.pool.acquire(key)
            authority = Authority(ip, candidate.port, is_ip=True)
            head = ConnectHead(str(authority), proxy.baggage(), traceparent=traceparent)
            tunnel = connection.open_tunnel(head)
            response = await tunnel.wait_response()
            status = response.status
            if status in {401, 403}:
                raise Denied(
                    f"{workload.name} refused {authority} by policy ({status})",
                    hint="the access log of its node's proxy names the policy",
                )
            if status != 200:
                raise Unavailable(
                    f"{workload.name} could not serve {authority} ({status})",
                    hint="the access log of its node's proxy says why",
                )
            return TunnelTransport(tunnel)
        raise Unavailable(f"no connection to {workload.name} within {seconds:g} s")

    def close(self) -> None:
        """Cut whatever is open."""
        self.pool.close_all()
        for transport in list(self._sockets):
            transport.abort()

    async def _dial_tunnels(self, key: PoolKey) -> TunnelConnection:
        proxy = self._proxy
        certificate = await proxy.secrets.get(proxy.identity)
        try:
            sock = open_outgoing(key.address.ip, mark=0)
        except KernelError as exc:
            raise Unavailable(f"cannot dial {key.address}: {exc}") from exc
        return await TunnelConnection.connect(
            proxy.reactor,
            sock,
            key.address,
            proxy.contexts.client(certificate),
            verify=lambda leaf: verify_server_peer(leaf, key.expected),
            connect_timeout=proxy.config.connect_timeout_seconds,
            budget=proxy.windows,
        )


async def _resolve(hostname: str) -> str:
    """An address of what is known by name alone, an external host. By the system's resolver,
    as an absolute name: no search domain of the pod may answer for it. Raises Unavailable, also
    for a name of our own loopback, where the admin port asks nobody who they are.
    """
    try:
        found = await trio.socket.getaddrinfo(
            f"{hostname.rstrip('.')}.", None, type=socket.SOCK_STREAM
        )
    except (OSError, UnicodeError) as exc:
        raise Unavailable(f"{hostname} has no address: {exc}") from exc
    address = str(found[0][4][0])
    if leads_to_forbidden(address):
        raise Unavailable(f"{hostname} leads to {address}, where nobody may be sent")
    return address


async def _connect(address: SocketAddress) -> socket.socket:
    """Plain TCP. Raises Unavailable. If cancelled: closed."""
    try:
        sock = open_outgoing(address.ip, mark=0)
    except KernelError as exc:
        raise Unavailable(f"cannot dial {address}: {exc}") from exc
    try:
        error = sock.connect_ex(tuple(address))
        if error == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(sock)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise Unavailable(f"connect to {address}: {os.strerror(error).lower()}")
    except BaseException:
        sock.close()
        raise
    return sock
