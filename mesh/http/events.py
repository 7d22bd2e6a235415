"""What a peer did on an HTTP/2 connection, as values.

Made by `mesh.http.h2` and matched by `mesh.http.driver`. Header fields are pairs of text,
decoded as Latin-1: nothing is lost and nothing can fail. Sizes are in bytes. Stream 0
stands for the whole connection. Not for the data plane, which has `mesh.http.h2_core`.
"""

from __future__ import annotations

from dataclasses import dataclass

Headers = tuple[tuple[str, str], ...]
"""Fields in wire order, names in lower case, pseudo-headers first."""


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """A peer opened a stream (server side)."""

    stream_id: int
    headers: Headers


@dataclass(frozen=True, slots=True)
class ResponseReceived:
    """The final response head (client side); informational ones are not reported."""

    stream_id: int
    headers: Headers


@dataclass(frozen=True, slots=True)
class TrailersReceived:
    """Fields after the body; StreamEnded follows."""

    stream_id: int
    headers: Headers


@dataclass(frozen=True, slots=True)
class DataReceived:
    """A piece of body. `credit`, padding included, goes back by `acknowledge` once consumed."""

    stream_id: int
    data: bytes
    credit: int


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The peer sends no more on this stream."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class StreamCut:
    """RST_STREAM, by the peer or provoked by it; `code` is an HTTP/2 error code."""

    stream_id: int
    code: int
    by_peer: bool


@dataclass(frozen=True, slots=True)
class WindowOpened:
    """The peer takes more data on this stream, or on any when 0."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class SettingsReceived:
    """The peer's SETTINGS changed: windows, frame sizes, the number of streams."""


@dataclass(frozen=True, slots=True)
class PongReceived:
    """The answer to a PING of ours."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class GoawayReceived:
    """The peer opens no more streams and ignores those of ours above `last_stream_id`."""

    last_stream_id: int
    code: int
    debug: str


Event = (
    RequestReceived
    | ResponseReceived
    | TrailersReceived
    | DataReceived
    | StreamEnded
    | StreamCut
    | WindowOpened
    | SettingsReceived
    | PongReceived
    | GoawayReceived
)


def find_header(headers: Headers, name: str) -> str:
    """The value of the first field called `name` (lower case), or empty text."""
    for key, value in headers:
        if key == name:
            return value
    return ""
