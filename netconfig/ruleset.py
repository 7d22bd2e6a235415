"""The nftables rules of one captured pod, as text. Pure; golden files pin every variant.

One `inet` table per pod. The text creates the table if it is absent, deletes it and makes it
anew in one transaction, so applying it is idempotent and no connection slips through between
the old rules and the new. Only the first packet of a connection is ever redirected
(`tcp flags == syn`): without that, capturing a running pod would break its open connections.

The drain ruleset is the same without the redirects. Its chains stay hooked, so connections
captured earlier keep their address translation while new ones go direct.

Never `iif`/`oif` (indices are cached process-wide by libnftables), always `iifname`/`oifname`.
Never `l4proto tcp` (looked up in a way that threads must not do at a time): `tcp` implies it.
The routing that belongs to mark 0x111 is in `netconfig.kernel`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TABLE = "ambient"
OUTBOUND, INBOUND, HBONE, DNS = 15001, 15006, 15008, 15053

#: Deletes the table whether or not it exists.
DELETE = f"table inet {TABLE}\ndelete table inet {TABLE}\n"

_MARK = "meta mark & 0xfff == 0x539"
_NO_MARK = "meta mark & 0xfff != 0x539"
_SYN = "tcp flags & (fin | syn | rst | ack) == syn"


@dataclass(frozen=True, slots=True)
class Capture:
    """What of a pod's traffic goes through the node proxy.

    `exempt` are addresses or networks whose connections reach the application directly:
    the sources of the kubelet's probes. `ipv6` False leaves IPv6 alone altogether.
    """

    dns: bool = True
    inbound: bool = True
    ipv6: bool = True
    exempt: tuple[str, ...] = ()


def for_pod(capture: Capture) -> str:
    """The text that captures a pod. Raises ValueError for an exemption that is no address."""
    return _render(capture, redirects=True)


def draining(capture: Capture) -> str:
    """The text that captures nothing new and keeps what is captured. Raises ValueError."""
    return _render(capture, redirects=False)


def _render(capture: Capture, *, redirects: bool) -> str:
    four, six = _split(capture.exempt)
    chains = [
        _chain("pre_raw", "filter hook prerouting priority raw", _pre_raw(capture)),
        _chain("out_raw", "filter hook output priority raw", _out_raw(capture)),
        _chain("pre_mangle", "filter hook prerouting priority mangle", _pre_mangle()),
        # `type route` routes again after the mark: the answer goes to the proxy through lo.
        _chain("out_mangle", "route hook output priority mangle", _out_mangle()),
        _chain("pre_nat", "nat hook prerouting priority dstnat", _pre_nat(capture, redirects)),
        # -100 and not `dstnat`: nft refuses that word in output.
        _chain("out_nat", "nat hook output priority -100", _out_nat(capture, redirects)),
    ]
    body = "\n\n".join(
        [_set("exempt4", "ipv4_addr", four) + "\n" + _set("exempt6", "ipv6_addr", six), *chains]
    )
    return f"{DELETE}table inet {TABLE} {{\n{body}\n}}\n"


def _pre_raw(capture: Capture) -> Iterable[str]:
    # Before address translation, so redirected connections are not meant: nobody outside
    # the pod may dial the proxy's private ports.
    private = (OUTBOUND, INBOUND, DNS) if capture.dns else (OUTBOUND, INBOUND)
    yield f'iifname != "lo" tcp dport {{ {", ".join(map(str, private))} }} counter drop'
    if capture.dns:
        yield f'iifname != "lo" udp dport {DNS} counter drop'
        # The proxy's own questions live in zone 1, where they cannot clash with the
        # application's redirected ones.
        yield f"udp sport 53 {_NO_MARK} ct zone set 1"


def _out_raw(capture: Capture) -> Iterable[str]:
    if capture.dns:
        yield f"udp dport 53 {_MARK} ct zone set 1"


def _pre_mangle() -> Iterable[str]:
    # The proxy's spoofed connection to the application crosses lo with its mark: remember
    # it on the connection, ...
    yield f"{_MARK} ct mark set ct mark & 0xfffff000 | 0x111"


def _out_mangle() -> Iterable[str]:
    # ... so that the application's answers find back to the proxy.
    yield "ct mark & 0xfff == 0x111 meta mark set meta mark & 0xfffff000 | 0x111"


def _pre_nat(capture: Capture, redirects: bool) -> Iterable[str]:
    yield 'iifname "lo" accept'
    if not capture.ipv6:
        yield "meta nfproto ipv6 accept"
    yield f"ip saddr @exempt4 tcp dport != {HBONE} counter accept"
    yield f"ip6 saddr @exempt6 tcp dport != {HBONE} counter accept"
    if redirects and capture.inbound:
        yield f"tcp dport != {HBONE} {_SYN} {_NO_MARK} counter redirect to :{INBOUND}"


def _out_nat(capture: Capture, redirects: bool) -> Iterable[str]:
    yield f"{_MARK} accept"
    yield 'oifname "lo" accept'
    if not capture.ipv6:
        yield "meta nfproto ipv6 accept"
    if redirects and capture.dns:
        yield f"udp dport 53 counter redirect to :{DNS}"
        yield f"tcp dport 53 {_SYN} counter redirect to :{DNS}"
    if redirects:
        yield f"{_SYN} counter redirect to :{OUTBOUND}"


def _chain(name: str, head: str, rules: Iterable[str]) -> str:
    lines = [f"        {rule}" for rule in rules]
    return "\n".join(
        [f"    chain {name} {{", f"        type {head}; policy accept;", *lines, "    }"]
    )


def _set(name: str, kind: str, elements: Sequence[str]) -> str:
    listed = f" elements = {{ {', '.join(elements)} }}" if elements else ""
    return f"    set {name} {{ type {kind}; flags interval;{listed} }}"


def _split(exempt: Iterable[str]) -> tuple[list[str], list[str]]:
    """IPv4 and IPv6 exemptions without overlaps, which an interval set would refuse."""
    four: list[ipaddress.IPv4Network] = []
    six: list[ipaddress.IPv6Network] = []
    for text in exempt:
        network = ipaddress.ip_network(text, strict=False)
        if isinstance(network, ipaddress.IPv4Network):
            four.append(network)
        else:
            six.append(network)
    return (
        [_shown(each) for each in ipaddress.collapse_addresses(four)],
        [_shown(each) for each in ipaddress.collapse_addresses(six)],
    )


def _shown(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> str:
    alone = network.prefixlen == network.max_prefixlen
    return str(network.network_address) if alone else str(network)
