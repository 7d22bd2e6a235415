"""A request that may last stays under the policies that let it begin.

A WebSocket or a gRPC stream lives for hours and is one request to policy. When policy changes that
request is judged again as it came; what would be refused now is cut. Only authorization is asked: a
limit counts beginnings, and a token that ends later was good when it was shown. An external
authorizer whom a CUSTOM policy names since then cannot be asked in the middle: the caller has to
come again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from waypoint.filters.authorize import Authorize
from waypoint.filters.chain import Headers, Pair, Request, Respond, Verdict
from waypoint.filters.ext_authz import ExternalAuthorization, refusal

if TYPE_CHECKING:
    from waypoint.exchange import Exchange
    from waypoint.traffic import Traffic

PERMISSION_DENIED: Final = 7
TRAILERS: Final[tuple[Pair, ...]] = (
    (b"grpc-status", b"%d" % PERMISSION_DENIED),
    (b"grpc-message", b"policy changed"),
)
"""The end of a gRPC stream that policy does not let go on."""


class LongLived:
    """One such request, as it came and before any filter changed it."""

    __slots__ = ("_exchange", "_judged_by", "_seen")

    def __init__(self, exchange: Exchange) -> None:
        request = exchange.request
        self._exchange = exchange
        # Each unary call pays for this: what filters may change, and no more.
        self._seen = (
            request.method, request.authority, request.path, request.query,
            request.headers.pairs.copy(),
        )  # fmt: skip
        self._judged_by: Traffic = exchange.inbound.traffic()
        exchange.inbound.pipes.add(self)

    def end(self) -> None:
        """It is over."""
        self._exchange.inbound.pipes.discard(self)

    def rejudge(self) -> None:
        """Policy may have changed since."""
        before, traffic = self._judged_by, self._exchange.inbound.traffic()
        if traffic is before:
            return
        self._judged_by = traffic
        for each in traffic.filters:
            verdict: Verdict = None
            if isinstance(each, Authorize):
                verdict = each.on_request(self._request())
            elif isinstance(each, ExternalAuthorization):
                verdict = self._unasked(each, before)
            if isinstance(verdict, Respond):
                self._exchange.cut_by_policy(verdict)
                return

    def _request(self) -> Request:
        request = replace(self._exchange.request)  # what the token said is known by now
        request.method, request.authority, request.path, request.query, pairs = self._seen
        request.headers = Headers(pairs.copy())
        request.notes = {}
        return request

    def _unasked(self, now: ExternalAuthorization, before: Traffic) -> Respond | None:
        """A refusal, if somebody would be asked now who was not."""
        request = self._request()
        asked = {
            (policy, provider)
            for each in before.filters
            if isinstance(each, ExternalAuthorization)
            for policy, _, provider in each.would_ask(request)
        }
        for policy, rule, provider in now.would_ask(request):
            if (policy, provider) not in asked:
                return refusal(403, policy, rule, f"{provider} was not asked when it began")
        return None
