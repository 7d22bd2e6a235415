"""Which filters a service's policies become, and in which order. Pure.

    1. redaction and audit of requests come last, so that policy judges what the caller sent;
    2. whoever is denied costs nothing more: identity, then authorization, then rate limits.

A policy that no filter here carries out answers 500: it must not be left out in silence.
"""

from __future__ import annotations

from collections.abc import Sequence

from mesh.model.l7_policy import TrafficConfig
from mesh.model.route import RouteFilter
from waypoint.filters.chain import Filter, PassingFilter, Request, Respond, Verdict


class Unsupported(PassingFilter):
    """Stands for a policy that is not carried out by this build."""

    def __init__(self, kind: str, policy: str) -> None:
        self.name = kind
        self._respond = Respond(
            500, flag="NC", policy=policy, reason=f"{kind} is not carried out by this waypoint"
        )

    def on_request(self, request: Request) -> Verdict:
        """Refuse."""
        del request
        return self._respond


def make_filters(everywhere: TrafficConfig, own: TrafficConfig) -> Sequence[Filter]:
    """The filters of one service, in their order."""
    found: list[Filter] = []
    for config in (everywhere, own) if own is not everywhere else (own,):
        for kind, policies in (
            ("RequestAuthentication", config.authentications),
            ("AuthorizationPolicy", config.authorizations),
            ("RateLimitPolicy", config.rate_limits),
            ("RedactionPolicy", config.redactions),
        ):
            found += [Unsupported(kind, f"{each.namespace}/{each.name}") for each in policies]
    return tuple(found)


def make_route_filter(entry: RouteFilter) -> Filter | None:
    """A filter of a route's rule that the plan does not carry out; None: nobody does."""
    del entry
    return None
