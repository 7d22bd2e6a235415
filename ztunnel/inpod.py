"""One captured pod, served from inside its network namespace.

`PodProxy` lends the pod's namespace descriptor, opens the listeners there (15001 outbound,
15006 inbound plaintext, 15008 HBONE, 15053 DNS) before anything is redirected to them, or takes
over those that an earlier proxy had, and runs the pod's tasks in one nursery: cancel it, and
every connection of the pod is cut.
Every socket in the pod carries the proxy's mark, listeners too, because accepted sockets
inherit it and the way back depends on it.

Not here: what a connection is for (`ztunnel.outbound`, `ztunnel.inbound`).
"""

from __future__ import annotations

import contextlib
import functools
import socket
from collections import Counter
from collections.abc import Mapping

import trio

from mesh import sockets
from mesh.errors import IdentityError, KernelError, Unavailable
from mesh.fiber import Fibers, in_task
from mesh.hbone.connection import TunnelConnection
from mesh.hbone.held import HeldBytes
from mesh.hbone.pool import Pool, PoolKey
from mesh.http.receive_windows import WindowBudget
from mesh.identity import SpiffeId
from mesh.model.workload import Workload
from mesh.runtime import lifecycle, log
from mesh.runtime.tracing import Kind
from mesh.sockets import PROXY_MARK
from mesh.tls.certificate import Certificate
from mesh.tls.context import verify_server_peer
from mesh.zds import Listener
from ztunnel import inbound, outbound
from ztunnel.accept import ACCEPTS_PER_TURN, OUT_OF_RESOURCES, PAUSE_SECONDS, Acceptor
from ztunnel.dns import DnsProxy, Forwarder
from ztunnel.node import Node
from ztunnel.record import Direction, Record
from ztunnel.routes import Routes
from ztunnel.workloads import Pod

WORKLOAD_SECONDS = 5.0
CERTIFICATE_SECONDS = 5.0
_DRAIN_POLL_SECONDS = 0.02

# DNS on loopback by name: answers from a wildcard socket would not match what was redirected.
_PLACES = {
    Listener.OUTBOUND: ("::", sockets.OUTBOUND_PORT),
    Listener.INBOUND_PLAINTEXT: ("::", sockets.INBOUND_PLAINTEXT_PORT),
    Listener.INBOUND_HBONE: ("::", sockets.HBONE_PORT),
    Listener.DNS_UDP: ("127.0.0.1", sockets.DNS_PORT),
    Listener.DNS_TCP: ("127.0.0.1", sockets.DNS_PORT),
    Listener.DNS_UDP_V6: ("::1", sockets.DNS_PORT),
    Listener.DNS_TCP_V6: ("::1", sockets.DNS_PORT),
}
_UDP = frozenset({Listener.DNS_UDP, Listener.DNS_UDP_V6})
_DNS = _UDP | {Listener.DNS_TCP, Listener.DNS_TCP_V6}

_log = log.get("inpod")


