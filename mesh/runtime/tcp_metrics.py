"""Metrics of TCP connections, by Istio's names and labels.

Directions are as seen from the two applications, for both reporters: `received` is client to
server, `sent` is server to client. How sets of labels are bounded: `mesh.runtime.metrics`.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric
from prometheus_client.registry import Collector

from mesh.runtime.metrics import IDLE_SECONDS, MAX_LABEL_SETS, OVERFLOW, UNKNOWN

Reporter = Literal["source", "destination", "waypoint"]


@dataclass(frozen=True, slots=True)
class TcpLabels:
    """The labels of Istio's TCP metrics, in Istio's order; missing is `unknown`."""

    reporter: Reporter
    source_workload: str = UNKNOWN
    source_canonical_service: str = UNKNOWN
    source_canonical_revision: str = UNKNOWN
    source_workload_namespace: str = UNKNOWN
    source_principal: str = UNKNOWN
    source_app: str = UNKNOWN
    source_version: str = UNKNOWN
    source_cluster: str = UNKNOWN
    destination_service: str = UNKNOWN
    destination_service_namespace: str = UNKNOWN
    destination_service_name: str = UNKNOWN
    destination_workload: str = UNKNOWN
    destination_canonical_service: str = UNKNOWN
    destination_canonical_revision: str = UNKNOWN
    destination_workload_namespace: str = UNKNOWN
    destination_principal: str = UNKNOWN
    destination_app: str = UNKNOWN
    destination_version: str = UNKNOWN
    destination_cluster: str = UNKNOWN
    request_protocol: str = "tcp"
    response_flags: str = "-"
    connection_security_policy: str = UNKNOWN
    source_region: str = UNKNOWN
    source_zone: str = UNKNOWN
    destination_region: str = UNKNOWN
    destination_zone: str = UNKNOWN


_TCP_LABEL_NAMES = tuple(field.name for field in dataclasses.fields(TcpLabels))


def _values(labels: TcpLabels) -> tuple[str, ...]:
    return tuple(getattr(labels, name) or UNKNOWN for name in _TCP_LABEL_NAMES)


def tcp_directions(reporter: Reporter, to_tunnel: int, from_tunnel: int) -> tuple[int, int]:
    """(sent, received) for `TcpMetrics.bytes` from a relay's two counts.

    At the source, what goes into the tunnel is client to server; at the destination it is
    server to client. (The access log counts per viewpoint: its `bytes_sent` is always
    what went into the tunnel.)
    """
    return (from_tunnel, to_tunnel) if reporter == "source" else (to_tunnel, from_tunnel)


class _TcpSeries:
    """What was counted under one set of labels, and how much of it the registry was told."""

    __slots__ = (
        "_children",
        "_told",
        "closed",
        "failed",
        "last_used",
        "open_now",
        "opened",
        "received",
        "sent",
    )

    def __init__(self, counters: tuple[Counter, ...], values: tuple[str, ...]) -> None:
        self._children = tuple(counter.labels(*values) for counter in counters)
        self._told = [0] * len(counters)
        self.opened = self.closed = self.failed = self.sent = self.received = 0
        self.last_used = 0.0
        self.open_now = 0

    def tell(self) -> None:
        """Add to the registry's counters what was counted since the last call."""
        now = (self.opened, self.closed, self.failed, self.sent, self.received)
        for index, count in enumerate(now):
            if count != self._told[index]:
                self._children[index].inc(count - self._told[index])
                self._told[index] = count


