"""FAST PATH: an HTTP/2 connection to an endpoint, shared by the requests to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mesh.http import h2_frames
from mesh.http.h2_core import Stream
from mesh.http.hpack_table import encode_block
from mesh.http.receive_windows import WindowBudget
from mesh.http.trailers import safe_trailers
from mesh.reactor import Reactor
from waypoint import extended_connect
from waypoint.filters.chain import Headers, Pair, Request, Response
from waypoint.h1_up import MAX_INTERIM
from waypoint.h2 import H2Channel, H2Stream
from waypoint.streams import Answered
from waypoint.transport import Transport

_NOT_IN_HTTP2 = frozenset({b"host", b"expect"})


class H2Up(H2Channel):
    """The connection."""

    def __init__(
        self,
        reactor: Reactor,
        transport: Transport,
        on_gone: Callable[[H2Up], None],
        budget: WindowBudget | None = None,
    ) -> None:
        super().__init__(reactor, transport, client=True, budget=budget)
        self._told = on_gone
        self.awaiting: dict[UpStream, Request] = {}
        self.idle_since = 0.0

    @property
    def can_open(self) -> bool:
        """Whether one more request may be sent."""
        return not self.is_closed and self.core.can_open

    def new_stream(self, owner: Answered) -> UpStream:
        """For one exchange; `can_open` holds."""
        return UpStream(self, owner)

    def on_headers(self, stream: Stream, pairs: Sequence[Pair]) -> None:
        """A response, or its trailers."""
        if stream.owner is not None:
            stream.owner.on_head(pairs)

    def on_stream_end(self, stream: Stream) -> None:
        """The response is complete."""
        if stream.owner is not None:
            stream.owner.on_end()

    def after_flush(self) -> None:
        """After the peer's GOAWAY the last stream ends the connection."""
        if self.core.goaway_received and not self.core.streams and not self.awaiting:
            self.end("the endpoint goes away", abort=False)

    def close_if_idle(self) -> None:
        """Not wanted any more."""
        if not self.core.streams and not self.awaiting:
            self.end("idle", abort=False)

    def on_gone(self) -> None:
        """The connection has ended."""
        self._told(self)
        awaiting, self.awaiting = self.awaiting, {}
        for each in awaiting:
            each.on_cut("the endpoint closed the connection", is_refused=True)

    def on_connection_room(self) -> None:
        """The peer's settings may have come: whether it takes WebSockets shows there."""
        super().on_connection_room()
        if self.awaiting and self.core.settings_received:
            awaiting, self.awaiting = self.awaiting, {}
            for each, request in awaiting.items():
                if self.core.can_open:
                    each.send_head(request, ends=True, upgrade=extended_connect.WEBSOCKET)
                else:
                    each.on_cut("the endpoint takes no requests", is_refused=True)


class UpStream(H2Stream):
    """One try of a request: the `Upstream` of its exchange."""

    __slots__ = (
        "_head",
        "_interim",
        "_is_head",
        "_is_tunnel",
        "_key",
        "_owner",
        "_trailers_in",
        "_up",
    )

    def __init__(self, channel: H2Up, owner: Answered) -> None:
        super().__init__(channel)
        self._up = channel
        self._owner: Answered | None = owner
        self._head: Response | None = None
        self._is_head = self._is_tunnel = False
        self._key = b""  # of a WebSocket (RFC 8441)
        self._interim = 0
        self._trailers_in: Sequence[Pair] = ()

    def send_head(self, request: Request, *, ends: bool, upgrade: bytes = b"") -> None:
        """The request's head. A WebSocket becomes an extended CONNECT if the endpoint takes it;
        any other upgrade is not possible here and is left out.
        """
        if upgrade and ends and upgrade.lower() == extended_connect.WEBSOCKET:
            if not self._up.core.settings_received:
                self._up.awaiting[self] = request
                return
            if self._up.core.peer_takes_connect:
                self._key = request.headers.get(b"sec-websocket-key") or b""
                block = encode_block(extended_connect.request_head(request))
                self.stream = self.channel.core.open(block, self)
                self.channel.touch()
                return
        target = request.path + b"?" + request.query if request.query else request.path
        head = [
            (b":method", request.method), (b":scheme", request.scheme or b"http"),
            (b":authority", request.authority), (b":path", target),
            *(pair for pair in request.headers.pairs if pair[0] not in _NOT_IN_HTTP2),
        ]  # fmt: skip
        self.stream = self.channel.core.open(encode_block(head), self, end_stream=ends)
        self._is_head = request.method == b"HEAD"
        self.channel.touch()

    def cancel(self) -> None:
        """RST_STREAM."""
        self._owner = None
        self._up.awaiting.pop(self, None)
        self.reset(h2_frames.CANCEL)

    def on_head(self, pairs: Sequence[Pair]) -> None:
        """A head, an interim one, or trailers."""
        owner = self._owner
        if owner is None:
            return
        if self._head is not None:
            self._trailers_in = safe_trailers(pairs)
            return
        status = int(next(value for name, value in pairs if name == b":status"))
        fields = [pair for pair in pairs if pair[0][:1] != b":"]
        if status < 200:
            self._interim += 1
            if self._interim > MAX_INTERIM:
                self.broken("too many interim responses")
                return
            fields = [pair for pair in fields if pair[0] != b"content-length"]
            owner.on_interim(status, fields)
            return
        if self._key and status < 300:
            self._is_tunnel = True
            self._head = extended_connect.switched(fields, self._key)
            owner.on_response(self._head, ends=False, switches=extended_connect.WEBSOCKET)
            return
        if not self.declare(fields):
            self.broken("a malformed content-length")
            return
        if status == 204:
            fields = [pair for pair in fields if pair[0] != b"content-length"]
        headers = Headers(fields)
        has_none = self._is_head or status in {204, 304}
        # "Trailers-Only" of gRPC: it has to stay one block.
        if has_none or headers.has(b"grpc-status"):
            self.declared = 0  # a body would be another response to callers of HTTP/1.1
        self._head = Response(status=status, headers=headers)
        owner.on_response(self._head, ends=self.declared == 0)

    def on_body(self, data: memoryview) -> None:
        """Payload."""
        if self._owner is not None:
            self._owner.on_response_data(data)

    def on_end(self) -> None:
        """END_STREAM."""
        if self.is_short():
            self.broken("less body than content-length says")
            return
        owner = self._owner
        if self._is_tunnel:
            if owner is not None:
                owner.on_response_end()
            return  # our half goes on
        self._owner = None
        if owner is not None:
            owner.on_response_end(self._trailers_in)
        if self.stream is not None and not self.stream.local_ended:
            self.reset(h2_frames.NO_ERROR)

    def on_cut(self, reason: str, *, is_refused: bool) -> None:
        """The endpoint cut it."""
        self.stream = None
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.on_up_lost(reason, is_refused=is_refused)

    def on_room(self) -> None:
        """The endpoint takes bytes again."""
        if self._owner is not None:
            self._owner.on_up_room()
