"""Endpoints: which one answers a request, and its connections.

Among the candidates that health and locality leave (`mesh.model.balancing`), two are drawn and the
one with less expected work wins (requests in flight times a moving average of latency: P2C with
EWMA). Those that failed several times in a row are left out for a while, a part of all at most;
retries have a budget, services a limit. Endpoints of the mesh are reached through HBONE under our
own identity, the others by plain TCP.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import trio

from mesh.errors import MeshError, Refusal
from mesh.model.balancing import Candidate, find_candidates
from mesh.model.route import DEFAULT_BACKEND, BackendSettings
from mesh.model.service import AppProtocol
from mesh.model.workload import NamespacedHostname
from waypoint.filters.chain import Request
from waypoint.h1_up import H1Up
from waypoint.h2_up import H2Up
from waypoint.streams import Answered, Upstream
from waypoint.transport import Transport

if TYPE_CHECKING:
    from waypoint.exchange import Exchange
    from waypoint.inbound import Inbound
    from waypoint.proxy import Proxy

_EWMA_SHARE: Final = 0.2
_FIRST_GUESS_SECONDS: Final = 0.005
_MAX_EJECTION_SECONDS: Final = 300.0
_HTTP2 = frozenset({AppProtocol.HTTP2, AppProtocol.GRPC})


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
        "_ewma",
        "_h2",
        "_idle",
        "_is_dialling",
        "_proxy",
        "_settings",
        "_waiting",
        "active",
        "candidate",
        "ejected_until",
        "is_http2",
        "last_used",
    )  # fmt: skip

    def __init__(self, proxy: Proxy, candidate: Candidate) -> None:
        self._proxy = proxy
        self.candidate = candidate
        self._settings: BackendSettings = DEFAULT_BACKEND
        self._idle: list[H1Up] = []
        self._h2: list[H2Up] = []
        self._waiting: list[tuple[Try, int]] = []
        self._is_dialling = False
        self.is_http2 = False
        self._ewma = _FIRST_GUESS_SECONDS
        self._errors = self._ejections = 0
        self.active = 0
        self.ejected_until = 0.0
        self.last_used = 0.0

    @property
    def load(self) -> float:
        """Expected work before a new request is through; shared by the workload's capacity."""
        return (self.active + 1) * self._ewma / max(1, self.candidate.workload.capacity)

    def take(self, settings: BackendSettings) -> None:
        """A request is on its way here; `release` follows."""
        self._settings = settings
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
        self._proxy.start(functools.partial(self._connect, exchange, exchange.tries))

    def _open_http2(self, exchange: Try) -> None:
        for each in self._h2:
            if each.can_open:
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
            transport = await self._proxy.dialler.dial(self.candidate)
            channel = H2Up(self._proxy.reactor, transport, self._h2_gone)
            self._h2.append(channel)
            transport.start(channel)
            channel.touch()
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
        if channel in self._h2:
            self._h2.remove(channel)

    async def _connect(self, exchange: Try, number: int) -> None:
        transport: Transport | None = None
        reason = "internal error"
        try:
            transport = await self._proxy.dialler.dial(self.candidate)
        except MeshError as exc:
            reason = str(exc)
        finally:
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
        up.idle_since = time.monotonic()
        self._idle.append(up)

    def _gone(self, up: H1Up) -> None:
        if up in self._idle:
            self._idle.remove(up)

    def close_idle(self, before: float) -> None:
        """Close connections that have been idle since before `before`."""
        for up in [each for each in self._idle if each.idle_since < before]:
            up.close()
        if before == float("inf"):
            for channel in list(self._h2):
                channel.close_if_idle()

    # ---- what happened

    def answered(self, status: int) -> None:
        """A response's head."""
        if status in {502, 503, 504}:
            self.failed()
        else:
            self._errors = 0
            if time.monotonic() >= self.ejected_until:
                self._ejections = max(0, self._ejections - 1) if self._ejections else 0

    def failed(self) -> None:
        """No response, or one that means as much: ejected after several in a row."""
        self._errors += 1
        outlier = self._settings.outlier
        if outlier is not None and self._errors >= outlier.consecutive_errors:
            self._errors = 0
            self._ejections += 1
            seconds = outlier.base_ejection_seconds * self._ejections
            self.ejected_until = time.monotonic() + min(seconds, _MAX_EJECTION_SECONDS)

    def release(self, exchange: Try) -> None:
        """The try is over."""
        now = time.monotonic()
        self.active -= 1
        self.last_used = now
        self._ewma += _EWMA_SHARE * (now - exchange.started_at - self._ewma)


class _Backend:
    """A service's port: its endpoints as of one state of the Store, and its counts."""

    __slots__ = ("active", "endpoints", "reason", "retries", "settings", "version")

    def __init__(self) -> None:
        self.version = -1
        self.endpoints: Sequence[Endpoint] = ()
        self.reason = ""
        self.settings: BackendSettings = DEFAULT_BACKEND
        self.active = self.retries = 0


