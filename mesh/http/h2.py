"""HTTP/2 for the control plane (RFC 9113): the only importer of the h2 library.

A sans-IO codec: bytes in, events out, bytes to send. h2 does framing, HPACK, windows and
stream states. What it leaves open is closed here:

- floods of cheap frames, also resets that a peer provokes from us, empty one token bucket;
- inbound DATA is credited only by `acknowledge`, so what is unread is bounded by the windows;
- a frame that is too long is refused by its head, where h2 would first gather all of it;
- outbound bytes are bounded while the peer does not read;
- GOAWAY goes past h2, whose connection is dead after one, so that streams can drain;
- every exception of h2, and the stray ValueError and IndexError that leak from it,
  becomes RemoteProtocolError with the h2_code of the GOAWAY that is then due.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

from mesh.errors import LocalProtocolError, RemoteProtocolError
from mesh.http import events as ev
from mesh.http import h2_frames as frames
from mesh.http.abuse import TokenBucket
from mesh.http.events import Headers

SEND_FRAME_BYTES: Final = frames.DEFAULT_MAX_FRAME
MAX_TABLE_BYTES: Final = 4096
_EARNED_AT_START = 16
_EARNED_PER_DATA = 4
_MAX_EARNED = 10_000
_MAX_GOAWAY_BYTES = 4096
_GOAWAY_HEAD = struct.Struct(">II")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may cost us. Sizes in bytes."""

    stream_window: int = 256 << 10
    connection_window: int = 1 << 20
    max_header_list: int = 16 << 10
    max_streams: int = 100
    max_pending: int = 256 << 10
    """Answers (PING, SETTINGS, window) queued while the peer does not read."""


