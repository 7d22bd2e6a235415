"""What a connection tells when it is over: one access-log line and one set of metrics.

`Record` gathers facts while the connection lives; `Journal` writes them, exactly once.
Field and label names are Istio's. The log counts bytes by viewpoint (`bytes_sent` is what
this end put into the tunnel), the metrics by application (`received` is client to server).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from mesh.hbone.head import Baggage
from mesh.identity import SpiffeId
from mesh.model.service import Service
from mesh.model.workload import Workload
from mesh.runtime.metrics import UNKNOWN
from mesh.runtime.tcp_metrics import TcpLabels, tcp_directions
from mesh.runtime.tracing import Span

Direction = Literal["inbound", "outbound"]
_MAX_KNOWN = 256


class AccessSink(Protocol):
    """Where access-log lines go."""

    def record(self, fields: dict[str, object]) -> None:
        """Queue one line."""
        ...


class TcpSink(Protocol):
    """Where the TCP metrics go."""

    def opened(self, labels: TcpLabels) -> None:
        """A connection was established."""
        ...

    def closed(self, labels: TcpLabels) -> None:
        """It ended."""
        ...

    def failed(self, labels: TcpLabels) -> None:
        """It could not be established."""
        ...

    def bytes(self, labels: TcpLabels, sent: int, received: int) -> None:
        """Bytes by application direction."""
        ...


class Record:
    """One connection's facts. `started` is a monotonic time in seconds.

    `counters` gives (bytes into the tunnel, bytes out of it) while the relay runs.
    """

    __slots__ = (
        "_parties",
        "_reported",
        "connection_id",
        "counters",
        "destination",
        "destination_address",
        "destination_identity",
        "direction",
        "hbone_address",
        "id",
        "is_finished",
        "is_mutual_tls",
        "is_open",
        "original_destination",
        "peer_baggage",
        "policy",
        "protocol",
        "rule",
        "service",
        "source",
        "source_address",
        "source_identity",
        "span",
        "started",
    )

    def __init__(
        self,
        id: str,  # noqa: A002 - what the log calls it
        direction: Direction,
        started: float,
        *,
        source_address: str = "",
        destination_address: str = "",
        original_destination: str = "",
        hbone_address: str = "",
        protocol: str = "TCP",
        source: Workload | None = None,
        destination: Workload | None = None,
        service: Service | None = None,
        source_identity: SpiffeId | None = None,
        destination_identity: SpiffeId | None = None,
        peer_baggage: Baggage | None = None,
        is_mutual_tls: bool = False,
        policy: str = "",
        rule: int | None = None,
        connection_id: str = "",
    ) -> None:
        self.id = id
        self.direction = direction
        self.started = started
        self.source_address = source_address
        self.destination_address = destination_address
        self.original_destination = original_destination
        self.hbone_address = hbone_address
        self.protocol = protocol
        self.source = source
        self.destination = destination
        self.service = service
        self.source_identity = source_identity
        self.destination_identity = destination_identity
        self.peer_baggage = peer_baggage
        self.is_mutual_tls = is_mutual_tls
        self.policy = policy
        self.rule = rule
        self.connection_id = connection_id
        self.span: Span | None = None
        self.counters: Callable[[], tuple[int, int]] | None = None
        self.is_open = False
        self.is_finished = False
        self._reported = (0, 0)
        self._parties: _Parties | None = None

    @property
    def labels(self) -> TcpLabels:
        """The metrics' labels; fixed once the connection is open."""
        return self.parties.labels

    @property
    def parties(self) -> _Parties:
        """What is told of both ends; fixed once the connection is open."""
        if self._parties is None or not self.is_open:
            self._parties = _parties(self)
        return self._parties

    def unreported(self, to_tunnel: int, from_tunnel: int) -> tuple[int, int]:
        """What was added since the last call."""
        before = self._reported
        self._reported = (to_tunnel, from_tunnel)
        return to_tunnel - before[0], from_tunnel - before[1]


class Ending:
    """How a connection ended; `error` is empty after an orderly end of both directions."""

    __slots__ = ("bytes_from_tunnel", "bytes_to_tunnel", "error", "flag", "hint")

    def __init__(
        self,
        flag: str = "-",
        error: str = "",
        hint: str = "",
        bytes_to_tunnel: int = 0,
        bytes_from_tunnel: int = 0,
    ) -> None:
        self.flag = flag
        self.error = error
        self.hint = hint
        self.bytes_to_tunnel = bytes_to_tunnel
        self.bytes_from_tunnel = bytes_from_tunnel


