"""What all connections of this waypoint share: the Store, our certificate, the reactor, endpoints,
timers, records. No behaviour of its own beyond starting tasks and calling back at the turn's end.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import trio

from mesh.hbone.head import Baggage
from mesh.http.receive_windows import WindowBudget
from mesh.identity import SpiffeId
from mesh.model.workload import NetworkAddress, Workload
from mesh.reactor import Reactor
from mesh.runtime import lifecycle
from mesh.runtime.tracing import Tracer
from mesh.secrets import SecretManager
from mesh.tls.contexts import TlsContexts
from waypoint.config import WaypointConfig
from waypoint.counters import Counters
from waypoint.dial import Dialler
from waypoint.filters.chain import Respond
from waypoint.record import Journal
from waypoint.timers import Timers
from waypoint.traffic import TrafficStore
from waypoint.upstream import Upstreams


class Proxy:
    """The parts that every connection works with."""

    def __init__(
        self,
        config: WaypointConfig,
        store: TrafficStore,
        reactor: Reactor,
        secrets: SecretManager,
        journal: Journal,
        counters: Counters,
        nursery: trio.Nursery,
        tracer: Tracer | None = None,
    ) -> None:
        self.config = config
        self.store = self.traffic = store
        self.reactor = reactor
        self.secrets = secrets
        self.journal = journal
        self.counters = counters
        self.tracer = tracer
        self.identity = SpiffeId(config.trust_domain, config.pod_namespace, config.service_account)
        self.contexts = TlsContexts()
        # Spreads load and names traces; nothing secret depends on it.
        self.rng = random.Random()  # noqa: S311
        self.version = 0
        self.on_change: Callable[[], None] = lambda: None
        self.is_draining = False
        # What peers may send before we take it, of all connections together.
        self.windows = WindowBudget(config.window_budget_bytes)
        self.mirrors_in_flight = self.in_flight = 0
        self.max_in_flight = config.max_active_requests or float("inf")
        self._nursery = nursery
        self._later: list[Callable[[], None]] = []
        self.timers = Timers()
        self.dialler = Dialler(self, nursery)
        self.upstreams = Upstreams(self)
        self._own: Workload | None = None
        self._own_version = -1

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def wall(self) -> float:
        """Seconds since the epoch."""
        return datetime.now(UTC).timestamp()

    def shed(self) -> Respond:
        """What a request too many is answered."""
        self.counters.shed.labels("active").inc()
        return Respond(503, flag="UO", reason="the waypoint has as many requests as it takes")

    def changed(self) -> None:
        """The Store changed: nothing derived from it holds any more."""
        self.version += 1
        self.on_change()

    def own_workload(self) -> Workload:
        """Ourselves as the control plane knows us, else as far as we know."""
        if self._own is None or self._own_version != self.version:
            config = self.config
            address = NetworkAddress(config.network, config.instance_ip)
            self._own_version = self.version
            self._own = self.store.workload_by_address(address) or Workload(
                uid="", name=config.pod_name, namespace=config.pod_namespace,
                addresses=(config.instance_ip,), network=config.network, node=config.node_name,
                trust_domain=config.trust_domain, service_account=config.service_account,
                cluster_id=config.cluster_id,
            )  # fmt: skip
        return self._own

    def baggage(self) -> Baggage:
        """What we tell the endpoints' node proxies about us."""
        own = self.own_workload()
        return Baggage(
            cluster=own.cluster_id, namespace=own.namespace, workload_type="deployment",
            workload_name=own.workload_name or self.config.gateway_name,
            service_name=own.canonical_name or self.config.gateway_name,
            service_version=own.canonical_revision or "latest",
        )  # fmt: skip

    def start(self, task: Callable[[], Awaitable[object]]) -> None:
        """A task of its own; what it lets escape is reported and ends only it."""
        self._nursery.start_soon(lifecycle.guard, "waypoint", task)

    def later(self, call: Callable[[], None]) -> None:
        """Call at the end of this turn of the reactor."""
        if not self._later:
            self.reactor.defer(self)
        self._later.append(call)

    def flush(self) -> None:
        """The turn's end."""
        calls, self._later = self._later, []
        for call in calls:
            lifecycle.call("later", call)

    def on_failed(self, error: Exception) -> None:
        """Never called: `flush` lets nothing escape."""
