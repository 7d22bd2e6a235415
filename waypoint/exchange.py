"""One request's life: judged, sent to an endpoint, perhaps more than once, answered, recorded.

    start      the plan is made (route, rule, backend), the filters decide in their order
    _forward   the rule's changes are made, once; then a try
    _try       an endpoint is chosen; it connects, or has a connection
    on_response...   retried while nothing was sent on, else changed and passed
    _finish    recorded, exactly once

No task, no cancel scope: callbacks of two codecs, of timers and, when a filter waits, of one task.
Bodies pass as they come; only while a try may be repeated (or has no connection yet) a bounded
part of the request's body is kept.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import trio

from mesh.errors import Refusal
from mesh.http.h1_heads import RequestHead
from waypoint import deadline, heads, long_lived, spans
from waypoint.filters.chain import (
    Blocked,
    BodyFilter,
    Filter,
    Headers,
    Pair,
    Request,
    Respond,
    Response,
    Wait,
)
from waypoint.filters.ext_authz import PLACE
from waypoint.filters.redact.filter import RedactionFilter, redact_trailers
from waypoint.long_lived import LongLived
from waypoint.mirror import open_mirrors
from waypoint.place import Place
from waypoint.plan import Answer, Forward
from waypoint.spans import RequestSpans
from waypoint.streams import Downstream, Upstream

if TYPE_CHECKING:
    from waypoint.inbound import Inbound
    from waypoint.timers import Timer
    from waypoint.upstream import Endpoint

KEPT_BODY = 64 << 10
_IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"})


class Exchange:
    """Made by a codec of the caller's side for each request."""

    __slots__ = ("_body_in", "_body_out", "_budgeted", "_deadline", "_decided", "_done", "_down",
                 "_endpoint", "_excluded", "_filters", "_held", "_long_lived", "_next_filter",
                 "_per_try", "_plan", "_scope", "_started", "_switched", "_timer", "_trailers",
                 "_up", "bytes_in", "bytes_out", "early", "flag", "grpc_status", "inbound",
                 "is_request_done", "is_response_done", "policy", "reason", "request", "rule_name",
                 "spans", "started_at", "status", "tries",
                 "upgrade")  # fmt: skip

    request: Request

    def __init__(self, inbound: Inbound, down: Downstream) -> None:
        self.inbound = inbound
        self._down = down
        self._up: Upstream | None = None
        self._endpoint: Endpoint | None = None
        self._plan: Forward | None = None
        self._filters: Sequence[Filter] = ()
        self._next_filter = 0
        self._body_in: list[BodyFilter] | None = None
        self._body_out: list[BodyFilter] | None = None
        self._held: bytearray | None = bytearray()
        self._trailers: Sequence[Pair] = ()
        self._timer: Timer | None = None
        self._long_lived: LongLived | None = None
        self._per_try: Timer | None = None
        self._deadline = 0.0
        self._scope: Any = None
        self._excluded: set[Endpoint] | None = None
        self._decided = self._started = self._done = self._switched = self._budgeted = False
        self.is_request_done = self.is_response_done = False
        self.early: Place | None = None
        self.upgrade = b""
        self.spans: RequestSpans | None = None
        self.started_at = 0.0
        self.status = 0
        self.flag = "-"
        self.reason = self.policy = self.rule_name = self.grpc_status = ""
        self.bytes_in = self.bytes_out = self.tries = 0

    # ---- the beginning

    def start_h1(self, head: RequestHead, *, ends: bool) -> None:
        """A request over HTTP/1.1."""
        self.upgrade = head.upgrade
        headers = Headers(head.pairs, head.lines)
        if head.expects_continue:
            headers.add(b"expect", b"100-continue")
        if head.takes_trailers:
            headers.add(b"te", b"trailers")
        self.start(head.method, head.scheme, head.authority, head.path, head.query, headers,
                   ends=ends)  # fmt: skip

    def start(
        self,
        method: bytes,
        scheme: bytes,
        authority: bytes,
        path: bytes,
        query: bytes | None,
        headers: Headers,
        *,
        ends: bool,
    ) -> None:
        """A request's head. `headers` become this exchange's."""
        inbound = self.inbound
        self.started_at = now = time.monotonic()
        self.is_request_done = ends
        inbound.active += 1
        inbound.proxy.in_flight += 1
        traffic = inbound.traffic()
        normal = traffic.normalize(path)
        self.request = request = Request(
            method=method, scheme=scheme, authority=authority, path=normal or path,
            query=query or b"", headers=headers, source=inbound.source,
            source_ip=inbound.source_ip, remote_ip=inbound.source_ip,
            destination_ip=inbound.destination_ip, destination_port=inbound.port,
            service=inbound.service_key, now=now, upgrade=self.upgrade,
        )  # fmt: skip
        if normal is None:
            self._answer(Respond(400, reason="the path cannot be normalized", flag="DPE"))
            return
        is_claimed = False
        for name, value in headers.pairs:
            if name in heads.NOTED:
                if name == b"content-type":
                    request.is_grpc = heads.is_grpc(value)
                else:
                    is_claimed = True
        if is_claimed or traffic.config.shows_client_identity:
            self._set_client_identity(is_shown=traffic.config.shows_client_identity)
        if inbound.proxy.in_flight > inbound.proxy.max_in_flight:
            self._answer(inbound.proxy.shed())
            return
        plan = traffic.routes.plan(request, inbound.source_namespace, inbound.rng)
        request.route, request.rule = plan.route, plan.rule
        if isinstance(plan, Forward):
            self._plan = plan
            self._filters = plan.filters_with(traffic.filters)
        else:
            self._filters = traffic.filters
        self.spans = spans.begin(inbound.proxy.tracer, inbound, request)
        if self.upgrade or request.is_grpc:
            self._long_lived = LongLived(self)
        self._filter(plan)

    def _set_client_identity(self, *, is_shown: bool) -> None:
        """Nobody but us says who calls; and we only where the Gateway asks for it."""
        headers = self.request.headers
        headers.pairs = [each for each in headers.pairs if not heads.is_client_certificate(each[0])]
        if is_shown:
            inbound = self.inbound
            headers.add(*heads.client_certificate(inbound.proxy.identity, inbound.source))

    def hide(self, *texts: bytes) -> list[str]:
        """Texts for a log, without what the service's policies redact."""
        shown = list(texts)
        for each in self._filters:
            if isinstance(each, RedactionFilter):
                shown = each.redact_texts(self.request, shown)
        return [text.decode("latin-1") for text in shown]

    def _filter(self, plan: Forward | Answer) -> None:
        """The filters that are left, then what was planned."""
        filters = self._filters
        while self._next_filter < len(filters):
            verdict = filters[self._next_filter].on_request(self.request)
            self._next_filter += 1
            if verdict is None:
                continue
            if isinstance(verdict, Wait):
                self._down.pause()
                self.inbound.proxy.start(functools.partial(self._wait, verdict, plan))
                return
            self._answer(verdict)
            return
        if isinstance(plan, Answer):
            self._answer(plan.respond)
            return
        for each in filters:
            body = each.open_request_body(self.request)
            if body is not None:
                self._body_in = [*(self._body_in or ()), body]
        if self._body_in is not None and not self.is_request_done:
            self.request.headers.remove(b"content-length")
        if self._held:
            self._filter_held()
        self._forward(plan)

    def _filter_held(self) -> None:
        """What came of the body while a filter waited: the body's filters see it all the same."""
        held, filters = self._held, self._body_in
        if held is None or filters is None:
            return
        early = bytes(held)
        del held[:]
        held += self._filtered(filters, memoryview(early))
        if self.is_request_done and not self._done:
            held += self._filtered(filters, None)
            self.request.headers.remove(b"content-length")

    async def _wait(self, verdict: Wait, plan: Forward | Answer) -> None:
        """A filter's question. If cancelled: the exchange ended meanwhile."""

        with trio.CancelScope() as scope:
            self._scope = scope
            if self._done:
                return
            self.request.notes[PLACE] = Place(self, self._down)
            answer = await verdict.ask()
            self.request.notes.pop(PLACE, None)
            self._scope = None
            if self._done:
                return
            if answer is not None:
                self._answer(answer)
            else:
                self._down.unpause()
                self._filter(plan)

    # ---- towards the endpoint

    def _forward(self, plan: Forward) -> None:
        self._decided = True
        if self._done:
            return
        plan.change_request(self.request)
        if plan.mirrors:
            early = bytes(self._held or b"")
            self._body_in = open_mirrors(self, plan.mirrors, self._body_in, early)
        timers = self.inbound.proxy.timers
        seconds = deadline.request_seconds(plan.request_timeout, self.request)
        if seconds is not None:
            self._deadline = self.started_at + seconds
            left = max(0.0, self._deadline - time.monotonic())
            self._timer = timers.after(left, self._timed_out)
        self._try()

    def _try(self) -> None:
        plan = self._plan
        assert plan is not None  # noqa: S101 - only forwarded requests are tried
        if self._done:
            return
        self.tries += 1
        chosen = self.inbound.proxy.upstreams.choose(
            plan.backend.service, plan.backend.port, self.inbound, self._excluded or (),
            self.request, plan.session,
        )  # fmt: skip
        if isinstance(chosen, Refusal):
            self._answer(Respond(chosen.http_status, flag=chosen.flag, reason=chosen.reason))
            return
        self._endpoint = chosen
        if self.spans is not None:
            candidate = chosen.candidate
            self.spans.tried(self.tries, candidate.workload, candidate.port)
        if self._deadline or plan.backend_timeout is not None:
            self._limit_try(plan.backend_timeout)
        chosen.open(self)

    def _limit_try(self, seconds: float | None) -> None:
        """Start the clock of this try, and tell the endpoint of it."""
        left = max(0.0, self._deadline - time.monotonic()) if self._deadline else None
        if seconds is not None and (left is None or seconds < left):
            self._per_try = self.inbound.proxy.timers.after(seconds, self._try_timed_out)
        told = deadline.shortest(left, seconds)
        if told is not None:
            deadline.tell(self.request.headers, told, is_grpc=self.request.is_grpc)

    def waits_for(self, endpoint: Endpoint, number: int) -> bool:
        """Whether try `number` still wants a connection to `endpoint`."""
        return (
            not self._done
            and self._up is None
            and self._endpoint is endpoint
            and self.tries == number
        )

    def connected(self, up: Upstream) -> None:
        """The endpoint has a connection for this try: out with what waits."""
        self._up = up
        held = self._held
        ends = self.is_request_done and not held and not self._trailers
        up.send_head(self.request, ends=ends, upgrade=self.upgrade)
        if ends or self._up is not up:
            return
        if held:
            up.send_data(bytes(held))
        if not self._may_repeat():
            self._held = None
        if self.is_request_done:
            up.send_end(self._trailers)
        elif not up.is_blocked:
            self._down.unpause()

    def on_request_data(self, data: memoryview) -> None:
        """Body from the caller."""
        if self._done:
            return
        self.bytes_in += len(data)
        if self._switched:
            up = self._up
            if up is not None:
                up.send_data(data)
                if up.is_blocked:
                    self._down.pause()
            return
        if self._body_in is not None:
            self._send_body(self._filtered(self._body_in, data))
        else:
            self._send_body(data)

    def _send_body(self, data: bytes | memoryview) -> None:
        if self._done:
            return
        held, up = self._held, self._up
        if held is not None:
            if up is not None and len(held) + len(data) > KEPT_BODY:
                self._held = None  # too much to say it again
            else:
                held += data
        if up is not None:
            up.send_data(data)
            if up.is_blocked:
                self._down.pause()
        elif held is not None:
            if self.early is not None:
                self.early.came(len(held))
            elif len(held) > KEPT_BODY:
                self._down.pause()

    def held_body(self) -> bytes:
        """What came of the body and is kept."""
        return bytes(self._held or b"")

    def on_request_end(self, trailers: Sequence[Pair]) -> None:
        """The request is complete."""
        if self._done:
            return
        if self._body_in is not None and not self._switched:
            self._send_body(self._filtered(self._body_in, None))
            if self._done:
                return
        trailers = self._redacted(trailers, is_request=True)
        if self._done:
            return
        self.is_request_done = True
        self._trailers = trailers
        if self.early is not None:
            self.early.ended()
        if self._up is not None:
            self._up.send_end(trailers)
        if self._switched and self.is_response_done:
            self._finish()

    def _filtered(self, filters: list[BodyFilter], data: memoryview | None) -> bytes:
        """What the body filters make of some bytes, or of the end."""
        piece = bytes(data) if data is not None else b""
        try:
            for each in filters:
                if data is None:
                    piece = (each.feed(piece) if piece else b"") + each.finish()
                elif piece:
                    piece = each.feed(piece)
        except Blocked as blocked:
            self._blocked(blocked.respond)
            return b""
        return piece

    def _redacted(self, trailers: Sequence[Pair], *, is_request: bool) -> Sequence[Pair]:
        if trailers:
            try:
                return redact_trailers(
                    self._filters, self.request, trailers, is_request=is_request
                )  # fmt: skip
            except Blocked as blocked:
                self._blocked(blocked.respond)
        return trailers

    def _blocked(self, respond: Respond) -> None:
        if self._started:
            self.flag, self.reason, self.policy = respond.flag, respond.reason, respond.policy
            self._cut()
        else:
            self._answer(respond)

    def cut_by_policy(self, respond: Respond) -> None:
        """Policy changed, and would not let this begin any more."""
        respond = replace(respond, reason=f"policy changed: {respond.reason}")
        self.rule_name = respond.rule
        if self._started and self.request.is_grpc and self._body_out is None:
            self.flag, self.reason, self.policy = respond.flag, respond.reason, respond.policy
            self._end_call(long_lived.TRAILERS)
        else:
            self._blocked(respond)

    def _end_call(self, trailers: Sequence[Pair]) -> None:
        """End a gRPC stream before its endpoint does."""
        self._note_grpc(trailers)
        down = self._down
        self._finish()
        down.send_end(trailers)

    def on_down_room(self) -> None:
        """The caller takes bytes again."""
        if self._up is not None:
            self._up.unpause()

    def on_up_room(self) -> None:
        """The endpoint takes bytes again."""
        if not self._done:
            self._down.unpause()

    def on_down_lost(self, reason: str, *, flag: str) -> None:
        """The caller has gone, or broke a rule."""
        if self._done:
            return
        self.flag, self.reason = flag, reason
        self._finish()

    # ---- from the endpoint

    def on_interim(self, status: int, pairs: Sequence[Pair]) -> None:
        """A 1xx."""
        if not self._done and not self._started:
            self._down.send_interim(status, pairs)

    def on_response(self, response: Response, *, ends: bool, switches: bytes = b"") -> None:
        """The response's head."""
        if self._done:
            return
        plan = self._plan
        if self._endpoint is not None:
            self._endpoint.answered(response.status)
        if switches:
            self._switched, self.is_request_done = True, False
        elif plan is not None and self._may_retry_status(plan, response.status):
            up, self._up = self._up, None
            if up is not None:
                up.cancel()
            self._retry(f"status {response.status}")
            return
        if plan is not None:
            plan.change_response(self.request, response)
        if not self._pass_filters(response):
            return
        if not ends and not switches:
            self._open_response_bodies(response)
        self._started = True
        self.status = response.status
        self._note_grpc(response.headers.pairs)
        self._held = None
        self._down.send_head(response, ends=ends, switches=switches)
        if self._down.is_blocked and self._up is not None:
            self._up.pause()

    def _pass_filters(self, response: Response) -> bool:
        for each in reversed(self._filters):
            verdict = each.on_response(self.request, response)
            if verdict is not None:
                self._answer(verdict)
                return False
        return True

    def _open_response_bodies(self, response: Response) -> None:
        for each in reversed(self._filters):
            body = each.open_response_body(self.request, response)
            if body is not None:
                self._body_out = [*(self._body_out or ()), body]
        if self._body_out is not None:
            response.headers.remove(b"content-length")

    def on_response_data(self, data: memoryview) -> None:
        """Body from the endpoint."""
        if self._done:
            return
        piece: bytes | memoryview = data
        if self._body_out is not None:
            piece = self._filtered(self._body_out, data)
            if self._done:
                return
        self.bytes_out += len(piece)
        self._down.send_data(piece)
        if self._up is not None and self._down.is_blocked:
            self._up.pause()

    def on_response_end(self, trailers: Sequence[Pair] = ()) -> None:
        """The response is complete."""
        if self._done:
            return
        if self._body_out is not None:
            last = self._filtered(self._body_out, None)
            if self._done:
                return
            self.bytes_out += len(last)
            self._down.send_data(last)
        trailers = self._redacted(trailers, is_request=False)
        if self._done:
            return
        self.is_response_done = True
        if trailers:
            self._note_grpc(trailers)
        if self._switched and not self.is_request_done:
            self._down.send_end(trailers)
            return
        if not self._switched and self.is_request_done:
            self._up = None  # it is the next request's
        self._finish()
        self._down.send_end(trailers)

    def _note_grpc(self, pairs: Sequence[Pair]) -> None:
        if self.request.is_grpc:
            for name, value in pairs:
                if name == b"grpc-status":
                    # It becomes a label: what is none counts as UNKNOWN.
                    is_one = value.isdigit() and len(value) <= 2
                    self.grpc_status = value.decode("ascii") if is_one else "2"

    def on_up_lost(self, reason: str, *, is_refused: bool) -> None:
        """The try ended without a response."""
        self._up = None
        if self._done:
            return
        endpoint = self._endpoint
        # Who asks an endpoint of HTTP/1.1 for gRPC does not make it unfit for others.
        if endpoint is not None and (endpoint.is_http2 or not self.request.is_grpc):
            endpoint.failed()
        if self._started:
            self.flag, self.reason = "UC", reason
            self._cut()
            return
        plan = self._plan
        can = plan is not None and self._held is not None
        safe = is_refused or self.request.method in _IDEMPOTENT
        configured = plan is not None and plan.retry is not None
        if can and plan is not None and (is_refused or safe or configured):
            retry = plan.retry
            wanted = retry.on_connection_failure if retry is not None else True
            attempts = retry.attempts if retry is not None else 2
            if wanted and self.tries <= attempts:
                self._retry(reason)
                return
        self._answer(Respond(503, flag="UF" if is_refused else "UC", reason=reason))

    # ---- again, or not

    def _may_repeat(self) -> bool:
        plan = self._plan
        return plan is not None and (plan.retry is None or plan.retry.attempts > 0)

    def _may_retry_status(self, plan: Forward, status: int) -> bool:
        retry = plan.retry
        return (
            retry is not None
            and status in retry.codes
            and self.tries <= retry.attempts
            and self._held is not None
        )

    def _retry(self, reason: str) -> None:
        endpoint, plan = self._endpoint, self._plan
        assert plan is not None  # noqa: S101 - only forwarded requests are retried
        if self._per_try is not None:
            self._per_try.cancel()
            self._per_try = None
        if self.spans is not None:
            self.spans.try_failed(reason)
        if endpoint is not None:
            self._endpoint = None
            endpoint.release(self)
            self._excluded = (self._excluded or set()) | {endpoint}
        upstreams = self.inbound.proxy.upstreams
        if not upstreams.may_retry(plan.backend, is_first=not self._budgeted):
            reason = f"{reason}; the retry budget is spent"
            self._answer(Respond(503, flag="URX", reason=reason))
            return
        self._budgeted = True
        pause = plan.backoff(self.tries, self.inbound.rng)
        self.inbound.proxy.timers.after(pause, self._try)

    def _timed_out(self) -> None:
        if self._done:
            return
        self._give_up("the request's timeout passed")

    def _give_up(self, reason: str) -> None:
        """No time is left: 504, or what has begun ends visibly."""
        if not self._started:
            self._answer(deadline.exceeded(reason))
            return
        self.flag, self.reason = "UT", reason
        if self.request.is_grpc and self._body_out is None:
            self._end_call(deadline.TRAILERS)
        else:
            self._cut()

    def _try_timed_out(self) -> None:
        plan = self._plan
        if self._done or plan is None:
            return
        if self._started:
            self._give_up("the try's timeout passed")
            return
        up, self._up = self._up, None
        if up is not None:
            up.cancel()
        if self._endpoint is not None:
            self._endpoint.failed()
        retry = plan.retry
        kept = self._held is not None
        if retry is not None and self.tries <= retry.attempts and kept:
            self._retry("the try's timeout passed")
        else:
            self._answer(deadline.exceeded("the try's timeout passed"))

    # ---- the end

    def _answer(self, respond: Respond) -> None:
        """Answer ourselves."""
        if self._done:
            return
        self.flag, self.reason = respond.flag, respond.reason
        self.policy, self.rule_name = respond.policy, respond.rule
        response = heads.local_response(self.request, respond)
        self.status = response.status
        self._note_grpc(response.headers.pairs)
        plan = self._plan
        if plan is not None and self._decided:
            plan.change_response(self.request, response)
        body = b"" if self.request.is_grpc else respond.body
        self.bytes_out += len(body)
        down = self._down
        up, self._up = self._up, None
        if up is not None:
            up.cancel()
        ends = not body or self.request.method == b"HEAD"
        self.is_response_done = True
        self._finish()
        down.send_head(response, ends=ends)
        if not ends:
            down.send_data(body)
        down.send_end()

    def _cut(self) -> None:
        down = self._down
        self._finish()
        down.cut()

    def _finish(self) -> None:
        """Recorded, exactly once; nothing happens to this exchange afterwards."""
        if self._done:
            return
        self._done = True
        for timer in (self._timer, self._per_try):
            if timer is not None:
                timer.cancel()
        if self._scope is not None:
            self._scope.cancel()
        if self._long_lived is not None:
            self._long_lived.end()
        up, self._up = self._up, None
        if up is not None and not (self.is_response_done and self.is_request_done):
            up.cancel()
        inbound = self.inbound
        inbound.active -= 1
        inbound.proxy.in_flight -= 1
        inbound.proxy.journal.finished(self, self._endpoint)
        if self.spans is not None:
            self.spans.end(self)
        if self._endpoint is not None:
            self._endpoint.release(self)
        if self._budgeted and self._plan is not None:
            inbound.proxy.upstreams.retried(self._plan.backend)