class Journal:
    """Writes records: `opened` when bytes may flow, `finished` once, `progress` in between."""

    def __init__(
        self,
        access: AccessSink,
        metrics: TcpSink,
        end_span: Callable[[Span, Record, Ending, float], None] = lambda *_: None,
    ) -> None:
        self._access = access
        self._metrics = metrics
        self._end_span = end_span

    def opened(self, record: Record) -> None:
        """Established end to end."""
        labels = record.labels
        record.is_open = True
        self._metrics.opened(labels)

    def progress(self, record: Record) -> None:
        """Report the bytes so far, so that long connections show up before they end."""
        if record.is_open and not record.is_finished and record.counters is not None:
            self._add_bytes(record, *record.counters())

    def finished(self, record: Record, ending: Ending, now: float) -> None:
        """The end. A second call is ignored: the first one knew best."""
        if record.is_finished:
            return
        labels = record.labels
        if ending.flag != labels.response_flags:
            labels = replace(labels, response_flags=ending.flag)
        if record.is_open:
            self._add_bytes(record, ending.bytes_to_tunnel, ending.bytes_from_tunnel)
            self._metrics.closed(labels)
        else:
            self._metrics.failed(labels)
        record.is_finished = True
        self._access.record(access_fields(record, ending, now))
        if record.span is not None:
            self._end_span(record.span, record, ending, now)

    def _add_bytes(self, record: Record, to_tunnel: int, from_tunnel: int) -> None:
        added = record.unreported(to_tunnel, from_tunnel)
        if any(added):
            sent, received = tcp_directions(record.labels.reporter, *added)
            self._metrics.bytes(record.labels, sent, received)


def access_fields(record: Record, ending: Ending, now: float) -> dict[str, object]:
    """The line of one connection; what is not known is left out."""
    parties = record.parties
    told = parties.fields
    fields: dict[str, object] = {
        "level": "error" if ending.error else "info",
        "message": "connection complete" if record.is_open else "connection failed",
        "id": record.id,
        "connection.id": record.connection_id or record.id,
        "direction": record.direction,
        "src.addr": record.source_address,
        "src.workload": told["src.workload"],
        "src.namespace": told["src.namespace"],
        "src.identity": told["src.identity"],
        "src.cluster": told["src.cluster"],
        "dst.addr": record.destination_address,
        "dst.hbone_addr": record.hbone_address,
        "dst.service": told["dst.service"],
        "dst.workload": told["dst.workload"],
        "dst.namespace": told["dst.namespace"],
        "dst.identity": told["dst.identity"],
        "dst.cluster": told["dst.cluster"],
        "policy": record.policy,
        "rule": "" if record.rule is None else record.rule,
        "bytes_sent": ending.bytes_to_tunnel,
        "bytes_recv": ending.bytes_from_tunnel,
        "duration": f"{max(0, round((now - record.started) * 1000))}ms",
        "response_flags": ending.flag,
        "error": ending.error,
        "hint": ending.hint,
    }
    for name in parties.unknown:
        if fields[name] == "":
            del fields[name]
    return fields


_MAY_BE_EMPTY = ("src.addr", "dst.addr", "dst.hbone_addr", "policy", "rule", "error", "hint")


def _party_fields(record: Record) -> dict[str, str]:
    """What the access log tells of both ends."""
    source, destination, service = record.source, record.destination, record.service
    peer = record.peer_baggage
    return {
        "src.workload": source.name if source else peer.workload_name if peer else "",
        "src.namespace": _namespace(source, record.source_identity),
        "src.identity": str(record.source_identity or ""),
        "src.cluster": source.cluster_id if source else peer.cluster if peer else "",
        "dst.service": service.hostname if service else "",
        "dst.workload": destination.name if destination else "",
        "dst.namespace": _namespace(destination, record.destination_identity),
        "dst.identity": str(record.destination_identity or ""),
        "dst.cluster": destination.cluster_id if destination else "",
    }


def _namespace(workload: Workload | None, identity: SpiffeId | None) -> str:
    if workload is not None:
        return workload.namespace
    return identity.namespace if identity is not None else ""


@dataclass(frozen=True, slots=True)
class _Parties:
    """What metrics and access log tell of the two ends of a connection; `unknown` are the fields
    that a line may have to do without.
    """

    about: tuple[object, ...]
    labels: TcpLabels
    fields: dict[str, str]
    unknown: tuple[str, ...]


_known_parties: dict[tuple[object, ...], _Parties] = {}


