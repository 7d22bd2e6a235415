"""Addresses for hosts of ServiceEntries that bring none, so that they can be told apart. Pure.

As Istio's: one of 240.240.0.0/16 and one of 2001:2::/48 for each host, unless the entry has
`addresses`, passes through (resolution NONE), or says `networking.istio.io/enable-autoallocate-ip:
"false"`. What the status has already is kept. Everything else follows from namespace and host by
a hash, and of two that meet the older one wins: replicas and restarted controllers find the same
without asking each other, whatever order they learn of entries in.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b

from mesh.cluster.api import Ref
from mesh.cluster.entries import ServiceEntry
from mesh.cluster.inventory import Inventory

NETWORKS = (ipaddress.ip_network("240.240.0.0/16"), ipaddress.ip_network("2001:2::/48"))
ENABLE = "networking.istio.io/enable-autoallocate-ip"
#: How often another place is looked for, for one host. Full networks leave hosts without.
MAX_TRIES = 64
# Of the /48, too: the same place in both networks is easier to read.
_PLACES = (1 << 16) - 2

Assigned = tuple[tuple[str, str], ...]


class AutoAddresses:
    """What every entry is given now. `look` when one changes; `settle` tells whose changed."""

    def __init__(self) -> None:
        self._found: Mapping[Ref, Assigned] = {}
        self._is_settled = True

    def look(self) -> None:
        """An entry came, changed or went."""
        self._is_settled = False

    def of(self, entry: Ref) -> Assigned:
        """Its hosts with their addresses."""
        return self._found.get(entry, ())

    def settle(self, inventory: Inventory) -> list[Ref]:
        """Look at all entries again: any may have to leave its place to another. The time grows
        with their number, and only their own changes take it.
        """
        if self._is_settled:
            return []
        self._is_settled = True
        before, self._found = self._found, allocate(inventory.all(ServiceEntry))
        refs = before.keys() | self._found.keys()
        return sorted(ref for ref in refs if before.get(ref) != self._found.get(ref))


def is_wanted(entry: ServiceEntry) -> bool:
    """Whether an entry's hosts are given addresses."""
    enabled = entry.labels.get(ENABLE, "").lower() != "false"
    return enabled and not entry.addresses and entry.resolution != "NONE"


def allocate(entries: Iterable[ServiceEntry]) -> Mapping[Ref, Assigned]:
    """Host and address, for every entry that has any; all entries of the mesh must be given."""
    wanted = sorted(
        (each for each in entries if is_wanted(each)),
        key=lambda each: (each.created, each.namespace, each.name),
    )
    taken: set[str] = set()
    found: dict[tuple[Ref, str, int], str] = {}
    for entry, host, family in _each(wanted):
        for name, address in entry.assigned:
            is_free = address not in taken and (entry.ref, host, family) not in found
            if name == host and is_free and _is_of(address, family):
                found[entry.ref, host, family] = address
                taken.add(address)
    for entry, host, family in _each(wanted):
        if (entry.ref, host, family) not in found:
            for address in _candidates(f"{entry.namespace}/{host}", family):
                if address not in taken:
                    found[entry.ref, host, family] = address
                    taken.add(address)
                    break
    result: dict[Ref, list[tuple[str, str]]] = {}
    for entry, host, family in _each(wanted):
        if (entry.ref, host, family) in found:
            listed = result.setdefault(entry.ref, [])
            listed.append((host, found[entry.ref, host, family]))
    return {ref: tuple(listed) for ref, listed in result.items()}


def _each(entries: Iterable[ServiceEntry]) -> Iterator[tuple[ServiceEntry, str, int]]:
    for entry in entries:
        for host in dict.fromkeys(entry.hosts):
            for family in range(len(NETWORKS)):
                yield entry, host, family


def _is_of(address: str, family: int) -> bool:
    network, read = NETWORKS[family], ipaddress.ip_address(address)
    return read.version == network.version and read in network


def _candidates(key: str, family: int) -> Iterator[str]:
    base = NETWORKS[family].network_address
    for attempt in range(MAX_TRIES):
        digest = blake2b(f"{key} {attempt}".encode(), digest_size=8).digest()
        yield str(base + 1 + int.from_bytes(digest, "big") % _PLACES)
