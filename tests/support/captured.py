"""Captured pods in namespaces of their own, served by real PodProxies inside the test's process.

One bridge, some pods behind it, nftables rules as the node agent writes them. Applications
are plain sockets born in a pod. Only the control plane is missing: the test fills the Store
and issues the certificates. Needs CAP_SYS_ADMIN and CAP_NET_ADMIN, as root or in a user
namespace.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio
from prometheus_client import CollectorRegistry

from mesh import netns
from mesh.hbone.held import HeldBytes
from mesh.http.receive_windows import WindowBudget
from mesh.identity import SpiffeId
from mesh.model.authorization import Authorization
from mesh.model.service import Service
from mesh.model.store import Changed, Store
from mesh.model.workload import TunnelProtocol, Workload
from mesh.reactor import Reactor
from mesh.runtime.metrics import DnsMetrics
from mesh.runtime.tcp_metrics import TcpMetrics
from mesh.secrets import SecretManager
from mesh.sockets import SocketAddress
from mesh.tls.certificate import Certificate
from netconfig import kernel
from netconfig.ruleset import Capture
from tests.support.certs import CertificateAuthority, make_ca
from ztunnel.config import ZtunnelConfig
from ztunnel.connections import Connections, Judges
from ztunnel.dns_plan import Names
from ztunnel.inpod import PodProxy
from ztunnel.node import Node
from ztunnel.record import Journal
from ztunnel.workloads import Pod

GATEWAY = "10.77.0.1"


def can_make_namespaces() -> bool:
    """Whether this process may make and program network namespaces."""
    try:
        fd = netns.create()
    except Exception:
        return False
    os.close(fd)
    return True


class Notes:
    """The access log, kept."""

    def __init__(self) -> None:
        self.lines: list[dict[str, object]] = []
        self._changed = trio.Event()

    def record(self, fields: dict[str, object]) -> None:
        self.lines.append(fields)
        self._changed.set()
        self._changed = trio.Event()

    async def wait(self, **expected: object) -> dict[str, object]:
        """The first line with these values (`direction="inbound"`, ...)."""
        with trio.fail_after(30):
            while True:
                for line in self.lines:
                    if all(line.get(name) == value for name, value in expected.items()):
                        return line
                await self._changed.wait()


@dataclass
class CapturedPod:
    """A namespace with an address, and (once enrolled) its proxy."""

    name: str
    ip: str
    ip6: str
    fd: int
    proxy: PodProxy | None = None

    @property
    def uid(self) -> str:
        return f"Kubernetes//Pod/shop/{self.name}"

    def workload(self, **fields: object) -> Workload:
        defaults: dict[str, object] = {
            "service_account": self.name,
            "node": "n1",
            "canonical_name": self.name,
            "tunnel_protocol": TunnelProtocol.HBONE if self.proxy else TunnelProtocol.NONE,
        }
        return Workload(self.uid, self.name, "shop", (self.ip, self.ip6), **(defaults | fields))  # type: ignore[arg-type]

    def listen(self, port: int, host: str = "::") -> trio.SocketListener:
        """An application that listens in the pod."""
        with netns.inside(self.fd):
            sock = socket.create_server(
                (host, port), family=socket.AF_INET6, dualstack_ipv6=host == "::"
            )
        sock.setblocking(False)
        return trio.SocketListener(trio.socket.from_stdlib_socket(sock))

    async def connect(self, host: str, port: int, *, seconds: float = 30.0) -> trio.SocketStream:
        """An application in the pod that dials."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with netns.inside(self.fd):
            sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            with trio.fail_after(seconds):
                await sock.connect((host, port))
        except BaseException:
            sock.close()
            raise
        return trio.SocketStream(sock)

    def udp(self, host: str, port: int) -> trio.socket.SocketType:
        """A connected UDP socket of an application in the pod."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with netns.inside(self.fd):
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.connect((host, port))
        return trio.socket.from_stdlib_socket(sock)


@dataclass
class CapturedMesh:
    """The node, its pods, and what happened."""

    node: Node
    nursery: trio.Nursery
    bridge: int
    ca: CertificateAuthority
    notes: Notes
    registry: CollectorRegistry
    pods: list[CapturedPod] = field(default_factory=list)
    issued: list[SpiffeId] = field(default_factory=list)
    bugs: list[object] = field(default_factory=list)

    def add(self, name: str, *, enrolled: bool = True) -> CapturedPod:
        """A pod on the bridge; an enrolled one has its proxy and its rules."""
        number = 10 + len(self.pods)
        fd = _namespace()
        pod = CapturedPod(name, f"10.77.0.{number}", f"fd77::{number}", fd)
        self.pods.append(pod)
        _run(
            self.bridge,
            f"ip link add v{number} type veth peer name eth0 netns /proc/{os.getpid()}/fd/{fd}",
            f"ip link set v{number} master br0 up",
        )
        _run(
            fd,
            "ip link set lo up",
            f"ip addr add {pod.ip}/24 dev eth0",
            f"ip addr add {pod.ip6}/64 dev eth0 nodad",
            "ip link set eth0 up",
            f"ip route add default via {GATEWAY}",
            "ip -6 route add default via fd77::1",
        )
        if enrolled:
            self.enrol(pod)
        return pod

    def enrol(self, pod: CapturedPod) -> None:
        pod.proxy = PodProxy(self.node, Pod(f"uid-{pod.name}", pod.name, "shop", pod.name), pod.fd)
        pod.proxy.open()
        self.nursery.start_soon(pod.proxy.run)
        kernel.capture_pod(pod.fd, Capture())

    def know(self, *resources: Workload | Service, removed: tuple[str, ...] = ()) -> None:
        """What the controller would say about workloads and services."""
        self._changed(self.node.store.apply_addresses(resources, removed))

    def judge_by(self, *policies: Authorization, removed: tuple[str, ...] = ()) -> None:
        """What the controller would say about policies."""
        self._changed(self.node.store.apply_policies(policies, removed))

    def _changed(self, changed: Changed) -> None:
        self.node.connections.changed(changed)
        self.node.watch.notify()


def _namespace() -> int:
    fd = netns.create()
    with netns.inside(fd):
        for path in ("default", "all"):
            with open(f"/proc/sys/net/ipv6/conf/{path}/accept_dad", "w") as file:
                file.write("0")
    return fd


def _run(fd: int, *commands: str) -> None:
    for command in commands:
        with netns.inside(fd):
            subprocess.run(command.split(), check=True, capture_output=True)


@contextlib.asynccontextmanager
async def captured_mesh(
    *, dns_servers: tuple[SocketAddress, ...] = (), **settings: object
) -> AsyncIterator[CapturedMesh]:
    """A node without pods yet."""
    bridge = _namespace()
    _run(
        bridge,
        "ip link add br0 type bridge",
        f"ip addr add {GATEWAY}/24 dev br0",
        "ip addr add fd77::1/64 dev br0 nodad",
        "ip link set br0 up",
        "ip link set lo up",
    )
    ca = make_ca()
    notes = Notes()
    registry = CollectorRegistry()
    store = Store()
    issued: list[SpiffeId] = []
    bugs: list[object] = []

    async def fetch(identity: SpiffeId) -> Certificate:
        issued.append(identity)
        return ca.issue(identity).certificate()

    mesh: CapturedMesh | None = None
    try:
        with Reactor(lambda error, where: bugs.append((error, where))) as reactor:
            async with trio.open_nursery() as nursery:
                judges = Judges(store)
                connections = Connections(store, judges, Journal(notes, TcpMetrics(registry)))
                node = Node(
                    config=ZtunnelConfig(node_name="n1", **settings),  # type: ignore[arg-type]
                    store=store,
                    reactor=reactor,
                    secrets=SecretManager(fetch, rng=random.Random(1)),
                    judges=judges,
                    connections=connections,
                    dns_metrics=DnsMetrics(registry),
                    names=Names(),
                    dns_servers=dns_servers,
                    windows=WindowBudget(64 << 20),
                    held=HeldBytes(256 << 20),
                )
                nursery.start_soon(reactor.run)
                nursery.start_soon(node.secrets.run)
                nursery.start_soon(connections.run)
                mesh = CapturedMesh(node, nursery, bridge, ca, notes, registry, [], issued, bugs)
                yield mesh
                nursery.cancel_scope.cancel()
        assert not bugs
    finally:
        os.close(bridge)
        for pod in mesh.pods if mesh else ():
            os.close(pod.fd)
