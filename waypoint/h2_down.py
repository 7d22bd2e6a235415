"""FAST PATH: a caller's HTTP/2 connection: each stream is a request with an exchange of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from mesh.errors import RemoteProtocolError
from mesh.http import h2_frames
from mesh.http.h1 import MAX_FIELDS, is_host
from mesh.http.h2_core import Stream
from mesh.http.hpack_table import encode_block
from mesh.http.trailers import safe_trailers
from waypoint import extended_connect
from waypoint.exchange import Exchange
from waypoint.filters.chain import Headers, Pair, Response
from waypoint.h2 import H2Channel, H2Stream
from waypoint.heads import RandomBytes
from waypoint.idle import Expirable, Kind, Mark
from waypoint.transport import Transport

if TYPE_CHECKING:
    from waypoint.inbound import Inbound

# What goes into a request line must not end it, whoever reads it.
_METHOD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}")
_PATH = re.compile(rb"/[!\"$-~]*+|\*")
_SCHEMES = frozenset({b"http", b"https"})
_METHODS = frozenset({b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"PATCH", b"OPTIONS"})
_METHOD_FIELD: Final = 1
_SCHEME_FIELD: Final = 2
_PATH_FIELD: Final = 3
_AUTHORITY: Final = 4
_PROTOCOL_FIELD: Final = 5
_HOST: Final = 6
_COOKIE: Final = 7
_LENGTH: Final = 8
_IN_DISGUISE: Final = 9
_READ_HERE: Final = {
    b":method": _METHOD_FIELD,
    b":scheme": _SCHEME_FIELD,
    b":path": _PATH_FIELD,
    b":authority": _AUTHORITY,
    b":protocol": _PROTOCOL_FIELD,
    b"host": _HOST,
    b"cookie": _COOKIE,
    b"content-length": _LENGTH,
    b"content_length": _IN_DISGUISE,
    b"transfer_encoding": _IN_DISGUISE,
}
_COLON: Final = 0x3A
_PSEUDO = "pseudo-headers are missing or unknown"
_START = "a malformed method or path"
_DISGUISED = "a framing field in disguise"
_TOO_MANY = "too many fields"
_CONNECT = "CONNECT is not served here"
_PROTOCOL = "a :protocol that is not served"
_SCHEME = "a scheme that is not served"
_NOT_SERVED = {_DISGUISED: 400, _TOO_MANY: 431, _CONNECT: 405, _PROTOCOL: 501, _SCHEME: 400}
"""What RFC 9113 allows, and we do not."""


class H2Down(H2Channel):
    """The connection."""

    def __init__(self, inbound: Inbound, transport: Transport) -> None:
        proxy = inbound.proxy
        super().__init__(proxy.reactor, transport, client=False, budget=proxy.windows)
        self._inbound = inbound
        inbound.connections.add(self)
        self.touch()

    def on_headers(self, stream: Stream, pairs: Sequence[Pair]) -> None:
        """A request, or its trailers."""
        owner: _DownStream | None = stream.owner
        if owner is not None:
            owner.trailers = safe_trailers(pairs)
            return
        owner = stream.owner = _DownStream(self, stream)
        problem = owner.read(pairs, self._inbound.rng)
        if problem:
            status = _NOT_SERVED.get(problem, 400)
            self._inbound.refused(RemoteProtocolError(problem, http_status=status))
            # Malformed is an error of the stream; the answer before it is for the caller's log.
            is_lawful = problem in _NOT_SERVED
            head = encode_block([(b":status", b"%d" % status)])
            self.core.send_headers(stream, head, end_stream=is_lawful)
            owner.reset(h2_frames.NO_ERROR if is_lawful else h2_frames.PROTOCOL_ERROR)
            self.core.cheap_arrived("malformed requests")
            return
        owner.exchange = Exchange(self._inbound, owner)
        # Whether it has a body shows when END_STREAM comes, which is in this very call or not.
        self._inbound.proxy.later(owner.begin)
        self.touch()

    def on_stream_end(self, stream: Stream) -> None:
        """The request is complete."""
        owner: _DownStream | None = stream.owner
        if owner is not None:
            owner.on_end()

    def drain(self) -> None:
        """Take no new streams."""
        if not self.is_closed:
            self.core.goaway()
            self.touch()

    def marks(self) -> Iterable[tuple[Expirable, Mark]]:
        """What the caller keeps us waiting for."""
        if self.core.is_amid_head:
            yield self, Mark("head")
        elif not self.core.streams:
            yield self, Mark("idle")
        for stream in self.core.streams.values():
            owner: _DownStream | None = stream.owner
            if owner is not None and (mark := owner.mark()) is not None:
                yield owner, mark

    def expire(self, kind: Kind) -> None:
        """It has waited too long."""
        self.core.goaway(h2_frames.NO_ERROR if kind == "idle" else h2_frames.ENHANCE_YOUR_CALM)
        self.flush()
        self.end("idle" if kind == "idle" else "a head came too slowly", abort=False)

    def after_flush(self) -> None:
        """After our GOAWAY the last stream ends the connection."""
        if self.core.goaway_sent and not self.core.streams:
            self.end("drained", abort=False)

    def on_gone(self) -> None:
        """The connection has ended."""
        self._inbound.connections.discard(self)


class _DownStream(H2Stream):
    """One request: the `Downstream` of its exchange."""

    __slots__ = ("_early", "_has_begun", "_has_ended", "_head", "_holds", "_key", "exchange",
                 "trailers")  # fmt: skip

    def __init__(self, channel: H2Channel, stream: Stream) -> None:
        super().__init__(channel)
        self.stream = stream
        self.exchange: Exchange | None = None
        self.trailers: Sequence[Pair] = ()
        self._early = bytearray()
        self._has_begun = self._has_ended = False
        self._holds = True
        self._key = b""  # of a WebSocket (RFC 8441)
        self._head: tuple[bytes, bytes, bytes, bytes, list[Pair]] | None = None

    def read(self, pairs: Sequence[Pair], rng: RandomBytes) -> str:
        """Judge the head (RFC 9113 section 8.3); what is wrong with it, or empty text."""
        method = scheme = path = b""
        named: bytes | None = None
        protocol: bytes | None = None
        rest: list[Pair] = []
        hosts: list[bytes] = []
        cookies: list[bytes] = []
        is_disguised = has_length = False
        for pair in pairs:
            what = _READ_HERE.get(pair[0], 0)
            if what == 0:
                if pair[0][0] == _COLON:
                    return _PSEUDO
                rest.append(pair)
            elif what == _METHOD_FIELD:
                method = pair[1]
            elif what == _SCHEME_FIELD:
                scheme = pair[1]
            elif what == _PATH_FIELD:
                path = pair[1]
            elif what == _AUTHORITY:
                named = pair[1]
            elif what == _PROTOCOL_FIELD:
                protocol = pair[1]
            elif what == _HOST:
                hosts.append(pair[1])
            else:
                if what == _COOKIE:
                    cookies.append(pair[1])
                elif what == _LENGTH:
                    has_length = True
                else:
                    is_disguised = True
                rest.append(pair)
        authority = named
        if authority is None:
            authority = hosts[0] if len(hosts) == 1 else b""
        if method == b"CONNECT":
            if protocol != extended_connect.WEBSOCKET:
                return _CONNECT if protocol is None else _PROTOCOL
            protocol = None
            method = b"GET"
            name, self._key = extended_connect.new_key(rng)
            rest = [pair for pair in rest if pair[0] != name]
            rest.append((name, self._key))
        if not method or not scheme or not path or protocol is not None:
            return _PSEUDO
        if scheme not in _SCHEMES:
            return _SCHEME
        if method not in _METHODS and not _METHOD.fullmatch(method):
            return _START
        if not _PATH.fullmatch(path):
            return _START
        if path == b"*" and method != b"OPTIONS":
            return "a path that only OPTIONS has"
        if not authority or not is_host(authority) or hosts.count(authority) != len(hosts):
            return "a malformed authority, or two"
        if has_length and (not self.declare(rest) or self._key):
            return "a malformed content-length"
        if is_disguised:
            return _DISGUISED
        if len(cookies) > 1:
            rest = [pair for pair in rest if pair[0] != b"cookie"]
            rest.append((b"cookie", b"; ".join(cookies)))
        if len(rest) > MAX_FIELDS:
            return _TOO_MANY
        self._head = (method, scheme, authority, path, rest)
        return ""

    def begin(self) -> None:
        """The exchange starts, once it is known whether a body follows."""
        exchange, head = self.exchange, self._head
        if self._has_begun or exchange is None or head is None:
            return
        self._has_begun = True
        self._head = None
        method, scheme, authority, target, pairs = head
        path, found, query = target.partition(b"?")
        early, self._early = self._early, bytearray()
        ends = self._has_ended and not early
        headers = Headers(pairs)
        if self._key:
            # What comes before the switch waits, and the caller gets no credit for more.
            self._early = early
            self.pause()
            exchange.upgrade, ends = extended_connect.WEBSOCKET, True
        else:
            self._holds = False
        exchange.start(method, scheme, authority, path, query if found else None, headers,
                       ends=ends)  # fmt: skip
        if self._holds:
            return
        if early and self.exchange is exchange:
            exchange.on_request_data(memoryview(early))
        if self._has_ended and not ends:
            exchange.on_request_end(self.trailers)

    def mark(self) -> Mark | None:
        """What the caller keeps us waiting for on this stream."""
        exchange, stream = self.exchange, self.stream
        if exchange is None or stream is None:
            return None
        if self.is_blocked:
            return Mark("unread", stream.send_window + exchange.bytes_out)
        if self._key:
            return Mark("left", self.received) if exchange.is_response_done else None
        if not self._has_ended and not stream.answered and not exchange.request.is_grpc:
            return Mark("body", self.received)
        return None

    def expire(self, kind: Kind) -> None:
        """It has waited too long."""
        late = "the body came too slowly"
        self.reset(h2_frames.CANCEL)
        self.on_cut(late if kind == "body" else "the caller does not read", is_refused=False)

    def on_body(self, data: memoryview) -> None:
        """Payload."""
        if self._holds:
            self._early += data
        elif self.exchange is not None:
            self.exchange.on_request_data(data)

    def on_end(self) -> None:
        """END_STREAM."""
        self._has_ended = True
        if self.is_short():
            self.broken("less body than content-length says")
        elif not self._holds and self.exchange is not None:
            self.exchange.on_request_end(self.trailers)

    def on_cut(self, reason: str, *, is_refused: bool) -> None:
        """The caller cut it."""
        self.stream = None
        exchange, self.exchange = self.exchange, None
        if exchange is not None and self._has_begun:
            exchange.on_down_lost(reason, flag="DC")

    def on_room(self) -> None:
        """The caller takes bytes again."""
        if self.exchange is not None:
            self.exchange.on_down_room()

    # ---- Downstream

    def send_interim(self, status: int, pairs: Sequence[Pair]) -> None:
        """A 1xx response."""
        if self.stream is not None:
            block = encode_block([(b":status", b"%d" % status), *pairs])
            self.channel.core.send_headers(self.stream, block)
            self.channel.touch()

    def send_head(self, response: Response, *, ends: bool, switches: bytes = b"") -> None:
        """The response's head."""
        if self.stream is None:
            return
        status = response.status
        if self._key:
            if switches:
                self._open_tunnel(response)
                return
            status = extended_connect.refused(response)
        head = [(b":status", b"%d" % status), *response.headers.pairs]
        stream = self.stream
        self.channel.core.send_headers(stream, encode_block(head), end_stream=ends)
        self.channel.touch()

    def send_end(self, trailers: Sequence[Pair] = ()) -> None:
        """The response is complete."""
        super().send_end(trailers)
        stream = self.stream
        if self._key and not self._holds:
            return  # either half of a tunnel ends by itself
        if stream is not None and stream.local_ended and not stream.remote_ended:
            self.reset(h2_frames.NO_ERROR)  # the rest of the request is not wanted

    def _open_tunnel(self, response: Response) -> None:
        """The endpoint switched: a 200, then what waited."""
        stream, exchange = self.stream, self.exchange
        if stream is None or exchange is None:
            return
        head = extended_connect.opened(response, self._key)
        if head is None:
            block = encode_block([(b":status", b"502")])
            self.channel.core.send_headers(stream, block, end_stream=True)
            self.exchange = None
            self.reset(h2_frames.NO_ERROR)
            exchange.on_down_lost("the endpoint's sec-websocket-accept is another", flag="UC")
            return
        self.channel.core.send_headers(stream, encode_block(head))
        self.channel.touch()
        self._holds = False
        early, self._early = self._early, bytearray()
        if early:
            exchange.on_request_data(memoryview(early))
        if self._has_ended:
            exchange.on_request_end(())
        else:
            self.unpause()

    def unpause(self) -> None:
        """The body again; not before a tunnel is open."""
        if not (self._holds and self._key):
            super().unpause()

    def cut(self) -> None:
        """It never will be."""
        self.exchange = None
        self.reset(h2_frames.CANCEL if self._key else h2_frames.INTERNAL_ERROR)
