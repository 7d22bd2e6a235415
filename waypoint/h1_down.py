"""FAST PATH: one caller's HTTP/1.1 connection: requests in order, one exchange at a time.

What follows a request that is still being answered waits here (and reading pauses beyond a bound).
A request that cannot be judged is answered and the connection closed; so is one whose response was
complete before its body was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mesh.errors import RemoteProtocolError
from mesh.http import h1
from mesh.http.h1_heads import RequestHead
from waypoint.exchange import Exchange
from waypoint.filters.chain import Pair, Response
from waypoint.idle import Expirable, Kind, Mark
from waypoint.streams import Chunk
from waypoint.timers import Timer
from waypoint.transport import Transport

if TYPE_CHECKING:
    from waypoint.inbound import Inbound

_HEAD, _LENGTH, _CHUNKED, _WAIT, _RAW, _CLOSED, _UNREAD = range(7)
_MAX_WAITING = 64 << 10
_NO_BODY = frozenset({204, 304})
_LAST_CALL_SECONDS = 2.0


class H1Down:
    """A `Codec` of the caller's transport and the `Downstream` of each of its exchanges."""

    __slots__ = ("_buffer", "_chunks", "_close_after", "_exchange", "_has_left", "_head",
                 "_inbound", "_is_chunking", "_left", "_needs_more", "_response_done", "_started",
                 "_state", "_timer", "_transport")  # fmt: skip

    def __init__(self, inbound: Inbound, transport: Transport) -> None:
        self._inbound = inbound
        self._transport = transport
        self._state = _HEAD
        self._buffer = b""
        self._head: RequestHead | None = None
        self._chunks: h1.ChunkReader | None = None
        self._left = 0
        self._exchange: Exchange | None = None
        self._is_chunking = self._close_after = self._has_left = False
        self._started = self._response_done = False
        self._timer: Timer | None = None
        inbound.connections.add(self)

    # ---- Codec

    def on_data(self, data: memoryview) -> None:
        """From the caller."""
        state = self._state
        if state == _HEAD:
            self._parse(self._buffer + bytes(data) if self._buffer else bytes(data))
        elif state in {_WAIT, _UNREAD}:
            self._buffer += bytes(data)
            if len(self._buffer) > _MAX_WAITING:
                self._transport.pause()
        elif state != _CLOSED:
            try:
                self._body(data)
            except RemoteProtocolError as exc:
                self._bad_body(exc)

    def _parse(self, data: bytes) -> None:
        self._buffer = b""
        try:
            parsed = h1.parse_request(data)
        except RemoteProtocolError as exc:
            self._refuse(exc)
            return
        if parsed is None:
            self._buffer = data
            if self._timer is None and data:
                seconds = self._inbound.proxy.config.head_timeout_seconds
                self._timer = self._inbound.proxy.timers.after(seconds, self._too_slow)
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        head, end = parsed
        self._head = head
        self._close_after = not head.keeps_alive or self._inbound.proxy.is_draining
        self._started = self._response_done = self._is_chunking = False
        ends = head.length == 0
        rest = data[end:]
        if ends:
            self._state = _WAIT
        elif head.length is None:
            self._state = _CHUNKED
            self._chunks = h1.ChunkReader()
        else:
            self._state = _LENGTH
            self._left = head.length
        if ends:
            self._buffer = rest
        exchange = self._exchange = Exchange(self._inbound, self)
        exchange.start_h1(head, ends=ends)
        if not ends and rest and self._state in {_LENGTH, _CHUNKED}:
            self.on_data(memoryview(rest))

    def _body(self, data: memoryview) -> None:
        exchange = self._exchange
        assert exchange is not None  # noqa: S101 - only these states have a body
        if self._state == _RAW:
            exchange.on_request_data(data)
            return
        trailers: Sequence[Pair] = ()
        if self._state == _LENGTH:
            used = min(len(data), self._left)
            self._left -= used
            exchange.on_request_data(data[:used])
            done = not self._left
        else:
            reader = self._chunks
            assert reader is not None  # noqa: S101 - set with the state
            views, used = reader.feed(data)
            if views:
                # Very many small chunks are one piece: else each would be a frame of its own.
                whole = views[0] if len(views) == 1 else memoryview(b"".join(views))
                exchange.on_request_data(whole)
            done = reader.is_done
            trailers = reader.trailers
        if done and self._state in {_LENGTH, _CHUNKED}:
            self._state = _WAIT
            self._buffer = bytes(data[used:])
            exchange.on_request_end(trailers)

    def on_end(self) -> None:
        """The caller sends no more; it may still wait for a response."""
        if self._state == _WAIT:
            self._close_after = self._has_left = True
        elif self._state == _UNREAD:
            self._end(abort=False)
        elif self._state == _RAW and self._exchange is not None:
            self._exchange.on_request_end(())
            if self._exchange is not None and self._exchange.is_response_done:
                self._end(abort=False)
        else:
            self._lost("the caller closed the connection")

    def on_lost(self, reason: str) -> None:
        """The caller has gone."""
        self._lost(reason)

    def on_writable(self) -> None:
        """The caller takes bytes again."""
        if self._exchange is not None:
            self._exchange.on_down_room()
        elif self._state == _UNREAD:
            self._await_next()

    # ---- Downstream

    @property
    def is_blocked(self) -> bool:
        """Whether the caller does not take what was sent."""
        return self._transport.is_blocked

    def send_interim(self, status: int, pairs: Sequence[Pair]) -> None:
        """A 1xx response; HTTP/1.0 knows none."""
        if self._head is not None and not self._head.is_http10:
            self._transport.write(h1.encode_response(status, pairs))

    def send_head(self, response: Response, *, ends: bool, switches: bytes = b"") -> None:
        """The response's head, framed for this caller."""
        head = self._head
        assert head is not None  # noqa: S101 - there is no response without a request
        self._started = True
        headers, status = response.headers, response.status
        if switches:
            self._state = _RAW
            extra = b"connection: upgrade\r\nupgrade: " + switches + b"\r\n"
            self._transport.write(h1.response_head(101, headers.encode(), extra))
            early, self._buffer = self._buffer, b""
            self._transport.unpause()
            if early and self._exchange is not None:
                self._exchange.on_request_data(memoryview(early))
            return
        extra = b""
        ends = ends or head.method == b"HEAD" or status in _NO_BODY
        if not headers.has(b"content-length"):
            if not ends:
                if head.is_http10:
                    self._close_after = True
                else:
                    self._is_chunking = True
                    extra = b"transfer-encoding: chunked\r\n"
            elif status not in _NO_BODY and head.method != b"HEAD":
                extra = b"content-length: 0\r\n"
        if self._state in {_LENGTH, _CHUNKED} and (ends or status >= 400):
            self._close_after = True
        if self._close_after:
            extra += b"connection: close\r\n"
        elif head.is_http10:
            extra += b"connection: keep-alive\r\n"
        self._transport.write(h1.response_head(status, headers.encode(), extra))

    def send_data(self, data: Chunk) -> None:
        """Body; raw after a switch."""
        if data:
            self._transport.write(h1.encode_chunk(data) if self._is_chunking else data)

    def send_end(self, trailers: Sequence[Pair] = ()) -> None:
        """The response is complete: the next request's turn, if there may be one."""
        if self._state == _RAW:
            self._transport.shut()
            if self._exchange is None or self._exchange.is_request_done:
                self._end(abort=False)
            return
        if self._is_chunking:
            self._transport.write(h1.encode_last_chunk(trailers))
        self._exchange = None
        if self._close_after or self._state != _WAIT:
            self._end(abort=False)
            return
        self._head = None
        if self._transport.is_blocked:
            self._state = _UNREAD  # whoever does not read answers gets no more of them
        else:
            self._await_next()

    def _await_next(self) -> None:
        self._state = _HEAD
        self._transport.unpause()
        if self._buffer:
            # Not from within the response's callbacks: pipelined requests would pile up the stack.
            self._inbound.proxy.later(self._next)

    def _next(self) -> None:
        if self._state == _HEAD and self._buffer:
            self._parse(self._buffer)

    def cut(self) -> None:
        """The response will not be complete."""
        self._exchange = None
        self._end(abort=True)

    def pause(self) -> None:
        """Read no more."""
        if self._state in {_LENGTH, _CHUNKED, _RAW}:
            self._transport.pause()

    def unpause(self) -> None:
        """Read again."""
        self._transport.unpause()

    # ---- ends

    def drain(self) -> None:
        """The next answer says `connection: close`. What was told that it may send another request
        (it is idle, or its answer has begun) is given a moment to: a request that is on its way
        already would be lost.
        """
        if self._exchange is not None and not self._started:
            self._close_after = True
        proxy = self._inbound.proxy
        proxy.timers.after(min(_LAST_CALL_SECONDS, proxy.config.drain_seconds / 4), self._end_idle)

    def _end_idle(self) -> None:
        self._close_after = True
        if self._state in {_HEAD, _UNREAD} and not self._buffer:
            self._end(abort=False)

    def _refuse(self, error: RemoteProtocolError, *, is_recorded: bool = False) -> None:
        if not is_recorded:
            self._inbound.refused(error)
        text = b"connection: close\r\ncontent-length: 0\r\n"
        self._transport.write(h1.encode_response(error.http_status, (), text))
        self._end(abort=False)

    def _bad_body(self, error: RemoteProtocolError) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            if not self._started:
                exchange.status = error.http_status
            exchange.on_down_lost(str(error), flag="DPE")
        if self._started:
            self._end(abort=True)
        else:
            self._refuse(error, is_recorded=exchange is not None)

    def marks(self) -> Iterable[tuple[Expirable, Mark]]:
        """What the caller keeps us waiting for."""
        exchange = self._exchange
        if self._transport.is_blocked:
            sent = exchange.bytes_out if exchange is not None else 0
            yield self, Mark("unread", sent - self._transport.backlog)
        elif exchange is None:
            if self._state == _HEAD and not self._buffer:
                yield self, Mark("idle")
        elif self._state == _RAW:
            if exchange.is_response_done:
                yield self, Mark("left", exchange.bytes_in)
        elif self._has_left:
            yield self, Mark("left", exchange.bytes_out)
        elif self._state in {_LENGTH, _CHUNKED} and not self._started:
            yield self, Mark("body", exchange.bytes_in)

    def expire(self, kind: Kind) -> None:
        """It has waited too long."""
        if kind == "body":
            self._bad_body(RemoteProtocolError("the body came too slowly", http_status=408))
        elif kind in {"unread", "left"}:
            exchange, self._exchange = self._exchange, None
            self._end(abort=True)
            if exchange is not None:
                late = "the caller closed its side, the endpoint says nothing"
                reason = late if kind == "left" else "the caller does not read the response"
                exchange.on_down_lost(reason, flag="DC")
        else:
            self._end(abort=False)

    def _too_slow(self) -> None:
        if self._state == _HEAD:
            self._refuse(RemoteProtocolError("the head came too slowly", http_status=408))

    def _lost(self, reason: str) -> None:
        exchange, self._exchange = self._exchange, None
        self._end(abort=exchange is not None)
        if exchange is not None:
            exchange.on_down_lost(reason, flag="DC")

    def _end(self, *, abort: bool) -> None:
        if self._state != _CLOSED:
            self._state = _CLOSED
            self._buffer = b""
            if self._timer is not None:
                self._timer.cancel()
            if abort:
                self._transport.abort()
            else:
                self._transport.close()
            self._inbound.connections.discard(self)
