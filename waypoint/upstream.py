"""Endpoints, their connections, and the bounds of both.

Which one answers is chosen in `waypoint.balance.backend`, among the candidates that health and
locality leave (`mesh.model.balancing`), by requests in flight times a moving average of latency.
Those that failed several times in a row are left out for a while. Endpoints of the mesh are reached
through HBONE under our own identity, the others by plain TCP.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import trio

from mesh.errors import MeshError, Refusal
from mesh.model.balancing import Candidate, find_candidates
from mesh.model.route import DEFAULT_BACKEND, Backend, BackendSettings
from mesh.model.service import AppProtocol
from mesh.model.workload import NamespacedHostname
from waypoint import heads
from waypoint.balance.backend import BackendState
from waypoint.balance.latency import Latency
from waypoint.balance.session import Session
from waypoint.filters.chain import Request
from waypoint.h1_up import H1Up
from waypoint.h2_up import H2Up
from waypoint.streams import Answered, Upstream
from waypoint.transport import Transport

if TYPE_CHECKING:
    from waypoint.inbound import Inbound
    from waypoint.proxy import Proxy

_MAX_EJECTION_SECONDS: Final = 300.0
_HTTP2 = frozenset({AppProtocol.HTTP2, AppProtocol.GRPC})
_NO_ANSWER = frozenset({0, 502, 503, 504})


class Try(Answered, Protocol):
    """Who asks an endpoint for a connection: an exchange, or the copy of one."""

    request: Request
    started_at: float
    tries: int

    def waits_for(self, endpoint: Endpoint, number: int) -> bool:
        """Whether try `number` still wants a connection to `endpoint`."""
        ...

    def connected(self, up: Upstream) -> None:
        """Here it is."""
        ...


class Endpoint:
    """A workload's port, with what we know of it and the connections we have to it."""

    __slots__ = (
        "_draws",
        "_ejections",
        "_errors",
        "_errors_5xx",
        "_h2",
        "_idle",
        "_is_dialling",
        "_latency",
        "_proxy",
        "_queue",
        "_uses",
        "_waiting",
        "active",
        "candidate",
        "connections",
        "ejected_until",
        "is_http2",
        "last_used",
        "peers",
        "settings",
        "turn",
    )  # fmt: skip

    def __init__(self, proxy: Proxy, candidate: Candidate) -> None:
        self._proxy = proxy
        self.candidate = candidate
        self.settings: BackendSettings = DEFAULT_BACKEND
        self._idle: list[H1Up] = []
        self._h2: list[H2Up] = []
        self._waiting: list[tuple[Try, int]] = []
        self._is_dialling = False
        self.is_http2 = False
        self._latency = Latency()
        self._errors = self._errors_5xx = self._ejections = 0
        self._queue: deque[tuple[Try, int]] = deque()
        self._uses: dict[object, int] = {}
        self.active = self.connections = self.turn = 0
        self.peers: Sequence[Endpoint] = ()
        self.ejected_until = 0.0
        self.last_used = 0.0

    @property
    def load(self) -> float:
        """Expected work before a new request is through; shared by the workload's capacity."""
        expected = self._latency.expected(time.monotonic(), self.active)
        return (self.active + 1) * expected / max(1, self.candidate.workload.capacity)

    def take(self) -> None:
        """A request is on its way here; `release` follows."""
        self.active += 1

    def open(self, exchange: Try) -> None:
        """Connect `exchange`: now, if a connection is idle, else as soon as there is one."""
        if self.is_http2 or exchange.request.is_grpc:
            self._open_http2(exchange)
            return
        idle = self._idle
        while idle:
            up = idle.pop()
            if not up.is_closed:
                up.take(exchange)
                exchange.connected(up)
                return
        if self.settings.limits.max_connections and self._is_full():
            self._queue.append((exchange, exchange.tries))
            return
        self._dial(exchange, exchange.tries)

    def _dial(self, exchange: Try, number: int) -> None:
        self.connections += 1
        self._proxy.start(functools.partial(self._connect, exchange, number))

    def _is_full(self) -> bool:
        """Whether the service has all its connections; an endpoint without any may have one."""
        limit = self.settings.limits.max_connections
        return self.connections > 0 and sum(each.connections for each in self.peers) >= limit

    @property
    def waiting(self) -> int:
        """Requests that wait for one of a bounded number of connections."""
        return len(self._queue)

    @property
    def is_overflowing(self) -> bool:
        """Whether one more request would wait for a connection, with too many waiting already."""
        limits = self.settings.limits
        if not limits.max_pending or not limits.max_connections or self._idle or self.is_http2:
            return False
        return self._is_full() and sum(each.waiting for each in self.peers) >= limits.max_pending

    def _serve_queue(self, up: H1Up | None) -> bool:
        """Give a free connection, or the place of one that has gone, to who waits longest."""
        while self._queue:
            exchange, number = self._queue.popleft()
            if not exchange.waits_for(self, number):
                continue
            if up is not None:
                up.take(exchange)
                exchange.connected(up)
            else:
                self._dial(exchange, number)
            return True
        return False

    def _open_http2(self, exchange: Try) -> None:
        limit = self.settings.limits.max_requests_per_connection
        for each in self._h2:
            if each.can_open and not (limit and self._uses.get(each, 0) >= limit):
                if limit:
                    self._uses[each] = self._uses.get(each, 0) + 1
                exchange.connected(each.new_stream(exchange))
                return
        self._waiting.append((exchange, exchange.tries))
        if not self._is_dialling:
            self._is_dialling = True
            self._proxy.start(self._connect_http2)

    async def _connect_http2(self) -> None:
        """One connection for all that wait; what it cannot take waits for the next."""
        reason = "internal error"
        channel: H2Up | None = None
        try:
            proxy, seconds = self._proxy, self.settings.limits.connect_seconds
            first = self._waiting[0][0] if self._waiting else None
            trace = heads.traceparent(first.request) if first is not None else ""
            transport = await proxy.dialler.dial(self.candidate, seconds, trace)
            channel = H2Up(proxy.reactor, transport, self._h2_gone, proxy.windows)
            self._h2.append(channel)
            transport.start(channel)
            channel.touch()
            if not channel.can_open:
                reason = "the endpoint takes no requests"
                channel.end(reason, abort=False)
                channel = None
        except MeshError as exc:
            reason = str(exc)
        finally:
            self._is_dialling = False
            waiting, self._waiting = self._waiting, []
            for exchange, number in waiting:
                if not exchange.waits_for(self, number):
                    continue
                if channel is None:
                    exchange.on_up_lost(reason, is_refused=True)
                else:
                    self._open_http2(exchange)

    def _h2_gone(self, channel: H2Up) -> None:
        self._uses.pop(channel, None)
        if channel in self._h2:
            self._h2.remove(channel)

    async def _connect(self, exchange: Try, number: int) -> None:
        transport: Transport | None = None
        reason = "internal error"
        try:
            seconds = self.settings.limits.connect_seconds
            trace = heads.traceparent(exchange.request)
            transport = await self._proxy.dialler.dial(self.candidate, seconds, trace)
        except MeshError as exc:
            reason = str(exc)
        finally:
            if transport is None:
                self.connections -= 1
                self._serve_queue(None)
            if transport is None and exchange.waits_for(self, number):
                exchange.on_up_lost(reason, is_refused=True)
        if transport is None:
            return
        up = H1Up(transport, self._idled, self._gone)
        transport.start(up)
        if up.is_closed:
            if exchange.waits_for(self, number):
                exchange.on_up_lost("the endpoint closed at once", is_refused=True)
        elif exchange.waits_for(self, number):
            up.take(exchange)
            exchange.connected(up)
        else:
            self._idled(up)

    def _idled(self, up: H1Up) -> None:
        limit = self.settings.limits.max_requests_per_connection
        if limit:
            self._uses[up] = self._uses.get(up, 0) + 1
            if self._uses[up] >= limit:
                up.close()
                return
        if self._queue and self._serve_queue(up):
            return
        up.idle_since = time.monotonic()
        self._idle.append(up)

    def _gone(self, up: H1Up) -> None:
        self.connections -= 1
        if self._uses:
            self._uses.pop(up, None)
        if self._queue:
            self._serve_queue(None)
        if up in self._idle:
            self._idle.remove(up)

    def close_idle(self, now: float, seconds: float) -> None:
        """Close connections that have been idle for `seconds`, or for what the service says; with 0
        those to an endpoint that is not used any more.
        """
        if seconds:
            seconds = self.settings.limits.idle_seconds or seconds
        before = now - seconds
        for up in [each for each in self._idle if each.idle_since < before]:
            up.close()
        limit = self.settings.limits.max_requests_per_connection
        for channel in list(self._h2):
            if not seconds or (limit and self._uses.get(channel, 0) >= limit):
                channel.close_if_idle()

    # ---- what happened

    def answered(self, status: int) -> None:
        """A response's head."""
        if status >= 500:
            self.failed(status)
        else:
            self._errors = self._errors_5xx = 0
            if time.monotonic() >= self.ejected_until:
                self._ejections = max(0, self._ejections - 1) if self._ejections else 0

    def failed(self, status: int = 0) -> None:
        """No response, or one that means as much: ejected after several in a row."""
        outlier = self.settings.outlier
        self._errors_5xx += 1
        self._errors = self._errors + 1 if status in _NO_ANSWER else 0
        if outlier is None:
            return
        if (
            0 < outlier.consecutive_errors <= self._errors
            or 0 < outlier.consecutive_5xx <= self._errors_5xx
        ):
            self._errors = self._errors_5xx = 0
            self._ejections += 1
            seconds = outlier.base_ejection_seconds * self._ejections
            self.ejected_until = time.monotonic() + min(seconds, _MAX_EJECTION_SECONDS)

    def release(self, exchange: Try) -> None:
        """The try is over."""
        now = time.monotonic()
        self.active -= 1
        self.last_used = now
        self._latency.heard(now - exchange.started_at, now)


