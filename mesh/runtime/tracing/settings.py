"""What the standard OTEL_* variables say about traces (OpenTelemetry specification, "Environment
Variable Specification" and "OTLP Exporter Configuration"). Values only.

A variable that is set to nothing counts as not set, as the specification has it; what it calls
a warning is a refusal to start here: a misspelt sampler would otherwise sample everything.
"""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass

from mesh.errors import ConfigError
from mesh.runtime.config import setting

DEFAULT_SAMPLER = "parentbased_always_on"
SAMPLERS = (
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
)
HTTP = "http/protobuf"
GRPC = "grpc"
TRACES_PATH = "/v1/traces"
DEFAULT_QUEUE = 2048
DEFAULT_BATCH = 512
_KEY = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z/-]+")


@dataclass(frozen=True, slots=True)
class TracingSettings:
    """A daemon's configuration inherits this. Raises ConfigError for values that disagree."""

    otlp_endpoint: str = setting(
        env="OTEL_EXPORTER_OTLP_ENDPOINT",
        default="",
        doc="Base URL of an OTLP collector; traces are made when there is one.",
    )
    otlp_traces_endpoint: str = setting(
        env="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        default="",
        doc="Full URL for traces, in place of the base URL.",
    )
    otlp_protocol: str = setting(
        env=("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"),
        default=HTTP,
        doc="How to speak to the collector.",
        choices=("", HTTP, GRPC),
    )
    otlp_headers: str = setting(
        env=("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"),
        default="",
        doc="Headers for the collector: `name=value,name=value`.",
        is_secret=True,
    )
    otlp_certificate: str = setting(
        env=("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE"),
        default="",
        doc="Root of the collector's certificate (a file); by default the system's.",
    )
    otlp_timeout_ms: int | None = setting(
        env=("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"),
        default=10_000,
        doc="How long one export may take, in milliseconds.",
    )
    traces_exporter: str = setting(
        env="OTEL_TRACES_EXPORTER",
        default="otlp",
        doc="`none` makes no traces.",
        choices=("", "otlp", "none"),
    )
    traces_sampler: str = setting(
        env="OTEL_TRACES_SAMPLER",
        default=DEFAULT_SAMPLER,
        doc="Which connections are traced.",
        choices=("", *SAMPLERS),
    )
    traces_sampler_arg: str = setting(
        env="OTEL_TRACES_SAMPLER_ARG",
        default="",
        doc="The ratio for `traceidratio`, 0 to 1; by default 1.",
    )
    otel_service_name: str = setting(
        env="OTEL_SERVICE_NAME",
        default="",
        doc="What traces call this daemon; by default its name.",
    )
    otel_resource_attributes: str = setting(
        env="OTEL_RESOURCE_ATTRIBUTES",
        default="",
        doc="More about this daemon in every trace: `key=value,key=value`.",
    )
    otel_sdk_disabled: bool | None = setting(
        env="OTEL_SDK_DISABLED", default=False, doc="Make no traces, whatever else is set."
    )
    span_queue: int | None = setting(
        env="OTEL_BSP_MAX_QUEUE_SIZE",
        default=DEFAULT_QUEUE,
        doc="Spans that may wait for the collector; more are dropped and counted.",
    )
    span_batch: int | None = setting(
        env="OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
        default=None,
        doc="Spans in one export; by default 512, or the queue if that is smaller.",
    )
    span_delay_ms: int | None = setting(
        env="OTEL_BSP_SCHEDULE_DELAY",
        default=5000,
        doc="How long a span waits for company, in milliseconds.",
    )
    span_export_timeout_ms: int | None = setting(
        env="OTEL_BSP_EXPORT_TIMEOUT",
        default=30_000,
        doc="After how long an export is given up, its retries included, in milliseconds.",
    )

    def __post_init__(self) -> None:
        """Judge the values together."""
        for name in (
            "otlp_timeout_ms",
            "span_queue",
            "span_batch",
            "span_delay_ms",
            "span_export_timeout_ms",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{value} is not 1 or more", field=name)
        if self.batch > self.queue:
            raise ConfigError(
                f"{self.batch} spans in a batch do not fit into a queue of {self.queue}",
                field="span_batch",
            )
        sampling_ratio(self)
        read_pairs(self.otel_resource_attributes, "otel_resource_attributes")
        read_pairs(self.otlp_headers, "otlp_headers")
        if self.makes_traces:
            self.url()

    @property
    def makes_traces(self) -> bool:
        """Whether there is a collector, and traces are wanted."""
        has_endpoint = bool(self.otlp_endpoint or self.otlp_traces_endpoint)
        return has_endpoint and not self.otel_sdk_disabled and self.traces_exporter != "none"

    @property
    def queue(self) -> int:
        """Spans that may wait."""
        return self.span_queue or DEFAULT_QUEUE

    @property
    def batch(self) -> int:
        """Spans in one export; a small queue makes for small batches."""
        return self.span_batch or min(DEFAULT_BATCH, self.queue)

    def url(self) -> urllib.parse.SplitResult:
        """Where traces go, with a scheme and a host. Raises ConfigError."""
        field = "otlp_traces_endpoint" if self.otlp_traces_endpoint else "otlp_endpoint"
        text = self.otlp_traces_endpoint or self.otlp_endpoint
        try:
            url = urllib.parse.urlsplit(text)
            host, _ = url.hostname, url.port
        except ValueError:
            host = None
        if not host or url.scheme not in ("http", "https"):
            raise ConfigError(
                f"not a URL: {text!r}", field=field, hint="such as http://collector:4318"
            )
        if self.otlp_traces_endpoint or self.otlp_protocol == GRPC:
            return url
        return url._replace(path=url.path.rstrip("/") + TRACES_PATH)


def sampling_ratio(settings: TracingSettings) -> float:
    """The share of traces that begin here which are kept. Raises ConfigError."""
    sampler = settings.traces_sampler or DEFAULT_SAMPLER
    if sampler.endswith("always_on"):
        return 1.0
    if sampler.endswith("always_off"):
        return 0.0
    text = settings.traces_sampler_arg.strip() or "1"
    if not re.fullmatch(r"(0|1|[01]?\.[0-9]{1,18}|[0-9.]{1,18}e-[0-9]{1,2})", text):
        raise ConfigError(f"{text!r} is not a ratio from 0 to 1", field="traces_sampler_arg")
    try:
        ratio = float(text)
    except ValueError:
        ratio = 2.0
    if ratio > 1:
        raise ConfigError(f"{text!r} is not a ratio from 0 to 1", field="traces_sampler_arg")
    return ratio


def read_pairs(text: str, field: str) -> dict[str, str]:
    """`key=value,key=value` with percent-encoded values, as in W3C baggage. Raises ConfigError."""
    found = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        key, separator, value = part.partition("=")
        if not separator or not _KEY.fullmatch(key.strip()):
            raise ConfigError("is not a list of key=value", field=field)
        found[key.strip()] = urllib.parse.unquote(value.strip())
    return found
