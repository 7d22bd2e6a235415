"""Metrics by Istio's names and labels, on prometheus-client.

Two rules keep them cheap and bounded. A series' label children are looked up once per set of
labels, not once per event. And label values come from the cluster (partly from peers), so
sets of labels are capped: beyond the cap a set is folded into one whose labels say `overflow`,
and series that nobody touched for a while are forgotten.
Connections are in `mesh.runtime.tcp_metrics`, requests in `mesh.runtime.http_metrics`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import trio
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder

# `_created` doubles the series and nothing of ours reads it.
disable_created_metrics()  # type: ignore[no-untyped-call]

UNKNOWN = "unknown"
OVERFLOW = "overflow"
MAX_LABEL_SETS = 1000
MAX_URLS = 16
IDLE_SECONDS = 900.0
LAG_INTERVAL_SECONDS = 0.5
LAG_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


TerminationReason = Literal["ConnectionError", "Error", "Reconnect", "Complete"]


class XdsMetrics:
    """What the xDS client saw; `url` is a type URL."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._terminations = Counter(
            "istio_xds_connection_terminations",
            "xDS connections that ended",
            ["reason"],
            registry=registry,
        )
        self._messages = Counter(
            "istio_xds_message", "xDS responses received", ["url"], registry=registry
        )
        self._bytes = Counter(
            "istio_xds_message_bytes", "Bytes of xDS responses", ["url"], registry=registry
        )
        self._rejected = Counter(
            "ambit_xds_rejected", "xDS responses answered with NACK", ["url"], registry=registry
        )
        self._last = Gauge(
            "ambit_xds_last_message_timestamp_seconds",
            "When the last response came, Unix seconds",
            ["url"],
            registry=registry,
        )
        self._connected = Gauge(
            "ambit_xds_connected", "1 while the control plane is connected", registry=registry
        )
        age = Gauge(
            "ambit_xds_age_seconds",
            "Seconds since the control plane said anything; since the start before that",
            registry=registry,
        )
        self._urls: set[str] = set()
        self._heard = time.monotonic()
        age.set_function(lambda: time.monotonic() - self._heard)

    def connected(self) -> None:
        """A connection to the control plane is open."""
        self._connected.set(1)

    def terminated(self, reason: TerminationReason) -> None:
        """The connection to the control plane ended, or could not be opened."""
        self._connected.set(0)
        self._terminations.labels(reason).inc()

    def message(self, url: str, size_bytes: int) -> None:
        """One response arrived."""
        url = self._bounded(url)
        self._messages.labels(url).inc()
        self._bytes.labels(url).inc(size_bytes)
        self._last.labels(url).set_to_current_time()
        self._heard = time.monotonic()

    def rejected(self, url: str) -> None:
        """One response was answered with NACK."""
        self._rejected.labels(self._bounded(url)).inc()

    def _bounded(self, url: str) -> str:
        """The first few as they are: a server may write anything there."""
        if url not in self._urls and len(self._urls) >= MAX_URLS:
            return OVERFLOW
        self._urls.add(url)
        return url


@dataclass(frozen=True, slots=True)
class DnsLabels:
    """Labels of the DNS metrics."""

    request_query_type: str
    request_protocol: Literal["udp", "tcp"]
    source_canonical_service: str = UNKNOWN
    source_canonical_revision: str = UNKNOWN


