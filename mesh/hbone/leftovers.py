"""What is left of streams that are over, sans-IO but for the closing of sockets.

A request that is no tunnel, after its answer: the answer ended our side. Theirs is open until they
end it, so that what they break until then is told them as RFC 9113 wants it; too much of it, or
too long a wait, is cut with NO_ERROR. And applications to whom everything was said, in a tunnel
that is over, who neither answer nor end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mesh.errors import RemoteProtocolError
from mesh.hbone.head import ConnectResponse, Malformed, encode_response
from mesh.hbone.relay import SocketEnd
from mesh.http import h2_frames as h2
from mesh.http.h2_core import H2Core, Stream
from mesh.http.hpack_table import Pair, encode_block

MOST_IGNORED: Final = 64 << 10


class RefusedRequest:
    """The owner of such a stream; `pairs` is the request's head."""

    __slots__ = ("_core", "_declared", "_seen", "_stream")

    def __init__(self, core: H2Core, stream: Stream, pairs: Sequence[Pair]) -> None:
        self._core = core
        self._stream = stream
        self._seen = 0
        self._declared = {value for name, value in pairs if name == b"content-length"}

    def on_data(self, views: Sequence[memoryview], total: int) -> None:
        """Counted, and thrown away."""
        del views
        self._seen += total
        if self._seen > MOST_IGNORED:
            self.dismiss()
        else:
            self._core.credit(self._stream, total)

    def on_end(self) -> None:
        """Their end: the length must be what they said (RFC 9113 section 8.1.1)."""
        if self._declared and self._declared != {b"%d" % self._seen}:
            self._core.reset(self._stream, h2.PROTOCOL_ERROR)

    def on_reset(self, code: int, *, by_peer: bool) -> None:
        """It is over."""

    def resume(self) -> None:
        """Nothing is sent any more."""

    def dismiss(self) -> None:
        """It need not go on. Idempotent."""
        self._core.reset(self._stream, h2.NO_ERROR)


class Leftovers:
    """Those of one connection; `tidy` is to be called now and then."""

    __slots__ = ("_core", "lingering", "refused")

    def __init__(self, core: H2Core) -> None:
        self._core = core
        self.refused: dict[int, RefusedRequest] = {}
        """By their stream's id; whoever hears of its end takes it out."""
        self.lingering: dict[SocketEnd, None] = {}

    def refuse(self, stream: Stream, pairs: Sequence[Pair], error: RemoteProtocolError) -> None:
        """The head of a new stream, `pairs`, is no CONNECT. Raises RemoteProtocolError when that
        comes too often.
        """
        core = self._core
        if isinstance(error, Malformed):
            core.reset(stream, error.h2_code)
        else:
            stream.owner = self.refused[stream.id] = RefusedRequest(core, stream, pairs)
            answer = encode_response(ConnectResponse(error.http_status))
            core.send_headers(stream, encode_block(answer), end_stream=True)
        core.cheap_arrived("malformed requests")

    def tidy(self) -> None:
        """Whoever had time since the last call has had enough of it."""
        self.dismiss_refused()
        for end in tuple(self.lingering):
            if end.leave():
                del self.lingering[end]

    def dismiss_refused(self) -> None:
        """Wait for no request's end; to be flushed."""
        for refused in tuple(self.refused.values()):
            refused.dismiss()

    def abandon(self) -> None:
        """The connection has ended: the kernel delivers what is under way."""
        for end in self.lingering:
            end.leave(at_once=True)
        self.lingering.clear()
