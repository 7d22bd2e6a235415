"""Carries the rules out inside a pod's network namespace, given as a descriptor.

Everything here is synchronous and waits for the kernel: call it in a worker thread, except
`generation`, which takes microseconds. Every change may be repeated. Descriptors are
borrowed. Beside the rules a pod needs, per family, one routing rule and one route, so that
the application's answers to a source-spoofing connection of the proxy are delivered to it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from mesh import netns
from mesh.errors import KernelError
from netconfig import connections, nft, ruleset
from netconfig.ruleset import Capture

ANSWER_MARK, MARK_MASK = 0x111, 0xFFF
ROUTE_TABLE = 100
RULE_PRIORITY = 32764
_LOOPBACK = 1
_TO_TABLE = 1
_SCOPE_HOST = 254
_ABSENT = frozenset({errno.ENOENT, errno.ESRCH, errno.ENETUNREACH})
_NO_FAMILY = frozenset({errno.EAFNOSUPPORT, errno.EOPNOTSUPP})


def capture_pod(fd: int, capture: Capture) -> None:
    """Redirect the pod's traffic to the proxy, and verify it. Listeners must be there.

    Raises KernelError, also when the rules read back differ from what was applied.
    """
    refuse_own_namespace(fd)
    text = ruleset.for_pod(capture)
    with _routing(fd) as routing:
        routing.add(ipv6=capture.ipv6)
    with netns.inside(fd):
        nft.run(text)
        found = nft.table_hash()
    if found != expected_hash(text):
        raise KernelError(
            "the rules in the pod are not those that were applied",
            command="list table",
            hint=f"compare: nsenter --net=... nft list table inet {ruleset.TABLE}",
        )


def drain_pod(fd: int, capture: Capture) -> None:
    """Capture no new connection and keep those there are. Raises KernelError."""
    refuse_own_namespace(fd)
    with netns.inside(fd):
        nft.run(ruleset.draining(capture))


def release_pod(fd: int) -> None:
    """Remove rules and routing. Raises KernelError."""
    refuse_own_namespace(fd)
    with netns.inside(fd):
        nft.run(ruleset.DELETE)
    with _routing(fd) as routing:
        routing.remove()


def rules_hash(fd: int) -> str | None:
    """The hash of the rules in the pod, None when there are none. Raises KernelError."""
    with netns.inside(fd):
        return nft.table_hash()


def is_intact(fd: int, capture: Capture) -> bool:
    """Whether rules and routing are as `capture_pod` leaves them. Raises KernelError."""
    if rules_hash(fd) != expected_hash(ruleset.for_pod(capture)):
        return False
    with _routing(fd) as routing:
        return routing.is_there(ipv6=capture.ipv6)


def foreign_nat_chains(fd: int) -> list[str]:
    """Nat chains in the pod that are not ours. Raises KernelError."""
    with netns.inside(fd):
        return nft.foreign_nat_chains()


def generation(fd: int) -> nft.Generation:
    """See `nft.generation`; never waits. Raises KernelError."""
    with netns.inside(fd):
        return nft.generation()


@functools.lru_cache(maxsize=256)
def expected_hash(text: str) -> str:
    """What `rules_hash` gives for these rules: applied in a scratch namespace and read back.

    Raises KernelError.
    """
    scratch = netns.create()
    try:
        with netns.inside(scratch):
            nft.run(text)
            found = nft.table_hash()
    finally:
        os.close(scratch)
    if found is None:
        raise KernelError("the rules left no table", command="list table")
    return found


def addresses(fd: int) -> frozenset[str]:
    """The pod's own addresses, of every interface. Raises KernelError."""
    with _routing(fd) as routing:
        return routing.addresses()


def proxied_connections(fd: int, own: frozenset[str]) -> int:
    """How many connections of the pod the proxy carries; `own` are its addresses.

    Raises KernelError.
    """
    count = 0
    # thread-self: the main thread's /proc/net would show the node's connections.
    with netns.inside(fd):
        for name in ("tcp", "tcp6"):
            with (
                contextlib.suppress(FileNotFoundError),
                Path("/proc/thread-self/net", name).open(encoding="ascii") as table,
            ):
                count += connections.count_proxied(table, own)
    return count