class Upstreams:
    """Every endpoint that requests were sent to."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._endpoints: dict[tuple[str, int], Endpoint] = {}
        self._backends: dict[tuple[str, int], _Backend] = {}

    def choose(
        self, service: str, port: int, inbound: Inbound, excluded: Collection[Endpoint] = ()
    ) -> Endpoint | Refusal:
        """An endpoint for one try, taken; other than `excluded`, if there is one."""
        backend = self._backend(service, port, inbound)
        candidates = backend.endpoints
        if not candidates:
            return Refusal("UH", backend.reason, http_status=503)
        limit = backend.settings.limits.max_requests
        if limit and sum(each.active for each in candidates) >= limit:
            return Refusal("UO", f"{service} has {limit} requests in flight", http_status=503)
        chosen = self._draw(candidates, backend.settings, excluded)
        chosen.take(backend.settings)
        return chosen

    def _draw(
        self,
        candidates: Sequence[Endpoint],
        settings: BackendSettings,
        excluded: Collection[Endpoint],
    ) -> Endpoint:
        if len(candidates) == 1:
            return candidates[0]
        now = time.monotonic()
        usable = [each for each in candidates if each.ejected_until <= now]
        outlier = settings.outlier
        share = outlier.max_ejection_percent if outlier is not None else 100
        if (len(candidates) - len(usable)) * 100 > share * len(candidates):
            usable = list(candidates)  # too many are out: nobody is
        if excluded:
            usable = [each for each in usable if each not in excluded] or usable
        if len(usable) == 1:
            return usable[0]
        rng = self._proxy.rng
        first = int(rng.random() * len(usable))
        if settings.balancing.kind == "RANDOM":
            return usable[first]
        second = int(rng.random() * (len(usable) - 1))
        second += second >= first
        a, b = usable[first], usable[second]
        return a if a.load <= b.load else b

    def _backend(self, service: str, port: int, inbound: Inbound) -> _Backend:
        key = (service, port) if service else (inbound.workload_uid, -port)
        backend = self._backends.get(key)
        if backend is None:
            backend = self._backends[key] = _Backend()
        if backend.version != self._proxy.version:
            backend.version = self._proxy.version
            self._refresh(backend, service, port, inbound)
        return backend

    def _refresh(self, backend: _Backend, service: str, port: int, inbound: Inbound) -> None:
        proxy = self._proxy
        if not service:
            workload = inbound.workload
            found = [Candidate(workload, port)] if workload is not None else []
            backend.endpoints = [self._endpoint(each) for each in found]
            backend.reason = "the workload is not known any more"
            return
        namespace, _, hostname = service.partition("/")
        key = NamespacedHostname(namespace, hostname)
        known = proxy.store.service_by_key(key)
        if known is None:
            backend.endpoints, backend.reason = (), f"service {service} is not known"
            return
        backend.settings = proxy.traffic.settings(service)
        chosen = find_candidates(known, proxy.store.endpoints(key), port, proxy.own_workload())
        backend.endpoints = [
            self._endpoint(each) for each in chosen.candidates if each.workload.capacity
        ]
        backend.reason = chosen.reason
        described = known.ports.get(port)
        for endpoint in backend.endpoints:
            endpoint.is_http2 = described is not None and described.app_protocol in _HTTP2

    def _endpoint(self, candidate: Candidate) -> Endpoint:
        key = (candidate.workload.uid, candidate.port)
        endpoint = self._endpoints.get(key)
        if endpoint is None:
            endpoint = self._endpoints[key] = Endpoint(self._proxy, candidate)
        elif endpoint.candidate != candidate:
            # Other address or identity: nothing of the old one may be used.
            endpoint.close_idle(float("inf"))
            endpoint.candidate = candidate
        return endpoint

    # ---- retries

    def may_retry(self, service: str, exchange: Exchange) -> bool:
        """Whether the budget allows one more; counted until `retried`."""
        backend = self._backends.get((service, exchange.inbound.port))
        if backend is None:
            return True
        limits = backend.settings.limits
        in_flight = sum(each.active for each in backend.endpoints)
        allowed = max(limits.retry_budget_minimum, in_flight * limits.retry_budget_percent / 100)
        return self.retries < allowed

    retries = 0

    def retrying(self) -> None:
        """A request is being repeated."""
        self.retries += 1

    def retried(self) -> None:
        """A request that was repeated has ended."""
        self.retries -= 1

    # ---- upkeep

    async def sweep(self, idle_seconds: float) -> None:
        """Close what stays idle, forget endpoints that left. If cancelled: ends."""
        while True:
            await trio.sleep(min(15.0, idle_seconds / 2))
            now = time.monotonic()
            used = {id(each) for backend in self._backends.values() for each in backend.endpoints}
            for key, endpoint in list(self._endpoints.items()):
                gone = id(endpoint) not in used
                endpoint.close_idle(now if gone else now - idle_seconds)
                if gone and not endpoint.active and now - endpoint.last_used > idle_seconds:
                    del self._endpoints[key]

    def close(self) -> None:
        """Close every idle connection."""
        for endpoint in self._endpoints.values():
            endpoint.close_idle(float("inf"))
