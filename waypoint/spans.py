"""Spans of a request: one as the waypoint served it, one for each try at an endpoint.

The caller's context is the parent (W3C or B3: `mesh.http.trace_context`); a request that brings
none belongs to the trace of the tunnel it came through, if that is sampled, else it begins one.
Each try passes its own span on, so that the endpoint's node proxy and the application hang below
it. Whether there is a span at all is decided first; without one nothing here is called again.
Whatever a policy redacts is in no span.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from mesh.http.trace_context import (
    NAMES,
    TraceContext,
    read_context,
    read_traceparent,
    with_context,
)
from mesh.model.workload import Workload
from mesh.runtime.tracing import Span, Tracer
from mesh.runtime.tracing.attributes import Attribute, party
from waypoint import heads
from waypoint.filters.chain import Request

if TYPE_CHECKING:
    from waypoint.exchange import Exchange
    from waypoint.inbound import Inbound

_METHODS: Final = frozenset(
    {b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH"}
)
_MAX_PATH = 1024


class RequestSpans:
    """The spans of one sampled request."""

    __slots__ = ("_request", "_server", "_state", "_try")

    def __init__(self, server: Span, request: Request, state: bytes) -> None:
        self._server = server
        self._request = request
        self._state = state
        self._try: Span | None = None

    def tried(self, number: int, workload: Workload, port: int) -> None:
        """Try `number` (from 1) begins, at a workload's port: what is sent names this try."""
        server, request = self._server, self._request
        span = server.tracer.start(
            server.name, "client", trio.current_time(), server.trace_id, server.traceparent
        )
        if span is None:
            return
        self._try = span
        span.attributes |= {
            "http.request.method": _method(request),
            "server.port": port,
            **party("destination", workload, str(workload.identity)),
        }
        if workload.addresses:
            span.attributes["server.address"] = workload.addresses[0]
        if number > 1:
            span.attributes["http.request.resend_count"] = number - 1
        context = TraceContext(span.trace_id, span.span_id, True, self._state)
        request.headers.pairs = with_context(request.headers.pairs, context)

    def try_failed(self, reason: str) -> None:
        """The present try came to nothing and is repeated."""
        span, self._try = self._try, None
        if span is not None:
            span.end(trio.current_time(), {}, reason)

    def end(self, exchange: Exchange) -> None:
        """The request is over."""
        now, status = trio.current_time(), exchange.status
        error = exchange.reason or (f"HTTP {status}" if status >= 500 else "")
        told: dict[str, Attribute] = {"http.response.status_code": status} if status else {}
        if exchange.grpc_status:
            told |= {"rpc.system": "grpc", "rpc.grpc.status_code": exchange.grpc_status}
        span, self._try = self._try, None
        if span is not None:
            span.end(now, told, error)
        self._server.end(now, told | _attributes(exchange), error)


def begin(tracer: Tracer | None, inbound: Inbound, request: Request) -> RequestSpans | None:
    """Settle the request's trace context, and its span if it is sampled."""
    headers = request.headers
    if tracer is None:
        heads.trace(request, inbound.rng)
        return None
    heads.identify(request, inbound.rng)
    context = read_context([each for each in headers.pairs if each[0] in NAMES])
    tunnel = inbound.traceparent
    through = read_traceparent(tunnel.encode()) if tunnel else None
    if through is not None and not through[2]:
        through = None  # nobody keeps that one
    parent = context if context is not None else TraceContext(*through) if through else None
    trace_id = parent.trace_id if parent is not None else inbound.rng.randbytes(16).hex()
    name = f"{_method(request)} {request.route or inbound.service_key}"
    span = tracer.start(
        name, "server", trio.current_time(), trace_id, parent.traceparent if parent else ""
    )
    if span is None:
        parent = parent or TraceContext(trace_id, inbound.rng.randbytes(8).hex(), False)
        headers.pairs = with_context(headers.pairs, parent)
        return None
    if through is not None and through[0] != trace_id:
        span.links = (tunnel,)
    return RequestSpans(span, request, context.state if context is not None else b"")


def _method(request: Request) -> str:
    return request.method.decode() if request.method in _METHODS else "_OTHER"


def _attributes(exchange: Exchange) -> dict[str, Attribute]:
    """What is known of a request when it is over; what is not known is left out."""
    inbound, request = exchange.inbound, exchange.request
    service = inbound.target.service
    path, authority = exchange.hide(request.path[:_MAX_PATH], request.authority)
    found: dict[str, Attribute] = {
        "http.request.method": _method(request),
        "url.scheme": request.scheme.decode("latin-1"),
        "url.path": path,
        "server.address": authority,
        "client.address": inbound.source_ip,
        "ambit.route": request.route,
        "ambit.route.rule": request.rule if request.route else "",
        "ambit.policy": exchange.policy,
        "ambit.policy.rule": exchange.rule_name,
        "ambit.connection.id": inbound.connection_id,
        "istio.destination_service": service.hostname if service is not None else "",
        "response_flags": exchange.flag,
        **party("source", inbound.source_workload(), str(inbound.source)),
    }
    known = {name: value for name, value in found.items() if value != ""}
    known["http.request.body.size"] = exchange.bytes_in
    known["http.response.body.size"] = exchange.bytes_out
    return known
