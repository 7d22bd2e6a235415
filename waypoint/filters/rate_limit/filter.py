"""RateLimitPolicy (ambit.dev/v1alpha1): who asks too much is told to wait.

Each rule that concerns a request takes from that rule's bucket for the caller's key; one bucket
that is over refuses the request, 429 or RESOURCE_EXHAUSTED, with Retry-After. Buckets of a refused
request keep what it took from the others: a caller who is over does not get the rest for free.

`RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers) tell of the rule with the
least left. These limits are this process's own; `shared` has those that replicas keep together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from mesh.errors import ConfigError
from mesh.model.l7_policy import RateLimitKey, RateLimitPolicy, RateLimitRule
from waypoint.filters.chain import Pair, PassingFilter, Request, Respond, Response, Verdict
from waypoint.filters.condition import Test, compile_condition
from waypoint.filters.rate_limit import gcra
from waypoint.filters.rate_limit.gcra import Rate
from waypoint.filters.rate_limit.local import Buckets, Key, Rehearsal

GRPC_RESOURCE_EXHAUSTED: Final = 8
MAX_KEY_BYTES: Final = 256
MakeBuckets = Callable[[RateLimitPolicy, RateLimitRule], Buckets]
_NOTE: Final = "rate_limit.headers"
_MOST_SECONDS: Final = 86_400 * 366


@dataclass(frozen=True, slots=True)
class LimitRule:
    """A rule, compiled."""

    policy: str
    rule: RateLimitRule
    concerns: Test
    parts: tuple[Callable[[Request], str], ...]
    rate: Rate
    overrides: dict[Key, Rate]
    buckets: Buckets
    advertised: bool

    def key_of(self, request: Request) -> Key:
        """Whose bucket a request takes from."""
        return tuple(part(request)[:MAX_KEY_BYTES] for part in self.parts)

    def rate_of(self, key: Key) -> Rate:
        """Of that bucket."""
        return self.overrides.get(key, self.rate)

    def cost_of(self, request: Request) -> int:
        """What a request takes from it."""
        if self.rule.cost_header:
            said = request.headers.get(self.rule.cost_header.lower().encode())
            # What the caller says of itself may cost more than the rule says, never less.
            if said is not None and said.isdigit() and len(said) <= 9:
                return max(self.rule.cost, int(said))
        return self.rule.cost


@dataclass(frozen=True, slots=True)
class Asked:
    """A rule that concerned a request, the bucket that it asked, and what that said."""

    policy: str
    rule: RateLimitRule
    key: Key
    rate: Rate
    verdict: gcra.Verdict


Hit = tuple[LimitRule, Rate, gcra.Verdict]


def new_buckets(policy: RateLimitPolicy, rule: RateLimitRule) -> Buckets:
    """Empty ones."""
    del policy, rule
    return Buckets()


class RateLimits(PassingFilter):
    """The rate limits of one service. `problem` policies refuse what they target. `buckets` gives
    the buckets of a rule: those it had before, where a change elsewhere must not refill them.
    """

    name = "RateLimitPolicy"

    def __init__(
        self, policies: Iterable[RateLimitPolicy], buckets: MakeBuckets = new_buckets
    ) -> None:
        self._rules: list[LimitRule] = []
        self._broken: Respond | None = None
        for policy in policies:
            key = f"{policy.namespace}/{policy.name}"
            try:
                if policy.shared.kind != "Local":
                    raise ConfigError(f"shared through {policy.shared.kind}, not kept here")
                self._rules += compile_policy(key, policy, buckets)
            except ConfigError as error:
                self._broken = self._broken or Respond(
                    500, flag="NC", policy=key, reason=f"it cannot be kept: {error}"
                )

    def on_request(self, request: Request) -> Verdict:
        """Take from the buckets, or refuse."""
        return self._judge(request, self._rules)

    def _judge(self, request: Request, rules: Iterable[LimitRule]) -> Respond | None:
        if self._broken is not None:
            return self._broken
        return sum_up(request, take(request, [each for each in rules if each.concerns(request)]))

    def rehearse(self, request: Request) -> tuple[Respond | None, list[Asked]]:
        """What `on_request` would say, by itself, and of which buckets; nothing is taken."""
        played = [(each, Rehearsal(each.buckets)) for each in self._rules]
        verdict = self._judge(request, [replace(each, buckets=own) for each, own in played])
        asked = [
            Asked(each.policy, each.rule, *found) for each, own in played for found in own.asked
        ]
        return verdict, asked

    def on_response(self, request: Request, response: Response) -> Respond | None:
        """Tell what is left, unless the origin has told something itself."""
        add_headers(request, response)
        return None


def add_headers(request: Request, response: Response) -> None:
    """`RateLimit` and its policy, as the request's verdict noted them."""
    headers = request.notes.get(_NOTE)
    if headers is not None and response.headers.get(b"ratelimit") is None:
        for name, value in headers:
            response.headers.add(name, value)


