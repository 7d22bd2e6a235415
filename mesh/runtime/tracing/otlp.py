"""Delivering spans to an OTLP collector: over HTTP by the OpenTelemetry SDK's exporter in a worker
thread, over gRPC by our own client (`mesh.grpc`), which needs no second gRPC in the process.

Imported only when traces are on. The only module that knows OpenTelemetry.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import trio
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from mesh import __version__
from mesh.errors import ConfigError, Unavailable
from mesh.grpc.client import open_channel
from mesh.grpc.codec import Method
from mesh.runtime.tracing.settings import GRPC, TracingSettings, read_pairs
from mesh.runtime.tracing.spans import Exporter, Kind, Span
from mesh.tls.context import control_plane_client

_KINDS: Mapping[Kind, SpanKind] = {
    "client": SpanKind.CLIENT,
    "server": SpanKind.SERVER,
    "internal": SpanKind.INTERNAL,
}
_SCOPE = InstrumentationScope("ambit", __version__)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_DEFAULT_PORTS = {"http": 4317, "https": 4317}
_MAX_ROOTS = 1 << 20
_SWITCH_SECONDS = 0.0005

EXPORT = Method(
    path="/opentelemetry.proto.collector.trace.v1.TraceService/Export",
    request=ExportTraceServiceRequest,
    response=ExportTraceServiceResponse,
    kind="unary",
)


def open_exporter(settings: TracingSettings, service: str, resource: Mapping[str, str]) -> Exporter:
    """The exporter that settings ask for. Raises ConfigError."""
    # Encoding runs beside the event loop, which must not wait 5 ms for each of its turns.
    sys.setswitchinterval(_SWITCH_SECONDS)
    told = read_pairs(settings.otel_resource_attributes, "otel_resource_attributes")
    name = settings.otel_service_name or told.get("service.name") or service
    described = Resource({**resource, **told, "service.name": name})
    if settings.otlp_protocol == GRPC:
        return GrpcExporter(settings, described)
    return HttpExporter(settings, described)


class HttpExporter:
    """OTLP over HTTP, protobuf. One export at a time."""

    def __init__(self, settings: TracingSettings, resource: Resource) -> None:
        self._words = _LastWords()
        self._exporter = OTLPSpanExporter(
            endpoint=settings.url().geturl(),
            headers=read_pairs(settings.otlp_headers, "otlp_headers"),
            certificate_file=settings.otlp_certificate or None,
            timeout=(settings.otlp_timeout_ms or 10_000) / 1000,
        )
        self._resource = resource
        # An export that was given up may go on in its thread: the next one waits for that.
        self._one = trio.CapacityLimiter(1)

    async def export(self, spans: Sequence[Span]) -> None:
        """Deliver a batch; retries are the SDK's. Raises Unavailable."""
        self._words.lines.clear()
        done = await trio.to_thread.run_sync(
            self._export, spans, abandon_on_cancel=True, limiter=self._one
        )
        if done is not SpanExportResult.SUCCESS:
            words = " ".join(self._words.lines)
            raise Unavailable(words or "the collector did not take the spans")

    def _export(self, spans: Sequence[Span]) -> SpanExportResult:
        return self._exporter.export([_readable(each, self._resource) for each in spans])

    def close(self) -> None:
        """End a retry that waits, too."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]


class GrpcExporter:
    """OTLP over gRPC; one connection for each batch, because batches are seconds apart."""

    def __init__(self, settings: TracingSettings, resource: Resource) -> None:
        url = settings.url()
        self._host, self._port = url.hostname or "", url.port or _DEFAULT_PORTS[url.scheme]
        self._context = None
        if url.scheme == "https":
            self._context = control_plane_client(_read_root(settings.otlp_certificate))
        self._headers = read_pairs(settings.otlp_headers, "otlp_headers")
        self._timeout = (settings.otlp_timeout_ms or 10_000) / 1000
        self._resource = resource

    async def export(self, spans: Sequence[Span]) -> None:
        """Deliver a batch, in one attempt. Raises Unavailable, GrpcError."""
        request = await trio.to_thread.run_sync(self._encode, spans)
        async with open_channel(
            self._host,
            self._port,
            self._context,
            metadata_provider=lambda: self._headers,
            connect_timeout=self._timeout,
        ) as channel:
            response = await channel.unary(EXPORT, request, timeout=self._timeout)
        rejected = response.partial_success.rejected_spans
        if rejected:
            words = response.partial_success.error_message[:200]
            raise Unavailable(f"the collector refused {rejected} spans: {words}")

    def _encode(self, spans: Sequence[Span]) -> ExportTraceServiceRequest:
        return encode_spans([_readable(each, self._resource) for each in spans])

    def close(self) -> None:
        """Nothing is kept."""


class _LastWords(logging.Handler):
    """What the SDK logs goes nowhere but here: its lines say why an export failed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=2)
        logger = logging.getLogger("opentelemetry")
        logger.propagate = False
        logger.handlers = [self]

    def emit(self, record: logging.LogRecord) -> None:
        """Remember: the last line says that it failed, the one before it why."""
        self.lines.append(record.getMessage()[:300])


def _readable(span: Span, resource: Resource) -> ReadableSpan:
    trace_id = int(span.trace_id, 16)
    context = SpanContext(trace_id, int(span.span_id, 16), is_remote=False, trace_flags=_SAMPLED)
    parent = None
    if span.parent_id:
        parent = SpanContext(trace_id, int(span.parent_id, 16), True, _SAMPLED)
    status = Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET)
    return ReadableSpan(
        span.name,
        context,
        parent,
        resource,
        span.attributes,
        [Event(name, attributes, at) for name, at, attributes in span.events],
        [Link(_linked(each)) for each in span.links],
        _KINDS[span.kind],
        status=status,
        start_time=span.start_ns,
        end_time=span.end_ns,
        instrumentation_scope=_SCOPE,
    )


@functools.lru_cache(maxsize=256)
def _linked(traceparent: str) -> SpanContext:
    _, trace_id, span_id, flags = traceparent.split("-")
    return SpanContext(int(trace_id, 16), int(span_id, 16), True, TraceFlags(int(flags, 16)))


def _read_root(path: str) -> bytes | None:
    if not path:
        return None
    try:
        with Path(path).open("rb") as file:
            return file.read(_MAX_ROOTS)
    except OSError as exc:
        raise ConfigError(
            f"{path!r} cannot be read: {exc.strerror}", field="OTEL_EXPORTER_OTLP_CERTIFICATE"
        ) from exc
