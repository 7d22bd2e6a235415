"""`/explain/request` on the admin port: what this waypoint would do with a request, answered by the
very functions that decide (`target.plan_tunnel`, `plan.Routes`, the filters themselves) over the
very state it holds. Nothing is sent, no bucket is taken from, no issuer and no authorizer asked.

The request is read as one from a caller is, so what that refuses is refused here. Where weights
choose, every backend is a way of its own. A filter that would have to ask somebody, or that is
not ours, is said not to have been asked, and what follows it is then not certain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mesh.errors import ConfigError, Refusal, RemoteProtocolError
from mesh.hbone.head import Authority, parse_authority
from mesh.http import h1
from mesh.http.h1_heads import RequestHead
from mesh.identity import SpiffeId
from mesh.model.balancing import find_candidates
from mesh.model.service import AppProtocol
from mesh.model.shown import show_endpoint
from mesh.model.workload import NamespacedHostname
from mesh.runtime import admin
from waypoint import heads
from waypoint.explain_filter import explain_filter
from waypoint.filters.chain import Filter, Headers, Request
from waypoint.plan import Answer, Forward, Plan
from waypoint.target import Own, Target, plan_tunnel
from waypoint.traffic import Traffic

if TYPE_CHECKING:
    from waypoint.proxy import Proxy

MAX_WAYS = 16
_Told = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Asked:
    """The question: who calls from where, the tunnel's target, and the request's head."""

    source: SpiffeId
    ip: str
    authority: Authority
    head: RequestHead


class Explainer:
    """The page. `own` is who we are, to tunnels."""

    def __init__(self, proxy: Proxy, own: Own) -> None:
        self._proxy = proxy
        self._own = own

    def add_to(self, app: admin.AdminApp) -> None:
        """Route it."""
        app.route("/explain/request", self.request)

    async def request(self, request: admin.Request) -> admin.Response:
        """`identity` (a SPIFFE ID), `source` (an address), `authority` (of the CONNECT), `method`,
        `path` (with a query), `host`, `headers` (lines of `name: value`). Raises ConfigError.
        """
        query = request.query
        told: _Told = {
            "gateway": self._proxy.config.gateway,
            "identity": str(self._proxy.identity),
        }
        try:
            asked = _read(query)
        except RemoteProtocolError as error:
            return admin.Response.json(told | {"ways": [_way(_malformed(error))]})
        target = plan_tunnel(asked.authority, asked.source.namespace, self._own, self._proxy.store)
        if isinstance(target, Refusal):
            decision = _decision(target.http_status, target.flag, target.reason)
            return admin.Response.json(told | {"ways": [_way(decision)]})
        told |= {"service": target.key, "port": target.port}
        ways = list(self._ways(asked, target))
        return admin.Response.json(
            told | {"ways": ways[:MAX_WAYS], "truncated": len(ways) > MAX_WAYS}
        )

    def _ways(self, asked: _Asked, target: Target) -> Iterator[_Told]:
        traffic = self._proxy.traffic.traffic(target.key)
        kind = traffic.routes.kind(target.port, asked.source.namespace)
        if kind in ("TLSRoute", "TCPRoute") or (
            not kind and target.protocol in {AppProtocol.TCP, AppProtocol.TLS}
        ):
            said = f"no HTTP on this port ({kind or target.protocol.name}): its bytes are carried"
            yield {**_way({"allowed": None, "reason": said}), "outcome": "depends"}
            return
        request = self._request(asked, target, traffic)
        if request is None:
            yield _way(_decision(400, "DPE", "the path cannot be normalized"))
            return
        for plan, share in traffic.routes.ways(request, asked.source.namespace):
            yield self._way_of(plan, share, kind, traffic, _copy(request), target)

    def _request(self, asked: _Asked, target: Target, traffic: Traffic) -> Request | None:
        """As an exchange makes it; None: the path cannot be normalized."""
        head = asked.head
        path = traffic.normalize(head.path)
        if path is None:
            return None
        pairs = [each for each in head.pairs if not heads.is_client_certificate(each[0])]
        if traffic.config.shows_client_identity:
            pairs.append(heads.client_certificate(self._proxy.identity, asked.source))
        return Request(
            method=head.method, scheme=head.scheme, authority=head.authority, path=path,
            query=head.query or b"", headers=Headers(pairs), source=asked.source,
            source_ip=asked.ip, remote_ip=asked.ip, destination_ip=target.ip,
            destination_port=target.port, service=target.key, now=self._proxy.now(),
            upgrade=head.upgrade,
            is_grpc=any(n == b"content-type" and heads.is_grpc(v) for n, v in pairs),
        )  # fmt: skip

    def _way_of(
        self,
        plan: Plan,
        share: float,
        kind: str,
        traffic: Traffic,
        request: Request,
        target: Target,
    ) -> _Told:
        """One of the plans: the filters in their order, then where it goes."""
        request.route, request.rule = plan.route, plan.rule
        filters: Sequence[Filter] = traffic.filters
        if isinstance(plan, Forward):
            filters = plan.filters_with(filters)
        route = {"kind": kind, "name": plan.route, "rule": plan.rule} if plan.route else None
        told: _Told = {"share": share, "route": route, "steps": []}
        is_certain = True
        for each in filters:
            step, respond = explain_filter(each, request)
            told["steps"].append(step)
            if respond is not None:
                return told | _answer(respond.status, respond.flag, step)
            is_certain = is_certain and step["outcome"] == "passes"
        if isinstance(plan, Answer):
            status, flag = plan.respond.status, plan.respond.flag
            reason = plan.respond.reason or _reason(plan)
            decided = _decision(status, flag, reason)
            return told | {"outcome": "answer" if is_certain else "depends", "decision": decided}
        plan.change_request(request)
        query = b"?" + request.query if request.query else b""
        endpoints, reason = self._endpoints(plan, target)
        if not endpoints:
            return told | {"outcome": "answer", "decision": _decision(503, "UH", reason)}
        told |= {
            "outcome": "forward" if is_certain else "depends",
            "decision": {"allowed": True, "policy": None, "rule": None, "reason": ""},
            "backend": {"service": plan.backend.service, "port": plan.backend.port},
            "endpoints": endpoints,
            "sends": {
                "method": request.method.decode("latin-1"),
                "host": request.authority.decode("latin-1"),
                "path": (request.path + query).decode("latin-1"),
            },
            "timeouts": {"request": plan.request_timeout, "backend": plan.backend_timeout},
            "attempts": 1 + (plan.retry.attempts if plan.retry is not None else 0),
            "mirrors": [f"{e.backend.service}:{e.backend.port}" for e in plan.mirrors],
        }
        return told

    def _endpoints(self, plan: Forward, target: Target) -> tuple[list[_Told], str]:
        """Those that a try may choose among, or why there is none."""
        backend, store = plan.backend, self._proxy.store
        if not backend.service:
            workload = target.workload
            return ([show_endpoint(workload, backend.port)] if workload is not None else []), ""
        namespace, _, hostname = backend.service.partition("/")
        key = NamespacedHostname(namespace, hostname)
        known = store.service_by_key(key)
        if known is None:
            return [], f"service {backend.service} is not known"
        own = self._proxy.own_workload()
        found = find_candidates(known, store.endpoints(key), backend.port, own)
        shown = [
            show_endpoint(each.workload, each.port)
            for each in found.candidates
            if each.workload.capacity
        ]
        return shown, found.reason


def _read(query: Mapping[str, str]) -> _Asked:
    """Raises ConfigError, and RemoteProtocolError for what a caller may not send."""
    source = SpiffeId.parse(query.get("identity", ""))
    try:
        authority = parse_authority(query.get("authority", ""))
    except RemoteProtocolError as error:
        raise ConfigError(str(error), field="authority") from error
    lines = [
        f"{query.get('method') or 'GET'} {query.get('path') or '/'} HTTP/1.1",
        f"host: {query.get('host', '')}",
        *(each for each in query.get("headers", "").split("\n") if each),
    ]
    try:
        data = "\r\n".join([*lines, "", ""]).encode("latin-1")
    except UnicodeEncodeError as error:
        raise ConfigError("not a request: only ASCII is sent in a head") from error
    parsed = h1.parse_request(data)
    if parsed is None or parsed[1] != len(data):
        raise ConfigError("not the head of one request")
    return _Asked(source, query.get("source", ""), authority, parsed[0])


def _copy(request: Request) -> Request:
    """Filters change what they are shown."""
    copied = dataclasses.replace(request)
    copied.headers, copied.notes = Headers(list(request.headers.pairs)), {}
    return copied


def _malformed(error: RemoteProtocolError) -> _Told:
    return _decision(error.http_status, "DPE", f"it cannot be read: {error}")


def _decision(status: int, flag: str, reason: str) -> _Told:
    return {
        "allowed": False,
        "status": status,
        "flag": flag,
        "policy": None,
        "rule": None,
        "reason": reason,
    }


def _answer(status: int, flag: str, step: _Told) -> _Told:
    """A filter answers."""
    facts = {name: step.get(name) for name in ("policy", "rule", "reason")}
    return {"outcome": "answer", "decision": _decision(status, flag, "") | facts}


def _reason(plan: Answer) -> str:
    """What an answer of the route itself is: so far, only redirects come without words."""
    where = next((v for name, v in plan.respond.headers if name == b"location"), b"")
    return f"redirected to {where.decode('latin-1')}" if where else "the route answers"


def _way(decision: _Told) -> _Told:
    """A way that ends here."""
    return {"share": 1.0, "route": None, "steps": [], "outcome": "answer", "decision": decision}