class TcpMetrics(Collector):
    """Connections and bytes by source and destination.

    Events are counted in plain integers, a tenth of the price of the library's locked floats, and
    told to the registry when somebody reads it.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        max_label_sets: int = MAX_LABEL_SETS,
        idle_seconds: float = IDLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        def counter(name: str, doc: str) -> Counter:
            return Counter(name, doc, _TCP_LABEL_NAMES, registry=registry)

        # Collectors are asked in the order in which they were registered: we before the counters.
        registry.register(self)
        self._telling = threading.Lock()
        self._counters = (
            counter("istio_tcp_connections_opened", "TCP connections opened"),
            counter("istio_tcp_connections_closed", "TCP connections closed"),
            counter("istio_tcp_connections_failed", "TCP connections that failed to open"),
            counter("istio_tcp_sent_bytes", "Bytes from server to client"),
            counter("istio_tcp_received_bytes", "Bytes from client to server"),
        )
        self._open = Gauge(
            "istio_tcp_sockets_open", "TCP connections open now", ["reporter"], registry=registry
        )
        self._overflows = Counter(
            "ambit_metrics_overflow",
            "Events counted under the labels `overflow`, because there were too many label sets",
            registry=registry,
        )
        self._expired = Counter(
            "ambit_metrics_expired", "Label sets forgotten because idle", registry=registry
        )
        self._max = max_label_sets
        self._idle = idle_seconds
        self._clock = clock
        self._series: dict[TcpLabels, _TcpSeries] = {}
        # The same by the labels' id, because hashing 25 of them costs more than counting does.
        self._recent: dict[int, tuple[TcpLabels, _TcpSeries]] = {}
        self._next_expiry = 0.0
        self._open_now: dict[Reporter, int] = {}

    def describe(self) -> Iterable[Metric]:
        """For the registry: nothing, the counters have names of their own."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """For the registry, in the reader's thread: the counters are about to be read."""
        with self._telling:
            for series in list(self._series.values()):
                series.tell()
            for reporter, count in list(self._open_now.items()):
                self._open.labels(reporter).set(count)
        return ()

    def opened(self, labels: TcpLabels) -> None:
        """A connection was established end to end."""
        series = self._find(labels)
        series.opened += 1
        series.open_now += 1
        self._open_now[labels.reporter] += 1

    def closed(self, labels: TcpLabels) -> None:
        """A connection that was `opened` ended; `response_flags` may have changed since."""
        ended = self._find(labels)
        ended.closed += 1
        self._open_now[labels.reporter] -= 1
        series: _TcpSeries | None = ended
        if labels.response_flags != "-":
            at_open = dataclasses.replace(labels, response_flags="-")
            series = self._series.get(at_open) or self._series.get(_overflow(labels.reporter))
        if series is not None and series.open_now:
            series.open_now -= 1

    def failed(self, labels: TcpLabels) -> None:
        """A connection could not be established; `response_flags` says why."""
        self._find(labels).failed += 1

    def bytes(self, labels: TcpLabels, sent: int, received: int) -> None:
        """Add bytes: `sent` from server to client, `received` from client to server."""
        series = self._find(labels)
        series.sent += sent
        series.received += received

    def expire(self) -> int:
        """Forget label sets that have no open connection and were not touched for
        `idle_seconds`; returns how many.
        """
        now = self._clock()
        self._next_expiry = now + 1.0
        stale = [
            labels
            for labels, one in self._series.items()
            if not one.open_now and one.last_used < now - self._idle
        ]
        if stale:
            self._recent.clear()
        for labels in stale:
            del self._series[labels]
            values = _values(labels)
            for counter in self._counters:
                counter.remove(*values)
        self._expired.inc(len(stale))
        return len(stale)

    def _find(self, labels: TcpLabels) -> _TcpSeries:
        recent = self._recent.get(id(labels))
        if recent is None:
            if len(self._recent) >= 512:
                self._recent.clear()
            recent = (labels, self._series.get(labels) or self._add(labels))
            self._recent[id(labels)] = recent
        recent[1].last_used = self._clock()
        return recent[1]

    def _add(self, labels: TcpLabels) -> _TcpSeries:
        if len(self._series) >= self._max and self._clock() >= self._next_expiry:
            self.expire()  # at most once a second: it looks at every label set
        if len(self._series) >= self._max:
            self._overflows.inc()
            labels = _overflow(labels.reporter)
            found = self._series.get(labels)
            if found is not None:
                return found
        self._open_now.setdefault(labels.reporter, 0)
        series = self._series[labels] = _TcpSeries(self._counters, _values(labels))
        return series


def _overflow(reporter: Reporter) -> TcpLabels:
    rest = {name: OVERFLOW for name in _TCP_LABEL_NAMES if name != "reporter"}
    return TcpLabels(reporter=reporter, **rest)