def refuse_own_namespace(fd: int) -> None:
    """The node's own traffic must never be captured. Raises KernelError."""
    own = os.stat("/proc/thread-self/ns/net")
    is_own = netns.identity(fd) == (own.st_dev, own.st_ino)
    if is_own:
        raise KernelError("this pod's network namespace is the node's own", command="setns")


@contextlib.contextmanager
def _routing(fd: int) -> Iterator[_Routing]:
    with netns.inside(fd):
        netlink = IPRoute()
        has_ipv6 = _has_ipv6()
    try:
        yield _Routing(netlink, has_ipv6=has_ipv6)
    except NetlinkError as exc:
        raise KernelError(f"routing: {exc}", errno=exc.code, command="netlink") from exc
    finally:
        netlink.close()


class _Routing:
    """The routing rule and route of one pod."""

    def __init__(self, netlink: Any, *, has_ipv6: bool) -> None:
        self._netlink = netlink
        self._has_ipv6 = has_ipv6

    def add(self, *, ipv6: bool) -> None:
        # A route through lo needs lo up; it belongs to the pod and is up in any normal one.
        if self._netlink.get_links(_LOOPBACK)[0].get("state") != "up":
            self._netlink.link("set", index=_LOOPBACK, state="up")
        for family in self._families(ipv6):
            with _tolerate(frozenset({errno.EEXIST})):
                self._netlink.rule("add", **_rule(family))
            self._netlink.route("replace", **_route(family))

    def remove(self) -> None:
        for family in (socket.AF_INET, socket.AF_INET6):
            steps: list[tuple[Callable[..., Any], dict[str, Any]]] = [
                (self._netlink.rule, _rule(family)),
                (self._netlink.route, _route(family)),
            ]
            for change, arguments in steps:
                with _tolerate(_ABSENT | _NO_FAMILY):
                    change("del", **arguments)

    def is_there(self, *, ipv6: bool) -> bool:
        for family in self._families(ipv6):
            has_rule = any(
                rule.get("FRA_FWMARK") == ANSWER_MARK and rule.get("FRA_TABLE") == ROUTE_TABLE
                for rule in self._netlink.get_rules(family=family)
            )
            if not has_rule:
                return False
            if not list(self._netlink.get_routes(family=family, table=ROUTE_TABLE)):
                return False
        return True

    def _families(self, ipv6: bool) -> tuple[socket.AddressFamily, ...]:
        if ipv6 and self._has_ipv6:
            return (socket.AF_INET, socket.AF_INET6)
        return (socket.AF_INET,)

    def addresses(self) -> frozenset[str]:
        return frozenset(str(message.get("IFA_ADDRESS")) for message in self._netlink.get_addr())


def _has_ipv6() -> bool:
    """Whether the calling thread's namespace has IPv6 on lo; some runtimes turn it off."""
    try:
        text = Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").read_text("ascii")
    except FileNotFoundError:
        return False
    return text.strip() == "0"


def _rule(family: int) -> dict[str, Any]:
    return {
        "family": family,
        "fwmark": ANSWER_MARK,
        "fwmask": MARK_MASK,
        "table": ROUTE_TABLE,
        "priority": RULE_PRIORITY,
        "action": _TO_TABLE,
    }


def _route(family: int) -> dict[str, Any]:
    return {
        "family": family,
        "dst": "0.0.0.0/0" if family == socket.AF_INET else "::/0",
        "oif": _LOOPBACK,
        "table": ROUTE_TABLE,
        "type": "local",
        "scope": _SCOPE_HOST,
    }


@contextlib.contextmanager
def _tolerate(numbers: frozenset[int]) -> Iterator[None]:
    try:
        yield
    except NetlinkError as exc:
        if exc.code not in numbers:
            raise
