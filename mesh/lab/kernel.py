"""Carries a Plan's network out: namespaces, bridges, veth pairs, addresses and routes.

    fabric namespace    bridge `fabric`, one port per node and one for the control plane
    node namespace      `eth0` on the fabric, `cbr0` with the pods' gateway addresses
    pod namespace       `eth0`, a port of its node's `cbr0`

A pod has a /32 and a /128 and reaches everything through its node, pods beside it included:
connections to a Service come back through the node that translated them. Nothing is
named outside the lab. Synchronous, by pyroute2, each call in the namespace it is about.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from mesh import netns
from mesh.errors import KernelError
from mesh.lab import addresses
from mesh.lab.topology import NodePlan, PodPlan

NO_DAD = 0x02  # IFA_F_NODAD
SCOPE_LINK = 253
FABRIC = "fabric"
POD_BRIDGE = "cbr0"

# Before any link exists: the first IPv6 connection would wait two seconds for duplicate address
# detection of the link-local address. Redirects would teach pods to go around their node.
_QUIET = {
    "net.ipv6.conf.default.accept_dad": "0",
    "net.ipv6.conf.all.accept_dad": "0",
    "net.ipv6.conf.default.router_solicitations": "0",
    "net.ipv6.conf.default.accept_ra": "0",
    "net.ipv6.conf.default.accept_redirects": "0",
    "net.ipv4.conf.default.accept_redirects": "0",
    "net.ipv4.conf.all.accept_redirects": "0",
    "net.ipv4.conf.default.send_redirects": "0",
    "net.ipv4.conf.all.send_redirects": "0",
}
# Frames on a bridge are not to be translated twice, where br_netfilter happens to be loaded:
# a pod's connection to itself through its Service would be lost.
_BRIDGE = {
    "net.bridge.bridge-nf-call-iptables": "0",
    "net.bridge.bridge-nf-call-ip6tables": "0",
    "net.bridge.bridge-nf-call-arptables": "0",
}
_ROUTER = {
    **_BRIDGE,
    "net.ipv4.ip_forward": "1",
    "net.ipv6.conf.all.forwarding": "1",
    "net.ipv4.conf.all.rp_filter": "0",
    "net.ipv4.conf.default.rp_filter": "0",
}
_POD = {"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 0"}

_HINTS = {
    errno.EOPNOTSUPP: "the kernel lacks veth or bridge: modprobe veth bridge",
    errno.EPERM: "run it as root with all capabilities, or as an ordinary user",
}


class Kernel:
    """The lab's network. Descriptors of all its namespaces belong to it, but for the pods'."""

    def __init__(self) -> None:
        self.fabric = _new_namespace({**_QUIET, **_BRIDGE})
        self.control_plane = -1
        self.nodes: dict[str, int] = {}
        self._plans: dict[str, NodePlan] = {}
        self._bridge: dict[str, int] = {}
        with _netlink(self.fabric, "fabric") as links:
            links.link("set", index=1, state="up")
            links.link("add", ifname=FABRIC, kind="bridge", br_mcast_snooping=0, state="up")
            self._fabric_index = links.link_lookup(ifname=FABRIC)[0]

    def add_control_plane(self) -> int:
        """The control plane's namespace on the fabric; its descriptor. Raises KernelError."""
        self.control_plane = _new_namespace({**_QUIET, **_POD})
        self._plug("control", self.control_plane, addresses.CONTROL_PLANE_IPS)
        return self.control_plane

    def add_node(self, node: NodePlan) -> int:
        """A node's namespace with its bridge and routes; its descriptor. Raises KernelError."""
        fd = self.nodes[node.name] = _new_namespace({**_QUIET, **_ROUTER, **_POD})
        self._plug(f"node{node.index}", fd, node.ips)
        with _netlink(fd, node.name) as links:
            # With no address of its own a bridge takes the lowest of its ports' and changes it when
            # pods come and go: pods would talk to a gateway address that is no more.
            links.link(
                "add",
                ifname=POD_BRIDGE,
                kind="bridge",
                br_mcast_snooping=0,
                state="up",
                address=addresses.mac_of(node.gateway_ips[0]),
            )
            bridge = self._bridge[node.name] = links.link_lookup(ifname=POD_BRIDGE)[0]
            for address, network in zip(
                node.gateway_ips, addresses.pod_networks(node.index), strict=True
            ):
                prefix = int(network.rpartition("/")[2])
                links.addr("add", index=bridge, address=address, prefixlen=prefix, flags=NO_DAD)
            for address in addresses.DNS_IPS:
                prefix = 128 if ":" in address else 32
                links.addr("add", index=1, address=address, prefixlen=prefix, flags=NO_DAD)
            # Cluster IPs need some route, or a connection of the node itself fails before the
            # output hook can translate it.
            for network in addresses.SERVICE_NETWORKS:
                links.route("add", dst=network, oif=bridge, **_families(network))
        for other in self._plans.values():
            self._route(fd, node.name, other)
            self._route(self.nodes[other.name], other.name, node)
        self._plans[node.name] = node
        if self.control_plane >= 0:
            self._route(self.control_plane, "control plane", node)
        return fd

    def add_pod(self, pod: PodPlan, fd: int) -> None:
        """Connect a pod's namespace `fd` to its node. Raises KernelError."""
        node = self._plans[pod.node]
        what = f"pod {pod.namespace}/{pod.name}"
        _sysctl(fd, {**_QUIET, **_POD})
        with _netlink(self.nodes[pod.node], what) as links:
            links.link(
                "add",
                ifname=link_name(pod),
                kind="veth",
                master=self._bridge[pod.node],
                state="up",
                peer={
                    "ifname": "eth0",
                    "net_ns_fd": fd,
                    "address": addresses.mac_of(pod.ips[0]),
                },
            )
        with _netlink(fd, what) as links:
            links.link("set", index=1, state="up")
            index = links.link_lookup(ifname="eth0")[0]
            links.link("set", index=index, state="up")
            for address, gateway in zip(pod.ips, node.gateway_ips, strict=True):
                prefix, everywhere = (128, "::/0") if ":" in address else (32, "0.0.0.0/0")
                links.addr("add", index=index, address=address, prefixlen=prefix, flags=NO_DAD)
                links.route("add", dst=f"{gateway}/{prefix}", oif=index, scope=SCOPE_LINK)
                links.route("add", dst=everywhere, gateway=gateway, oif=index)

    def remove_pod(self, pod: PodPlan) -> None:
        """Take a pod's link away; gone already is fine. Raises KernelError."""
        with _netlink(self.nodes[pod.node], f"pod {pod.namespace}/{pod.name}") as links:
            for index in links.link_lookup(ifname=link_name(pod)):
                links.link("del", index=index)

    def close(self) -> None:
        """Let go of every namespace; the kernel takes them apart."""
        for fd in (self.fabric, self.control_plane, *self.nodes.values()):
            if fd >= 0:
                os.close(fd)
        self.nodes.clear()
        self.fabric = self.control_plane = -1

    def _plug(self, port: str, fd: int, ips: tuple[str, str]) -> None:
        """Give a namespace an `eth0` on the fabric."""
        with _netlink(self.fabric, port) as links:
            links.link(
                "add",
                ifname=port,
                kind="veth",
                master=self._fabric_index,
                state="up",
                peer={"ifname": "eth0", "net_ns_fd": fd, "address": addresses.mac_of(ips[0])},
            )
        with _netlink(fd, port) as links:
            links.link("set", index=1, state="up")
            index = links.link_lookup(ifname="eth0")[0]
            links.link("set", index=index, state="up")
            for address, prefix in zip(ips, addresses.FABRIC_PREFIXES, strict=True):
                links.addr("add", index=index, address=address, prefixlen=prefix, flags=NO_DAD)

    def _route(self, fd: int, what: str, node: NodePlan) -> None:
        """Teach a namespace the way to the pods of `node`."""
        with _netlink(fd, what) as links:
            for network, gateway in zip(addresses.pod_networks(node.index), node.ips, strict=True):
                links.route("add", dst=network, gateway=gateway)


