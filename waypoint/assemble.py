"""Which filters a service's policies become, and in which order.

    fault, cors             a rule's own: they answer before anybody is asked who they are, and
                            a preflight carries no credentials
    AuthorizationPolicy CUSTOM  an external authorizer, asked before tokens are looked at
    RequestAuthentication   whose token it is, for what follows
    AuthorizationPolicy     whoever is denied costs nothing more
    RateLimitPolicy         only what is allowed is counted
    RedactionPolicy         last, so that policy judges what the caller sent

A policy that a filter cannot carry out answers 500 there: it is not left out in silence.

What filters remember beyond one configuration (buckets, issuers' keys) is kept here by the rule
that it belongs to, so that an edit beside it neither refills a bucket nor fetches a key again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from mesh.model.l7_policy import JwtRule, RateLimitPolicy, RateLimitRule, TrafficConfig
from mesh.model.route import RouteFilter
from waypoint.ask import Asker
from waypoint.filters import jwks
from waypoint.filters.authorize import Authorize, is_asked
from waypoint.filters.chain import Filter
from waypoint.filters.cors import CorsFilter
from waypoint.filters.custom import CustomFilters
from waypoint.filters.ext_authz import ExternalAuthorization
from waypoint.filters.fault import FaultFilter, Random
from waypoint.filters.jwt import Jwt, KeySource
from waypoint.filters.rate_limit.filter import MakeBuckets, RateLimits
from waypoint.filters.rate_limit.local import Buckets
from waypoint.filters.rate_limit.shared import SharedLimits, SharedRateLimits
from waypoint.filters.rate_limit.stores import Stores
from waypoint.filters.redact.filter import ReadKey, RedactionFilter
from waypoint.filters.redact.keys import key_reader

K = TypeVar("K")
V = TypeVar("V")
_MOST_REMEMBERED: Final = 4096
DEFAULT_KEYS: Final = Path("/var/run/secrets/ambit/redaction")


class Assembly:
    """Makes filters. `clock` gives seconds since the epoch, `fetch` what an issuer publishes,
    `read_key` the key that a redaction names. `domain` is the cluster's, in DNS.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        rng: Random,
        fetch: jwks.Fetch = jwks.fetch,
        custom: CustomFilters | None = None,
        read_key: ReadKey | None = None,
        stores: Stores | None = None,
        domain: str = "cluster.local",
    ) -> None:
        self._domain = domain
        self._read_key = read_key or key_reader(DEFAULT_KEYS)
        self._stores = stores if stores is not None else Stores()
        self._clock = clock
        self._rng = rng
        self._ask = Asker()
        self._custom = custom if custom is not None else CustomFilters()
        self._source = jwks.sources(fetch)
        self._buckets: dict[tuple[str, str, RateLimitRule], Buckets] = {}
        self._keys: dict[JwtRule, KeySource] = {}

    def make_filters(self, everywhere: TrafficConfig, own: TrafficConfig) -> Sequence[Filter]:
        """The filters of one service, in their order."""
        configs = (everywhere, own) if own is not everywhere else (own,)
        found: list[Filter] = []
        authorizations = [each for config in configs for each in config.authorizations]
        if any(map(is_asked, authorizations)):
            found.append(ExternalAuthorization(authorizations, self._ask, self._clock))
        authentications = [each for config in configs for each in config.authentications]
        if authentications:
            found.append(Jwt(authentications, self._keys_of, self._clock))
        if authorizations:
            explains = any(config.explains_denials for config in configs)
            found.append(Authorize(authorizations, explains_denials=explains))
        for config in configs:
            local = [each for each in config.rate_limits if each.shared.kind == "Local"]
            if local:
                found.append(RateLimits(local, self._buckets_in(config.key)))
            found += [
                self._make_shared(each, self._buckets_in(config.key))
                for each in config.rate_limits
                if each.shared.kind != "Local"
            ]
        redactions = [each for config in configs for each in config.redactions]
        if redactions:
            found.append(RedactionFilter(redactions, self._read_key))
        return tuple(found)

    def _make_shared(self, policy: RateLimitPolicy, buckets: MakeBuckets) -> SharedLimits:
        if policy.shared.kind == "RateLimitService":
            # Its messages cost memory that only who asks should pay.
            from waypoint.filters.rate_limit.service import ServiceRateLimits

            return ServiceRateLimits(policy, self._ask, self._domain, self._stores, buckets)
        return SharedRateLimits(policy, self._stores, buckets)

    def make_route_filter(self, entry: RouteFilter) -> Filter | None:
        """A filter of a route's rule that the plan does not carry out; None: nobody does."""
        if entry.cors is not None:
            return CorsFilter(entry.cors)
        if entry.fault is not None:
            return FaultFilter(entry.fault, self._rng)
        if entry.extension:
            return self._custom.make(entry.extension)
        return None

    def _keys_of(self, rule: JwtRule) -> KeySource:
        return _kept(self._keys, rule, lambda: self._source(rule))

    def _buckets_in(self, scope: str) -> MakeBuckets:
        def buckets(policy: RateLimitPolicy, rule: RateLimitRule) -> Buckets:
            key = (scope, f"{policy.namespace}/{policy.name}", rule)
            return _kept(self._buckets, key, Buckets)

        return buckets


def _kept(kept: dict[K, V], key: K, make: Callable[[], V]) -> V:
    """What is remembered under `key`; the longest unused is forgotten when there is too much."""
    found = kept.pop(key, None)
    if found is None:
        found = make()
        if len(kept) >= _MOST_REMEMBERED:
            del kept[next(iter(kept))]
    kept[key] = found
    return found
