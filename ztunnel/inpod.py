"""One captured pod, served from inside its network namespace.

`PodProxy` lends the pod's namespace descriptor, opens the listeners there (15001 outbound,
15006 inbound plaintext, 15008 HBONE, 15053 DNS) before anything is redirected to them, and
runs the pod's tasks in one nursery: cancel it, and every connection of the pod is cut.
Every socket in the pod carries the proxy's mark, listeners too, because accepted sockets
inherit it and the way back depends on it.

Not here: what a connection is for (`ztunnel.outbound`, `ztunnel.inbound`).
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Awaitable, Callable

import trio

from mesh import sockets
from mesh.errors import IdentityError, KernelError, Unavailable
from mesh.hbone.connection import TunnelConnection
from mesh.hbone.pool import Pool, PoolKey
from mesh.identity import SpiffeId
from mesh.model.workload import Workload
from mesh.runtime import lifecycle, log
from mesh.sockets import PROXY_MARK
from mesh.tls.certificate import Certificate
from mesh.tls.context import verify_server_peer
from ztunnel import inbound, outbound
from ztunnel.dns import DnsProxy, Forwarder
from ztunnel.node import Node
from ztunnel.record import Direction, Record
from ztunnel.workloads import Pod

WORKLOAD_SECONDS = 5.0
CERTIFICATE_SECONDS = 5.0
_ACCEPTS_PER_TURN = 64
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PAUSE_SECONDS = 0.1

_log = log.get("inpod")


class PodProxy:
    """The proxy of one pod. `open` it, `run` it, `stop` it; `namespace` stays the caller's."""

    def __init__(self, node: Node, pod: Pod, namespace: int) -> None:
        self.node = node
        self.pod = pod
        self.namespace = namespace
        self.forwarder = Forwarder(node.dns_servers, namespace, node.rng)
        self.inbound_connections: set[TunnelConnection] = set()
        self.pool: Pool
        self.nursery: trio.Nursery
        self._listeners: dict[str, socket.socket] = {}
        self._dns_listeners: list[socket.socket] = []
        self._dns_sockets: list[socket.socket] = []
        self._scope = trio.CancelScope()
        self._accepting = trio.CancelScope()
        self._stopped = trio.Event()

    # -- life

    def open(self) -> None:
        """Open every listener, or none. Raises KernelError."""
        inside, mark = self.namespace, PROXY_MARK
        try:
            for name, port in (
                ("outbound", sockets.OUTBOUND_PORT),
                ("plaintext", sockets.INBOUND_PLAINTEXT_PORT),
                ("hbone", sockets.HBONE_PORT),
            ):
                self._listeners[name] = sockets.open_listener(port, namespace=inside, mark=mark)
            if self.node.config.dns_capture:
                self._open_dns("127.0.0.1")
                # A pod without IPv6 has no ::1 to listen on; then nothing can ask there.
                with contextlib.suppress(KernelError):
                    self._open_dns("::1")
        except BaseException:
            self._close_listeners()
            raise

    def _open_dns(self, host: str) -> None:
        # Loopback by name: answers from a wildcard socket would not match what was redirected.
        inside, port, mark = self.namespace, sockets.DNS_PORT, PROXY_MARK
        self._dns_sockets.append(sockets.open_udp(host, port, namespace=inside, mark=mark))
        self._dns_listeners.append(
            sockets.open_listener(port, namespace=inside, host=host, mark=mark)
        )

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
                    for dns_socket in self._dns_sockets:
                        nursery.start_soon(self._dns().serve_udp, dns_socket, nursery)
                    for listener in self._dns_listeners:
                        nursery.start_soon(self._serve_dns_tcp, self._dns(), listener)
                    await self._accept_all()
                    await trio.sleep_forever()
        finally:
            self._close_listeners()
            self.node.judges.forget(self._uid_or_nothing())
            self._stopped.set()

    async def stop(self) -> None:
        """Cut everything now, and wait until the namespace is no longer used."""
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self._stopped.wait()

    def stop_accepting(self) -> None:
        """Begin to drain: no new connections, no new tunnels on those that are open."""
        self._accepting.cancel()
        for connection in tuple(self.inbound_connections):
            connection.goaway()

    async def drain(self, seconds: float) -> None:
        """Let connections finish, for at most `seconds`; DNS is answered meanwhile."""
        self.stop_accepting()
        with trio.move_on_after(seconds):
            await self.node.connections.wait_empty(self.pod.uid)
        await self.pool.drain(0)

    # -- for connections

    @property
    def workload(self) -> Workload | None:
        """What the controller says this pod is: name, namespace and account must agree."""
        pod, node_name = self.pod, self.node.config.node_name
        return self.node.store.workload_by_pod(
            pod.namespace, pod.name, pod.service_account, node_name
        )

    async def wait_workload(self) -> Workload:
        """The pod's workload, within five seconds. Raises Unavailable."""
        found = self.workload
        if found is None:
            found = await self.node.watch.wait_until(lambda: self.workload, WORKLOAD_SECONDS)
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

    def new_record(self, direction: Direction, trace: str = "") -> Record:
        """A record that starts now; `trace` is a W3C traceparent to take the id from."""
        number = trace[3:35] if trace else f"{self.node.rng.getrandbits(128):032x}"
        return Record(number, direction, trio.current_time())

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
        )

    # -- accepting

    async def _accept_all(self) -> None:
        with self._accepting:
            async with trio.open_nursery() as accepting:
                for name, serve in (
                    ("outbound", outbound.serve),
                    ("plaintext", inbound.serve_plaintext),
                    ("hbone", inbound.serve_hbone),
                ):
                    accepting.start_soon(self._accept, name, self._listeners[name], serve)
        self._close_listeners(but_dns=True)

    async def _accept(
        self,
        name: str,
        listener: socket.socket,
        serve: Callable[[PodProxy, socket.socket], Awaitable[None]],
    ) -> None:
        slots = trio.Semaphore(self.node.config.max_connections_per_pod)
        while True:
            await trio.lowlevel.wait_readable(listener)
            for _ in range(_ACCEPTS_PER_TURN):
                await slots.acquire()
                try:
                    sock, _ = listener.accept()
                except OSError as exc:
                    slots.release()
                    if exc.errno in _OUT_OF_RESOURCES:
                        _log.warning("accept_failed", listener=name, error=exc.strerror)
                        await trio.sleep(_PAUSE_SECONDS)
                    break
                self.nursery.start_soon(self._serve_one, name, serve, sock, slots)

    async def _serve_one(
        self,
        name: str,
        serve: Callable[[PodProxy, socket.socket], Awaitable[None]],
        sock: socket.socket,
        slots: trio.Semaphore,
    ) -> None:
        try:
            sock.setblocking(False)
            await lifecycle.guard(name, serve, self, sock)
        finally:
            # What is still open was not carried to its end: the peer must not take it for one.
            if sock.fileno() >= 0:
                sockets.reset_on_close(sock)
                sock.close()
            slots.release()

    # -- DNS

    def _dns(self) -> DnsProxy:
        return DnsProxy(self.node, self.forwarder, lambda: self.workload)

    async def _serve_dns_tcp(self, dns: DnsProxy, listener: socket.socket) -> None:
        async def serve(stream: trio.SocketStream) -> None:
            async with stream:
                await lifecycle.guard("dns", dns.serve_tcp, stream)

        wrapped = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        await trio.serve_listeners(serve, [wrapped])

    def _uid_or_nothing(self) -> str:
        workload = self.workload
        return workload.uid if workload is not None else ""

    def _close_listeners(self, *, but_dns: bool = False) -> None:
        for listener in self._listeners.values():
            listener.close()
        if not but_dns:
            for each in (*self._dns_listeners, *self._dns_sockets):
                each.close()
