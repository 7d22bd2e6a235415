"""FAST PATH: one HTTP/1.1 connection to an endpoint, used for one request at a time.

Heads are made from what was judged, bodies framed anew. After a complete exchange the connection
goes back to its endpoint's idle list through `on_idle`; everything unexpected ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mesh.errors import RemoteProtocolError
from mesh.http import h1
from waypoint.filters.chain import Headers, Pair, Request, Response
from waypoint.streams import Answered, Chunk
from waypoint.transport import Transport

_IDLE, _HEAD, _LENGTH, _CHUNKED, _UNTIL_END, _RAW, _CLOSED = range(7)
MAX_INTERIM = 32
_NEEDS_LENGTH = frozenset({b"POST", b"PUT", b"PATCH"})


class H1Up:
    """`take` it for an exchange, then it is the exchange's `Upstream`."""

    __slots__ = ("_asked", "_buffer", "_chunks", "_has_ended", "_interim", "_is_chunking",
                 "_is_sending", "_keeps", "_left", "_method", "_on_gone", "_on_idle", "_owner",
                 "_state", "_transport", "idle_since", "was_used")  # fmt: skip

    def __init__(
        self,
        transport: Transport,
        on_idle: Callable[[H1Up], None],
        on_gone: Callable[[H1Up], None],
    ) -> None:
        self._transport = transport
        self._on_idle = on_idle
        self._on_gone = on_gone
        self._owner: Answered | None = None
        self._state = _IDLE
        self._buffer = b""
        self._method = b""
        self._left = 0
        self._chunks: h1.ChunkReader | None = None
        self._is_chunking = self._is_sending = self._has_ended = False
        self._keeps = False
        self._asked = b""
        self._interim = 0
        self.was_used = False
        self.idle_since = 0.0

    @property
    def is_closed(self) -> bool:
        """Whether it can be used no more."""
        return self._state == _CLOSED

    def take(self, owner: Answered) -> None:
        """For one exchange."""
        self._owner = owner

    # ---- Upstream

    @property
    def is_blocked(self) -> bool:
        """Whether the endpoint does not take what was sent."""
        return self._transport.is_blocked

    def send_head(self, request: Request, *, ends: bool, upgrade: bytes = b"") -> None:
        """The request's head."""
        self._state = _HEAD
        self._method = request.method
        self._is_sending = not ends
        self._is_chunking = False
        target = request.path + b"?" + request.query if request.query else request.path
        extra = b""
        headers = request.headers
        if not headers.has(b"content-length"):
            if not ends:
                self._is_chunking = True
                extra = b"transfer-encoding: chunked\r\n"
            elif request.method in _NEEDS_LENGTH:
                extra = b"content-length: 0\r\n"
        self._asked = upgrade
        self._interim = 0
        if upgrade:
            extra += b"connection: upgrade\r\nupgrade: " + upgrade + b"\r\n"
        self._transport.write(
            h1.request_head(request.method, target, request.authority, headers.encode(), extra)
        )

    def send_data(self, data: Chunk) -> None:
        """Body; raw after a switch."""
        if data:
            self._transport.write(h1.encode_chunk(data) if self._is_chunking else data)

    def send_end(self, trailers: Sequence[Pair] = ()) -> None:
        """The request is complete."""
        if self._state == _RAW:
            self._is_sending = False
            self._transport.shut()
            if self._has_ended:
                self._end(abort=False)
            return
        if self._is_chunking:
            self._transport.write(h1.encode_last_chunk(trailers))
        self._is_sending = False

    def cancel(self) -> None:
        """HTTP/1.1 has one way to say so."""
        self._owner = None
        self._end(abort=True)

    def pause(self) -> None:
        """Read no more."""
        self._transport.pause()

    def unpause(self) -> None:
        """Read again."""
        self._transport.unpause()

    def close(self) -> None:
        """An idle connection is not wanted any more."""
        self._end(abort=False)

    # ---- Codec

    def on_data(self, data: memoryview) -> None:
        """From the endpoint."""
        try:
            self._receive(data)
        except RemoteProtocolError as exc:
            self._fail(str(exc))

    def _receive(self, data: memoryview) -> None:
        while len(data) or self._buffer:
            state, owner = self._state, self._owner
            if state == _CLOSED:
                return
            if owner is None:
                # Nobody asked: a 408 before closing, at best.
                self._end(abort=False)
                return
            if state == _HEAD:
                rest = self._head(data, owner)
                if rest is None:
                    return
                data = rest
            elif state == _LENGTH:
                if len(data) > self._left:
                    raise RemoteProtocolError("more body than was announced")
                self._left -= len(data)
                owner.on_response_data(data)
                if not self._left and self._state == _LENGTH:
                    self._complete(owner, ())
                return
            elif state == _CHUNKED:
                self._chunked(data, owner)
                return
            else:
                owner.on_response_data(data)
                return

    def _chunked(self, data: memoryview, owner: Answered) -> None:
        reader = self._chunks
        assert reader is not None  # noqa: S101 - set with the state
        views, used = reader.feed(data)
        if views:
            whole = views[0] if len(views) == 1 else memoryview(b"".join(views))
            owner.on_response_data(whole)
            if self._state != _CHUNKED:
                return
        if reader.is_done:
            if used < len(data):
                self._keeps = False
            self._complete(owner, reader.trailers)

    def _head(self, data: memoryview, owner: Answered) -> memoryview | None:
        """Read a head; what follows it, or None when there is nothing to do now."""
        block = self._buffer + bytes(data) if self._buffer else bytes(data)
        parsed = h1.parse_response(block, method=self._method)
        if parsed is None:
            self._buffer = block
            return None
        self._buffer = b""
        head, end = parsed
        rest = memoryview(block)[end:]
        if head.status < 200 and head.status != 101:
            self._interim += 1
            if self._interim > MAX_INTERIM:
                raise RemoteProtocolError("too many interim responses", http_status=502)
            owner.on_interim(head.status, head.pairs)
            return rest if self._state == _HEAD else None
        response = Response(status=head.status, headers=Headers(head.pairs, head.lines))
        self._keeps = head.keeps_alive
        if head.status == 101:
            self._check_switch(head.upgrade)
            self._state = _RAW
            self._is_sending = True
            self._is_chunking = False
            owner.on_response(response, ends=False, switches=head.upgrade)
            return rest if len(rest) else None
        length = head.length
        if length == 0:
            if len(rest):
                self._keeps = False
            self._state = _IDLE
            owner.on_response(response, ends=True)
            if self._owner is owner:
                self._complete(owner, ())
            return None
        if length is None:
            self._state = _CHUNKED
            self._chunks = h1.ChunkReader()
        elif length < 0:
            self._state = _UNTIL_END
        else:
            self._state = _LENGTH
            self._left = length
        owner.on_response(response, ends=False)
        return rest if len(rest) and self._owner is owner else None

    def _check_switch(self, protocol: bytes) -> None:
        """Raises RemoteProtocolError unless it was asked for, by a request that is complete: what
        comes after this is read by nobody.
        """
        asked = {part.strip(b" \t").lower() for part in self._asked.split(b",")} - {b""}
        if protocol.lower() not in asked or self._is_sending:
            raise RemoteProtocolError("an upgrade that was not asked for", http_status=502)

    def _complete(self, owner: Answered, trailers: Sequence[Pair]) -> None:
        self._owner = None
        self._state = _IDLE
        self._chunks = None
        self.was_used = True
        reusable = self._keeps and not self._is_sending and not self._transport.is_blocked
        # Before the owner hears: what it does next may be to ask for a connection.
        if reusable and not self._transport.is_closed:
            self._transport.unpause()
            self._on_idle(self)
        else:
            self._end(abort=self._is_sending)
        owner.on_response_end(trailers)

    def on_end(self) -> None:
        """The endpoint closed."""
        owner = self._owner
        if owner is not None and self._state == _UNTIL_END:
            self._complete(owner, ())
        elif owner is not None and self._state == _RAW:
            self._has_ended = True
            owner.on_response_end(())
            if not self._is_sending:
                self._end(abort=False)
        else:
            self._fail("the endpoint closed the connection")

    def on_lost(self, reason: str) -> None:
        """The endpoint reset."""
        self._fail(reason)

    def on_writable(self) -> None:
        """The endpoint takes bytes again."""
        if self._owner is not None:
            self._owner.on_up_room()

    def _fail(self, reason: str) -> None:
        owner, self._owner = self._owner, None
        self._end(abort=True)
        if owner is not None:
            owner.on_up_lost(reason, is_refused=False)

    def _end(self, *, abort: bool) -> None:
        if self._state != _CLOSED:
            self._state = _CLOSED
            self._buffer = b""
            if abort:
                self._transport.abort()
            else:
                self._transport.close()
            self._on_gone(self)
