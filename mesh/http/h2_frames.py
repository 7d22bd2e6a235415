"""HTTP/2 framing constants and packers for the data plane (RFC 9113), and the buffer in
which DATA frames are built around bytes that a socket wrote there.

No state of a connection is here (`mesh.http.h2_core`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER: Final = struct.Struct(">HBBBI")
"""A frame header: length (high 16 bits, low 8), type, flags, stream id."""
HEADER_BYTES: Final = 9

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0, 1, 2, 3, 4
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 5, 6, 7, 8, 9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITY_FLAG: Final = 0x20

NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 2, 3
SETTINGS_TIMEOUT, STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM = 4, 5, 6, 7
CANCEL, COMPRESSION_ERROR, CONNECT_ERROR, ENHANCE_YOUR_CALM = 8, 9, 10, 11

ERROR_NAMES: Final = (
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
)

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS = 1, 2, 3
INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE, ENABLE_CONNECT_PROTOCOL = 4, 5, 6, 8

DEFAULT_WINDOW: Final = 65535
DEFAULT_MAX_FRAME: Final = 16384
LARGEST_FRAME: Final = (1 << 24) - 1
LARGEST_WINDOW: Final = (1 << 31) - 1
LARGEST_STREAM_ID: Final = (1 << 31) - 1


def error_name(code: int) -> str:
    """The name of an error code, or its number."""
    return ERROR_NAMES[code] if 0 <= code < len(ERROR_NAMES) else f"error {code}"


def is_lawful_setting(key: int, value: int, *, to_client: bool) -> bool:
    """Whether a peer may announce this (RFC 9113 section 6.5.2); unknown keys are ignored."""
    if key == INITIAL_WINDOW_SIZE:
        return value <= LARGEST_WINDOW
    if key == MAX_FRAME_SIZE:
        return DEFAULT_MAX_FRAME <= value <= LARGEST_FRAME
    if key == ENABLE_PUSH:
        return value <= (0 if to_client else 1)
    return key != ENABLE_CONNECT_PROTOCOL or value <= 1


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """What we announce and enforce. Sizes in bytes; the windows are Istio's.

    A stream begins with `stream_window`; up to `largest_window` it grows with use. With
    `holds_connection` the connection's window, too, opens only by what was consumed, so that it
    bounds what all stalled readers of a connection hold together, and one may stop the others.
    """

    stream_window: int = 4 << 20
    largest_window: int = 0
    connection_window: int = 16 << 20
    max_frame: int = 1 << 20
    max_header_list: int = 64 << 10
    max_streams: int = 200
    holds_connection: bool = False
    extended_connect: bool = False
    """A server's: that it takes requests of RFC 8441, WebSockets."""

    def pack(self, *, client: bool) -> bytes:
        """The SETTINGS frame and the WINDOW_UPDATE that opens the connection window."""
        pairs = [
            (MAX_HEADER_LIST_SIZE, self.max_header_list),
            (INITIAL_WINDOW_SIZE, self.stream_window),
            (MAX_FRAME_SIZE, self.max_frame),
            (ENABLE_PUSH, 0) if client else (MAX_CONCURRENT_STREAMS, self.max_streams),
        ]
        if self.extended_connect and not client:
            pairs.append((ENABLE_CONNECT_PROTOCOL, 1))
        body = b"".join(struct.pack(">HI", *pair) for pair in pairs)
        out = pack_frame(SETTINGS, 0, 0, body)
        if self.connection_window > DEFAULT_WINDOW:
            out += pack_window_update(0, self.connection_window - DEFAULT_WINDOW)
        return out


def pack_header(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    """A frame header."""
    return HEADER.pack(length >> 8, length & 255, kind, flags, stream_id)


def pack_frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """A whole frame; the payload must fit the peer's frame size."""
    return pack_header(len(payload), kind, flags, stream_id) + payload


def pack_window_update(stream_id: int, increment: int) -> bytes:
    """A WINDOW_UPDATE."""
    return HEADER.pack(0, 4, WINDOW_UPDATE, 0, stream_id) + increment.to_bytes(4, "big")


def pack_rst(stream_id: int, code: int) -> bytes:
    """A RST_STREAM."""
    return HEADER.pack(0, 4, RST_STREAM, 0, stream_id) + code.to_bytes(4, "big")


def pack_goaway(last_stream_id: int, code: int, debug: bytes = b"") -> bytes:
    """A GOAWAY."""
    return pack_frame(GOAWAY, 0, 0, struct.pack(">II", last_stream_id, code) + debug)


def pack_headers(stream_id: int, block: bytes, *, end_stream: bool, max_frame: int) -> bytes:
    """HEADERS, and CONTINUATION where the block exceeds the peer's frame size."""
    flags = END_STREAM if end_stream else 0
    if len(block) <= max_frame:
        return pack_frame(HEADERS, flags | END_HEADERS, stream_id, block)
    out = [pack_frame(HEADERS, flags, stream_id, block[:max_frame])]
    for start in range(max_frame, len(block), max_frame):
        piece = block[start : start + max_frame]
        last = start + max_frame >= len(block)
        out.append(pack_frame(CONTINUATION, END_HEADERS if last else 0, stream_id, piece))
    return b"".join(out)


class FrameBuffer:
    """A buffer to read application bytes into, leaving gaps for the frame headers.

    `slots(room, max_frame)` gives the views to read into, `seal(count, ...)` writes the
    headers and gives the finished frames as one view, valid until the next `slots`.
    A peer with small frames gets 16375-byte payloads, so that a frame is one TLS record.
    """

    SLOT = DEFAULT_MAX_FRAME - HEADER_BYTES

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        frames = -(-capacity // self.SLOT)
        self._buffer = bytearray(capacity + frames * HEADER_BYTES)
        self._view = memoryview(self._buffer)
        step = self.SLOT + HEADER_BYTES
        self._slots = [
            self._view[index * step + HEADER_BYTES : (index + 1) * step] for index in range(frames)
        ]
        self._whole = self._view[HEADER_BYTES : HEADER_BYTES + capacity]
        self._all = [self._whole]

    def slots(self, room: int, max_frame: int) -> list[memoryview]:
        """Views for up to `room` bytes (capped to the capacity)."""
        if room >= self.capacity:
            room = self.capacity
            if room <= max_frame:
                return self._all
        if room <= max_frame:
            return [self._whole[:room]]
        full, rest = divmod(room, self.SLOT)
        views = self._slots[:full]
        if rest:
            views.append(self._slots[full][:rest])
        return views

    def seal(self, count: int, room: int, max_frame: int, stream_id: int) -> memoryview:
        """Frames around the first `count` bytes read; `room` and `max_frame` as in `slots`."""
        if room <= max_frame or self.capacity <= max_frame:
            HEADER.pack_into(self._buffer, 0, count >> 8, count & 255, DATA, 0, stream_id)
            return self._view[: HEADER_BYTES + count]
        offset = 0
        while count > 0:
            size = min(self.SLOT, count)
            HEADER.pack_into(self._buffer, offset, size >> 8, size & 255, DATA, 0, stream_id)
            offset += HEADER_BYTES + size
            count -= size
        return self._view[:offset]
