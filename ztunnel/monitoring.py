"""The node proxy's gauges: what is held at the moment when Prometheus asks.

Counted on the event loop, where the counted things live; written out in a thread. What is
counted when it happens (connections, bytes, DNS, xDS) is in `mesh.runtime.metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge

from mesh.hbone.pool import Pool
from mesh.runtime.log import AccessLog
from mesh.secrets import SecretManager, wall_clock

STATES = ("Available", "Initializing", "Unavailable", "Expired")


class Gauges:
    """`count` takes them; hand it to `mesh.runtime.admin.metrics_app`."""

    def __init__(
        self,
        registry: CollectorRegistry,
        secrets: SecretManager,
        access: AccessLog,
        pools: Callable[[], Iterable[Pool]],
        clock: Callable[[], float] = wall_clock,
    ) -> None:
        def gauge(name: str, doc: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(name, doc, labels, registry=registry)

        self._secrets = secrets
        self._access = access
        self._pools = pools
        self._clock = clock
        self._certificates = gauge(
            "ambit_certificates", "Certificates that are held or wanted", ("state",)
        )
        self._next_expiry = gauge(
            "ambit_certificate_next_expiry_seconds",
            "Seconds until the first certificate expires, negative after; 0 without any",
        )
        self._oldest = gauge(
            "ambit_certificate_oldest_age_seconds", "Age of the oldest certificate; 0 without any"
        )
        self._connections = gauge(
            "ambit_pool_connections", "Tunnel connections open to other nodes' pods"
        )
        self._tunnels = gauge("ambit_pool_tunnels", "Tunnels open on them")
        self._dropped = Counter(
            "ambit_access_log_dropped",
            "Access-log lines that nobody read fast enough",
            registry=registry,
        )
        self._dropped_before = 0

    def count(self) -> None:
        """Take the gauges of this moment. On the event loop."""
        now = self._clock()
        entries = self._secrets.entries()
        for state in STATES:
            self._certificates.labels(state).set(sum(each.state == state for each in entries))
        held = [each.certificate for each in entries if each.certificate is not None]
        self._next_expiry.set(min((each.not_after - now for each in held), default=0.0))
        self._oldest.set(max((now - each.not_before for each in held), default=0.0))
        connections = [each for pool in self._pools() for each in pool.connections]
        self._connections.set(len(connections))
        self._tunnels.set(sum(each.tunnel_count for each in connections))
        self._dropped.inc(self._access.dropped - self._dropped_before)
        self._dropped_before = self._access.dropped
