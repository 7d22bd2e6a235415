"""The other side of an export: what an OTLP collector gets, read for who shows a trace."""

from __future__ import annotations

import gzip
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from mesh.errors import RemoteProtocolError


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """A span; ids in hex, `service` is the resource's `service.name`."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str


def read_export(body: bytes, coding: bytes = b"") -> list[ReceivedSpan]:
    """The spans of one `ExportTraceServiceRequest`, whose body may be compressed (`coding` is
    gzip). Raises RemoteProtocolError.
    """
    try:
        plain = gzip.decompress(body) if coding == b"gzip" else body
        request = ExportTraceServiceRequest.FromString(plain)
    except (OSError, EOFError, DecodeError) as exc:
        raise RemoteProtocolError(f"no OTLP export: {exc}") from exc
    found = []
    for resource in request.resource_spans:
        facts = {each.key: each.value.string_value for each in resource.resource.attributes}
        service = facts.get("service.name", "")
        for scope in resource.scope_spans:
            for each in scope.spans:
                ids = (each.trace_id, each.span_id, each.parent_span_id)
                found.append(ReceivedSpan(service, each.name, *(part.hex() for part in ids)))
    return found