class Upstreams:
    """Every endpoint that requests were sent to."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._endpoints: dict[tuple[str, int, str, int], Endpoint] = {}
        self._backends: dict[tuple[str, int], BackendState[Endpoint]] = {}

    def choose(
        self,
        service: str,
        port: int,
        inbound: Inbound,
        excluded: Collection[Endpoint] = (),
        request: Request | None = None,
        session: Session | None = None,
    ) -> Endpoint | Refusal:
        """An endpoint for one try, taken; other than `excluded`, if there is one. With a `request`,
        that of its session (of its rule, or of the service) or of its hash.
        """
        backend = self._backend(service, port, inbound)
        if not backend.endpoints:
            return Refusal("UH", backend.reason, http_status=503)
        settings = backend.settings
        limit = settings.limits.max_requests
        if limit and backend.active >= limit:
            return self._overflow("requests", f"{service} has {limit} requests in flight")
        if request is not None and (session is not None or backend.has_affinity):
            chosen = backend.find(request, session, excluded)
        else:
            chosen = backend.draw(excluded)
        chosen.take()
        if settings.limits.max_pending and chosen.is_overflowing:
            chosen.active -= 1
            most = settings.limits.max_pending
            return self._overflow("pending", f"{most} requests wait for a connection to {service}")
        if backend.budget.counts_requests and not excluded:
            backend.budget.requested(self._proxy.now())
        return chosen

    def _overflow(self, bound: str, reason: str) -> Refusal:
        self._proxy.counters.shed.labels(bound).inc()
        return Refusal("UO", reason, http_status=503)

    def _backend(self, service: str, port: int, inbound: Inbound) -> BackendState[Endpoint]:
        key = (service, port) if service else (inbound.workload_uid, -port)
        backend = self._backends.get(key)
        if backend is None:
            proxy = self._proxy
            backend = self._backends[key] = BackendState(service, port, proxy, proxy.rng)
        if backend.version != self._proxy.version:
            backend.version = self._proxy.version
            self._refresh(backend, service, port, inbound)
        return backend

    def _refresh(
        self, backend: BackendState[Endpoint], service: str, port: int, inbound: Inbound
    ) -> None:
        proxy = self._proxy
        if not service:
            workload = inbound.workload
            found = [Candidate(workload, port)] if workload is not None else []
            endpoints = [self._endpoint(service, port, each) for each in found]
            backend.update(endpoints, DEFAULT_BACKEND, "the workload is not known any more")
            return
        namespace, _, hostname = service.partition("/")
        key = NamespacedHostname(namespace, hostname)
        known = proxy.store.service_by_key(key)
        settings = proxy.traffic.settings(service, port)
        if known is None:
            backend.update((), settings, f"service {service} is not known")
            return
        chosen = find_candidates(known, proxy.store.endpoints(key), port, proxy.own_workload())
        endpoints = [
            self._endpoint(service, port, each)
            for each in chosen.candidates
            if each.workload.capacity
        ]
        described = known.ports.get(port)
        for endpoint in endpoints:
            endpoint.is_http2 = described is not None and described.app_protocol in _HTTP2
            endpoint.peers, endpoint.settings = endpoints, settings
        backend.update(endpoints, settings, chosen.reason)

    def _endpoint(self, service: str, port: int, candidate: Candidate) -> Endpoint:
        # Each service its own: two that lead to the same port may differ in protocol and limits.
        key = (service, port, candidate.workload.uid, candidate.port)
        endpoint = self._endpoints.get(key)
        if endpoint is None:
            endpoint = self._endpoints[key] = Endpoint(self._proxy, candidate)
        elif endpoint.candidate != candidate:
            # Other address or identity: nothing of the old one may be used.
            endpoint.close_idle(float("inf"), 0.0)
            endpoint.candidate = candidate
        return endpoint

    # ---- retries

    def may_retry(self, to: Backend, *, is_first: bool) -> bool:
        """One retry out of the service's budget, if one is left; `retried` follows the first."""
        backend = self._backends.get((to.service, to.port))
        if backend is None:
            return True
        active = backend.active if is_first else 0
        if backend.budget.take(self._proxy.now(), active, is_first=is_first):
            return True
        self._proxy.counters.shed.labels("retries").inc()
        return False

    def retried(self, to: Backend) -> None:
        """A request that was repeated has ended."""
        backend = self._backends.get((to.service, to.port))
        if backend is not None:
            backend.budget.give()

    # ---- upkeep

    async def sweep(self, idle_seconds: float) -> None:
        """Close what stays idle, forget endpoints that left. If cancelled: ends."""
        while True:
            await trio.sleep(min(15.0, idle_seconds / 2))
            now = time.monotonic()
            used = {id(each) for backend in self._backends.values() for each in backend.endpoints}
            for key, endpoint in list(self._endpoints.items()):
                gone = id(endpoint) not in used
                endpoint.close_idle(now, 0.0 if gone else idle_seconds)
                if gone and not endpoint.active and now - endpoint.last_used > idle_seconds:
                    del self._endpoints[key]

    def close(self) -> None:
        """Close every idle connection."""
        for endpoint in self._endpoints.values():
            endpoint.close_idle(float("inf"), 0.0)
