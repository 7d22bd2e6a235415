"""FAST PATH: HTTP/2 bytes in, frames out (RFC 9113 sections 4 and 6), for H2Core.

The reader knows the shapes and sizes of frames and nothing of streams: it compares the
preface, checks every frame by its header before keeping any of it, puts header blocks
together within their limit, skips what it does not know, and streams DATA: slices of the
caller's buffer are handed on as they come, neighbours of one stream in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mesh.errors import RemoteProtocolError
from mesh.http import h2_frames as h2
from mesh.http.h2_stream import Stream

MAX_CONTINUATIONS = 32
MAX_CONTROL_PAYLOAD = 16384
_FIXED_LENGTHS = {h2.PRIORITY: 5, h2.RST_STREAM: 4, h2.PING: 8, h2.WINDOW_UPDATE: 4}
_CONNECTION_FRAMES = frozenset({h2.SETTINGS, h2.PING, h2.GOAWAY})


def broken(code: int, reason: str) -> RemoteProtocolError:
    """The error that ends a connection with GOAWAY `code`."""
    return RemoteProtocolError(reason, h2_code=code)


class FrameSink(Protocol):
    """What the reader calls; each may raise RemoteProtocolError."""

    def data_started(self, stream_id: int, length: int) -> Stream | None:
        """A DATA frame of `length` bytes begins; None discards its payload."""
        ...

    def data_padded(self, stream: Stream, count: int) -> None:
        """`count` bytes of a DATA frame are no payload."""
        ...

    def data_arrived(self, stream: Stream, views: Sequence[memoryview], total: int) -> None:
        """Payload; the views are valid during the call."""
        ...

    def data_ended(self, stream: Stream) -> None:
        """The last byte of a DATA frame with END_STREAM was handed on."""
        ...

    def block_arrived(self, stream_id: int, block: bytes, *, ends: bool) -> None:
        """A whole header block."""
        ...

    def control_arrived(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """A frame of another kind, of checked size and stream."""
        ...

    def cheap_arrived(self, what: str) -> None:
        """A frame that costs the peer nothing: count it."""
        ...


class FrameReader:
    """The parser's state of one connection. Sizes in bytes."""

    def __init__(
        self, sink: FrameSink, *, server: bool, max_frame: int, max_header_list: int
    ) -> None:
        self._sink = sink
        self._max_frame = max_frame
        # 256: pad length, priority and padding of the first frame.
        self._max_block = max_header_list + 256
        self._preface = h2.PREFACE if server else b""
        self._settings_seen = False
        self._partial = bytearray()
        # the DATA frame being streamed
        self._left = 0
        self._padding = 0
        self._pad_length_due = False
        self._ends = False
        self._stream: Stream | None = None
        # the header block being put together
        self._block: bytearray | None = None
        self._block_id = 0
        self._block_ends = False
        self._block_frames = 0

    @property
    def is_amid_head(self) -> bool:
        """Whether a header block has begun and not ended."""
        return self._block is not None or len(self._partial) > 9

    def forget(self, stream: Stream) -> None:
        """Discard what is left of `stream`'s current DATA frame."""
        if self._stream is stream:
            self._stream = None

    def receive(self, data: memoryview) -> None:
        """Parse `data`. Raises RemoteProtocolError when the connection cannot go on."""
        if self._preface:
            data = self._match_preface(data)
        if self._partial:
            data = self._complete_partial(data)
        offset, size = 0, len(data)
        unpack = h2.HEADER.unpack_from
        run: Stream | None = None
        views: list[memoryview] = []
        total = 0
        while offset < size:
            left = self._left
            if left:
                count = size - offset
                if count > left:
                    count = left
                stream = self._stream
                if stream is not None:
                    if stream is not run:
                        if run is not None:
                            self._deliver(run, views, total)
                        run, views, total = stream, [], 0
                    views.append(data[offset : offset + count])
                    total += count
                offset += count
                self._left = left = left - count
                if not left and not self._padding and self._ends:
                    if run is not None:
                        self._deliver(run, views, total)
                        run = None
                    self._data_ended()
                continue
            if self._padding or self._pad_length_due:
                offset = self._skip_padding(data, offset)
                if not self._left and not self._padding and self._ends:
                    if run is not None:
                        self._deliver(run, views, total)
                        run = None
                    self._data_ended()
                continue
            if size - offset < 9:
                self._partial += data[offset:]
                break
            high, low, kind, flags, stream_id = unpack(data, offset)
            length = high << 8 | low
            stream_id &= h2.LARGEST_STREAM_ID
            if kind == 0:
                offset += 9
                if run is not None and not length:
                    self._deliver(run, views, total)
                    run = None
                self._start_data(length, flags, stream_id)
                continue
            if run is not None:
                self._deliver(run, views, total)
                run = None
            if kind > h2.CONTINUATION:
                offset += 9
                self._start_unknown(length, kind)
                continue
            self._check_frame(length, kind, stream_id)
            if size - offset < 9 + length:
                self._partial += data[offset:]
                break
            self._control(kind, flags, stream_id, bytes(data[offset + 9 : offset + 9 + length]))
            offset += 9 + length
        if run is not None:
            self._deliver(run, views, total)

    def _deliver(self, stream: Stream, views: list[memoryview], total: int) -> None:
        if not stream.closed:
            self._sink.data_arrived(stream, views, total)

    def _match_preface(self, data: memoryview) -> memoryview:
        expected = self._preface
        count = min(len(expected), len(data))
        if data[:count] != expected[:count]:
            raise broken(h2.PROTOCOL_ERROR, "the peer does not speak HTTP/2")
        self._preface = expected[count:]
        return data[count:]

    def _complete_partial(self, data: memoryview) -> memoryview:
        """Finish the frame that earlier bytes began; gives the rest of `data`."""
        partial = self._partial
        begun = len(partial)
        if begun < 9:
            partial += data[: 9 - begun]
            data = data[9 - begun :]
            if len(partial) < 9:
                return data
        high, low, kind, flags, stream_id = h2.HEADER.unpack_from(partial)
        length = high << 8 | low
        stream_id &= h2.LARGEST_STREAM_ID
        if kind == h2.DATA or kind > h2.CONTINUATION:
            self._partial = bytearray()
            if kind == h2.DATA:
                self._start_data(length, flags, stream_id)
            else:
                self._start_unknown(length, kind)
            return data
        if begun < 9:
            self._check_frame(length, kind, stream_id)
        need = 9 + length - len(partial)
        partial += data[:need]
        if len(partial) == 9 + length:
            self._partial = bytearray()
            self._control(kind, flags, stream_id, bytes(partial[9:]))
        return data[need:]

    def _expect(self, kind: int) -> None:
        if not self._settings_seen and kind != h2.SETTINGS:
            raise broken(h2.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if (self._block is None) is (kind == h2.CONTINUATION):
            raise broken(h2.PROTOCOL_ERROR, "a header block is not contiguous")

    def _start_data(self, length: int, flags: int, stream_id: int) -> None:
        self._expect(h2.DATA)
        if length > self._max_frame:
            raise broken(h2.FRAME_SIZE_ERROR, "a DATA frame is too long")
        self._stream = self._sink.data_started(stream_id, length)
        self._ends = bool(flags & h2.END_STREAM)
        if flags & h2.PADDED:
            if not length:
                raise broken(h2.FRAME_SIZE_ERROR, "a padded frame without pad length")
            self._pad_length_due = True
            self._padding = length
            return
        self._left = length
        if length:
            return
        if self._ends:
            self._data_ended()
        else:
            self._sink.cheap_arrived("empty DATA")

    def _skip_padding(self, data: memoryview, offset: int) -> int:
        if not self._pad_length_due:
            count = min(self._padding, len(data) - offset)
            self._padding -= count
            return offset + count
        self._pad_length_due = False
        padding = data[offset]
        if padding >= self._padding:
            raise broken(h2.PROTOCOL_ERROR, "more padding than payload")
        self._left = self._padding - 1 - padding
        self._padding = padding
        if self._stream is not None:
            self._sink.data_padded(self._stream, padding + 1)
        if not self._left and not self._ends:
            self._sink.cheap_arrived("empty DATA")
        return offset + 1

    def _data_ended(self) -> None:
        self._ends = False
        stream, self._stream = self._stream, None
        if stream is not None and not stream.closed:
            self._sink.data_ended(stream)

    def _start_unknown(self, length: int, kind: int) -> None:
        """Skip a frame of a type we do not know, without keeping it."""
        self._expect(kind)
        if length > self._max_frame:
            raise broken(h2.FRAME_SIZE_ERROR, "a frame is too long")
        self._sink.cheap_arrived("unknown frames")
        self._stream = None
        self._ends = False
        self._padding = length

    def _check_frame(self, length: int, kind: int, stream_id: int) -> None:
        """Judge a control frame by its header, before any of it is kept."""
        self._expect(kind)
        fixed = _FIXED_LENGTHS.get(kind)
        if fixed is not None and length != fixed:
            raise broken(h2.FRAME_SIZE_ERROR, f"frame type {kind} of {length} bytes")
        if (stream_id == 0) is not (kind in _CONNECTION_FRAMES) and kind != h2.WINDOW_UPDATE:
            raise broken(h2.PROTOCOL_ERROR, f"frame type {kind} on stream {stream_id}")
        if length > self._max_frame:
            raise broken(h2.FRAME_SIZE_ERROR, "a frame is too long")
        if kind == h2.PUSH_PROMISE:
            raise broken(h2.PROTOCOL_ERROR, "push is off")
        if kind in {h2.HEADERS, h2.CONTINUATION}:
            if length + len(self._block or b"") > self._max_block:
                raise broken(h2.ENHANCE_YOUR_CALM, "a header block is too long")
        elif length > MAX_CONTROL_PAYLOAD:
            raise broken(h2.ENHANCE_YOUR_CALM, f"frame type {kind} of {length} bytes")

    def _control(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == h2.HEADERS:
            self._headers(flags, stream_id, payload)
        elif kind == h2.CONTINUATION:
            self._continuation(flags, stream_id, payload)
        else:
            self._settings_seen = True  # any other first frame was refused by _expect
            self._sink.control_arrived(kind, flags, stream_id, payload)

    def _headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        start, end = 0, len(payload)
        if flags & h2.PADDED:
            if not payload:
                raise broken(h2.FRAME_SIZE_ERROR, "a padded frame without pad length")
            start, end = 1, end - payload[0]
        if flags & h2.PRIORITY_FLAG:
            depends_on = int.from_bytes(payload[start : start + 4], "big") & h2.LARGEST_STREAM_ID
            if depends_on == stream_id:
                raise broken(h2.PROTOCOL_ERROR, "a stream depends on itself")
            start += 5
        if start > end:
            raise broken(h2.PROTOCOL_ERROR, "more padding than payload")
        self._block_id = stream_id
        self._block_ends = bool(flags & h2.END_STREAM)
        self._block_frames = 0
        if flags & h2.END_HEADERS:
            self._sink.block_arrived(stream_id, payload[start:end], ends=self._block_ends)
        else:
            self._block = bytearray(payload[start:end])

    def _continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        block = self._block
        if block is None or stream_id != self._block_id:
            raise broken(h2.PROTOCOL_ERROR, "a header block is not contiguous")
        self._block_frames += 1
        if self._block_frames > MAX_CONTINUATIONS:
            raise broken(h2.ENHANCE_YOUR_CALM, "too many CONTINUATION frames")
        self._sink.cheap_arrived("CONTINUATION")
        block += payload
        if flags & h2.END_HEADERS:
            self._block = None
            self._sink.block_arrived(stream_id, bytes(block), ends=self._block_ends)
