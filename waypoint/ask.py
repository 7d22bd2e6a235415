"""A question to a service of the mesh, for a filter that waits: one request, one bounded answer.

It goes the way of all requests: an endpoint is chosen, through a tunnel where that is enrolled.
No retry, no body; the whole has one deadline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import trio

from mesh.errors import Refusal, Unavailable
from mesh.model.l7_policy import ExternalAuthorizer
from waypoint.filters.chain import Pair, Request, Response
from waypoint.streams import Upstream

if TYPE_CHECKING:
    from waypoint.inbound import Inbound
    from waypoint.upstream import Endpoint

MAX_ANSWER: Final = 64 << 10
_MOST_SECONDS: Final = 600.0


async def ask(
    inbound: Inbound, provider: ExternalAuthorizer, request: Request
) -> tuple[Response, bytes]:
    """The answer's head and body. Raises Unavailable: no endpoint, no answer in time, too long.
    If cancelled: the question is taken back.
    """
    chosen = inbound.proxy.upstreams.choose(provider.service, provider.port, inbound)
    if isinstance(chosen, Refusal):
        raise Unavailable(chosen.reason)
    question = _Question(chosen, request, inbound.proxy.now())
    seconds = min(provider.timeout_seconds, _MOST_SECONDS)
    try:
        with trio.move_on_after(seconds if math.isfinite(seconds) else _MOST_SECONDS):
            chosen.open(question)
            await question.answered.wait()
    finally:
        question.close()
    if question.problem or question.response is None:
        raise Unavailable(question.problem or f"no answer within {seconds:g} s")
    return question.response, bytes(question.body)


class _Question:
    """What an endpoint takes for an exchange."""

    def __init__(self, endpoint: Endpoint, request: Request, now: float) -> None:
        self._endpoint = endpoint
        self._up: Upstream | None = None
        self._is_closed = self._is_complete = False
        self.request = request
        self.started_at = now
        self.tries = 1
        self.answered = trio.Event()
        self.response: Response | None = None
        self.body = bytearray()
        self.problem = ""

    def waits_for(self, endpoint: Endpoint, number: int) -> bool:
        """Whether it still wants that connection."""
        del number
        return not self._is_closed and self._up is None and self._endpoint is endpoint

    def connected(self, up: Upstream) -> None:
        """Out with it."""
        self._up = up
        up.send_head(self.request, ends=True)

    def on_interim(self, status: int, pairs: Sequence[Pair]) -> None:
        """Not for us."""

    def on_response(self, response: Response, *, ends: bool, switches: bytes = b"") -> None:
        """The answer's head; its end is told apart."""
        del ends
        self.response = response
        if switches:
            self._fail("it switches protocols")

    def on_response_data(self, data: memoryview) -> None:
        """Kept, within the bound."""
        if len(self.body) + len(data) > MAX_ANSWER:
            self._fail(f"its answer is longer than {MAX_ANSWER >> 10} KiB")
        else:
            self.body += data

    def on_response_end(self, trailers: Sequence[Pair] = ()) -> None:
        """Complete."""
        del trailers
        self._up = None
        self._is_complete = True
        self.answered.set()

    def on_up_lost(self, reason: str, *, is_refused: bool) -> None:
        """No answer."""
        del is_refused
        self._up = None
        self._fail(reason)

    def on_up_room(self) -> None:
        """All was written at once."""

    def _fail(self, problem: str) -> None:
        self.problem = self.problem or problem
        self.answered.set()

    def close(self) -> None:
        """Nobody waits any more."""
        self._is_closed = True
        if not self._is_complete:
            self.problem = self.problem or "no answer in time"
        up, self._up = self._up, None
        if up is not None:
            up.cancel()
        self._endpoint.release(self)
