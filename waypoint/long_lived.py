"""A request that may last stays under the policies that let it begin.

A WebSocket or a gRPC stream lives for hours and is one request to policy. When policy changes that
request is judged again as it came; what would be refused now is cut. Only authorization is asked: a
limit counts beginnings, and a token that ends later was good when it was shown.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from waypoint.filters.authorize import Authorize
from waypoint.filters.chain import Headers, Pair, Respond

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
        traffic = self._exchange.inbound.traffic()
        if traffic is self._judged_by:
            return
        self._judged_by = traffic
        for each in traffic.filters:
            if isinstance(each, Authorize):
                request = replace(self._exchange.request)  # what the token said is known by now
                request.method, request.authority, request.path, request.query, pairs = self._seen
                request.headers = Headers(pairs.copy())
                request.notes = {}
                verdict = each.on_request(request)
                if isinstance(verdict, Respond):
                    self._exchange.cut_by_policy(verdict)
                    return
