"""What H2Core and its shell share: one stream's state, and the calls the core makes.

The shell (`mesh.hbone.connection`, a waypoint's proxy) implements `Receiver`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mesh.http.hpack_table import Block, Pair


class Stream:
    """One stream. `owner` is the shell's; windows are in bytes.

    `starved` is set by the shell when it stopped sending for want of stream window; the
    core clears it and calls `on_stream_room`. Of the window that the peer may use,
    `granted` bytes are beyond the first one; `lagged` says that the reader did not keep up, `held`
    how much of the connection's window is not consumed yet (with `holds_connection`).
    """

    __slots__ = (
        "answered",
        "closed",
        "credit_step",
        "granted",
        "held",
        "id",
        "lagged",
        "local_ended",
        "owner",
        "receive_window",
        "remote_ended",
        "send_window",
        "starved",
        "uncredited",
    )

    def __init__(self, stream_id: int, send_window: int, receive_window: int) -> None:
        self.id = stream_id
        self.owner: Any = None
        self.send_window = send_window
        self.receive_window = receive_window
        self.credit_step = max(1, receive_window // 2)
        self.granted = 0
        self.held = 0
        self.lagged = False
        self.uncredited = 0
        self.answered = False
        self.local_ended = False
        self.remote_ended = False
        self.closed = False
        self.starved = False


class Receiver(Protocol):
    """What the core tells the shell. Calls are synchronous and must not raise."""

    def on_headers(self, stream: Stream, pairs: Sequence[Pair]) -> None:
        """A request (server, new stream), a response or trailers."""
        ...

    def on_data(self, stream: Stream, views: Sequence[memoryview], total: int) -> None:
        """Payload; the views are valid during the call. Answer with `core.credit` some time."""
        ...

    def on_end(self, stream: Stream) -> None:
        """END_STREAM."""
        ...

    def on_reset(self, stream: Stream, code: int, *, by_peer: bool) -> None:
        """The stream was cut, by the peer or by us for the peer's fault; it is closed."""
        ...

    def on_closed(self, stream: Stream) -> None:
        """Both directions ended or the stream was reset: it no longer counts."""
        ...

    def on_stream_room(self, stream: Stream) -> None:
        """A starved stream may send again."""
        ...

    def on_connection_room(self) -> None:
        """The connection's send window opened again."""
        ...

    def on_settings(self) -> None:
        """The peer's SETTINGS changed."""
        ...

    def on_pong(self, payload: bytes) -> None:
        """An answer to a PING."""
        ...

    def on_goaway(self, code: int, debug: bytes) -> None:
        """The peer takes no new streams; those it will not process were reset before."""
        ...


def is_interim(pairs: Sequence[Pair]) -> bool:
    """Whether a response is 1xx: another one follows."""
    status = dict(pairs).get(b":status", b"")
    return len(status) == 3 and status[:1] == b"1"


def _is_status(pairs: Sequence[Pair]) -> bool:
    """101 is none: nothing is switched to in HTTP/2 (RFC 9113 section 8.6)."""
    status = dict(pairs).get(b":status", b"")
    return len(status) == 3 and status.isdigit() and status >= b"100" and status != b"101"


def find_head_problem(block: Block, *, is_response: bool, ends: bool) -> str:
    """Why a header block on an open stream is malformed, or empty text.

    It is a response, or it must be trailers (RFC 9113 section 8.1).
    """
    if block.problem:
        return block.problem
    if not is_response:
        if not ends:
            return "a second head"
        if any(name[:1] == b":" for name, _ in block.pairs):
            return "pseudo-header in trailers"
    elif sum(name[:1] == b":" for name, _ in block.pairs) != 1 or not _is_status(block.pairs):
        return "no :status, or more than it"
    elif ends and is_interim(block.pairs):
        return "an interim response ends the stream"
    return ""
