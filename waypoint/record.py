"""What is told of each request when it is over: one access-log line and one set of metrics.

Field and label names are Istio's. Headers, bodies and queries are never part of it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from mesh.errors import Refusal, RemoteProtocolError
from mesh.identity import SpiffeId
from mesh.model.workload import Workload
from mesh.runtime.http_metrics import HttpMetrics, Series
from waypoint.filters.chain import LOGGED, OWN_ID
from waypoint.filters.redact.audit import AuditLog

if TYPE_CHECKING:
    from waypoint.exchange import Exchange
    from waypoint.inbound import Inbound
    from waypoint.upstream import Endpoint

_UNKNOWN = "unknown"
_MAX_KNOWN = 1024
_MAX_PATH = 2048


class AccessSink(Protocol):
    """Where access-log lines go."""

    def record(self, fields: dict[str, object]) -> None:
        """Queue one line."""
        ...

    def takes(self, level: str) -> bool:
        """Whether lines of this level are written."""
        ...


class Told:
    """What all records of one tunnel say, as of one state of the Store."""

    __slots__ = ("fields", "series", "version", "workloads")

    def __init__(self, inbound: Inbound) -> None:
        self.version = inbound.proxy.version
        self.series: dict[tuple[object, ...], Series] = {}
        # Held as long as their ids are keys.
        self.workloads: list[Workload | None] = []
        source = inbound.source_workload()
        connection = inbound.connection_id
        self.fields: dict[str, object] = {
            **({"connection.id": connection} if connection else {}),
            "direction": "inbound",
            "src.addr": f"{inbound.source_ip}:{inbound.source_port}",
            **({"src.workload": source.name} if source is not None else {}),
            "src.namespace": inbound.source.namespace,
            "src.identity": str(inbound.source),
            "dst.service": inbound.service_key.partition("/")[2],
        }


class Journal:
    """Writes records."""

    def __init__(
        self, access: AccessSink, metrics: HttpMetrics, audit: AuditLog | None = None
    ) -> None:
        self._audit = audit
        self._access = access
        self._metrics = metrics

    def finished(self, exchange: Exchange, endpoint: Endpoint | None) -> None:
        """A request is over."""
        now = time.monotonic()
        inbound = exchange.inbound
        milliseconds = (now - exchange.started_at) * 1000
        workload = endpoint.candidate.workload if endpoint is not None else None
        told = inbound.told
        if told is None or told.version != inbound.proxy.version:
            told = inbound.told = Told(inbound)
        key = (id(workload), exchange.status, exchange.flag, exchange.request.is_grpc,
               exchange.grpc_status)  # fmt: skip
        series = told.series.get(key)
        if series is None or series.is_forgotten:
            if len(told.series) >= _MAX_KNOWN:
                told.series.clear()
                told.workloads.clear()
            labels = _labels(inbound, workload, exchange)
            series = told.series[key] = self._metrics.series(labels)
            told.workloads.append(workload)
        series.add(milliseconds, exchange.bytes_in, exchange.bytes_out, now)
        if self._access.takes("error" if exchange.reason else "info"):
            self._access.record(_fields(exchange, told, workload, milliseconds))
        if self._audit is not None:
            self._audit.record_exchange(exchange)

    def connection(
        self, inbound: Inbound, flag: str, reason: str, sent: int, received: int, started: float
    ) -> None:
        """An opaque connection is over."""
        self._access.record(
            _of(
                {
                    "level": "error" if reason else "info",
                    "message": "connection complete",
                    "direction": "inbound",
                    "src.addr": f"{inbound.source_ip}:{inbound.source_port}",
                    "src.identity": str(inbound.source),
                    "dst.service": inbound.service_key.partition("/")[2],
                    "bytes_sent": received,
                    "bytes_recv": sent,
                    "duration": f"{max(0, round((time.monotonic() - started) * 1000))}ms",
                    "response_flags": flag,
                    "error": reason,
                }
            )
        )

    def refused(self, source: SpiffeId, address: str, authority: str, refusal: Refusal) -> None:
        """A tunnel was refused."""
        self._access.record(
            {
                "level": "error",
                "message": "tunnel refused",
                "direction": "inbound",
                "src.addr": address,
                "src.identity": str(source),
                "dst.hbone_addr": authority,
                "status": refusal.http_status,
                "response_flags": refusal.flag,
                "error": refusal.reason,
            }
        )

    def malformed(self, inbound: Inbound, error: RemoteProtocolError) -> None:
        """A request could not be read."""
        self._access.record(
            {
                "level": "error",
                "message": "request malformed",
                "direction": "inbound",
                "src.addr": f"{inbound.source_ip}:{inbound.source_port}",
                "src.identity": str(inbound.source),
                "dst.service": inbound.service_key.partition("/")[2],
                "status": error.http_status,
                "response_flags": "DPE",
                "error": str(error),
            }
        )


def _of(fields: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value != ""}


def _fields(
    exchange: Exchange, told: Told, workload: Workload | None, milliseconds: float
) -> dict[str, object]:
    request = exchange.request
    request_id = trace = b""
    for name, value in request.headers.pairs:
        if name == b"x-request-id":
            request_id = request_id + b"," + value if request_id else value
        elif name == b"traceparent":
            trace = trace + b"," + value if trace else value

    # What a policy takes out of the traffic is not written down beside it. An id that was made here
    # is only random.
    is_own = request.notes.get(OWN_ID) == request_id
    authority, path, shown_id = exchange.hide(
        request.authority, request.path[:_MAX_PATH], b"" if is_own else request_id[:64]
    )
    found: dict[str, object] = {
        "level": "error" if exchange.reason else "info",
        "message": "request complete",
    }
    if request_id:
        found["id"] = request_id.decode("latin-1") if is_own else shown_id
    if trace:
        found["trace_id"] = trace[3:35].decode("latin-1")
    found |= told.fields
    if workload is not None:
        found["dst.workload"] = workload.name
        found["dst.namespace"] = workload.namespace
    found["method"] = request.method.decode("latin-1")
    found["authority"] = authority
    found["path"] = path
    found["status"] = exchange.status
    if exchange.grpc_status:
        found["grpc_status"] = exchange.grpc_status
    if request.route:
        found["route"], found["route.rule"] = request.route, request.rule
    if exchange.policy:
        found["policy"] = exchange.policy
    if exchange.rule_name:
        found["rule"] = exchange.rule_name
    logged = request.notes.get(LOGGED)
    if logged is not None:
        found |= logged
    report = request.notes.get("redaction report")
    if report is not None:
        found |= _redactions(report)
    found["bytes_recv"] = exchange.bytes_in
    found["bytes_sent"] = exchange.bytes_out
    found["tries"] = exchange.tries
    found["duration"] = f"{max(0, round(milliseconds))}ms"
    found["response_flags"] = exchange.flag
    if exchange.reason:
        found["error"] = exchange.reason
    return found


def _redactions(report: Any) -> dict[str, object]:
    found, unseen = sum(report.counts.values()), sum(report.uninspected.values())
    return {
        **({"redactions": found} if found else {}),
        **({"uninspected": unseen} if unseen else {}),
    }


def _labels(inbound: Inbound, workload: Workload | None, exchange: Exchange) -> tuple[str, ...]:
    service = inbound.target.service
    source = _party(inbound.source_workload())
    destination = _party(workload)
    baggage = inbound.baggage
    if source[0] == _UNKNOWN and baggage is not None:
        # What the peer says of itself: good enough for a label, never for a decision.
        source = (
            baggage.workload_name or _UNKNOWN, baggage.service_name or _UNKNOWN,
            baggage.service_version or _UNKNOWN, inbound.source.namespace,
            baggage.cluster or _UNKNOWN,
        )  # fmt: skip
    is_mesh = workload is not None and workload.tunnel_protocol.name == "HBONE"
    principal = str(workload.identity) if workload is not None and is_mesh else _UNKNOWN
    return (
        "waypoint",
        source[0], source[1], source[2], source[3], str(inbound.source), source[1], source[2],
        source[4],
        service.hostname if service is not None else _UNKNOWN,
        service.namespace if service is not None else _UNKNOWN,
        service.name if service is not None else _UNKNOWN,
        destination[0], destination[1], destination[2], destination[3], principal,
        destination[1], destination[2], destination[4],
        "grpc" if exchange.request.is_grpc else "http",
        str(exchange.status),
        exchange.grpc_status,
        exchange.flag,
        "mutual_tls",
    )  # fmt: skip


def _party(workload: Workload | None) -> tuple[str, str, str, str, str]:
    if workload is None:
        return (_UNKNOWN,) * 5
    return (
        workload.workload_name or workload.name or _UNKNOWN,
        workload.canonical_name or _UNKNOWN,
        workload.canonical_revision or _UNKNOWN,
        workload.namespace or _UNKNOWN,
        workload.cluster_id or _UNKNOWN,
    )
