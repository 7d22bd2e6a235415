"""The lab's address plan: who gets which address, as pure arithmetic.

    node i            172.18.0.i        fd00:172:18::i
    its pods          10.244.i.0/24     fd00:10:244:i::/64     (gateway .1 and ::1)
    control plane     172.18.0.254      fd00:172:18::fe
    cluster IPs       10.96.0.0/16      fd00:10:96::/112       (the low 16 bits agree)
    cluster DNS       10.96.0.10        fd00:10:96::a

Addresses of pods are taken round robin, so that one just released is not reused at once.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection

from mesh.errors import ConfigError

FABRIC_PREFIXES = (24, 64)
CONTROL_PLANE_IPS = ("172.18.0.254", "fd00:172:18::fe")
SERVICE_NETWORKS = ("10.96.0.0/16", "fd00:10:96::/112")
DNS_IPS = ("10.96.0.10", "fd00:10:96::a")
FIRST_POD, LAST_POD = 10, 249
# As Kubernetes does, the low band is left to addresses that people choose.
FIRST_SERVICE, LAST_SERVICE = 0x100 + 1, 0xFFFF - 1

_SERVICES4 = ipaddress.IPv4Network(SERVICE_NETWORKS[0])
_SERVICES6 = ipaddress.IPv6Network(SERVICE_NETWORKS[1])


def fabric_ips(index: int) -> tuple[str, str]:
    """A node's own addresses (its `eth0`); `index` is 1-based."""
    return f"172.18.0.{index}", f"fd00:172:18::{index}"


def pod_networks(index: int) -> tuple[str, str]:
    """The networks of a node's pods."""
    return f"10.244.{index}.0/24", f"fd00:10:244:{index}::/64"


def gateway_ips(index: int) -> tuple[str, str]:
    """A node's bridge addresses: the pods' gateway and the source of probes."""
    return f"10.244.{index}.1", f"fd00:10:244:{index}::1"


def pod_ips(index: int, number: int) -> tuple[str, str]:
    """Addresses of pod `number` on node `index`."""
    return f"10.244.{index}.{number}", f"fd00:10:244:{index}::{number:x}"


def pod_number(ipv4: str) -> int:
    """The inverse of `pod_ips` within one node."""
    return int(ipv4.rpartition(".")[2])


def next_pod_number(taken: Collection[int], cursor: int) -> int:
    """The next free number at or after `cursor`, wrapping. Raises ConfigError when full."""
    size = LAST_POD - FIRST_POD + 1
    for step in range(size):
        number = FIRST_POD + (cursor - FIRST_POD + step) % size
        if number not in taken:
            return number
    raise ConfigError(f"the node is full: {size} pods", hint="ask for more nodes with --nodes")


def mac_of(ipv4: str) -> str:
    """A MAC derived from the address: an address used again keeps its MAC, so no ARP goes stale."""
    return "0a:58:" + ":".join(f"{byte:02x}" for byte in ipaddress.IPv4Address(ipv4).packed)


def cluster_ip(number: int, family: str) -> str:
    """Cluster IP `number` (1..65534) in `IPv4` or `IPv6`."""
    return str(_SERVICES6[number] if family == "IPv6" else _SERVICES4[number])


def cluster_ip_number(address: str) -> int:
    """The low 16 bits of a cluster IP. Raises ConfigError outside the service networks."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError as exc:
        raise ConfigError(f"{address!r} is not an IP address") from exc
    network = _SERVICES4 if parsed.version == 4 else _SERVICES6
    if parsed not in network:
        raise ConfigError(f"{address} is outside the cluster IP network {network}")
    return int(parsed) - int(network.network_address)


def family_of(address: str) -> str:
    """`IPv4` or `IPv6`."""
    return "IPv6" if ":" in address else "IPv4"


def next_service_number(start: int, is_taken: Callable[[int], bool]) -> int:
    """The next number at or after `start` that nobody has. Raises ConfigError when full."""
    size = LAST_SERVICE - FIRST_SERVICE + 1
    for step in range(size):
        number = FIRST_SERVICE + (start - FIRST_SERVICE + step) % size
        if not is_taken(number):
            return number
    raise ConfigError("no cluster IP is left")
