"""Address blocks of policies, as one function each. Pure."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Callable, Iterable

from mesh.errors import ConfigError

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@functools.lru_cache(maxsize=4096)
def parse_ip(text: str) -> IpAddress | None:
    """An address, IPv4 also when it is mapped into IPv6; None when it is none."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def in_any_block(blocks: Iterable[str]) -> Callable[[str], bool]:
    """Whether an address is in one of these CIDR blocks. Raises ConfigError."""
    try:
        networks = tuple(ipaddress.ip_network(block, strict=False) for block in blocks)
    except ValueError as exc:
        raise ConfigError(str(exc), field="ipBlocks") from exc

    def matches(text: str) -> bool:
        address = parse_ip(text)
        return address is not None and any(address in network for network in networks)

    return matches
