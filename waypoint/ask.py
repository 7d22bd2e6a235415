"""A question to a service of the mesh, for a filter that waits: one request, one bounded answer.

It goes the way of all requests: an endpoint is chosen, through a tunnel where that is enrolled.
No retry; the whole has one deadline. A service that did not answer several times in a row is left
alone for a while, then probed by one question, so that a dead one costs callers no waiting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import trio

from mesh.errors import Refusal, Unavailable
from waypoint.filters.chain import Answer, Pair, Request, Response
from waypoint.place import Place
from waypoint.streams import Upstream

if TYPE_CHECKING:
    from waypoint.inbound import Inbound
    from waypoint.upstream import Endpoint

MAX_ANSWER: Final = 64 << 10
_MOST_SECONDS: Final = 600.0
_FAILURES: Final = 3
_FIRST_PAUSE_SECONDS: Final = 0.5
_LONGEST_PAUSE_SECONDS: Final = 5.0
_MOST_CIRCUITS: Final = 1024


class Circuit:
    """Whether a service is worth asking; it closes by itself. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._failures = 0
        self._pause = 0.0
        self._silent_until = 0.0

    def is_open(self, now: float) -> bool:
        """Whether nobody should ask. If not, and it was open, whoever asked this is its probe."""
        if now < self._silent_until:
            return True
        if self._pause:
            self._silent_until = now + self._pause
        return False

    def failed(self, now: float) -> None:
        """No answer."""
        self._failures += 1
        if self._failures >= _FAILURES:
            self._pause = min(_LONGEST_PAUSE_SECONDS, self._pause * 2 or _FIRST_PAUSE_SECONDS)
            self._silent_until = now + self._pause

    def answered(self) -> None:
        """An answer, whatever it says."""
        self._failures = 0
        self._pause = self._silent_until = 0.0


class Asker:
    """Asks, and remembers who does not answer."""

    def __init__(self) -> None:
        self._circuits: dict[tuple[str, int], Circuit] = {}

    async def __call__(
        self,
        place: Place,
        service: str,
        port: int,
        request: Request,
        body: bytes,
        seconds: float,
    ) -> Answer:
        """The answer of `service` (`namespace/hostname`). Raises Unavailable: no endpoint, no
        answer in time, too long, or left alone. If cancelled: the question is taken back.
        """
        circuit = self._circuits.get((service, port))
        if circuit is None:
            if len(self._circuits) >= _MOST_CIRCUITS:
                del self._circuits[next(iter(self._circuits))]
            circuit = self._circuits[service, port] = Circuit()
        if circuit.is_open(trio.current_time()):
            raise Unavailable("it did not answer several times, and is asked again in a while")
        try:
            answer = await _ask(place.inbound, service, port, request, body, seconds)
        except Unavailable:
            circuit.failed(trio.current_time())
            raise
        circuit.answered()
        return answer


async def _ask(
    inbound: Inbound, service: str, port: int, request: Request, body: bytes, seconds: float
) -> Answer:
    chosen = inbound.proxy.upstreams.choose(service, port, inbound)
    if isinstance(chosen, Refusal):
        raise Unavailable(chosen.reason)
    question = _Question(chosen, request, body, inbound.proxy.now())
    seconds = min(seconds, _MOST_SECONDS) if math.isfinite(seconds) else _MOST_SECONDS
    try:
        with trio.move_on_after(seconds):
            chosen.open(question)
            await question.answered.wait()
    finally:
        question.close()
    if question.problem or question.response is None:
        raise Unavailable(question.problem or f"no answer within {seconds:g} s")
    return Answer(question.response, bytes(question.body), question.trailers)


class _Question:
    """What an endpoint takes for an exchange."""

    def __init__(self, endpoint: Endpoint, request: Request, body: bytes, now: float) -> None:
        self._endpoint = endpoint
        self._up: Upstream | None = None
        self._is_closed = self._is_complete = False
        self._sent = body
        self.request = request
        self.started_at = now
        self.tries = 1
        self.answered = trio.Event()
        self.response: Response | None = None
        self.body = bytearray()
        self.trailers: Sequence[Pair] = ()
        self.problem = ""

    def waits_for(self, endpoint: Endpoint, number: int) -> bool:
        """Whether it still wants that connection."""
        del number
        return not self._is_closed and self._up is None and self._endpoint is endpoint

    def connected(self, up: Upstream) -> None:
        """Out with it."""
        self._up = up
        up.send_head(self.request, ends=not self._sent)
        if self._sent and self._up is up:
            up.send_data(self._sent)
            up.send_end()

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
        self.trailers = trailers
        self._up = None
        self._is_complete = True
        self.answered.set()

    def on_up_lost(self, reason: str, *, is_refused: bool) -> None:
        """No answer."""
        del is_refused
        self._up = None
        self._fail(reason)

    def on_up_room(self) -> None:
        """All was handed over at once."""

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
