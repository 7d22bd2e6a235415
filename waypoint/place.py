"""What a filter that waits may use of the exchange it waits in: where it runs, and the body.

Bodies stream. A filter that asks somebody about a request with its body has the exchange take in
so much of it first; what came is kept and goes on to the endpoint as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from waypoint.h2 import H2Stream

if TYPE_CHECKING:
    from waypoint.exchange import Exchange
    from waypoint.inbound import Inbound
    from waypoint.streams import Downstream

#: How long a caller may take for the part of its body that is waited for.
BODY_SECONDS: Final = 60.0


class Place:
    """Of one exchange. Made for each wait."""

    def __init__(self, exchange: Exchange, down: Downstream) -> None:
        self._exchange = exchange
        self._down = down
        self._most = 0
        self._is_enough = trio.Event()

    @property
    def inbound(self) -> Inbound:
        """The port that the request came to."""
        return self._exchange.inbound

    @property
    def protocol(self) -> str:
        """What the caller speaks."""
        return "HTTP/2" if isinstance(self._down, H2Stream) else "HTTP/1.1"

    async def read_body(self, most: int) -> tuple[bytes, bool] | None:
        """The first `most` bytes of the request's body, and whether that is all of it. None if
        the caller takes too long. If cancelled: the exchange has ended.
        """
        exchange = self._exchange
        if not exchange.is_request_done and len(exchange.held_body()) <= most:
            headers = exchange.request.headers
            if headers.has(b"expect"):
                # Who waits for leave to send a body would wait for ever.
                headers.remove(b"expect")
                self._down.send_interim(100, ())
            self._most = most
            exchange.early = self
            self._down.unpause()
            with trio.move_on_after(BODY_SECONDS):
                await self._is_enough.wait()
            exchange.early = None
            if not self._is_enough.is_set():
                return None
        held = exchange.held_body()
        return held[:most], exchange.is_request_done and len(held) <= most

    def came(self, total: int) -> None:
        """So much of the body is there."""
        if total > self._most:
            self._down.pause()
            self._is_enough.set()

    def ended(self) -> None:
        """All of it is."""
        self._is_enough.set()
