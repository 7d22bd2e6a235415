"""Istio's L7 metrics by its names and labels, cheap enough for every request.

A series is a few integers behind one dictionary lookup; prometheus-client sees them when it
collects, not when a request ends. Sets of labels are capped as those of `TcpMetrics` are:
beyond the cap events are counted under `overflow`, and idle series are forgotten.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

LABELS: Final = (
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "response_code",
    "grpc_response_status",
    "response_flags",
    "connection_security_policy",
)
MILLISECONDS: Final = (0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0,
                       5000.0, 10000.0, 30000.0, 60000.0, 300000.0, 600000.0, 1800000.0,
                       3600000.0)  # fmt: skip
BYTES: Final = (100.0, 1000.0, 10000.0, 100000.0, 1000000.0, 10000000.0)
MAX_SERIES: Final = 2000
IDLE_SECONDS: Final = 900.0


class Series:
    """Counts of one set of labels."""

    __slots__ = ("count", "is_forgotten", "last_used", "milliseconds", "received",
                 "request_sizes", "response_sizes", "sent", "spent")  # fmt: skip

    def __init__(self) -> None:
        self.count = 0
        self.spent = 0.0
        self.received = self.sent = 0
        self.milliseconds = [0] * (len(MILLISECONDS) + 1)
        self.request_sizes = [0] * (len(BYTES) + 1)
        self.response_sizes = [0] * (len(BYTES) + 1)
        self.last_used = 0.0
        self.is_forgotten = False
        """Nobody collects it any more: ask for the series again."""

    def add(self, milliseconds: float, received: int, sent: int, now: float) -> None:
        """One request: its time, and the bytes of both bodies."""
        self.count += 1
        self.spent += milliseconds
        self.received += received
        self.sent += sent
        self.milliseconds[bisect.bisect_left(MILLISECONDS, milliseconds)] += 1
        self.request_sizes[bisect.bisect_left(BYTES, received)] += 1
        self.response_sizes[bisect.bisect_left(BYTES, sent)] += 1
        self.last_used = now


class HttpMetrics(Collector):
    """Requests by source, destination and outcome."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        max_series: int = MAX_SERIES,
        idle_seconds: float = IDLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._series: dict[tuple[str, ...], Series] = {}
        self._max = max_series
        self._idle = idle_seconds
        self._clock = clock
        registry.register(self)

    def series(self, values: tuple[str, ...]) -> Series:
        """The counts for the values of LABELS."""
        found = self._series.get(values)
        if found is None:
            if len(self._series) >= self._max:
                self.expire()
            if len(self._series) >= self._max:
                values = (values[0], *["overflow"] * (len(LABELS) - 1))
            found = self._series.setdefault(values, Series())
        return found

    def expire(self) -> None:
        """Forget series that nobody touched for long."""
        before = self._clock() - self._idle
        for values in [v for v, one in self._series.items() if one.last_used < before]:
            self._series.pop(values).is_forgotten = True

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        requests = CounterMetricFamily("istio_requests", "Requests", labels=LABELS)
        duration = HistogramMetricFamily(
            "istio_request_duration_milliseconds", "Time of requests", labels=LABELS
        )
        received = HistogramMetricFamily(
            "istio_request_bytes", "Sizes of request bodies", labels=LABELS
        )
        sent = HistogramMetricFamily(
            "istio_response_bytes", "Sizes of response bodies", labels=LABELS
        )
        for values, one in list(self._series.items()):
            requests.add_metric(values, one.count)
            duration.add_metric(values, _buckets(MILLISECONDS, one.milliseconds), one.spent)
            received.add_metric(values, _buckets(BYTES, one.request_sizes), one.received)
            sent.add_metric(values, _buckets(BYTES, one.response_sizes), one.sent)
        yield from (requests, duration, received, sent)


def _buckets(bounds: tuple[float, ...], counts: list[int]) -> list[tuple[str, float]]:
    total = 0
    found: list[tuple[str, float]] = []
    for bound, count in zip((*bounds, float("inf")), counts, strict=True):
        total += count
        found.append(("+Inf" if bound == float("inf") else f"{bound:g}", total))
    return found