class H2Codec:
    """The state of one connection. `now` is any clock, in seconds."""

    def __init__(
        self,
        *,
        client: bool,
        limits: Limits | None = None,
        bucket: TokenBucket | None = None,
    ) -> None:
        self._limits = limits if limits is not None else Limits()
        self._bucket = bucket if bucket is not None else TokenBucket()
        self._h2 = _open(client, self._limits)
        self._out = bytearray()
        preface = len(frames.PREFACE)
        self._inbound = _Scanner(0 if client else preface, frames.DEFAULT_MAX_FRAME)
        self._outbound = _Scanner(preface if client else 0, frames.LARGEST_FRAME)
        self._earned = _EARNED_AT_START
        self.failed = False
        self._drain()

    # ---- receiving

    def receive_data(self, data: bytes, now: float) -> list[ev.Event]:
        """Parse `data`. Raises RemoteProtocolError when the connection cannot go on; the
        GOAWAY that says so is then the last thing to send.
        """
        try:
            return self._receive(data, now)
        except RemoteProtocolError as exc:
            self.fail(exc)
            raise

    def _receive(self, data: bytes, now: float) -> list[ev.Event]:
        if self.failed:
            raise RemoteProtocolError("data after the connection failed")
        scan = self._inbound.feed(data)
        self._charge(scan, now)
        with _mapped():
            events = list(_translate(self._h2.receive_data(bytes(scan.passed))))
        if self._h2.encoder.header_table_size > MAX_TABLE_BYTES:
            # The peer's offer is a ceiling; its memory is not ours to spend.
            self._h2.encoder.header_table_size = MAX_TABLE_BYTES
        replies = self._drain()
        provoked = replies.counts.get(frames.RST_STREAM, 0)
        if provoked and not self._bucket.take(now, provoked):
            raise _calm("the peer provokes too many resets")
        if len(self._out) > self._limits.max_pending:
            raise _calm("the peer does not read what it asks for")
        events += [_parse_goaway(body) for body in scan.goaways]
        return events

    def _charge(self, scan: _Scan, now: float) -> None:
        counts = scan.counts
        owed = sum(counts.get(kind, 0) for kind in _EARNABLE)
        covered = min(owed, self._earned)
        self._earned -= covered
        cost = owed - covered + scan.empty_data
        cost += sum(count for kind, count in counts.items() if kind not in _USEFUL)
        if cost and not self._bucket.take(now, cost):
            raise _calm("too many frames that carry nothing")

    def fail(self, error: RemoteProtocolError) -> None:
        """Queue the GOAWAY for `error`; nothing can be sent or received afterwards."""
        if not self.failed:
            self._h2.clear_outbound_data_buffer()
            self.send_goaway(error.h2_code, str(error))
            self.failed = True

    # ---- sending

    def data_to_send(self) -> bytes:
        """Take all bytes that are due."""
        data = bytes(self._out)
        self._out.clear()
        return data

    @property
    def pending(self) -> int:
        """Bytes that wait to be taken."""
        return len(self._out)

    def can_open(self) -> bool:
        """Whether the peer takes one more stream of ours now."""
        allowed = self._h2.remote_settings.max_concurrent_streams
        return self._h2.open_outbound_streams < allowed

    def open_stream(self, headers: Sequence[tuple[str, str]], *, end_stream: bool = False) -> int:
        """Send a request head; the id of its stream. Raises LocalProtocolError."""
        with self._ours():
            stream_id = self._h2.get_next_available_stream_id()
            self._h2.send_headers(stream_id, _encode(headers), end_stream=end_stream)
        return stream_id

    def send_headers(
        self, stream_id: int, headers: Sequence[tuple[str, str]], *, end_stream: bool = False
    ) -> None:
        """Send a response head, or trailers after one. Raises LocalProtocolError."""
        with self._ours():
            self._h2.send_headers(stream_id, _encode(headers), end_stream=end_stream)

    def sendable(self, stream_id: int) -> int:
        """How many bytes one `send_data` may carry now. Raises LocalProtocolError."""
        with self._ours():
            room = self._h2.local_flow_control_window(stream_id)
        return max(0, min(room, self._h2.max_outbound_frame_size, SEND_FRAME_BYTES))

    def send_data(self, stream_id: int, data: bytes, *, end_stream: bool = False) -> None:
        """Send at most `sendable` bytes. Raises LocalProtocolError."""
        with self._ours():
            self._h2.send_data(stream_id, data, end_stream=end_stream)

    def acknowledge(self, stream_id: int, credit: int) -> None:
        """The application consumed `credit` bytes: let the peer send as many again."""
        with self._ours():
            self._h2.acknowledge_received_data(credit, stream_id)

    def reset(self, stream_id: int, code: int) -> None:
        """Cut a stream; one that is already gone is left alone."""
        with self._ours(), contextlib.suppress(h2.exceptions.NoSuchStreamError):
            self._h2.reset_stream(stream_id, code)

    def ping(self, payload: bytes) -> None:
        """Send a PING of 8 bytes."""
        with self._ours():
            self._h2.ping(payload)
        self._earned += 1

    def send_goaway(
        self, code: int = frames.NO_ERROR, debug: str = "", *, last_stream_id: int | None = None
    ) -> None:
        """Announce the end; streams up to `last_stream_id` (default: all seen) go on."""
        if self.failed:
            return
        last = self._h2.highest_inbound_stream_id if last_stream_id is None else last_stream_id
        self._out += frames.pack_goaway(last, code, debug.encode()[:200])

    @property
    def highest_inbound_stream(self) -> int:
        """The last stream that the peer opened."""
        return self._h2.highest_inbound_stream_id

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        if self.failed:
            raise LocalProtocolError("the connection has failed")
        try:
            yield
        except (h2.exceptions.H2Error, ValueError, IndexError, KeyError) as exc:
            raise LocalProtocolError(f"HTTP/2: {exc or type(exc).__name__}") from exc
        scan = self._drain()
        data = scan.counts.get(frames.DATA, 0)
        if data:
            self._earned = min(_MAX_EARNED, self._earned + _EARNED_PER_DATA * data)

    def _drain(self) -> _Scan:
        data = self._h2.data_to_send()
        self._out += data
        return self._outbound.feed(data)


# Frames that cost work and carry nothing are charged. WINDOW_UPDATE, PING (of which gRPC
# peers send some for their bandwidth estimate) and SETTINGS (its ACK) are owed to us in
# proportion to what we send, so that proportion is free.
_EARNABLE: Final = (frames.WINDOW_UPDATE, frames.PING, frames.SETTINGS)
_USEFUL: Final = frozenset({frames.DATA, frames.HEADERS, frames.CONTINUATION, *_EARNABLE})


class _Scan:
    """What one piece of bytes held: frames by type, and the bytes without the GOAWAYs."""

    __slots__ = ("counts", "empty_data", "goaways", "passed")

    def __init__(self) -> None:
        self.passed = bytearray()
        self.counts: dict[int, int] = {}
        self.empty_data = 0
        self.goaways: list[bytes] = []