def link_name(pod: PodPlan) -> str:
    """The node's end of a pod's veth pair."""
    return f"pod{addresses.pod_number(pod.ips[0])}"


def _families(network: str) -> dict[str, int]:
    return {"family": 10} if ":" in network else {}


def _new_namespace(settings: Mapping[str, str]) -> int:
    fd = netns.create()
    try:
        _sysctl(fd, settings)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _sysctl(fd: int, settings: Mapping[str, str]) -> None:
    with netns.inside(fd):
        for name, value in settings.items():
            path = Path("/proc/sys", *name.split("."))
            try:
                path.write_text(value, "ascii")
            except FileNotFoundError:
                continue  # a kernel without IPv6 or without this setting
            except OSError as exc:
                raise KernelError(
                    f"sysctl {name}: {exc.strerror}", errno=exc.errno or 0, command=name
                ) from exc


@contextlib.contextmanager
def _netlink(fd: int, what: str) -> Iterator[Any]:
    """An IPRoute in the namespace `fd`; netlink's errors become KernelError."""
    try:
        # Sync pyroute2 may open its socket late, so the whole block stays inside.
        with netns.inside(fd), IPRoute() as links:
            yield links
    except NetlinkError as exc:
        reason = exc.args[1] if len(exc.args) > 1 else exc
        hint = _HINTS.get(exc.code, "")
        raise KernelError(f"{what}: netlink: {reason}", errno=exc.code, hint=hint) from exc
    except OSError as exc:
        raise KernelError(f"{what}: {exc}", errno=exc.errno or 0) from exc
    except IndexError as exc:
        raise KernelError(f"{what}: a link did not appear") from exc