def take(request: Request, rules: Iterable[LimitRule], replicas: int = 1) -> list[Hit]:
    """From the buckets here of rules that concern a request, as one of so many replicas."""
    hits = []
    for each in rules:
        key = each.key_of(request)
        rate = share_of(each.rate_of(key), replicas)
        verdict = each.buckets.hit(key, request.now, rate, each.cost_of(request))
        hits.append((each, rate, verdict))
    return hits


def share_of(rate: Rate, replicas: int) -> Rate:
    """What one of `replicas` may let pass of a rate: as often, in a window as many times longer."""
    if replicas <= 1:
        return rate
    return replace(
        rate, window_seconds=rate.window_seconds * replicas, burst=max(1, rate.burst // replicas)
    )


def sum_up(request: Request, hits: Iterable[Hit]) -> Respond | None:
    """What the buckets' verdicts mean together: refused by the one that takes longest, or told of
    the one with the least left.
    """
    tightest: tuple[float, Hit] | None = None
    refused: Hit | None = None
    for hit in hits:
        each, rate, verdict = hit
        if each.rule.is_shadow:
            if not verdict.is_allowed:
                shadowed = request.notes.setdefault("rate_limit.shadow", [])
                shadowed.append(f"{each.policy} {each.rule.name}")
            continue
        if not verdict.is_allowed and (
            refused is None or verdict.retry_seconds > refused[2].retry_seconds
        ):
            refused = hit
        share = verdict.remaining / max(1, rate.burst)
        if each.advertised and (tightest is None or share < tightest[0]):
            tightest = (share, hit)
    if refused is not None:
        return _refusal(*refused)
    if tightest is not None:
        request.notes[_NOTE] = _headers(*tightest[1])
    return None


def compile_policy(key: str, policy: RateLimitPolicy, buckets: MakeBuckets) -> list[LimitRule]:
    """The rules of one policy. Raises ConfigError."""
    if policy.problem:
        raise ConfigError(policy.problem)
    return [_compile_rule(key, policy, rule, buckets) for rule in policy.rules]


def _compile_rule(
    key: str, policy: RateLimitPolicy, rule: RateLimitRule, buckets: MakeBuckets
) -> LimitRule:
    is_elsewhere = policy.shared.kind == "RateLimitService" and not rule.window_seconds
    if not (0 < rule.window_seconds <= _MOST_SECONDS or is_elsewhere):
        raise ConfigError("must be more than nothing, and a year at most", field="window")
    if rule.requests < 0 or rule.burst < 0 or rule.cost < 0:
        raise ConfigError("must not be negative", field="requests")

    def rate(requests: int) -> Rate:
        return Rate(requests, rule.window_seconds, rule.burst or max(1, requests))

    return LimitRule(
        policy=key,
        rule=rule,
        concerns=compile_condition(rule.condition),
        parts=tuple(_part(part) for part in rule.keys),
        rate=rate(rule.requests),
        overrides={each.key: rate(each.requests) for each in rule.overrides},
        buckets=buckets(policy, rule),
        advertised=policy.sends_headers,
    )


def _part(part: RateLimitKey) -> Callable[[Request], str]:
    name = part.name.lower().encode()
    match part.kind:
        case "Identity":
            return lambda request: str(request.source or "")
        case "Namespace":
            return lambda request: request.source.namespace if request.source else ""
        case "SourceIP":
            return lambda request: request.remote_ip or request.source_ip
        case "Header":
            return lambda request: (request.headers.get(name) or b"").decode("latin-1")
        case "Path":
            return lambda request: request.path.decode("latin-1")
        case "Method":
            return lambda request: request.method.decode("latin-1")
        case "Host":
            return lambda request: request.authority.lower().decode("latin-1")
        case "Claim":
            claim = part.name
            return lambda request: str((request.claims or {}).get(claim, ""))


def _refusal(rule: LimitRule, rate: Rate, verdict: gcra.Verdict) -> Respond:
    headers: list[Pair] = list(_headers(rule, rate, verdict)) if rule.advertised else []
    if verdict.retry_seconds != gcra.NEVER:
        wait = max(1, math.ceil(verdict.retry_seconds))
        headers.append((b"retry-after", str(wait).encode()))
    return Respond(
        429,
        b"rate limit exceeded",
        tuple(headers),
        flag="RL",
        policy=rule.policy,
        rule=rule.rule.name,
        reason=f"more than {rate.requests} in {rate.window_seconds:g} s",
        grpc_status=GRPC_RESOURCE_EXHAUSTED,
    )


def _headers(rule: LimitRule, rate: Rate, verdict: gcra.Verdict) -> tuple[Pair, ...]:
    name = rule.rule.name.replace("\\", "").replace('"', "").encode("ascii", "replace")
    window = max(1, math.ceil(rate.window_seconds))
    told = b'"%s";q=%d;w=%d' % (name, rate.requests, window)
    until = verdict.retry_seconds if not verdict.is_allowed else verdict.reset_seconds
    left = b'"%s";r=%d' % (name, verdict.remaining)
    if until != gcra.NEVER:
        left += b";t=%d" % math.ceil(until)
    return ((b"ratelimit-policy", told), (b"ratelimit", left))