class _Scanner:
    """Walks over frame heads, in pieces cut anywhere; takes GOAWAY out of the flow."""

    __slots__ = ("_goaway", "_head", "_left", "_max_frame")

    def __init__(self, preface: int, max_frame: int) -> None:
        self._left = preface
        self._max_frame = max_frame
        self._head = bytearray()
        self._goaway: bytearray | None = None

    def feed(self, data: bytes) -> _Scan:
        """Raises RemoteProtocolError for a frame that is too long or a malformed GOAWAY."""
        scan = _Scan()
        offset, size = 0, len(data)
        while offset < size:
            if self._left:
                end = min(size, offset + self._left)
                self._left -= end - offset
                sink = scan.passed if self._goaway is None else self._goaway
                sink += data[offset:end]
                offset = end
            else:
                end = min(size, offset + frames.HEADER_BYTES - len(self._head))
                self._head += data[offset:end]
                offset = end
                if len(self._head) < frames.HEADER_BYTES:
                    break
                self._start_frame(scan)
            if not self._left and self._goaway is not None:
                scan.goaways.append(bytes(self._goaway))
                self._goaway = None
        return scan

    def _start_frame(self, scan: _Scan) -> None:
        high, low, kind, flags, stream_id = frames.HEADER.unpack(self._head)
        length = high << 8 | low
        if length > self._max_frame:
            raise RemoteProtocolError(f"a frame of {length} bytes", h2_code=frames.FRAME_SIZE_ERROR)
        scan.counts[kind] = scan.counts.get(kind, 0) + 1
        if kind == frames.GOAWAY:
            if length < _GOAWAY_HEAD.size or length > _MAX_GOAWAY_BYTES:
                raise RemoteProtocolError(
                    f"a GOAWAY of {length} bytes", h2_code=frames.FRAME_SIZE_ERROR
                )
            if stream_id & frames.LARGEST_STREAM_ID:
                raise RemoteProtocolError("a GOAWAY on a stream")
            self._goaway = bytearray()
        else:
            scan.passed += self._head
            if kind == frames.DATA and not length and not flags & frames.END_STREAM:
                scan.empty_data += 1
        self._head.clear()
        self._left = length


def _open(client: bool, limits: Limits) -> h2.connection.H2Connection:
    config = h2.config.H2Configuration(client_side=client, header_encoding=None)
    connection = _Connection(config=config)
    codes = h2.settings.SettingCodes
    initial = {
        codes.ENABLE_PUSH: 0,
        codes.INITIAL_WINDOW_SIZE: limits.stream_window,
        codes.MAX_CONCURRENT_STREAMS: limits.max_streams,
        codes.MAX_HEADER_LIST_SIZE: limits.max_header_list,
    }
    connection.local_settings = h2.settings.Settings(client=client, initial_values=initial)
    del connection.local_settings[codes.ENABLE_CONNECT_PROTOCOL]
    connection.decoder.max_header_list_size = limits.max_header_list
    connection.initiate_connection()
    extra = limits.connection_window - frames.DEFAULT_WINDOW
    if extra > 0:
        connection.increment_flow_control_window(extra)
    return connection


class _Connection(h2.connection.H2Connection):
    # Each remembered stream costs memory; 65536 of them are meant for other uses.
    MAX_CLOSED_STREAMS = 2048


def _translate(events: Sequence[h2.events.Event]) -> Iterator[ev.Event]:
    for event in events:
        match event:
            case h2.events.RequestReceived():
                yield ev.RequestReceived(event.stream_id, _decode(event.headers))
            case h2.events.ResponseReceived():
                yield ev.ResponseReceived(event.stream_id, _decode(event.headers))
            case h2.events.TrailersReceived():
                yield ev.TrailersReceived(event.stream_id, _decode(event.headers))
            case h2.events.DataReceived():
                credit = event.flow_controlled_length
                if credit:
                    yield ev.DataReceived(event.stream_id, bytes(event.data), credit)
            case h2.events.StreamEnded():
                yield ev.StreamEnded(event.stream_id)
            case h2.events.StreamReset():
                code = int(event.error_code)
                yield ev.StreamCut(event.stream_id, code, by_peer=event.remote_reset)
            case h2.events.WindowUpdated():
                yield ev.WindowOpened(event.stream_id)
            case h2.events.RemoteSettingsChanged():
                yield ev.SettingsReceived()
            case h2.events.PingAckReceived():
                yield ev.PongReceived(event.ping_data)
            case _:
                pass  # acknowledgements, priorities, unknown frames: nothing to do


def _parse_goaway(body: bytes) -> ev.GoawayReceived:
    last, code = _GOAWAY_HEAD.unpack_from(body)
    debug = body[_GOAWAY_HEAD.size :][:200].decode("utf-8", "replace")
    return ev.GoawayReceived(last & frames.LARGEST_STREAM_ID, code, debug)


def _decode(headers: Sequence[tuple[bytes | str, bytes | str]]) -> Headers:
    return tuple((_text(name), _text(value)) for name, value in headers)


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


def _encode(headers: Sequence[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except h2.exceptions.ProtocolError as exc:
        raise RemoteProtocolError(f"HTTP/2: {exc}", h2_code=int(exc.error_code)) from exc
    except (h2.exceptions.H2Error, ValueError, IndexError, KeyError) as exc:
        raise RemoteProtocolError(f"HTTP/2: {exc or type(exc).__name__}") from exc


def _calm(reason: str) -> RemoteProtocolError:
    return RemoteProtocolError(reason, http_status=429, h2_code=frames.ENHANCE_YOUR_CALM)
