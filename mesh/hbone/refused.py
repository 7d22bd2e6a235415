"""A request that is no tunnel, after its answer: what still arrives on its stream, sans-IO.

The answer ended our side. Theirs is open until they end it, so that what they break until then is
told them as RFC 9113 wants it; too much of it, or too long a wait, is cut with NO_ERROR.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mesh.http import h2_frames as h2
from mesh.http.h2_core import H2Core, Stream
from mesh.http.hpack_table import Pair

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
