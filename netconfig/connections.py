"""Which connections of a pod go through the node proxy, from its /proc/net/tcp{,6}. Pure.

A proxied connection shows in the pod as one the proxy accepted (local port 15001 or 15006) or
one it opened to the application from the client's address (a local address that is not the
pod's). The tunnels themselves (15008) do not count: they are pooled and idle for minutes.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Collection, Iterable

from netconfig.ruleset import INBOUND, OUTBOUND

_PROXY_PORTS = (OUTBOUND, INBOUND)
# TIME_WAIT, CLOSE, LISTEN: nobody has anything left to lose.
_ENDED = frozenset({"06", "07", "0A"})
_FIN_WAIT2 = "05"


def count_proxied(lines: Iterable[str], own_addresses: Collection[str]) -> int:
    """How many live proxied sockets a table holds; `own_addresses` in canonical text.

    Lines that are not sockets (the heading) are passed over.
    """
    own = frozenset(own_addresses)
    count = 0
    for line in lines:
        fields = line.split(maxsplit=10)
        if len(fields) < 10 or ":" not in fields[1] or fields[3] in _ENDED:
            continue
        address, _, port = fields[1].rpartition(":")
        if fields[3] == _FIN_WAIT2 and fields[9] == "0":
            continue  # closed by its owner; the kernel only waits for the peer's FIN
        if int(port, 16) in _PROXY_PORTS or _is_foreign(parse_address(address), own):
            count += 1
    return count


def _is_foreign(address: str, own: frozenset[str]) -> bool:
    return address not in own and not ipaddress.ip_address(address).is_loopback


def parse_address(text: str) -> str:
    """The kernel's hexadecimal address in canonical text. Raises ValueError.

    It prints 32-bit words in the machine's order; IPv4-mapped addresses become IPv4.
    """
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    address = ipaddress.ip_address(packed)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)
