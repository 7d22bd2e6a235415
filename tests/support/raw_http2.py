"""HTTP/2 by hand, from either side: frames as bytes, for peers that break rules."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

import trio

from mesh.http import h2_frames as h2
from mesh.http.hpack_table import BlockDecoder, Pair, encode_block

HELLO = h2.PREFACE + h2.pack_frame(h2.SETTINGS, 0, 0)
END = h2.END_HEADERS | h2.END_STREAM
GET: tuple[Pair, ...] = (
    (b":method", b"GET"),
    (b":scheme", b"http"),
    (b":authority", b"web.shop"),
    (b":path", b"/"),
)


def head(stream_id: int, pairs: Iterable[Pair], flags: int = END) -> bytes:
    """A HEADERS frame; nothing is checked."""
    return h2.pack_frame(h2.HEADERS, flags, stream_id, encode_block(pairs))


def get(stream_id: int, *more: Pair, flags: int = END, **changed: bytes) -> bytes:
    """A request; pseudo-headers are changed by name, None of them is checked."""
    pairs = [(name, changed.get(name[1:].decode(), value)) for name, value in GET]
    return head(stream_id, [*pairs, *more], flags)


@dataclass
class Heard:
    """What a peer said until its end."""

    heads: dict[int, list[dict[bytes, bytes]]] = field(default_factory=dict)
    data: dict[int, bytes] = field(default_factory=dict)
    resets: dict[int, int] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    goaway: int | None = None

    def is_over(self, stream_id: int) -> bool:
        """Whether a stream has ended one way or the other."""
        return stream_id in self.ended or stream_id in self.resets


class RawPeer:
    """One HTTP/2 connection on a stream. `read` takes frames, acknowledging SETTINGS."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.heard = Heard()
        self.is_gone = False
        self.acknowledges = True
        self._turn = trio.Lock()
        self._data = bytearray()
        self._decoder = BlockDecoder(1 << 20)

    async def send(self, data: bytes) -> None:
        """Send, whatever becomes of it."""
        gone = (trio.BrokenResourceError, trio.ClosedResourceError)
        async with self._turn:
            with contextlib.suppress(*gone):
                await self.stream.send_all(data)

    async def read(self, *until: int) -> Heard:
        """Read until these streams have ended, or the connection has."""
        with trio.fail_after(30):
            while not self.is_gone and not (until and all(map(self.heard.is_over, until))):
                try:
                    piece = await self.stream.receive_some(65536)
                except trio.BrokenResourceError:
                    piece = b""
                self.is_gone = not piece
                self._data += piece
                await self._frames()
        return self.heard

    async def _frames(self) -> None:
        while len(self._data) >= 9:
            high, low, kind, flags, stream_id = h2.HEADER.unpack_from(self._data)
            size = high << 8 | low
            if len(self._data) < 9 + size:
                return
            payload = bytes(self._data[9 : 9 + size])
            del self._data[: 9 + size]
            await self._frame(kind, flags, stream_id, payload)

    async def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        heard = self.heard
        if kind == h2.HEADERS:
            pairs = self._decoder.decode(payload).pairs
            heard.heads.setdefault(stream_id, []).append(dict(pairs))
        elif kind == h2.DATA:
            heard.data[stream_id] = heard.data.get(stream_id, b"") + payload
        elif kind == h2.RST_STREAM:
            heard.resets[stream_id] = int.from_bytes(payload, "big")
        elif kind == h2.GOAWAY:
            heard.goaway = struct.unpack_from(">I", payload, 4)[0]
        elif kind == h2.SETTINGS and not flags & h2.ACK and self.acknowledges:
            await self.send(h2.pack_frame(h2.SETTINGS, h2.ACK, 0))
        if kind in {h2.HEADERS, h2.DATA} and flags & h2.END_STREAM:
            heard.ended.add(stream_id)
