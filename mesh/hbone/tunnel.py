"""One tunnel: a CONNECT stream of a TunnelConnection, from either side.

A trio task asks for it, waits for the answer (or gives one) and for the end; the bytes in
between never enter trio. What the local end is (a captured socket, an L7 codec) is behind
the `Sink` interface of `mesh.hbone.relay`. Bytes that arrive before there is a sink wait
here, uncredited, so at most one stream window of them.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mesh.errors import LocalProtocolError, MeshError, Unavailable
from mesh.fiber import Signal
from mesh.hbone.head import (
    Baggage,
    ConnectHead,
    ConnectResponse,
    encode_response,
    parse_response,
)
from mesh.hbone.relay import TOO_MUCH_WAITS, RelayResult, Sink, SocketEnd
from mesh.http import h2_frames as h2
from mesh.http.h2_core import Stream
from mesh.http.hpack_table import Pair, encode_block
from mesh.sockets import reset_on_close

if TYPE_CHECKING:
    from mesh.hbone.connection import TunnelConnection


@functools.lru_cache(maxsize=256)
def _response_block(status: int, baggage: Baggage | None) -> bytes:
    return encode_block(encode_response(ConnectResponse(status, baggage)))


class Tunnel:
    """Made by `TunnelConnection.open_tunnel` (client) or given to `on_tunnel` (server).

    `sent` and `received` are live byte counters (application bytes into and out of the
    tunnel); `head` is the CONNECT that opened it; `is_closed` says that both directions have
    ended.
    """

    __slots__ = (
        "_answered",
        "_closed",
        "_early",
        "_early_end",
        "_early_stop",
        "_error",
        "_response",
        "_sink",
        "_stream",
        "connection",
        "head",
        "is_closed",
        "received",
        "sent",
        "was_refused",
    )

    _stream: Stream

    def __init__(self, connection: TunnelConnection, head: ConnectHead) -> None:
        self.connection = connection
        self.head = head
        self.sent = 0
        self.received = 0
        self.is_closed = False
        self.was_refused = False
        """Client: the peer cut it and says that it did nothing about it: it may be sent again."""
        self._sink: Sink | None = None
        self._early: bytearray | None = None
        self._early_end = False
        self._early_stop = False
        self._response: ConnectResponse | None = None
        self._error: str | None = None
        self._answered = Signal()
        self._closed = Signal()

    # ---- for the owner

    async def wait_response(self) -> ConnectResponse:
        """Client: the peer's answer, of any status; other than 200 the tunnel is over.

        Raises Unavailable when the tunnel or the connection was cut first. Has no timeout of
        its own. If cancelled: the tunnel is reset.
        """
        try:
            await self._answered.wait()
        except BaseException:  # cancelled, as a task or as a fiber
            self.reset(reason="cancelled")
            raise
        if self._response is None:
            raise Unavailable(
                f"no answer to CONNECT {self.head.authority} "
                f"from {self.connection.peer_address}: {self._error}"
            )
        return self._response

    def respond(self, status: int = 200, *, baggage: Baggage | None = None) -> None:
        """Server: accept. Nothing happens when the tunnel is already gone (`is_closed`)."""
        if not self.is_closed:
            block = _response_block(status, baggage)
            self.connection.core.send_headers(self._stream, block)
            self.connection.touch()

    def refuse(self, status: int) -> None:
        """Server: answer `status` and finish. Nothing happens when already gone."""
        if self.is_closed:
            return
        core = self.connection.core
        block = _response_block(status, None)
        core.send_headers(self._stream, block, end_stream=True)
        core.reset(self._stream, h2.NO_ERROR)
        self.connection.touch()
        self.finish(f"refused with {status}")

    def relay(
        self, sock: socket.socket, *, has_spoken: bool = True, is_reset_on_close: bool = False
    ) -> None:
        """Start the fast path between `sock` and the tunnel.

        `sock` is connected and non-blocking; it belongs to the relay from here on and is
        closed by it, also when the tunnel is already gone. `has_spoken` says that something is
        probably there to be read, `is_reset_on_close` that its close would send RST already.
        """
        if self.is_closed:
            reset_on_close(sock)
            sock.close()
            return
        end = SocketEnd(self, sock, self.connection.reactor, is_reset_on_close=is_reset_on_close)
        self.attach(end)
        if has_spoken:
            end.on_readable()

    def attach(self, sink: Sink) -> None:
        """Use `sink` as the local end; what waits is delivered at once."""
        if self._sink is not None:
            raise LocalProtocolError("the tunnel has a local end already")
        self._sink = sink
        early = self._take_early()
        if self.is_closed:
            sink.reset(h2.CANCEL)
            return
        if early:
            sink.deliver([memoryview(early)], len(early))
        if self._early_end and not self.is_closed:
            sink.end()
        if self._early_stop and not self.is_closed:
            sink.stop()

    def reset(self, code: int = h2.CANCEL, reason: str = "reset") -> None:
        """Cut now: RST_STREAM to the peer, RST to the application. Idempotent."""
        if self.is_closed:
            return
        self.connection.core.reset(self._stream, code)
        self.connection.touch()
        self._cut(code, reason)

    async def wait_closed(self) -> RelayResult:
        """Wait for the end of both directions. If cancelled: reset()."""
        try:
            await self._closed.wait()
        finally:
            self.reset(reason="cancelled")
        return RelayResult(self.sent, self.received, self._error)

    def counts(self) -> tuple[int, int]:
        """`sent` and `received`."""
        return self.sent, self.received

    # ---- for the sink

    @property
    def stream_id(self) -> int:
        """The HTTP/2 stream."""
        return self._stream.id

    @property
    def max_frame(self) -> int:
        """The longest DATA frame the peer takes."""
        return self.connection.core.peer_max_frame

    def room(self) -> int:
        """Bytes that may be sent now; after 0 or less `sink.resume()` comes when it changed."""
        stream, connection = self._stream, self.connection
        if stream.closed or stream.local_ended:
            return 0
        window = connection.core.send_window
        if connection.is_blocked or window <= 0:
            connection.park(self)
            return 0
        room = stream.send_window
        if room <= 0:
            stream.starved = True
            return 0
        return room if room < window else window

    def send_frames(self, frames: memoryview, count: int) -> None:
        """Send `count` bytes that are framed already and within `room()`."""
        self.sent += count
        connection = self.connection
        connection.core.spend(self._stream, count)
        connection.write(frames)

    def send_whole(self, data: bytes | bytearray | memoryview) -> bool:
        """Send bytes if all of them fit now; whether they did."""
        connection = self.connection
        if connection.is_blocked or not connection.core.send_whole(self._stream, data):
            return False
        self.sent += len(data)
        connection.gathered()
        return True

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes within `room()`, framing them here."""
        self.sent += len(data)
        self.connection.core.send_data(self._stream, data)
        self.connection.touch()

    def end(self) -> None:
        """Our orderly end. Idempotent."""
        self.connection.core.end(self._stream)
        self.connection.touch()

    def hold(self, change: int) -> bool:
        """So many bytes more (or less) wait for the local end; whether they may."""
        held = self.connection.held
        if held is None or change < 0:
            if held is not None:
                held.release(-change)
            return True
        return held.hold(change)

    def lag(self) -> None:
        """The local end does not take what is delivered as it comes."""
        self._stream.lagged = True

    def credit(self, count: int) -> None:
        """`count` delivered bytes were consumed."""
        core = self.connection.core
        core.credit(self._stream, count)
        if core.out:
            self.connection.touch()

    def finish(self, error: str | None) -> None:
        """The sink is done with both directions. Idempotent."""
        if self.is_closed:
            return
        self._error = error
        self.is_closed = True
        self._take_early()
        self._closed.set()
        self._answered.set()
        self.connection.unpark(self)
        stream = self._stream
        # One whose both ends have been told is closed by the core right after this: an RST_STREAM
        # would be one more record to send and to read for every connection, and say nothing.
        if not (stream.closed or (stream.local_ended and stream.remote_ended)):
            self.connection.core.reset(stream, h2.CANCEL)
            self.connection.touch()
        stream.owner = None  # no cycle left for the collector

    # ---- for the connection

    def bind(self, stream: Stream) -> None:
        """Tie to a stream; before anything else happens."""
        self._stream = stream
        stream.owner = self

    def on_response(self, pairs: Sequence[Pair]) -> None:
        """Client: a response head; interim ones (1xx) are skipped, trailers ignored."""
        if self._response is not None:
            return
        try:
            response = parse_response(pairs)
        except MeshError as exc:
            self.reset(h2.PROTOCOL_ERROR, str(exc))
            return
        if response.status < 200:
            return
        self._response = response
        self._answered.set()
        if response.status != 200:
            self.connection.core.reset(self._stream, h2.CANCEL)
            self.finish(f"refused with {response.status}")

    def on_data(self, views: Sequence[memoryview], total: int) -> None:
        """DATA."""
        self.received += total
        if self._sink is not None:
            self._sink.deliver(views, total)
            return
        early = self._early
        if early is None:
            early = self._early = bytearray()
        for view in views:
            early += view
        if not self.hold(total):
            self.reset(h2.ENHANCE_YOUR_CALM, TOO_MUCH_WAITS)

    def _take_early(self) -> bytearray | None:
        early, self._early = self._early, None
        if early:
            self.hold(-len(early))
        return early

    def on_end(self) -> None:
        """END_STREAM."""
        if self._sink is not None:
            self._sink.end()
        else:
            self._early_end = True

    def on_reset(self, code: int, *, by_peer: bool) -> None:
        """The stream was cut. After END_STREAM a polite code only means "send no more"."""
        if by_peer and self._stream.remote_ended and code in {h2.NO_ERROR, h2.CANCEL}:
            if self._sink is not None:
                self._sink.stop()
            else:
                self._early_stop = True
            return
        self.was_refused = by_peer and code == h2.REFUSED_STREAM and self._response is None
        who = "the peer" if by_peer else "us, the peer broke a rule"
        self._cut(code, f"stream reset by {who}: {h2.error_name(code)}")

    def on_lost(self, reason: str) -> None:
        """The connection ended under us."""
        self._cut(h2.CONNECT_ERROR, reason)

    def resume(self) -> None:
        """There may be room again."""
        if self._sink is not None and not self.is_closed:
            self._sink.resume()

    def _cut(self, code: int, reason: str) -> None:
        if self.is_closed:
            return
        self.finish(reason)
        if self._sink is not None:
            self._sink.reset(code)
