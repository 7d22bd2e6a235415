"""What an exchange and its two codecs say to each other, whatever version each side speaks.

A codec makes an `Exchange` for each request and is its `Downstream`; a connection to an endpoint
gives it an `Upstream`. All calls are synchronous and may not raise for what a peer did. Views are
valid during the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from waypoint.filters.chain import Pair, Request, Response

Chunk = bytes | bytearray | memoryview


class Downstream(Protocol):
    """The caller's side of one request: where the response goes."""

    @property
    def is_blocked(self) -> bool:
        """Whether the caller does not take what was sent; `Exchange.on_down_room` follows."""
        ...

    def send_interim(self, status: int, pairs: Sequence[Pair]) -> None:
        """A 1xx response but 101."""
        ...

    def send_head(self, response: Response, *, ends: bool, switches: bytes = b"") -> None:
        """The response's head; with `switches` (the upgraded protocol) it is a 101."""
        ...

    def send_data(self, data: Chunk) -> None:
        """Body."""
        ...

    def send_end(self, trailers: Sequence[Pair] = ()) -> None:
        """The response is complete."""
        ...

    def cut(self) -> None:
        """It never will be: end visibly."""
        ...

    def pause(self) -> None:
        """No more of the request's body, soon."""
        ...

    def unpause(self) -> None:
        """The body again."""
        ...


class Upstream(Protocol):
    """The endpoint's side of one try of a request."""

    @property
    def is_blocked(self) -> bool:
        """Whether the endpoint does not take what was sent; `Exchange.on_up_room` follows."""
        ...

    def send_head(self, request: Request, *, ends: bool, upgrade: bytes = b"") -> None:
        """The request's head."""
        ...

    def send_data(self, data: Chunk) -> None:
        """Body."""
        ...

    def send_end(self, trailers: Sequence[Pair] = ()) -> None:
        """The request is complete."""
        ...

    def cancel(self) -> None:
        """Nobody wants the response any more. The exchange hears nothing further."""
        ...

    def pause(self) -> None:
        """No more of the response's body, soon."""
        ...

    def unpause(self) -> None:
        """The body again."""
        ...


class Answered(Protocol):
    """What an upstream tells: the `Exchange` (or a mirror, which drops it)."""

    def on_interim(self, status: int, pairs: Sequence[Pair]) -> None:
        """A 1xx response but 101."""
        ...

    def on_response(self, response: Response, *, ends: bool, switches: bytes = b"") -> None:
        """The response's head."""
        ...

    def on_response_data(self, data: memoryview) -> None:
        """Body."""
        ...

    def on_response_end(self, trailers: Sequence[Pair] = ()) -> None:
        """The response is complete; the upstream is not the exchange's any more, unless the
        request still streams.
        """
        ...

    def on_up_lost(self, reason: str, *, is_refused: bool) -> None:
        """The try ended without a complete response. Refused: it was not processed at all."""
        ...

    def on_up_room(self) -> None:
        """The endpoint takes bytes again."""
        ...
