"""What all pods of this node share: the Store, the certificates, the reactor, the records.

No behaviour of its own beyond keeping TLS contexts as long as their certificates, and
waking those who wait for the Store to learn something.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from mesh.hbone.held import HeldBytes
from mesh.http.receive_windows import WindowBudget
from mesh.model.store import Store
from mesh.reactor import Reactor
from mesh.runtime.metrics import DnsMetrics
from mesh.runtime.tracing import Tracer
from mesh.secrets import SecretManager
from mesh.sockets import SocketAddress
from mesh.tls.contexts import TlsContexts
from ztunnel.config import ZtunnelConfig
from ztunnel.connections import Connections, Judges
from ztunnel.dns_plan import Names

T = TypeVar("T")


class StoreWatch:
    """Wakes up who waits for the Store to change."""

    def __init__(self) -> None:
        self._changed = trio.Event()

    def notify(self) -> None:
        """The Store changed."""
        event, self._changed = self._changed, trio.Event()
        event.set()

    async def wait_until(self, lookup: Callable[[], T | None], seconds: float) -> T | None:
        """What `lookup` finds, now or within `seconds`; None when it never does.

        If cancelled: nothing is changed.
        """
        found = lookup()
        if found is not None:
            return found
        with trio.move_on_after(seconds):
            while found is None:
                await self._changed.wait()
                found = lookup()
        return found


@dataclass(frozen=True, slots=True)
class Node:
    """The parts that every captured pod's proxy works with."""

    config: ZtunnelConfig
    store: Store
    reactor: Reactor
    secrets: SecretManager
    judges: Judges
    connections: Connections
    dns_metrics: DnsMetrics
    names: Names
    dns_servers: tuple[SocketAddress, ...]
    windows: WindowBudget
    held: HeldBytes
    watch: StoreWatch = field(default_factory=StoreWatch)
    contexts: TlsContexts = field(default_factory=TlsContexts)
    tracer: Tracer | None = None
    # Spreads load and names traces; nothing secret depends on it.
    rng: random.Random = field(default_factory=random.Random)
