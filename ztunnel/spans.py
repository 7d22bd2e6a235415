"""What a connection's span says: Istio's words where Istio has one, OpenTelemetry's for addresses.

The outbound end's span is the parent of the inbound end's, through the CONNECT's `traceparent`.
Values in, attributes out: pure. When there is no span, none of this is called.
"""

from __future__ import annotations

from typing import Protocol

from mesh.runtime.tracing import Span
from mesh.runtime.tracing.attributes import Attribute, party
from ztunnel.record import Ending, Record


class Dialled(Protocol):
    """The part of a tunnel connection that tells how it came about. Times in seconds."""

    dial_seconds: float
    handshake_seconds: float
    settled_at: float


def end_span(span: Span, record: Record, ending: Ending, now: float) -> None:
    """The connection of `record` is over at `now` (trio time)."""
    span.end(now, attributes(record, ending), ending.error)


def note_acquired(span: Span, connection: Dialled, asked: float, now: float) -> None:
    """A tunnel connection was had at `now`, having been asked for at `asked` (trio times)."""
    is_reused = connection.settled_at <= asked
    span.attributes["ambit.pool.wait_seconds"] = round(now - asked, 6)
    span.attributes["ambit.pool.reused"] = is_reused
    if not is_reused:
        span.attributes["ambit.dial_seconds"] = round(connection.dial_seconds, 6)
        span.attributes["ambit.handshake_seconds"] = round(connection.handshake_seconds, 6)
    span.event("pool.acquired", now)


def note_accepted(span: Span, connection: Dialled) -> None:
    """The tunnel came in over `connection`; its first one is told what the handshake took."""
    if connection.handshake_seconds:
        span.attributes["ambit.handshake_seconds"] = round(connection.handshake_seconds, 6)
        connection.handshake_seconds = 0.0


def note_dialled(span: Span, asked: float, now: float) -> None:
    """The far end of a plain connection answered at `now`, dialled at `asked` (trio times)."""
    span.attributes["ambit.dial_seconds"] = round(now - asked, 6)


def attributes(record: Record, ending: Ending) -> dict[str, Attribute]:
    """Everything that is known of a connection; what is not known is left out."""
    is_outbound = record.direction == "outbound"
    to_destination, to_source = ending.bytes_to_tunnel, ending.bytes_from_tunnel
    if not is_outbound:
        to_destination, to_source = to_source, to_destination
    service, peer = record.service, record.peer_baggage
    found: dict[str, Attribute] = {
        "ambit.connection.id": record.connection_id or record.id,
        "ambit.direction": record.direction,
        "ambit.protocol": record.protocol,
        "ambit.original_destination": record.original_destination,
        "ambit.hbone.authority": record.hbone_address,
        "ambit.policy": record.policy,
        "ambit.hint": ending.hint,
        **_address("source", record.source_address),
        **_address("destination", record.destination_address),
        **party("source", record.source, str(record.source_identity or "")),
        **party("destination", record.destination, str(record.destination_identity or "")),
        "istio.destination_service": service.hostname if service else "",
        "istio.destination_service_name": service.name if service else "",
        "istio.destination_service_namespace": service.namespace if service else "",
        "connection_security_policy": "mutual_tls" if record.is_mutual_tls else "none",
        "response_flags": ending.flag,
    }
    if record.source is None and peer is not None:
        found["istio.source_workload"] = peer.workload_name
        found["istio.source_canonical_service"] = peer.service_name
    known = {name: value for name, value in found.items() if value != ""}
    if record.rule is not None:
        known["ambit.policy.rule"] = record.rule
    known["istio.tcp_received_bytes"] = to_destination
    known["istio.tcp_sent_bytes"] = to_source
    return known


def _address(side: str, address: str) -> dict[str, Attribute]:
    """`ip:port` in OpenTelemetry's two attributes."""
    ip, _, port = address.rpartition(":")
    if not ip or not port.isdecimal():
        return {}
    return {f"{side}.address": ip.strip("[]"), f"{side}.port": int(port)}
