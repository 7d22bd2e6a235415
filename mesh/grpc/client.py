"""A gRPC client on one HTTP/2 connection: unary calls and two-way streams.

A Channel never reconnects: when its connection is lost or drained (`is_usable`) the caller
opens another, with its own back-off. A status other than OK raises GrpcError; a lost
connection raises Unavailable.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Final, Generic

import trio

from mesh.errors import LocalProtocolError, Unavailable
from mesh.grpc.codec import (
    Code,
    GrpcError,
    MessageDecoder,
    Method,
    Req,
    Res,
    code_from_h2,
    code_from_http,
    encode_message,
    encode_timeout,
    has_status,
    parse_message,
    parse_status,
)
from mesh.grpc.metadata import CONTENT_TYPE, check_metadata
from mesh.http import h2_frames as frames
from mesh.http.client import CONNECT_SECONDS, open_connection
from mesh.http.driver import Connection, Timing
from mesh.http.events import Headers, find_header
from mesh.http.h2 import Limits
from mesh.http.stream import Stream, StreamReset
from mesh.sockets import SocketAddress

MAX_RESPONSE_BYTES: Final = 64 << 20
PING_SECONDS: Final = 30.0
PING_TIMEOUT_SECONDS: Final = 10.0
_USER_AGENT = "ambit"

MetadataProvider = Callable[[], Mapping[str, str]]
_LIMITS = Limits(stream_window=1 << 20, connection_window=4 << 20)


class Channel:
    """Calls over one connection; made by `open_channel`."""

    def __init__(
        self,
        connection: Connection,
        authority: str,
        *,
        scheme: str,
        metadata_provider: MetadataProvider | None = None,
        max_message: int = MAX_RESPONSE_BYTES,
    ) -> None:
        self._connection = connection
        self._authority = authority
        self._scheme = scheme
        self._metadata_provider = metadata_provider
        self._max_message = max_message

    @property
    def is_usable(self) -> bool:
        """Whether new calls can be made; False once the connection is lost or drains."""
        return self._connection.is_usable

    async def wait_closed(self) -> None:
        """Until the connection is over."""
        await self._connection.closed.wait()

    async def unary(
        self, method: Method[Req, Res], request: Req, timeout: float | None = None
    ) -> Res:
        """One request, one response; `timeout` in seconds, also told to the server.

        Raises GrpcError (a status, DEADLINE_EXCEEDED after `timeout`), Unavailable.
        If cancelled: the call is cancelled at the server too.
        """
        async with self.stream(method, timeout) as call:
            await call.send(request)
            await call.done_sending()
            response: Res | None = None
            async for message in call:
                if response is not None:
                    raise GrpcError(Code.INTERNAL, "more than one response")
                response = message
            if response is None:
                raise GrpcError(Code.INTERNAL, "no response")
            return response

    @asynccontextmanager
    async def stream(
        self, method: Method[Req, Res], timeout: float | None = None
    ) -> AsyncIterator[ClientStream[Req, Res]]:
        """A call whose messages flow both ways, cancelled at the server when the block is left
        before its end. `timeout` in seconds is for the whole block.

        Raises GrpcError (DEADLINE_EXCEEDED after `timeout`), Unavailable.
        """
        with _deadline(timeout, method.path):
            stream = await self._connection.open_stream(self._head(method.path, timeout))
            try:
                yield ClientStream(stream, method, self._max_message)
            finally:
                stream.finish()

    def _head(self, path: str, timeout: float | None) -> list[tuple[str, str]]:
        head = [
            (":method", "POST"),
            (":scheme", self._scheme),
            (":path", path),
            (":authority", self._authority),
            ("te", "trailers"),
            ("content-type", CONTENT_TYPE),
            ("user-agent", _USER_AGENT),
        ]
        if timeout is not None and not math.isinf(timeout):
            head.append(("grpc-timeout", encode_timeout(timeout)))
        if self._metadata_provider is not None:
            head += check_metadata(self._metadata_provider())
        return head


class ClientStream(Generic[Req, Res]):
    """One call: `send` messages, iterate over those that come.

    The iteration ends with status OK and raises GrpcError for any other, Unavailable when the
    connection is lost. One task may iterate while others send.
    """

    def __init__(self, stream: Stream, method: Method[Req, Res], max_message: int) -> None:
        self._stream = stream
        self._method = method
        self._decoder = MessageDecoder(max_message)
        self._sending = trio.Lock()
        self._head_checked = False
        self._ended = False

    async def send(self, message: Req) -> None:
        """Send one message. After the server ended the call it is dropped: the iteration tells
        how the call ended. Raises GrpcError, Unavailable. If cancelled: the call cannot go on.
        """
        await self._send(encode_message(message), end_stream=False)

    async def done_sending(self) -> None:
        """Tell the server that no more messages come."""
        if not self._stream.ended_by_us:
            await self._send(b"", end_stream=True)

    async def _send(self, data: bytes, *, end_stream: bool) -> None:
        async with self._sending:
            if self._stream.ended_by_us:
                raise LocalProtocolError("a message after done_sending()")
            try:
                await self._stream.send(data, end_stream=end_stream)
            except StreamReset as exc:
                if not self._stream.ended_by_peer:
                    raise _reset_status(exc) from exc

    def __aiter__(self) -> ClientStream[Req, Res]:
        return self

    async def __anext__(self) -> Res:
        if self._ended:
            raise StopAsyncIteration
        try:
            return await self._next()
        except StreamReset as exc:
            raise _reset_status(exc) from exc

    async def _next(self) -> Res:
        if not self._head_checked:
            _check_head(await self._stream.wait_headers())
            self._head_checked = True
        while True:
            body = self._decoder.next_body()
            if body is not None:
                return parse_message(self._method.response, body)
            data = await self._stream.receive()
            if not data:
                self._ended = True
                self._check_end()
                raise StopAsyncIteration
            self._decoder.receive_data(data)

    def _check_end(self) -> None:
        # With no message at all the status may have come in the only block of headers.
        fields = self._stream.trailers or self._stream.headers
        error = parse_status(fields)
        if error is not None:
            raise error
        self._decoder.receive_eof()


@asynccontextmanager
async def open_channel(
    host: str,
    port: int,
    ssl_context: ssl.SSLContext | None,
    server_hostname: str | None = None,
    metadata_provider: MetadataProvider | None = None,
    *,
    connect_timeout: float = CONNECT_SECONDS,
    ping_seconds: float = PING_SECONDS,
    ping_timeout: float = PING_TIMEOUT_SECONDS,
    max_message: int = MAX_RESPONSE_BYTES,
) -> AsyncIterator[Channel]:
    """A channel to `host:port`, closed when the block is left. Times in seconds, sizes in bytes.

    `metadata_provider` is asked at every call. Raises Unavailable, IdentityError (the server's
    certificate), RemoteProtocolError; what the body raises comes out as it is.
    """
    timing = Timing(ping_seconds=ping_seconds, ping_timeout=ping_timeout)
    name = server_hostname or host
    async with open_connection(
        host,
        port,
        ssl_context,
        name,
        connect_timeout=connect_timeout,
        timing=timing,
        limits=_LIMITS,
    ) as connection:
        yield Channel(
            connection,
            str(SocketAddress(name, port)),
            scheme="https" if ssl_context is not None else "http",
            metadata_provider=metadata_provider,
            max_message=max_message,
        )


@contextmanager
def _deadline(timeout: float | None, path: str) -> Iterator[None]:
    with trio.move_on_after(math.inf if timeout is None else timeout) as scope:
        yield
    if scope.cancelled_caught:
        raise GrpcError(Code.DEADLINE_EXCEEDED, f"no answer to {path} within {timeout:g} s")


def _check_head(headers: Headers) -> None:
    status = find_header(headers, ":status")
    if status != "200":
        if has_status(headers):
            error = parse_status(headers)
            if error is not None:
                raise error
        code = int(status) if status.isdigit() else 0
        raise GrpcError(code_from_http(code), f"HTTP status {status[:3]}")
    content_type = find_header(headers, "content-type")
    if not content_type.startswith(CONTENT_TYPE):
        raise GrpcError(Code.UNKNOWN, f"not a gRPC response: {content_type[:60]!r}")
    encoding = find_header(headers, "grpc-encoding")
    if encoding not in {"", "identity"}:
        raise GrpcError(Code.INTERNAL, f"unrequested grpc-encoding {encoding[:20]!r}")


def _reset_status(exc: StreamReset) -> GrpcError | Unavailable:
    if exc.h2_code == frames.REFUSED_STREAM:
        return Unavailable(str(exc))
    return GrpcError(code_from_h2(exc.h2_code), str(exc))