class PodProxy:
    """The proxy of one pod. `open` it, `run` it, `stop` it; `namespace` stays the caller's."""

    def __init__(self, node: Node, pod: Pod, namespace: int) -> None:
        self.node = node
        self.pod = pod
        self.namespace = namespace
        self.routes = Routes(node.store, node.rng)
        self.forwarder = Forwarder(node.dns_servers, namespace, node.rng)
        self.windows = WindowBudget(parent=node.windows)
        self.held = HeldBytes(whole=node.held)
        self.fibers = Fibers(node.reactor)
        self.inbound_connections: set[TunnelConnection] = set()
        self.handshakes: Counter[str] = Counter()
        """TLS handshakes in flight on 15008, by source address."""
        self.inbound_tunnels = 0
        self.pool: Pool
        self.nursery: trio.Nursery
        self.is_draining = False
        self._listeners: dict[Listener, socket.socket] = {}
        self._workload: Workload | None = None
        self._workload_version = -1
        self._serving = 0
        self._dns = DnsProxy(node, self.forwarder, lambda: self.workload)
        self._scope = trio.CancelScope()
        self._accepting = trio.CancelScope()
        self._answering = trio.CancelScope()
        self._stopped = trio.Event()

    # -- life

    def open(self, handed: Mapping[int, int] | None = None, *, shares_ports: bool = False) -> None:
        """Open every listener, or none; `handed` are lent descriptors of some, by kind.

        With `shares_ports` another proxy may listen beside us. Raises KernelError.
        """
        given = handed or {}
        try:
            for kind, (host, port) in _PLACES.items():
                if kind in _DNS and not self.node.config.dns_capture:
                    continue
                # A pod without IPv6 has no ::1 to listen on; then nothing can ask there.
                suppressed = (KernelError,) if host == "::1" and kind not in given else ()
                with contextlib.suppress(*suppressed):
                    self._listeners[kind] = self._open_one(
                        kind, host, port, given.get(kind), shares_ports=shares_ports
                    )
        except BaseException:
            self._close_listeners()
            raise

    def _open_one(
        self, kind: Listener, host: str, port: int, given: int | None, *, shares_ports: bool
    ) -> socket.socket:
        inside, mark = self.namespace, PROXY_MARK
        if given is not None:
            return sockets.adopt_listener(given, port, namespace=inside)
        if kind in _UDP:
            return sockets.open_udp(
                host, port, namespace=inside, mark=mark, shares_port=shares_ports
            )
        return sockets.open_listener(
            port, namespace=inside, host=host, mark=mark, shares_port=shares_ports
        )

    def listeners(self) -> dict[int, int]:
        """The listening sockets' descriptors by kind, lent."""
        return {kind: each.fileno() for kind, each in self._listeners.items()}

    async def run(self) -> None:
        """Serve until stopped. If cancelled: every connection of the pod is cut."""
        config = self.node.config
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self.nursery = nursery
                    self.pool = Pool(
                        self._dial,
                        nursery,
                        max_streams=config.pool_max_streams,
                        idle_seconds=config.pool_idle_seconds,
                    )
                    nursery.start_soon(self._answer_dns)
                    try:
                        await self._accept_all()
                        await trio.sleep_forever()
                    finally:
                        # Before they learn that what they use was cancelled, too.
                        self.fibers.cut()
        finally:
            self.fibers.cut()
            self._close_listeners()
            self.node.judges.forget(self._uid_or_nothing())
            self._stopped.set()

    async def stop(self) -> None:
        """Cut everything now, and wait until the namespace is no longer used."""
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self._stopped.wait()

    def stop_accepting(self, *, has_successor: bool = False) -> None:
        """Begin to drain: no new connections, no new tunnels on those that are open.

        With a successor it is the one to answer DNS from now on, too.
        """
        self.is_draining = True
        self._accepting.cancel()
        if has_successor:
            self._answering.cancel()
        for connection in tuple(self.inbound_connections):
            connection.goaway()

    async def drain(self, seconds: float, *, has_successor: bool = False) -> None:
        """Let connections finish, for at most `seconds`. Without a successor DNS is answered
        meanwhile.
        """
        self.stop_accepting(has_successor=has_successor)
        with trio.move_on_after(seconds):
            # Also those that were just accepted and are nobody's connection yet.
            while self._serving or self.fibers or (has_successor and self._dns.is_busy):  # noqa: ASYNC110 - rare
                await trio.sleep(_DRAIN_POLL_SECONDS)
            await self.node.connections.wait_empty(self.pod.uid)
        await self.pool.drain(0)

    # -- for connections

    @property
    def workload(self) -> Workload | None:
        """What the controller says this pod is: name, namespace and account must agree."""
        store = self.node.store
        if self._workload_version != store.version:
            pod, node_name = self.pod, self.node.config.node_name
            self._workload = store.workload_by_pod(
                pod.namespace, pod.name, pod.service_account, node_name
            )
            self._workload_version = store.version
        return self._workload

    async def wait_workload(self) -> Workload:
        """The pod's workload, within five seconds. Raises Unavailable."""
        found = self.workload
        if found is None:
            watch = self.node.watch
            found = await in_task(
                self.nursery, watch.wait_until, lambda: self.workload, WORKLOAD_SECONDS
            )
        if found is None:
            pod = self.pod
            raise Unavailable(
                f"no workload for pod {pod.namespace}/{pod.name} ({pod.service_account})",
                hint="ambit workloads: has the controller seen the pod?",
            )
        return found

    async def certificate(self, identity: SpiffeId) -> Certificate:
        """The certificate of a workload of this pod, within five seconds. Raises IdentityError."""
        with trio.move_on_after(CERTIFICATE_SECONDS):
            return await self.node.secrets.get(identity)
        error = self.node.secrets.last_error(identity)
        raise IdentityError(
            f"no certificate for {identity}: {error or 'the authority did not answer'}",
            hint="ambit certificates: is the control plane reachable?",
        )

    def new_record(self, direction: Direction, trace: str = "", connection_id: str = "") -> Record:
        """A record that starts now; `trace` is a W3C traceparent to take the id from, and
        `connection_id` how hops before us call the connection.
        """
        number = trace[3:35] if trace else f"{self.node.rng.getrandbits(128):032x}"
        record = Record(number, direction, trio.current_time())
        record.connection_id = connection_id or number
        tracer = self.node.tracer
        if tracer is not None:
            kind: Kind = "client" if direction == "outbound" else "server"
            name = f"ztunnel {direction}"
            record.span = tracer.start(name, kind, record.started, number, trace)
        return record

    async def _dial(self, key: PoolKey) -> TunnelConnection:
        node = self.node
        context = node.contexts.client(await self.certificate(key.source))
        try:
            sock = sockets.open_outgoing(key.address.ip, namespace=self.namespace)
        except KernelError as exc:
            raise Unavailable(f"cannot dial {key.address}: {exc}") from exc
        return await TunnelConnection.connect(
            node.reactor,
            sock,
            key.address,
            context,
            verify=lambda leaf: verify_server_peer(leaf, key.expected),
            connect_timeout=node.config.connect_timeout_seconds,
            budget=self.windows,
            held=self.held,
        )

    # -- accepting

    async def _accept_all(self) -> None:
        limit = self.node.config.max_connections_per_pod
        acceptors = [
            Acceptor(
                self.node.reactor,
                self.nursery,
                self.fibers,
                name,
                self._listeners[kind],
                functools.partial(serve, self),
                limit,
            )
            for kind, name, serve in (
                (Listener.OUTBOUND, "outbound", outbound.serve),
                (Listener.INBOUND_PLAINTEXT, "plaintext", inbound.serve_plaintext),
            )
        ]
        try:
            with self._accepting:
                await self._accept_hbone(self._listeners[Listener.INBOUND_HBONE], limit)
        finally:
            for acceptor in acceptors:
                acceptor.close()
        self._close_listeners(but_dns=True)

    async def _accept_hbone(self, listener: socket.socket, limit: int) -> None:
        slots = trio.Semaphore(limit)
        while True:
            await trio.lowlevel.wait_readable(listener)
            for _ in range(ACCEPTS_PER_TURN):
                try:
                    slots.acquire_nowait()
                except trio.WouldBlock:
                    await slots.acquire()
                try:
                    sock, _ = listener.accept()
                except OSError as exc:
                    slots.release()
                    if exc.errno in OUT_OF_RESOURCES:
                        _log.warning("accept_failed", listener="hbone", error=exc.strerror)
                        await trio.sleep(PAUSE_SECONDS)
                    break
                self._serving += 1
                self.nursery.start_soon(self._serve_hbone, sock, slots)

    async def _serve_hbone(self, sock: socket.socket, slots: trio.Semaphore) -> None:
        try:
            sock.setblocking(False)
            await lifecycle.guard("hbone", inbound.serve_hbone, self, sock)
        finally:
            # What is still open was not carried to its end: the peer must not take it for one.
            if sock.fileno() >= 0:
                sockets.reset_on_close(sock)
                sock.close()
            slots.release()
            self._serving -= 1

    # -- DNS

    async def _answer_dns(self) -> None:
        with self._answering:
            async with trio.open_nursery() as answering:
                for kind in _DNS.intersection(self._listeners):
                    listener = self._listeners[kind]
                    if kind in _UDP:
                        answering.start_soon(self._dns.serve_udp, listener, self.nursery)
                    else:
                        answering.start_soon(self._serve_dns_tcp, listener)

    async def _serve_dns_tcp(self, listener: socket.socket) -> None:
        async def serve(stream: trio.SocketStream) -> None:
            async with stream:
                await lifecycle.guard("dns", self._dns.serve_tcp, stream)

        wrapped = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        # Whoever was accepted is answered, also when no more are accepted.
        await trio.serve_listeners(serve, [wrapped], handler_nursery=self.nursery)

    def _uid_or_nothing(self) -> str:
        workload = self.workload
        return workload.uid if workload is not None else ""

    def _close_listeners(self, *, but_dns: bool = False) -> None:
        for kind, listener in self._listeners.items():
            if not (but_dns and kind in _DNS):
                listener.close()
