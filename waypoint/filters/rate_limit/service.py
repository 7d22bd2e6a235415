"""RateLimitPolicy counted by a rate-limit service: Envoy's protocol, so that limiters which are
there already can be asked (`envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit`).

Each rule that concerns a request is one descriptor: the rule's own entries, then those of its key.
The rule's limit goes along and counts instead of what the service is configured with; a rule
without one leaves it to the service. Rules of the same cost are asked about together. An answer
without a verdict, or with a field that cannot be sent, is none: `onFailure` decides.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import trio

from mesh.errors import ConfigError, Unavailable
from mesh.grpc import codec
from mesh.model.l7_policy import UNIT_SECONDS, RateLimitKey, RateLimitPolicy, RateLimitRule
from mesh.model.service import service_key
from mesh.proto import rate_limit_pb2 as pb
from waypoint.filters import ext_authz_grpc
from waypoint.filters.chain import Answer, Pair, Request, Respond, Response, Verdict, Wait
from waypoint.filters.ext_authz import PLACE, Ask, may_say
from waypoint.filters.rate_limit.filter import (
    Hit,
    LimitRule,
    MakeBuckets,
    new_buckets,
    sum_up,
)
from waypoint.filters.rate_limit.gcra import Rate
from waypoint.filters.rate_limit.gcra import Verdict as Judged
from waypoint.filters.rate_limit.shared import SharedLimits
from waypoint.filters.rate_limit.stores import Stores

METHOD: Final = b"/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"
MAX_COST: Final = (1 << 32) - 1
_TOLD: Final = "rate_limit.told"
_OK, _OVER = pb.RateLimitResponse.OK, pb.RateLimitResponse.OVER_LIMIT
_UNITS: Final = dict(zip(UNIT_SECONDS, (pb.SECOND, pb.MINUTE, pb.HOUR, pb.DAY), strict=True))
_SECONDS: Final = {
    **{unit: seconds for seconds, unit in _UNITS.items()},
    pb.WEEK: 7 * 86400.0, pb.MONTH: 30 * 86400.0, pb.YEAR: 365 * 86400.0,
}  # fmt: skip


class ServiceRateLimits(SharedLimits):
    """Counted by a service of the mesh, which is asked as authorizers are."""

    def __init__(
        self,
        policy: RateLimitPolicy,
        ask: Ask,
        domain: str,
        stores: Stores,
        buckets: MakeBuckets = new_buckets,
    ) -> None:
        """`domain` is the cluster's; `buckets` gives those of a rule for `LocalShare`."""
        self._ask = ask
        self._domain = domain
        super().__init__(policy, stores, buckets)

    def _open(self) -> None:
        shared = self._policy.shared
        host, _, port = shared.address.rpartition(":")
        service = service_key(host, self._domain)
        if service is None or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ConfigError(
                f"{shared.address!r} is no service and port of the mesh",
                hint="write name.namespace:port or namespace/host:port",
            )
        for each in self._policy.rules:
            if each.window_seconds and each.window_seconds not in _UNITS:
                raise ConfigError("a rate-limit service counts by 1s, 1m, 1h or 24h")
            if not each.window_seconds and shared.on_failure == "LocalShare":
                raise ConfigError("without a limit, LocalShare has nothing to share")
        self._service, self._port = service, int(port)

    def on_request(self, request: Request) -> Verdict:
        """Ask, if a rule concerns the request."""
        if self._broken is not None:
            return self._broken
        rules = [each for each in self._rules if each.concerns(request) and each.cost_of(request)]
        return Wait(functools.partial(self._judge, request, rules)) if rules else None

    async def _judge(self, request: Request, rules: Sequence[LimitRule]) -> Respond | None:
        place = request.notes.pop(PLACE)
        deadline = trio.current_time() + self._policy.shared.timeout_seconds
        hits: list[Hit] = []
        told: list[Pair] = []
        upstream: list[Pair] = []
        body = b""
        try:
            for cost in sorted({each.cost_of(request) for each in rules}):
                asked = [each for each in rules if each.cost_of(request) == cost]
                said = await self._say(place, request, asked, cost, deadline)
                hits += judge(request, asked, said)
                told += _fields(said.response_headers_to_add)
                upstream += _fields(said.request_headers_to_add)
                body = said.raw_body or body
        except Unavailable as exc:
            return self._alone(request, rules, str(exc))
        self._stores.answered(self._policy.shared.address)
        refusal = sum_up(request, hits)
        if refusal is not None:
            return replace(
                refusal,
                body=body or refusal.body,
                headers=(*refusal.headers, *told),
                reason=f"{self._policy.shared.address} says it is over the limit",
            )
        for name, value in upstream:
            request.headers.add(name, value)
        if told:
            request.notes.setdefault(_TOLD, []).extend(told)
        return None

    async def _say(
        self, place: Any, request: Request, rules: Sequence[LimitRule], cost: int, deadline: float
    ) -> pb.RateLimitResponse:
        seconds = max(0.0, deadline - trio.current_time())
        answer = await self._ask(
            place,
            self._service,
            self._port,
            ext_authz_grpc.call(self._service, METHOD, seconds, request),
            codec.encode_message(question(self._policy.shared.domain, request, rules, cost)),
            seconds,
        )
        return hear(answer)

    def on_response(self, request: Request, response: Response) -> Respond | None:
        """What the service wanted told, and what is left."""
        super().on_response(request, response)
        for name, value in request.notes.get(_TOLD, ()):
            response.headers.add(name, value)
        return None