def _parties(record: Record) -> _Parties:
    # The same few for thousands of connections. By identity, because hashing what they are made
    # of costs more than making them; the entry keeps the objects, so that the ids stay theirs.
    about = (
        record.source,
        record.destination,
        record.service,
        record.source_identity,
        record.destination_identity,
        record.peer_baggage,
    )
    key = (record.direction, record.is_mutual_tls, *map(id, about))
    known = _known_parties.get(key)
    if known is None:
        if len(_known_parties) >= _MAX_KNOWN:
            _known_parties.clear()
        fields = _party_fields(record)
        unknown = (*(name for name, value in fields.items() if not value), *_MAY_BE_EMPTY)
        known = _Parties(about, _make_labels(record), fields, unknown)
        _known_parties[key] = known
    return known


def _make_labels(record: Record) -> TcpLabels:
    service = record.service
    security = "mutual_tls" if record.is_mutual_tls else UNKNOWN
    source = _party(record.source, record.source_identity, record.peer_baggage)
    destination = _party(record.destination, record.destination_identity, None)
    return TcpLabels(
        reporter="source" if record.direction == "outbound" else "destination",
        source_workload=source.workload,
        source_canonical_service=source.canonical_service,
        source_canonical_revision=source.canonical_revision,
        source_workload_namespace=source.namespace,
        source_principal=source.principal,
        source_app=source.canonical_service,
        source_version=source.canonical_revision,
        source_cluster=source.cluster,
        destination_service=service.hostname if service else UNKNOWN,
        destination_service_namespace=service.namespace if service else UNKNOWN,
        destination_service_name=service.name if service else UNKNOWN,
        destination_workload=destination.workload,
        destination_canonical_service=destination.canonical_service,
        destination_canonical_revision=destination.canonical_revision,
        destination_workload_namespace=destination.namespace,
        destination_principal=destination.principal,
        destination_app=destination.canonical_service,
        destination_version=destination.canonical_revision,
        destination_cluster=destination.cluster,
        connection_security_policy=security,
        source_region=source.region,
        source_zone=source.zone,
        destination_region=destination.region,
        destination_zone=destination.zone,
    )


@dataclass(frozen=True, slots=True)
class _Party:
    workload: str = UNKNOWN
    namespace: str = UNKNOWN
    canonical_service: str = UNKNOWN
    canonical_revision: str = UNKNOWN
    principal: str = UNKNOWN
    cluster: str = UNKNOWN
    region: str = UNKNOWN
    zone: str = UNKNOWN


def _party(workload: Workload | None, identity: SpiffeId | None, baggage: Baggage | None) -> _Party:
    principal = str(identity) if identity is not None else UNKNOWN
    if workload is not None:
        return _Party(
            workload.workload_name or workload.name or UNKNOWN,
            workload.namespace,
            workload.canonical_name or UNKNOWN,
            workload.canonical_revision or UNKNOWN,
            principal,
            workload.cluster_id or UNKNOWN,
            workload.locality.region or UNKNOWN,
            workload.locality.zone or UNKNOWN,
        )
    if baggage is not None:
        # What the peer says of itself: good enough for a label, never for a decision.
        return _Party(
            baggage.workload_name or UNKNOWN,
            (identity.namespace if identity else baggage.namespace) or UNKNOWN,
            baggage.service_name or UNKNOWN,
            baggage.service_version or UNKNOWN,
            principal,
            baggage.cluster or UNKNOWN,
            baggage.region or UNKNOWN,
            baggage.zone or UNKNOWN,
        )
    return _Party(namespace=identity.namespace if identity else UNKNOWN, principal=principal)


_known_baggage: dict[int, tuple[Workload, Baggage]] = {}


def baggage_of(workload: Workload) -> Baggage:
    """What a workload tells the other end of a tunnel about itself."""
    known = _known_baggage.get(id(workload))
    if known is None:
        if len(_known_baggage) >= _MAX_KNOWN:
            _known_baggage.clear()
        known = _known_baggage[id(workload)] = (workload, _make_baggage(workload))
    return known[1]


def _make_baggage(workload: Workload) -> Baggage:
    return Baggage(
        cluster=workload.cluster_id,
        namespace=workload.namespace,
        workload_type=workload.workload_type.name.lower(),
        workload_name=workload.workload_name or workload.name,
        service_name=workload.canonical_name,
        service_version=workload.canonical_revision,
        region=workload.locality.region,
        zone=workload.locality.zone,
    )
