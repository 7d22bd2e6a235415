"""RateLimitPolicy whose buckets all replicas share: the same rules, asked of a store.

While the store does not answer the policy says what happens: `Allow`, `Deny` (503), or
`LocalShare`, by which each replica keeps its part of the limit by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from mesh.errors import ConfigError, Unavailable
from mesh.model.l7_policy import RateLimitPolicy
from waypoint.filters.chain import (
    PassingFilter,
    Request,
    Respond,
    Response,
    Verdict,
    Wait,
    add_to_log,
)
from waypoint.filters.rate_limit.filter import (
    LimitRule,
    MakeBuckets,
    add_headers,
    compile_policy,
    new_buckets,
    sum_up,
    take,
)
from waypoint.filters.rate_limit.gcra import Rate
from waypoint.filters.rate_limit.local import Key
from waypoint.filters.rate_limit.stores import Stores

GRPC_UNAVAILABLE = 14
_FIELD = "rate_limit.without_store"
"""Of the access log."""


class SharedLimits(PassingFilter):
    """The rules of one policy, whoever counts. What is not understood refuses what it targets."""

    name = "RateLimitPolicy"

    def __init__(self, policy: RateLimitPolicy, stores: Stores, buckets: MakeBuckets) -> None:
        """`buckets` gives those of a rule for `LocalShare`."""
        self._policy = policy
        self._key = f"{policy.namespace}/{policy.name}"
        self._stores = stores
        self._broken: Respond | None = None
        self._rules: list[LimitRule] = []
        try:
            self._rules = compile_policy(self._key, policy, buckets)
            self._open()
        except ConfigError as error:
            self._broken = Respond(
                500, flag="NC", policy=self._key, reason=f"it cannot be kept: {error}"
            )

    def _open(self) -> None:
        """Find who counts. Raises ConfigError."""
        raise ConfigError(f"limits shared through {self._policy.shared.kind} are not kept here")

    @property
    def where(self) -> str:
        """Who keeps the buckets."""
        return f"{self._policy.shared.kind} at {self._policy.shared.address}"

    def _alone(self, request: Request, rules: Sequence[LimitRule], why: str) -> Respond | None:
        """What holds while nobody answers."""
        shared = self._policy.shared
        self._stores.failed(shared.address, why)
        add_to_log(request, _FIELD, f"{self._key} {shared.on_failure}")
        match shared.on_failure:
            case "Allow":
                return None
            case "Deny":
                if all(each.rule.is_shadow for each in rules):
                    return None
                return Respond(
                    503,
                    b"rate limits cannot be told",
                    flag="RLSE",
                    policy=self._key,
                    reason=f"{shared.address} does not answer",
                    grpc_status=GRPC_UNAVAILABLE,
                )
            case "LocalShare":
                return sum_up(request, take(request, rules, shared.replicas))

    def on_response(self, request: Request, response: Response) -> Respond | None:
        """As local limits do."""
        add_headers(request, response)
        return None


class SharedRateLimits(SharedLimits):
    """Kept in a Redis."""

    def __init__(
        self, policy: RateLimitPolicy, stores: Stores, buckets: MakeBuckets = new_buckets
    ) -> None:
        """`buckets` gives those of a rule for `LocalShare`."""
        super().__init__(policy, stores, buckets)

    def _open(self) -> None:
        if self._policy.shared.kind != "Redis":
            super()._open()
        self._store = self._stores.redis(self._policy.shared.address)

    def on_request(self, request: Request) -> Verdict:
        """Ask the store, or say at once what holds without it."""
        if self._broken is not None:
            return self._broken
        rules = [each for each in self._rules if each.concerns(request)]
        if not rules:
            return None
        if not self._store.is_answering:
            return self._alone(request, rules, "not connected")
        return Wait(functools.partial(self._ask, request, rules))

    async def _ask(self, request: Request, rules: Sequence[LimitRule]) -> Respond | None:
        asked: list[tuple[str, Key, Rate, int]] = []
        for each in rules:
            key = each.key_of(request)
            asked.append((each.rule.name, key, each.rate_of(key), each.cost_of(request)))
        try:
            verdicts = await self._store.hit(self._key, asked, self._policy.shared.timeout_seconds)
        except Unavailable as exc:
            return self._alone(request, rules, str(exc))
        self._stores.answered(self._policy.shared.address)
        hits = zip(rules, (rate for _, _, rate, _ in asked), verdicts, strict=True)
        return sum_up(request, hits)
