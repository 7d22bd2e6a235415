"""OpenTelemetry traces: settings by the standard variables, spans, and their way out by OTLP.

settings    what the OTEL_* variables say
spans       Sampler, Span, Tracer: what the data plane touches; no OpenTelemetry in it
otlp        the exporters, on the OpenTelemetry SDK; imported only when traces are on
"""

from __future__ import annotations

from mesh.runtime.tracing.settings import TracingSettings
from mesh.runtime.tracing.spans import Kind, Sampler, Span, Tracer, open_tracer

__all__ = ["Kind", "Sampler", "Span", "Tracer", "TracingSettings", "open_tracer"]
