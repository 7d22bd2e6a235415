"""Two network namespaces joined by a veth: a pod and the world outside it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute

from mesh import netns
from mesh.errors import KernelError

POD_IPS = ("10.9.0.2", "fd00:9::2")
OUTSIDE_IPS = ("10.9.0.1", "fd00:9::1")


@dataclass(frozen=True, slots=True)
class Pair:
    """Descriptors of the two namespaces."""

    pod: int
    outside: int


def prepare(fd: int) -> None:
    """Without this, the first IPv6 connection of a link waits two seconds for an address."""
    with netns.inside(fd):
        for name in ("default", "all"):
            Path(f"/proc/sys/net/ipv6/conf/{name}/accept_dad").write_text("0")


@contextlib.contextmanager
def joined() -> Iterator[Pair]:
    """A pod and its outside, both families, default route to the outside."""
    pod, outside = netns.create(), netns.create()
    try:
        prepare(pod)
        prepare(outside)
        with netns.inside(outside):
            netlink = IPRoute()
        netlink.link(
            "add", ifname="host", kind="veth", state="up", peer={"ifname": "eth0", "net_ns_fd": pod}
        )
        _address(netlink, "host", OUTSIDE_IPS)
        netlink.close()
        with netns.inside(pod):
            netlink = IPRoute()
        _address(netlink, "eth0", POD_IPS)
        for gateway in OUTSIDE_IPS:
            family = socket.AF_INET6 if ":" in gateway else socket.AF_INET
            netlink.route("add", family=family, dst="default", gateway=gateway)
        netlink.close()
        yield Pair(pod, outside)
    finally:
        os.close(pod)
        os.close(outside)


def _address(netlink: IPRoute, name: str, addresses: tuple[str, str]) -> None:
    (index,) = netlink.link_lookup(ifname=name)
    netlink.link("set", index=index, state="up")
    netlink.link("set", index=1, state="up")
    for address in addresses:
        netlink.addr("add", index=index, address=address, prefixlen=64 if ":" in address else 24)


def listen(fd: int, port: int, host: str = "::") -> socket.socket:
    """A blocking listener in a namespace, both families if the host is `::`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with netns.inside(fd):
        listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if host == "::":
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind((host, port))
    listener.listen(16)
    listener.settimeout(2)
    return listener


def dial(fd: int, host: str, port: int, timeout: float = 2.0) -> socket.socket:
    """A blocking connection out of a namespace, as an application makes it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with netns.inside(fd):
        sock = socket.socket(family)
    try:
        sock.settimeout(timeout)
        sock.connect((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def alive(one: socket.socket, other: socket.socket) -> bool:
    """Whether bytes go both ways."""
    try:
        for sender, receiver in ((one, other), (other, one)):
            sender.send(b"ping")
            if receiver.recv(4) != b"ping":
                return False
    except OSError:
        return False
    return True


# The thread's own namespace is remembered on first use; before any test counts descriptors.
with contextlib.suppress(KernelError):
    _here = netns.current()
    try:
        with netns.inside(_here):
            pass
    finally:
        os.close(_here)
