"""Which filters a service's policies become, and in which order.

    fault, cors             a rule's own: they answer before anybody is asked who they are, and
                            a preflight carries no credentials
    RequestAuthentication   whose token it is, for what follows
    AuthorizationPolicy     whoever is denied costs nothing more
    RateLimitPolicy         only what is allowed is counted
    RedactionPolicy         last, so that policy judges what the caller sent

A policy that no filter here carries out answers 500: it must not be left out in silence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from mesh.errors import ConfigError
from mesh.model.l7_policy import TrafficConfig
from mesh.model.route import RouteFilter
from mesh.secrets import wall_clock
from waypoint.filters import jwks
from waypoint.filters.authorize import Authorize
from waypoint.filters.chain import Filter, PassingFilter, Request, Respond, Verdict
from waypoint.filters.cors import CorsFilter
from waypoint.filters.fault import FaultFilter
from waypoint.filters.jwt import Jwt
from waypoint.filters.rate_limit.filter import RateLimits

_rng = random.Random()  # noqa: S311 - draws faults, nothing secret


class Unsupported(PassingFilter):
    """Stands for a policy that is not carried out by this build."""

    def __init__(self, kind: str, policy: str, reason: str = "") -> None:
        self.name = kind
        self._respond = Respond(
            500,
            flag="NC",
            policy=policy,
            reason=reason or f"{kind} is not carried out by this waypoint",
        )

    def on_request(self, request: Request) -> Verdict:
        """Refuse."""
        del request
        return self._respond


def make_filters(everywhere: TrafficConfig, own: TrafficConfig) -> Sequence[Filter]:
    """The filters of one service, in order: what holds for everything together with its own."""
    configs = (everywhere, own) if own is not everywhere else (own,)
    found: list[Filter] = []
    authentications = [each for config in configs for each in config.authentications]
    authorizations = [each for config in configs for each in config.authorizations]
    limits = [each for config in configs for each in config.rate_limits]
    try:
        if authentications:
            found.append(Jwt(authentications, jwks.sources(jwks.fetch), wall_clock))
        if authorizations:
            explains = any(config.explains_denials for config in configs)
            found.append(Authorize(authorizations, explains_denials=explains))
        if limits:
            found.append(RateLimits(limits))
    except ConfigError as exc:
        return (Unsupported("policy", "", f"it cannot be carried out: {exc}"),)
    found += [
        Unsupported("RateLimitPolicy", f"{each.namespace}/{each.name}", "only local limits hold")
        for each in limits
        if each.shared.kind != "Local"
    ]
    found += [
        Unsupported("RedactionPolicy", f"{each.namespace}/{each.name}")
        for config in configs
        for each in config.redactions
    ]
    return tuple(found)


def make_route_filter(entry: RouteFilter) -> Filter | None:
    """A filter of a route's rule that the plan does not carry out; None: nobody does."""
    if entry.cors is not None:
        return CorsFilter(entry.cors)
    if entry.fault is not None:
        return FaultFilter(entry.fault, _rng)
    return None
