"""FAST PATH: an HTTP/2 connection inside a transport, and its streams; either side's common half.

`H2Core` judges frames and keeps windows; this moves bytes between it and the transport, holds what
a window does not allow yet, and checks that a body is as long as its head said: another length
would be another request to an endpoint that speaks HTTP/1.1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from mesh.errors import RemoteProtocolError
from mesh.http import h2_frames
from mesh.http.h2_core import H2Core, Stream
from mesh.http.hpack_table import encode_block
from mesh.http.receive_windows import WindowBudget
from mesh.reactor import Reactor
from waypoint.filters.chain import Pair
from waypoint.streams import Chunk
from waypoint.transport import Transport

SETTINGS = h2_frames.LocalSettings(
    stream_window=256 << 10, largest_window=1 << 20, connection_window=4 << 20,
    max_frame=256 << 10, holds_connection=True,
)  # fmt: skip
SERVED_SETTINGS = replace(SETTINGS, max_frame=h2_frames.DEFAULT_MAX_FRAME, extended_connect=True)
MAX_BACKLOG = 256 << 10
"""Bytes of heads and answers that a peer has not taken, beyond which we hear nothing from it."""


class H2Channel:
    """The connection: a `Codec` of its transport, the `Receiver` of its core."""

    def __init__(
        self, reactor: Reactor, transport: Transport, *, client: bool, budget: WindowBudget | None
    ) -> None:
        self.transport = transport
        settings = SETTINGS if client else SERVED_SETTINGS
        self.core = H2Core(_Facts(self), client=client, settings=settings, budget=budget)
        self.is_closed = False
        self._reactor = reactor
        self._is_dirty = False
        self._parked: dict[H2Stream, None] = {}

    def touch(self) -> None:
        """Flush at the end of this turn."""
        if not self._is_dirty and not self.is_closed:
            self._is_dirty = True
            self._reactor.defer(self)

    def park(self, stream: H2Stream) -> None:
        """Resume `stream` when the connection takes bytes again."""
        self._parked[stream] = None

    def flush(self) -> None:
        """The turn's end."""
        self._is_dirty = False
        if self.core.out and not self.is_closed:
            out, self.core.out = self.core.out, bytearray()
            self.transport.write(out)
            if self.transport.backlog > MAX_BACKLOG:
                self.transport.pause()
        self.after_flush()

    def after_flush(self) -> None:
        """Everything said in this turn is on its way."""

    def on_failed(self, error: Exception) -> None:
        """A bug in `flush`."""
        self.end("internal error", abort=True)

    # ---- Codec

    def on_data(self, data: memoryview) -> None:
        """From the peer."""
        try:
            self.core.receive(data, time.monotonic())
        except RemoteProtocolError as exc:
            self.core.goaway(exc.h2_code, str(exc))
            self.flush()
            self.end(str(exc), abort=False)
            return
        if self.core.out:
            self.touch()

    def on_end(self) -> None:
        """The peer closed."""
        self.end("the peer closed the connection", abort=bool(self.core.streams))

    def on_lost(self, reason: str) -> None:
        """The peer reset."""
        self.end(reason, abort=True)

    def on_writable(self) -> None:
        """The transport takes bytes again."""
        self.transport.unpause()
        self.on_connection_room()

    def end(self, reason: str, *, abort: bool) -> None:
        """The end of the connection and all its streams. Idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        if abort:
            self.transport.abort()
        else:
            self.transport.close()
        self._parked.clear()
        for stream in list(self.core.streams.values()):
            owner, stream.owner = stream.owner, None
            if owner is not None:
                owner.on_cut(reason, is_refused=False)
        self.on_gone()

    def on_gone(self) -> None:
        """The connection has ended."""

    def on_headers(self, stream: Stream, pairs: Sequence[Pair]) -> None:
        """A head, or trailers."""
        raise NotImplementedError

    def on_stream_end(self, stream: Stream) -> None:
        """END_STREAM."""
        raise NotImplementedError

    def on_connection_room(self) -> None:
        """The connection takes bytes again."""
        parked, self._parked = self._parked, {}
        for stream in parked:
            stream.resume()


class _Facts:
    """The core's `Receiver`: its `on_data` and `on_end` mean a stream, the transport's do not."""

    __slots__ = ("_channel",)

    def __init__(self, channel: H2Channel) -> None:
        self._channel = channel

    def on_headers(self, stream: Stream, pairs: Sequence[Pair]) -> None:
        self._channel.on_headers(stream, pairs)

    def on_data(self, stream: Stream, views: Sequence[memoryview], total: int) -> None:
        owner: H2Stream | None = stream.owner
        if owner is not None:
            owner.receive(views, total)
        else:
            self._channel.core.credit(stream, total)

    def on_end(self, stream: Stream) -> None:
        self._channel.on_stream_end(stream)

    def on_reset(self, stream: Stream, code: int, *, by_peer: bool) -> None:
        owner, stream.owner = stream.owner, None
        if owner is not None:
            refused = by_peer and code == h2_frames.REFUSED_STREAM
            owner.on_cut(f"stream reset: {h2_frames.error_name(code)}", is_refused=refused)

    def on_closed(self, stream: Stream) -> None:
        del stream
        self._channel.touch()

    def on_stream_room(self, stream: Stream) -> None:
        if stream.owner is not None:
            stream.owner.resume()

    def on_connection_room(self) -> None:
        self._channel.on_connection_room()

    def on_settings(self) -> None:
        self._channel.on_connection_room()

    def on_pong(self, payload: bytes) -> None:
        pass

    def on_goaway(self, code: int, debug: bytes) -> None:
        pass


class H2Stream:
    """One stream's sending half, and the accounts of its receiving half."""

    __slots__ = ("_ending", "_paused", "_pending", "_trailers", "_uncredited", "channel",
                 "declared", "is_over", "received", "stream")  # fmt: skip

    def __init__(self, channel: H2Channel) -> None:
        self.channel = channel
        self.stream: Stream | None = None
        self._pending: bytearray | None = None
        self._ending = False
        self._trailers: Sequence[Pair] = ()
        self._paused = False
        self._uncredited = 0
        self.declared = -1
        self.received = 0
        self.is_over = False

    # ---- sending

    @property
    def is_blocked(self) -> bool:
        """Whether the peer does not take what was sent."""
        return self._pending is not None or self.channel.transport.is_blocked

    def send_data(self, data: Chunk) -> None:
        """As far as the windows allow; the rest waits."""
        stream = self.stream
        if stream is None or stream.closed or not data:
            return
        if self._pending is not None:
            self._pending += data
            return
        channel = self.channel
        if not channel.transport.is_blocked and channel.core.send_whole(stream, data):
            channel.touch()
            return
        room = 0 if channel.transport.is_blocked else channel.core.room(stream)
        if len(data) <= room:
            channel.core.send_data(stream, data)
        else:
            self._pending = bytearray(data)
            self.resume()
        if channel.transport.is_blocked:
            channel.park(self)
        channel.touch()

    def send_end(self, trailers: Sequence[Pair] = ()) -> None:
        """END_STREAM, after what waits."""
        stream = self.stream
        if stream is None or stream.closed:
            return
        if self._pending is not None:
            self._ending, self._trailers = True, trailers
            return
        core = self.channel.core
        if trailers:
            core.send_headers(stream, encode_block(trailers), end_stream=True)
        else:
            core.end(stream)
        self.channel.touch()

    def resume(self) -> None:
        """There may be room again."""
        stream, pending, channel = self.stream, self._pending, self.channel
        if stream is None or stream.closed:
            return
        if pending is not None:
            if channel.transport.is_blocked:
                channel.park(self)
                return
            room = channel.core.room(stream)
            if room > 0:
                channel.core.send_data(stream, bytes(pending[:room]))
                del pending[:room]
                channel.touch()
            if pending:
                if stream.send_window <= 0:
                    stream.starved = True
                else:
                    channel.park(self)
                return
            self._pending = None
            if self._ending:
                self.send_end(self._trailers)
                return
        if not channel.transport.is_blocked:
            self.on_room()

    def reset(self, code: int) -> None:
        """RST_STREAM."""
        stream, self.stream = self.stream, None
        self._pending = None
        if stream is not None and not stream.closed:
            stream.owner = None
            self.channel.core.reset(stream, code)
            self.channel.touch()

    def pause(self) -> None:
        """Withhold credit."""
        self._paused = True
        if self.stream is not None:
            self.stream.lagged = True

    def unpause(self) -> None:
        """Give it."""
        self._paused = False
        count, self._uncredited = self._uncredited, 0
        if count and self.stream is not None:
            self.channel.core.credit(self.stream, count)
            self.channel.touch()

    # ---- receiving

    def receive(self, views: Sequence[memoryview], total: int) -> None:
        """DATA."""
        self.received += total
        if 0 <= self.declared < self.received:
            self.broken("more body than content-length says")
            return
        for view in views:
            self.on_body(view)
        if self.stream is not None:
            if self._paused:
                self._uncredited += total
            else:
                self.channel.core.credit(self.stream, total)

    def declare(self, pairs: Sequence[Pair]) -> bool:
        """Note content-length; whether it is well-formed."""
        found: bytes | None = None
        for name, value in pairs:
            if name == b"content-length":
                if found is not None or not value.isdigit() or len(value) > 18:
                    return False
                found = value
                self.declared = int(value)
        return True

    def is_short(self) -> bool:
        """At the end: whether less came than was declared."""
        return 0 <= self.declared != self.received

    def broken(self, reason: str) -> None:
        """The peer broke a rule of this stream."""
        self.reset(h2_frames.PROTOCOL_ERROR)
        self.on_cut(reason, is_refused=False)

    def on_room(self) -> None:
        """Everything went out."""
        raise NotImplementedError

    def on_body(self, data: memoryview) -> None:
        """Payload."""
        raise NotImplementedError

    def on_cut(self, reason: str, *, is_refused: bool) -> None:
        """The stream has ended without its end."""
        raise NotImplementedError
