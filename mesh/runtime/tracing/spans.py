"""Spans of the data plane: whether there is one is decided first, and what is not sampled costs
one comparison and no object. No OpenTelemetry here.

A finished span goes into a bounded queue; `Tracer.run` hands batches of it to an exporter, which
works in a thread or in trio. A collector that is slow or gone fills the queue; what does
not fit is dropped and counted. Nothing that carries traffic ever waits.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import trio
from prometheus_client import CollectorRegistry, Counter

from mesh.errors import MeshError
from mesh.runtime import log
from mesh.runtime.tracing.settings import TracingSettings, sampling_ratio

Value: TypeAlias = str | int | float | bool
Kind: TypeAlias = Literal["client", "server", "internal"]
FLUSH_SECONDS = 2.0
MAX_EVENTS = 32
_LOW_64_BITS = (1 << 64) - 1
_FIRST = 53  # of the flags in a traceparent
_log = log.get("tracing")


@dataclass(frozen=True, slots=True)
class Sampler:
    """Which traces are recorded: those whose low 64 bits are below `bound`, unless a parent
    decided already and `follows_parent`. As OpenTelemetry's TraceIdRatioBased and ParentBased.
    """

    bound: int
    follows_parent: bool

    @classmethod
    def of(cls, settings: TracingSettings) -> Sampler:
        """The sampler that settings ask for."""
        follows = settings.traces_sampler in ("",) or settings.traces_sampler.startswith("parent")
        return cls(round(sampling_ratio(settings) * (1 << 64)), follows)

    def is_sampled(self, trace_id: str, parent: str = "") -> bool:
        """`trace_id` is 32 hex digits, `parent` a valid W3C traceparent or empty."""
        if parent and self.follows_parent:
            return bool(int(parent[_FIRST:], 16) & 1)
        return int(trace_id[16:], 16) < self.bound


@dataclass(slots=True)
class Span:
    """One sampled span. Ids are hex; times in nanoseconds since the epoch.

    `started` is the trio time that `start_ns` corresponds to.
    """

    tracer: Tracer
    name: str
    kind: Kind
    trace_id: str
    span_id: str
    parent_id: str
    started: float
    start_ns: int
    end_ns: int = 0
    error: str | None = None
    attributes: dict[str, Value] = field(default_factory=dict)
    events: list[tuple[str, int, Mapping[str, Value]]] = field(default_factory=list)
    links: tuple[str, ...] = ()

    @property
    def traceparent(self) -> str:
        """The context for whom we call."""
        return f"00-{self.trace_id}-{self.span_id}-01"

    def at(self, now: float) -> int:
        """A trio time as nanoseconds since the epoch."""
        return self.start_ns + round((now - self.started) * 1e9)

    def event(self, name: str, now: float, **attributes: Value) -> None:
        """Something happened at `now` (trio time); of very many the first are kept."""
        if len(self.events) < MAX_EVENTS:
            self.events.append((name, self.at(now), attributes))

    def end(self, now: float, attributes: Mapping[str, Value], error: str = "") -> None:
        """It is over at `now` (trio time), badly if there is an `error`. Only once."""
        if self.end_ns:
            return
        self.end_ns = self.at(now)
        self.attributes.update(attributes)
        self.error = error or None
        self.tracer.finished(self)


class Exporter(Protocol):
    """The way out."""

    async def export(self, spans: Sequence[Span]) -> None:
        """Deliver a batch. Raises MeshError. If cancelled: given up."""
        ...

    def close(self) -> None:
        """No more comes."""
        ...


class Tracer:
    """Makes spans, and exports them while `run` runs."""

    def __init__(
        self,
        settings: TracingSettings,
        exporter: Exporter,
        registry: CollectorRegistry,
        rng: random.Random | None = None,
    ) -> None:
        self._sampler = Sampler.of(settings)
        self._exporter = exporter
        self._queue: deque[Span] = deque()
        self._limit = settings.queue
        self._batch = settings.batch
        self._delay = (settings.span_delay_ms or 5000) / 1000
        self._timeout = (settings.span_export_timeout_ms or 30_000) / 1000
        self._wake = trio.Event()
        self._rng = rng if rng is not None else random.Random()  # noqa: S311 - ids, no secrets
        self._is_failing = False
        spans = Counter(
            "ambit_trace_spans",
            "Spans: exported, dropped because the queue was full, or failed to be delivered",
            ["outcome"],
            registry=registry,
        )
        self._exported, self._dropped, self._failed = (
            spans.labels(each) for each in ("exported", "dropped", "failed")
        )

    def start(
        self, name: str, kind: Kind, started: float, trace_id: str, parent: str = ""
    ) -> Span | None:
        """A span that began at `started` (trio time), or None if it is not sampled.

        `trace_id` is 32 hex digits; `parent` a valid W3C traceparent of that trace, or empty.
        """
        if not self._sampler.is_sampled(trace_id, parent):
            return None
        since = trio.current_time() - started
        return Span(
            self,
            name,
            kind,
            trace_id,
            f"{self._rng.getrandbits(64) or 1:016x}",
            parent[36:52],
            started,
            time.time_ns() - round(since * 1e9),
        )

    def finished(self, span: Span) -> None:
        """Called by `Span.end`."""
        if len(self._queue) >= self._limit:
            self._dropped.inc()
            return
        self._queue.append(span)
        if len(self._queue) >= self._batch:
            self._wake.set()

    async def run(self) -> None:
        """Export, for ever. If cancelled: what waits gets a moment, then it is dropped."""
        try:
            while True:
                with trio.move_on_after(self._delay):
                    await self._wake.wait()
                await self._export_all()
                self._wake = trio.Event()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + FLUSH_SECONDS):
                await trio.lowlevel.checkpoint()
                await self._export_all()
            self._exporter.close()

    async def _export_all(self) -> None:
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(self._batch, len(self._queue)))]
            outcome = self._failed
            try:
                with trio.fail_after(self._timeout):
                    await self._exporter.export(batch)
                outcome = self._exported
                self._tell(None)
            except trio.TooSlowError:
                self._tell(f"no answer within {self._timeout:g} s")
            except MeshError as exc:
                self._tell(str(exc))
            finally:
                outcome.inc(len(batch))

    def _tell(self, error: str | None) -> None:
        """Once when it begins to fail and once when it works again: not once per batch."""
        if error is not None and not self._is_failing:
            _log.warning("trace_export_failed", error=error, waiting=len(self._queue))
        elif error is None and self._is_failing:
            _log.info("trace_export_recovered")
        self._is_failing = error is not None


def open_tracer(
    settings: TracingSettings,
    service: str,
    resource: Mapping[str, str],
    registry: CollectorRegistry,
) -> Tracer | None:
    """A tracer as `settings` say, or None when no traces are wanted; then nothing is imported.

    `service` names the daemon where OTEL_SERVICE_NAME does not; `resource` says more about
    it. Raises ConfigError.
    """
    if not settings.makes_traces:
        return None
    from mesh.runtime.tracing.otlp import open_exporter  # 7 MiB and 0.2 s, so only now

    return Tracer(settings, open_exporter(settings, service, resource), registry)