class DnsMetrics:
    """Questions to the DNS capture and to its upstream resolvers; bounded as `TcpMetrics`."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        max_label_sets: int = MAX_LABEL_SETS,
        idle_seconds: float = IDLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        names = tuple(field.name for field in dataclasses.fields(DnsLabels))

        def counter(name: str, doc: str) -> Counter:
            return Counter(name, doc, names, registry=registry)

        self._requests = counter("istio_dns_requests", "DNS questions received")
        self._upstream = counter("istio_dns_upstream_requests", "Questions forwarded upstream")
        self._failures = counter(
            "istio_dns_upstream_failures", "Forwarded questions without an answer"
        )
        self._on_demand = counter(
            "istio_on_demand_dns", "Endpoints known by name that were looked up for a connection"
        )
        self._seconds = Histogram(
            "istio_dns_upstream_request_duration_seconds",
            "Time to an upstream answer",
            names,
            buckets=(0.0005, 0.001, 0.01, 0.1, 1.0, 5.0),
            registry=registry,
        )
        self._max = max_label_sets
        self._idle = idle_seconds
        self._clock = clock
        self._last_used: dict[tuple[str, ...], float] = {}

    def request(self, labels: DnsLabels) -> None:
        """A question came in."""
        self._requests.labels(*self._values(labels)).inc()

    def upstream(self, labels: DnsLabels, seconds: float, *, failed: bool = False) -> None:
        """A question was forwarded and answered, or given up, after `seconds`."""
        values = self._values(labels)
        self._upstream.labels(*values).inc()
        self._seconds.labels(*values).observe(seconds)
        if failed:
            self._failures.labels(*values).inc()

    def on_demand(self, labels: DnsLabels) -> None:
        """The address of an endpoint that is known by name was looked up."""
        self._on_demand.labels(*self._values(labels)).inc()

    def expire(self) -> int:
        """Forget label sets that were not touched for `idle_seconds`; returns how many."""
        oldest = self._clock() - self._idle
        stale = [values for values, used in self._last_used.items() if used < oldest]
        for values in stale:
            del self._last_used[values]
            for each in (
                self._requests, self._upstream, self._failures, self._on_demand, self._seconds
            ):  # fmt: skip
                with contextlib.suppress(KeyError):  # not every question goes upstream
                    each.remove(*values)
        return len(stale)

    def _values(self, labels: DnsLabels) -> tuple[str, ...]:
        values = dataclasses.astuple(labels)
        if values not in self._last_used and len(self._last_used) >= self._max:
            values = (labels.request_query_type, labels.request_protocol, OVERFLOW, OVERFLOW)
        self._last_used[values] = self._clock()
        return values


class WorkloadManagerMetrics:
    """Proxies that run inside pods of this node."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.active = Gauge(
            "workload_manager_active_proxy_count", "Proxies running", registry=registry
        )
        self.pending = Gauge(
            "workload_manager_pending_proxy_count",
            "Proxies waiting for their workload or for a retry",
            registry=registry,
        )
        self.started = Counter(
            "workload_manager_proxies_started", "Proxies started", registry=registry
        )
        self.stopped = Counter(
            "workload_manager_proxies_stopped", "Proxies stopped", registry=registry
        )


def new_registry(component: str, version: str) -> CollectorRegistry:
    """A registry with `istio_build` and the `process_*` metrics of this process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    build = Gauge("istio_build", "Component and version", ["component", "tag"], registry=registry)
    build.labels(component, version).set(1)
    return registry


async def watch_loop_lag(
    registry: CollectorRegistry, *, interval_seconds: float = LAG_INTERVAL_SECONDS
) -> None:
    """Publish how late the event loop wakes a sleeper, in seconds. If cancelled: ends."""
    lag = Histogram(
        "ambit_event_loop_lag_seconds",
        "How late timers are",
        buckets=LAG_BUCKETS,
        registry=registry,
    )
    worst = Gauge(
        "ambit_event_loop_lag_max_seconds", "Worst lateness since the start", registry=registry
    )
    highest = 0.0
    while True:
        due = trio.current_time() + interval_seconds
        await trio.sleep_until(due)
        late = max(0.0, trio.current_time() - due)
        highest = max(highest, late)
        lag.observe(late)
        worst.set(highest)


class Expiring(Protocol):
    """Metrics whose label sets are forgotten."""

    def expire(self) -> int:
        """Forget idle ones; returns how many."""
        ...


async def expire_idle(*metrics: Expiring, interval_seconds: float = 60.0) -> None:
    """Forget idle label sets once a minute. If cancelled: ends."""
    while True:
        await trio.sleep(interval_seconds)
        for one in metrics:
            one.expire()


def render(registry: CollectorRegistry, accept: str = "") -> tuple[bytes, str]:
    """The exposition and its content type; OpenMetrics when the `Accept` header asks for it.

    Large registries take tens of milliseconds: call it in a worker thread.
    """
    encoder, content_type = choose_encoder(accept)
    return encoder(registry), content_type
