"""A connection that was switched to another protocol stays under the policies that let it begin.

A WebSocket lives for hours and is one request to policy. When policy changes that request is judged
again as it came; what would be refused now is cut. Only authorization is asked: a limit counts
beginnings, and a token that ends later was good when it was shown.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from waypoint.filters.authorize import Authorize
from waypoint.filters.chain import Headers, Request, Respond

if TYPE_CHECKING:
    from waypoint.exchange import Exchange
    from waypoint.traffic import Traffic


class Upgraded:
    """One request that asks to switch, as it came and before any filter changed it."""

    __slots__ = ("_exchange", "_judged_by", "_request")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._request: Request = replace(exchange.request)
        self._request.headers = Headers(list(exchange.request.headers.pairs))
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
                request = replace(self._request)
                request.notes = {}
                known = self._exchange.request  # what the token said came later
                request.claims, request.principal = known.claims, known.principal
                verdict = each.on_request(request)
                if isinstance(verdict, Respond):
                    self._exchange.cut_by_policy(verdict)
                    return
