"""Whose certificates this node will need: the identities of its own HBONE workloads.

Told of every change of the Store, it says which identities appeared and which left with
their last workload. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from mesh.errors import ConfigError
from mesh.identity import SpiffeId
from mesh.model.store import Store
from mesh.model.workload import TunnelProtocol, Workload


@dataclass(frozen=True, slots=True)
class Needs:
    """Identities to fetch certificates for, and identities whose certificates to drop."""

    fetch: tuple[SpiffeId, ...] = ()
    drop: tuple[SpiffeId, ...] = ()


class NodeIdentities:
    """The identities on `node`; nothing is ever needed when the node has no name."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._by_uid: dict[str, SpiffeId] = {}
        self._counts: Counter[SpiffeId] = Counter()

    def changed(self, uids: Iterable[str], store: Store) -> Needs:
        """What follows from a change of these workloads."""
        if not self._node:
            return Needs()
        before = set(self._counts)
        for uid in uids:
            identity = self._identity(store.workload_by_uid(uid))
            old = self._by_uid.get(uid)
            if old == identity:
                continue
            if old is not None:
                del self._by_uid[uid]
                self._counts[old] -= 1
                if not self._counts[old]:
                    del self._counts[old]
            if identity is not None:
                self._by_uid[uid] = identity
                self._counts[identity] += 1
        after = set(self._counts)
        return Needs(tuple(sorted(after - before)), tuple(sorted(before - after)))

    def _identity(self, workload: Workload | None) -> SpiffeId | None:
        if workload is None or workload.node != self._node:
            return None
        if workload.tunnel_protocol is not TunnelProtocol.HBONE and not workload.native_tunnel:
            return None
        try:
            return workload.identity
        except ConfigError:
            return None