def question(
    domain: str, request: Request, rules: Sequence[LimitRule], cost: int
) -> pb.RateLimitRequest:
    """One descriptor for each rule."""
    asked = pb.RateLimitRequest(domain=domain, hits_addend=min(cost, MAX_COST))
    for each in rules:
        key = each.key_of(request)
        made = asked.descriptors.add()
        for name, value in _fixed(each.rule):
            made.entries.add(key=name, value=value)
        for part, value in zip(each.rule.keys, key, strict=True):
            made.entries.add(key=_called(part), value=value)
        if each.rule.window_seconds:
            made.limit.requests_per_unit = each.rate_of(key).requests
            made.limit.unit = _UNITS[each.rule.window_seconds]
    return asked


def _fixed(rule: RateLimitRule) -> tuple[tuple[str, str], ...]:
    return (("generic_key", rule.name),) if rule.descriptor is None else rule.descriptor


def _called(part: RateLimitKey) -> str:
    if part.kind == "SourceIP":
        return part.descriptor_key or "remote_address"  # as Envoy's own action of that name
    return part.descriptor_key or part.name or part.kind.lower()


def hear(answer: Answer) -> pb.RateLimitResponse:
    """What it says. Raises Unavailable."""
    try:
        body = ext_authz_grpc.message_of(answer)
        said = codec.parse_message(pb.RateLimitResponse, body)
    except codec.GrpcError as exc:
        raise Unavailable(f"it answers nonsense: {exc}") from exc
    if said.overall_code not in (_OK, _OVER):
        raise Unavailable("it answers without a verdict")
    return said


def judge(request: Request, rules: Sequence[LimitRule], said: pb.RateLimitResponse) -> list[Hit]:
    """The verdict on each rule. What it does not say of one holds of all; rules without a limit,
    neither here nor there, have none unless they are over it.
    """
    is_over = said.overall_code == _OVER
    each_is_told = len(said.statuses) == len(rules) and is_over == any(
        each.code == _OVER for each in said.statuses
    )
    hits: list[Hit] = []
    for index, rule in enumerate(rules):
        status = said.statuses[index] if each_is_told else pb.RateLimitResponse.DescriptorStatus()
        over = status.code == _OVER if each_is_told else is_over
        limit = status.current_limit
        per_unit, seconds = limit.requests_per_unit, _SECONDS.get(limit.unit, 0.0)
        rate = rule.rate_of(rule.key_of(request))
        is_known = bool(seconds or rule.rule.window_seconds)
        if seconds:
            rate = Rate(per_unit, seconds, max(1, per_unit))
        if not is_known and not over:
            continue
        until = status.duration_until_reset
        reset = until.seconds + until.nanos / 1e9
        wait = max(reset, 0.0) or rate.window_seconds or 1.0
        left = 0 if over else status.limit_remaining
        judged = Judged(not over, 0.0, left, wait if over else 0.0, wait)
        advertised = rule.advertised and is_known and each_is_told
        hits.append((replace(rule, advertised=advertised), rate, judged))
    return hits


def _fields(headers: Sequence[Any]) -> list[Pair]:
    found = [ext_authz_grpc.field_of(each) for each in headers[: ext_authz_grpc.MAX_FIELDS]]
    return [each for each in found if each is not None and may_say(each[0])]
