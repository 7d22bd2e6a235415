"""FAST PATH: sans-IO HTTP/2 for the data plane, tunnels and L7 alike (RFC 9113).

Bytes go in by `receive`, facts come out as calls on a `Receiver`, bytes to send gather in
`out`. DATA is streamed: slices of the caller's buffer are handed on as they come, a frame
is never put together again, so large frames cost neither memory nor delay. DATA that is
sent does not pass through here either: the shell frames it in a FrameBuffer and calls
`spend`. Every limit of a careful server is kept: windows, frame and header sizes, stream
order and count, and one bucket for floods (`mesh.http.abuse`).

A broken connection raises RemoteProtocolError with the h2_code for GOAWAY; a broken
stream is reset and reported. This is not gRPC's HTTP/2 (`mesh.http.h2`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from mesh.errors import LocalProtocolError
from mesh.http import h2_frames as h2
from mesh.http.abuse import TokenBucket
from mesh.http.h2_reader import FrameReader, broken
from mesh.http.h2_stream import Receiver, Stream, find_head_problem, is_interim
from mesh.http.hpack_table import TABLE_SIZE_ZERO, Block, BlockDecoder
from mesh.http.receive_windows import ReceiveWindows, WindowBudget

__all__ = ["INITIAL_PEER_STREAMS", "H2Core", "Receiver", "Stream"]

INITIAL_PEER_STREAMS = 100
_EARNED_AT_START = 16
_EARNED_PER_STREAM = 4
_EARNED_PER_SEND = 8
_MAX_EARNED = 10_000
_MOST_CUT = 1_000


class H2Core:
    """The state of one connection. Nothing here waits; `now` is any clock, in seconds."""

    def __init__(
        self,
        receiver: Receiver,
        *,
        client: bool,
        settings: h2.LocalSettings | None = None,
        bucket: TokenBucket | None = None,
        budget: WindowBudget | None = None,
    ) -> None:
        self._receiver = receiver
        self._client = client
        self._settings = settings if settings is not None else h2.LocalSettings()
        self._bucket = bucket if bucket is not None else TokenBucket()
        self._decoder = BlockDecoder(self._settings.max_header_list)
        self._now = 0.0
        self.streams: dict[int, Stream] = {}
        self.out = bytearray(h2.PREFACE if client else b"")
        self.out += self._settings.pack(client=client)
        # what the peer allows us
        self.send_window = h2.DEFAULT_WINDOW
        self.peer_window = h2.DEFAULT_WINDOW
        self.peer_max_frame = h2.DEFAULT_MAX_FRAME
        self.peer_max_streams = INITIAL_PEER_STREAMS
        self.peer_takes_connect = False
        self.settings_received = False
        self.goaway_received = False
        self.goaway_sent = False
        self.goaway_final = False
        # what we allow the peer
        self._receive_window = max(self._settings.connection_window, h2.DEFAULT_WINDOW)
        self._uncredited = 0
        self._credit_step = self._receive_window // 2
        self._windows = ReceiveWindows(self._settings, budget)
        self._holds = self._settings.holds_connection
        self._accept_up_to = h2.LARGEST_STREAM_ID
        self._next_id = 1
        self._last_peer_id = 0
        # streams that we ended before the peer did: what was on its way to them is no fault
        self._cut_here: dict[int, None] = {}
        self._cut_up_to = 0
        self._reader = FrameReader(
            self,
            server=not client,
            max_frame=self._settings.max_frame,
            max_header_list=self._settings.max_header_list,
        )
        # flood accounting: frames that our own sending makes the peer owe us
        self._earned = _EARNED_AT_START
        self._free_resets = 0
        self._table_note = TABLE_SIZE_ZERO
        # the DATA frame that was queued last: it may grow while nothing follows it in `out`
        self._last_stream: Stream | None = None
        self._last_out = self.out
        self._last_at = self._last_end = 0

    # ---- receiving

    def receive(self, data: memoryview, now: float) -> None:
        """Parse `data`. Raises RemoteProtocolError when the connection cannot go on."""
        self._now = now
        self._reader.receive(data)
        self._credit_connection()

    def _credit_connection(self) -> None:
        if self._uncredited >= self._credit_step:
            self.out += h2.pack_window_update(0, self._uncredited)
            self._receive_window += self._uncredited
            self._uncredited = 0

    def _release(self, stream: Stream, count: int) -> None:
        """`count` held bytes are consumed, or nobody wants them any more."""
        stream.held -= count
        self._uncredited += count
        self._credit_connection()

    @property
    def is_amid_head(self) -> bool:
        """Whether a header block has begun and not ended."""
        return self._reader.is_amid_head

    # ---- what the reader finds

    def data_started(self, stream_id: int, length: int) -> Stream | None:
        """Account for a DATA frame; None when nobody will take its payload."""
        if length > self._receive_window:
            raise broken(h2.FLOW_CONTROL_ERROR, "the connection window is exceeded")
        self._receive_window -= length
        self._uncredited += length
        stream = self.streams.get(stream_id)
        if stream is None:
            self._refuse_idle(stream_id, "DATA")
            if not self._may_be_late(stream_id):
                self.cheap_arrived("DATA on closed streams")
                self.out += h2.pack_rst(stream_id, h2.STREAM_CLOSED)
            return None
        if stream.remote_ended:
            self._stream_error(stream, h2.STREAM_CLOSED)
        elif length > stream.receive_window:
            self._stream_error(stream, h2.FLOW_CONTROL_ERROR)
        elif self._client and not stream.answered:
            self._stream_error(stream, h2.PROTOCOL_ERROR)
        else:
            stream.receive_window -= length
            if self._holds:
                stream.held += length
                self._uncredited -= length
            return stream
        return None

    def data_padded(self, stream: Stream, count: int) -> None:
        """Padding is consumed as it comes."""
        self.credit(stream, count)

    def data_arrived(self, stream: Stream, views: Sequence[memoryview], total: int) -> None:
        """Payload."""
        self._receiver.on_data(stream, views, total)

    def data_ended(self, stream: Stream) -> None:
        """END_STREAM."""
        self._remote_ended(stream)

    def cheap_arrived(self, what: str) -> None:
        """One token from the bucket. Raises RemoteProtocolError when it is empty."""
        if not self._bucket.take(self._now):
            raise broken(h2.ENHANCE_YOUR_CALM, f"too many {what}")

    def control_arrived(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """Everything but DATA and header blocks."""
        if kind == h2.WINDOW_UPDATE:
            self._on_window_update(stream_id, int.from_bytes(payload, "big") & h2.LARGEST_WINDOW)
        elif kind == h2.RST_STREAM:
            self._on_rst(stream_id, int.from_bytes(payload, "big"))
        elif kind == h2.PING:
            self._on_ping(flags, payload)
        elif kind == h2.SETTINGS:
            self._on_settings(flags, payload)
        elif kind == h2.GOAWAY:
            self._on_goaway(payload)
        else:  # PRIORITY: deprecated, checked and ignored
            if int.from_bytes(payload[:4], "big") & h2.LARGEST_STREAM_ID == stream_id:
                raise broken(h2.PROTOCOL_ERROR, "a stream depends on itself")
            self._expected_or_flood("PRIORITY")

    def _refuse_idle(self, stream_id: int, what: str) -> None:
        """Raise when a frame names stream 0 or one that nobody opened yet."""
        if stream_id & 1 and stream_id > 0:
            opened = self._next_id - 2 if self._client else self._last_peer_id
            if stream_id <= opened:
                return
        raise broken(h2.PROTOCOL_ERROR, f"{what} on stream {stream_id}, which is not open")

    def _may_be_late(self, stream_id: int) -> bool:
        """Whether what comes on a closed stream may have been sent before the peer knew that; a
        peer that ended the stream itself may send nothing more (RFC 9113 section 5.1).
        """
        return (
            self._client
            or stream_id > self._accept_up_to
            or stream_id <= self._cut_up_to
            or stream_id in self._cut_here
        )

    def _note_cut(self, stream_id: int) -> None:
        if not self._client:
            self._cut_here[stream_id] = None
            if len(self._cut_here) > _MOST_CUT:
                self._cut_up_to = max(self._cut_up_to, oldest := next(iter(self._cut_here)))
                del self._cut_here[oldest]

    def block_arrived(self, stream_id: int, block: bytes, *, ends: bool) -> None:
        """A request, response or trailers."""
        stream = self.streams.get(stream_id)
        if stream is None and (self._client or not stream_id & 1):
            self._refuse_idle(stream_id, "HEADERS")
        # Decoded even when nobody wants it: the two dynamic tables must stay equal.
        decoded = self._decoder.decode(block)
        if stream is None:
            if self._client or stream_id <= self._last_peer_id:
                if not self._may_be_late(stream_id):
                    raise broken(h2.STREAM_CLOSED, "HEADERS on a stream that was ended")
                self.cheap_arrived("HEADERS on closed streams")
            else:
                self._accept_stream(stream_id, decoded, ends=ends)
            return
        if stream.remote_ended:
            self._stream_error(stream, h2.STREAM_CLOSED)
            return
        is_response = self._client and not stream.answered
        informational = is_response and is_interim(decoded.pairs)
        if find_head_problem(decoded, is_response=is_response, ends=ends):
            self._stream_error(stream, h2.PROTOCOL_ERROR)
            return
        if informational:
            self.cheap_arrived("interim responses")
        else:
            stream.answered = stream.answered or self._client
        self._receiver.on_headers(stream, decoded.pairs)
        if ends and not stream.closed:
            self._remote_ended(stream)

    def _accept_stream(self, stream_id: int, decoded: Block, *, ends: bool) -> None:
        self._last_peer_id = stream_id
        if stream_id > self._accept_up_to:
            self.cheap_arrived("streams after GOAWAY")
            return
        if len(self.streams) >= self._settings.max_streams:
            self.cheap_arrived("streams beyond the limit")
            self._note_cut(stream_id)
            self.out += h2.pack_rst(stream_id, h2.REFUSED_STREAM)
            return
        if decoded.problem:
            self.cheap_arrived("malformed requests")
            self._note_cut(stream_id)
            self.out += h2.pack_rst(stream_id, h2.PROTOCOL_ERROR)
            return
        stream = Stream(stream_id, self.peer_window, self._settings.stream_window)
        self.streams[stream_id] = stream
        self._earn(_EARNED_PER_STREAM)
        self._receiver.on_headers(stream, decoded.pairs)
        if ends and not stream.closed:
            self._remote_ended(stream)

    def _on_rst(self, stream_id: int, code: int) -> None:
        stream = self.streams.get(stream_id)
        if stream is None:
            self._refuse_idle(stream_id, "RST_STREAM")
            # One is honest after each ended stream (Envoy sends NO_ERROR so), more are not.
            if self._free_resets:
                self._free_resets -= 1
            else:
                self.cheap_arrived("RST_STREAM on closed streams")
            return
        if not self._client and not stream.answered:
            self.cheap_arrived("rapid resets")
        self._cut(stream, code, by_peer=True)

    def _on_window_update(self, stream_id: int, increment: int) -> None:
        self._expected_or_flood("WINDOW_UPDATE")
        if stream_id == 0:
            if not increment:
                raise broken(h2.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
            was = self.send_window
            self.send_window = was + increment
            if self.send_window > h2.LARGEST_WINDOW:
                raise broken(h2.FLOW_CONTROL_ERROR, "the connection window overflows")
            if was <= 0 < self.send_window:
                self._receiver.on_connection_room()
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            self._refuse_idle(stream_id, "WINDOW_UPDATE")
            return
        if not increment:
            self._stream_error(stream, h2.PROTOCOL_ERROR)
        elif stream.send_window + increment > h2.LARGEST_WINDOW:
            self._stream_error(stream, h2.FLOW_CONTROL_ERROR)
        else:
            stream.send_window += increment
            self._feed(stream)

    def _feed(self, stream: Stream) -> None:
        if stream.starved and stream.send_window > 0 and not stream.closed:
            stream.starved = False
            self._receiver.on_stream_room(stream)

    def _on_ping(self, flags: int, payload: bytes) -> None:
        if flags & h2.ACK:
            self._expected_or_flood("PING answers")
            self._receiver.on_pong(payload)
            return
        self._expected_or_flood("PING")
        self.out += h2.pack_frame(h2.PING, h2.ACK, 0, payload)

    def _on_settings(self, flags: int, payload: bytes) -> None:
        if flags & h2.ACK:
            if payload:
                raise broken(h2.FRAME_SIZE_ERROR, "a SETTINGS acknowledgement with content")
            if not self.settings_received:
                raise broken(h2.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            self._expected_or_flood("SETTINGS acknowledgements")
            return
        if len(payload) % 6:
            raise broken(h2.FRAME_SIZE_ERROR, f"SETTINGS of {len(payload)} bytes")
        self.cheap_arrived("SETTINGS")
        self.settings_received = True
        for key, value in struct.iter_unpack(">HI", payload):
            if not h2.is_lawful_setting(key, value, to_client=self._client):
                code = h2.FLOW_CONTROL_ERROR if key == h2.INITIAL_WINDOW_SIZE else h2.PROTOCOL_ERROR
                raise broken(code, f"setting {key} of {value}")
            if key == h2.INITIAL_WINDOW_SIZE:
                self._change_peer_window(value)
            elif key == h2.MAX_FRAME_SIZE:
                self.peer_max_frame = value
            elif key == h2.MAX_CONCURRENT_STREAMS:
                self.peer_max_streams = value
            elif key == h2.ENABLE_CONNECT_PROTOCOL:
                self.peer_takes_connect = value == 1
        self.out += h2.pack_frame(h2.SETTINGS, h2.ACK, 0)
        for stream in list(self.streams.values()):
            self._feed(stream)
        self._receiver.on_settings()

    def _change_peer_window(self, value: int) -> None:
        change = value - self.peer_window
        self.peer_window = value
        for stream in self.streams.values():
            stream.send_window += change
            if stream.send_window > h2.LARGEST_WINDOW:
                raise broken(h2.FLOW_CONTROL_ERROR, "a stream window overflows")

    def _on_goaway(self, payload: bytes) -> None:
        if len(payload) < 8:
            raise broken(h2.FRAME_SIZE_ERROR, f"GOAWAY of {len(payload)} bytes")
        self.cheap_arrived("GOAWAY")
        last, code = struct.unpack_from(">II", payload)
        self.goaway_received = True
        if self._client:
            for stream in [s for i, s in self.streams.items() if i > last & h2.LARGEST_STREAM_ID]:
                self._cut(stream, h2.REFUSED_STREAM, by_peer=True)
        self._receiver.on_goaway(code, payload[8:208])

    # ---- ends of streams, and floods

    def _remote_ended(self, stream: Stream) -> None:
        stream.remote_ended = True
        self._receiver.on_end(stream)
        self._close_if_ended(stream)

    def _close_if_ended(self, stream: Stream) -> None:
        if stream.local_ended and stream.remote_ended and not stream.closed:
            self._free_resets = min(self._free_resets + 1, _MAX_EARNED)
            self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        stream.closed = True
        self._windows.forget(stream)
        if stream.held:
            self._release(stream, stream.held)
        del self.streams[stream.id]
        self._reader.forget(stream)
        self._receiver.on_closed(stream)

    def _cut(self, stream: Stream, code: int, *, by_peer: bool) -> None:
        if not stream.closed:
            self._forget(stream)
            self._receiver.on_reset(stream, code, by_peer=by_peer)

    def _stream_error(self, stream: Stream, code: int) -> None:
        """The peer broke a rule of one stream. It pays: "made you reset" is a flood, too."""
        self.cheap_arrived("stream errors")
        if not stream.remote_ended:
            self._note_cut(stream.id)
        self.out += h2.pack_rst(stream.id, code)
        self._cut(stream, code, by_peer=False)

    def _earn(self, count: int) -> None:
        if self._earned < _MAX_EARNED:
            self._earned += count

    def _expected_or_flood(self, what: str) -> None:
        """Frames that follow from what we sent are free, up to a generous count."""
        if self._earned:
            self._earned -= 1
        else:
            self.cheap_arrived(what)

    # ---- sending

    @property
    def can_open(self) -> bool:
        """Whether `open` may be called."""
        return (
            self._client
            and not (self.goaway_received or self.goaway_sent)
            and len(self.streams) < self.peer_max_streams
            and self._next_id <= h2.LARGEST_STREAM_ID
        )

    def open(self, block: bytes, owner: object, *, end_stream: bool = False) -> Stream:
        """Send a request. Raises LocalProtocolError unless `can_open`."""
        if not self.can_open:
            raise LocalProtocolError("no new stream may be opened")
        stream = Stream(self._next_id, self.peer_window, self._settings.stream_window)
        self._next_id += 2
        stream.owner = owner
        self.streams[stream.id] = stream
        self._earn(_EARNED_PER_STREAM)
        self._write_headers(stream, block, end_stream=end_stream)
        return stream

    def send_headers(self, stream: Stream, block: bytes, *, end_stream: bool = False) -> None:
        """Send a response, or trailers. Nothing happens on a closed stream."""
        if stream.closed or stream.local_ended:
            return
        if not self._client:  # a client's are the trailers of its request
            stream.answered = True
        self._write_headers(stream, block, end_stream=end_stream)

    def _write_headers(self, stream: Stream, block: bytes, *, end_stream: bool) -> None:
        self.out += h2.pack_headers(
            stream.id,
            self._table_note + block,
            end_stream=end_stream,
            max_frame=self.peer_max_frame,
        )
        self._table_note = b""
        if end_stream:
            stream.local_ended = True
            self._close_if_ended(stream)

    def room(self, stream: Stream) -> int:
        """Bytes of DATA that both windows allow now (0 or less: none)."""
        return min(stream.send_window, self.send_window)

    def spend(self, stream: Stream, count: int) -> None:
        """Account for `count` bytes of DATA that the shell framed and sent itself."""
        stream.send_window -= count
        self.send_window -= count
        if self._earned < _MAX_EARNED:
            self._earned += _EARNED_PER_SEND

    def send_whole(self, stream: Stream, data: bytes | bytearray | memoryview) -> bool:
        """Queue DATA if it fits into the windows and one frame, perhaps the last one; else
        nothing. Whether it was queued.
        """
        size, most = len(data), self.peer_max_frame
        if (
            not 0 < size <= most
            or size > stream.send_window
            or size > self.send_window
            or stream.closed
            or stream.local_ended
        ):
            return False
        out = self.out
        end = len(out)
        if self._last_stream is stream and self._last_end == end and self._last_out is out:
            at = self._last_at
            grown = end - at - 9 + size
            if grown <= most:
                out[at : at + 3] = grown.to_bytes(3, "big")
                out += data
                self._last_end = end + size
                self.spend(stream, size)
                return True
        out += h2.HEADER.pack(size >> 8, size & 255, 0, 0, stream.id)
        out += data
        self._last_stream, self._last_out = stream, out
        self._last_at, self._last_end = end, end + 9 + size
        self.spend(stream, size)
        return True

    def send_data(self, stream: Stream, data: bytes | bytearray | memoryview) -> None:
        """Queue DATA in `out`. Raises LocalProtocolError beyond `room`."""
        if stream.closed or stream.local_ended or not data:
            return
        if len(data) > self.room(stream):
            raise LocalProtocolError("more DATA than the windows allow")
        view = memoryview(data)
        for start in range(0, len(view), self.peer_max_frame):
            piece = view[start : start + self.peer_max_frame]
            self.out += h2.pack_header(len(piece), h2.DATA, 0, stream.id)
            self.out += piece
        self.spend(stream, len(view))

    def end(self, stream: Stream) -> None:
        """Send END_STREAM. Idempotent."""
        if stream.closed or stream.local_ended:
            return
        out = self.out
        if self._last_stream is stream and self._last_end == len(out) and self._last_out is out:
            out[self._last_at + 4] = h2.END_STREAM
            self._last_stream = None
        else:
            out += h2.pack_frame(h2.DATA, h2.END_STREAM, stream.id)
        stream.local_ended = True
        self._close_if_ended(stream)

    def reset(self, stream: Stream, code: int) -> None:
        """Send RST_STREAM; the receiver hears `on_closed`, not `on_reset`. Idempotent."""
        if stream.closed:
            return
        self.out += h2.pack_rst(stream.id, code)
        if not stream.remote_ended:
            self._note_cut(stream.id)
        self._forget(stream)

    def credit(self, stream: Stream, count: int) -> None:
        """`count` bytes of a stream were consumed; the peer may send as many again, or more."""
        if self._holds and not stream.closed:
            self._release(stream, count)
        if stream.closed or stream.remote_ended:
            return
        stream.uncredited += count
        if stream.uncredited >= stream.credit_step:
            increment = self._windows.settle(stream)
            self.out += h2.pack_window_update(stream.id, increment)
            stream.receive_window += increment

    def ping(self, payload: bytes) -> None:
        """Send a PING of 8 bytes."""
        self._earn(1)
        self.out += h2.pack_frame(h2.PING, 0, 0, payload)

    def goaway(self, code: int = h2.NO_ERROR, debug: str = "", *, soon: bool = False) -> None:
        """Send GOAWAY. `soon`: streams on their way are taken, until a call without it."""
        last = h2.LARGEST_STREAM_ID if soon else self._last_peer_id
        self._accept_up_to = min(self._accept_up_to, last)
        self.goaway_sent = True
        self.goaway_final = not soon
        self.out += h2.pack_goaway(self._accept_up_to, code, debug.encode()[:200])
