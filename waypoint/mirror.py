"""RequestMirror: a copy of a request to another service, whose answer nobody hears.

A copy is sent when the request is complete, as it left the filters and the rule's changes, Host
included (the Gateway API asks for no suffix). It has its own endpoint, its own time limit and a
bounded body; what is too big, too much at once or cannot be delivered is counted and forgotten.
Nothing of it reaches the caller or the endpoint that answers: no retry, no ejection, no wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from mesh.errors import Refusal
from mesh.model.route import Mirror
from waypoint.filters.chain import BodyFilter, Headers, Pair, Request, Response
from waypoint.streams import Upstream

if TYPE_CHECKING:
    from waypoint.exchange import Exchange
    from waypoint.inbound import Inbound
    from waypoint.timers import Timer
    from waypoint.upstream import Endpoint

MAX_BODY: Final = 256 << 10
MAX_IN_FLIGHT: Final = 256
SECONDS: Final = 15.0
_NOT_COPIED: Final = frozenset({b"expect", b"content-length"})


def open_mirrors(
    exchange: Exchange, mirrors: Sequence[Mirror], others: list[BodyFilter] | None, early: bytes
) -> list[BodyFilter] | None:
    """Copies of a request whose head is ready, drawn by their shares. The body's filters are
    given back, with one more that collects what the copies need; `early` has passed the others
    already, while a filter was waited for.
    """
    inbound = exchange.inbound
    if exchange.upgrade or exchange.request.method == b"CONNECT":
        return others
    drawn = [
        each
        for each in mirrors
        if each.numerator >= each.denominator
        or inbound.rng.random() * each.denominator < each.numerator
    ]
    if not drawn:
        return others
    request = exchange.request
    pairs = [pair for pair in request.headers.pairs if pair[0] not in _NOT_COPIED]
    copier = _Copier(inbound, replace(request, headers=Headers(pairs), notes={}), drawn)
    copier.feed(early)
    if exchange.is_request_done:
        copier.finish()
        return others
    return [*(others or ()), copier]


class _Copier:
    """A body filter that changes nothing and keeps what passed."""

    def __init__(self, inbound: Inbound, request: Request, mirrors: Sequence[Mirror]) -> None:
        self._inbound = inbound
        self._request = request
        self._mirrors = mirrors
        self._body: bytearray | None = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Keep it, within the bound."""
        body = self._body
        if body is not None:
            if len(body) + len(data) > MAX_BODY:
                self._body = None
            else:
                body += data
        return data

    def finish(self) -> bytes:
        """The request is complete: send the copies."""
        for mirror in self._mirrors:
            if self._body is None:
                _count(self._inbound, mirror, "too_large")
            else:
                request = replace(self._request, headers=Headers(list(self._request.headers.pairs)))
                _Copy(self._inbound, mirror, request, bytes(self._body)).send()
        return b""


def _count(inbound: Inbound, mirror: Mirror, outcome: str) -> None:
    service = mirror.backend.service.partition("/")[2]
    inbound.proxy.counters.mirrored.labels(service, outcome).inc()


class _Copy:
    """One copy on its way: what an endpoint takes for an exchange."""

    __slots__ = ("_body", "_endpoint", "_inbound", "_is_done", "_mirror", "_timer", "_up",
                 "request", "started_at", "tries")  # fmt: skip

    def __init__(self, inbound: Inbound, mirror: Mirror, request: Request, body: bytes) -> None:
        self._inbound = inbound
        self._mirror = mirror
        self._body = body
        self._up: Upstream | None = None
        self._endpoint: Endpoint | None = None
        self._timer: Timer | None = None
        self._is_done = False
        self.request = request
        self.started_at = inbound.proxy.now()
        self.tries = 1

    def send(self) -> None:
        """Choose an endpoint and ask it for a connection."""
        proxy, backend = self._inbound.proxy, self._mirror.backend
        if backend.problem:
            _count(self._inbound, self._mirror, "no_backend")
            return
        if proxy.mirrors_in_flight >= MAX_IN_FLIGHT:
            _count(self._inbound, self._mirror, "overflow")
            return
        chosen = proxy.upstreams.choose(backend.service, backend.port, self._inbound)
        if isinstance(chosen, Refusal):
            _count(self._inbound, self._mirror, "no_endpoint")
            return
        proxy.mirrors_in_flight += 1
        self._endpoint = chosen
        self._timer = proxy.timers.after(SECONDS, self._timed_out)
        chosen.open(self)

    def waits_for(self, endpoint: Endpoint, number: int) -> bool:
        """Whether it still wants that connection."""
        del number
        return not self._is_done and self._up is None and self._endpoint is endpoint

    def connected(self, up: Upstream) -> None:
        """Out with it."""
        self._up = up
        body = self._body
        if body:
            self.request.headers.add(b"content-length", b"%d" % len(body))
        up.send_head(self.request, ends=not body)
        if body and self._up is up:
            up.send_data(body)
            up.send_end()

    def on_interim(self, status: int, pairs: Sequence[Pair]) -> None:
        """Not for us."""

    def on_response(self, response: Response, *, ends: bool, switches: bytes = b"") -> None:
        """Dropped."""
        del response, ends
        if switches:
            self._finish("failed")

    def on_response_data(self, data: memoryview) -> None:
        """Dropped."""

    def on_response_end(self, trailers: Sequence[Pair] = ()) -> None:
        """Delivered."""
        del trailers
        self._up = None
        self._finish("answered")

    def on_up_lost(self, reason: str, *, is_refused: bool) -> None:
        """Not delivered; it stays so."""
        del reason, is_refused
        self._up = None
        self._finish("failed")

    def on_up_room(self) -> None:
        """All was written at once."""

    def _timed_out(self) -> None:
        self._finish("timed_out")

    def _finish(self, outcome: str) -> None:
        if self._is_done:
            return
        self._is_done = True
        if self._timer is not None:
            self._timer.cancel()
        up, self._up = self._up, None
        if up is not None:
            up.cancel()
        self._inbound.proxy.mirrors_in_flight -= 1
        if self._endpoint is not None:
            self._endpoint.release(self)
        _count(self._inbound, self._mirror, outcome)
