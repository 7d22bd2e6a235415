"""A gRPC server on `mesh.http.server`: a table of methods, unary and two-way.

A handler is a plain async function; it is cancelled when the client cancels, when the
deadline passes or when the grace of a drain is over. A GrpcError that it raises is the
answer; other MeshErrors are answered by their kind; a bug goes to `supervise` and is
answered INTERNAL without a word of what it was. Sending waits for the client to read, so
that a stuck client holds one message per stream and no more.
"""

from __future__ import annotations

import math
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import trio
from google.protobuf.message import Message

from mesh.errors import ConfigError, Denied, IdentityError, MeshError, Unavailable
from mesh.grpc.codec import (
    MAX_MESSAGE_BYTES,
    Code,
    GrpcError,
    MessageDecoder,
    Method,
    Serialized,
    encode_message,
    encode_status,
    parse_message,
    parse_timeout,
)
from mesh.grpc.metadata import CONTENT_TYPE, read_metadata
from mesh.http import h2_frames as frames
from mesh.http.events import find_header
from mesh.http.server import FailureSink, ServerSettings, Supervisor, propagate, serve_http2
from mesh.http.stream import Stream, StreamReset
from mesh.sockets import SocketAddress

_LAST_WORDS_SECONDS: Final = 1.0
_CONTENT_TYPES: Final = (f"{CONTENT_TYPE}+", f"{CONTENT_TYPE};")

AnyMethod = Method[Any, Any]
Handler = Callable[..., Awaitable[Any]]
"""unary: `(request, call) -> response`; stream: `(requests, send, call) -> None`, where
`requests` is an async iterator and `send` an async function of one message."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler may know about its call. `deadline` is on trio's clock, in seconds."""

    method: AnyMethod
    metadata: dict[str, str]
    peer: SocketAddress
    peer_certificate: bytes | None
    deadline: float
    draining: trio.Event
    """Set when the connection is about to end: a long stream should return."""


async def serve_grpc(
    listener: socket.socket | trio.SocketListener,
    ssl_context: ssl.SSLContext | None,
    methods: Mapping[AnyMethod, Handler],
    *,
    settings: ServerSettings | None = None,
    drain: trio.Event | None = None,
    grace_seconds: float = 5.0,
    supervise: Supervisor = propagate,
    on_failure: FailureSink | None = None,
    max_message: int = MAX_MESSAGE_BYTES,
    task_status: trio.TaskStatus[SocketAddress] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `methods` until `drain` is set; calls that are not over `grace_seconds` later are
    answered UNAVAILABLE. Owns the listener. Started with the address that it listens on.

    Give lifecycle's `supervise`: without it a bug in a handler ends the server.
    If cancelled: everything is closed, handlers are cancelled.
    """
    service = _Service(methods, supervise, max_message)
    settings = settings if settings is not None else ServerSettings()
    # The last words of calls that outlived the grace are sent within the HTTP server's.
    settings = replace(settings, grace_seconds=grace_seconds + _LAST_WORDS_SECONDS)
    async with trio.open_nursery() as nursery:
        if drain is not None:
            nursery.start_soon(service.expire_after, drain, grace_seconds)
        await serve_http2(
            listener,
            ssl_context,
            service.serve,
            settings=settings,
            drain=drain,
            supervise=supervise,
            on_failure=on_failure,
            task_status=task_status,
        )
        nursery.cancel_scope.cancel()


class _Service:
    def __init__(
        self, methods: Mapping[AnyMethod, Handler], supervise: Supervisor, max_message: int
    ) -> None:
        self._methods = {method.path: (method, handler) for method, handler in methods.items()}
        self._supervise = supervise
        self._max_message = max_message
        self._running: set[trio.CancelScope] = set()

    async def expire_after(self, drain: trio.Event, grace_seconds: float) -> None:
        await drain.wait()
        await trio.sleep(grace_seconds)
        for scope in list(self._running):
            scope.cancel()

    async def serve(self, stream: Stream) -> None:
        problem = _http_problem(stream)
        if problem:
            await stream.send_headers([(":status", problem)], end_stream=True)
            return
        exchange = _Exchange(stream, self._max_message)
        try:
            method, handler, deadline = self._match(stream)
            await self._call(exchange, method, handler, deadline)
            await exchange.finish(Code.OK, "")
        except StreamReset:
            raise
        except MeshError as exc:
            await exchange.finish(*_status_of(exc))

    def _match(self, stream: Stream) -> tuple[AnyMethod, Handler, float]:
        encoding = find_header(stream.headers, "grpc-encoding")
        if encoding not in {"", "identity"}:
            raise GrpcError(Code.UNIMPLEMENTED, f"grpc-encoding {encoding[:20]!r}")
        path = find_header(stream.headers, ":path")
        entry = self._methods.get(path)
        if entry is None:
            raise GrpcError(Code.UNIMPLEMENTED, f"unknown method {path[:200]}")
        timeout = find_header(stream.headers, "grpc-timeout")
        seconds = parse_timeout(timeout) if timeout else math.inf
        return *entry, trio.current_time() + seconds

    async def _call(
        self, exchange: _Exchange, method: AnyMethod, handler: Handler, deadline: float
    ) -> None:
        stream = exchange.stream
        call = Call(
            method=method,
            metadata=read_metadata(stream.headers),
            peer=stream.connection.peer,
            peer_certificate=stream.connection.peer_certificate,
            deadline=deadline,
            draining=stream.connection.draining,
        )
        run = exchange.run_unary if method.kind == "unary" else exchange.run_stream
        with trio.CancelScope() as expiry:
            self._running.add(expiry)
            try:
                with trio.move_on_at(deadline) as patience:
                    await self._supervise(method.path, run, handler, call)
            finally:
                self._running.discard(expiry)
        if expiry.cancelled_caught:
            raise GrpcError(Code.UNAVAILABLE, "the server is shutting down")
        if patience.cancelled_caught:
            raise GrpcError(Code.DEADLINE_EXCEEDED, "the deadline passed")
        if not exchange.handled:
            raise GrpcError(Code.INTERNAL, "internal error")


class _Exchange:
    """The wire side of one call. `handled` once the handler returned."""

    def __init__(self, stream: Stream, max_message: int) -> None:
        self.stream = stream
        self.handled = False
        self._decoder = MessageDecoder(max_message)
        self._head_sent = False
        self._inside_message = False
        self._sending = trio.Lock()

    async def run_unary(self, handler: Handler, call: Call) -> None:
        request = await self.next_request(call.method.request)
        if request is None:
            raise GrpcError(Code.INTERNAL, "no request")
        if await self.next_request(call.method.request) is not None:
            raise GrpcError(Code.INTERNAL, "more than one request")
        await self._send(await handler(request, call))
        self.handled = True

    async def run_stream(self, handler: Handler, call: Call) -> None:
        await handler(_Requests(self, call.method.request), self._send, call)
        self.handled = True

    async def next_request(self, cls: type[Message]) -> Message | None:
        """The next message, None after the last. Raises GrpcError when it is not acceptable."""
        while True:
            body = self._decoder.next_body()
            if body is not None:
                return parse_message(cls, body)
            data = await self.stream.receive()
            if not data:
                self._decoder.receive_eof()
                return None
            self._decoder.receive_data(data)

    async def send_head(self) -> None:
        """Send the response's head, once."""
        if not self._head_sent:
            async with self._sending:
                await self._send_head_locked()

    async def _send_head_locked(self) -> None:
        if not self._head_sent:
            await self.stream.send_headers([(":status", "200"), ("content-type", CONTENT_TYPE)])
            self._head_sent = True

    async def _send(self, message: Message | Serialized) -> None:
        parts = _framed(message)
        async with self._sending:
            await self._send_head_locked()
            self._inside_message = True
            for part in parts:
                await self.stream.send(part)
            self._inside_message = False

    async def finish(self, code: Code, message: str) -> None:
        """Send the status, alone when nothing was sent before.

        When sending was cancelled half-way in a message the stream is cut instead: a status
        behind half a message would be read as a broken one.
        """
        if self._inside_message:
            self.stream.reset(frames.CANCEL)
            return
        fields = list(encode_status(code, message))
        if not self._head_sent:
            fields = [(":status", "200"), ("content-type", CONTENT_TYPE), *fields]
        await self.stream.send_headers(fields, end_stream=True)


class _Requests:
    """The requests of a two-way call, for its handler to iterate over."""

    def __init__(self, exchange: _Exchange, cls: type[Message]) -> None:
        self._exchange = exchange
        self._cls = cls

    def __aiter__(self) -> _Requests:
        return self

    async def __anext__(self) -> Message:
        # Some clients wait for the head before they go on; by now the handler has had its
        # chance to refuse the call without one.
        await self._exchange.send_head()
        message = await self._exchange.next_request(self._cls)
        if message is None:
            raise StopAsyncIteration
        return message


def _framed(message: Message | Serialized) -> tuple[bytes, ...]:
    if isinstance(message, Serialized):
        return message.encode()
    return (encode_message(message),)


def _http_problem(stream: Stream) -> str:
    if find_header(stream.headers, ":method") != "POST":
        return "405"
    content_type = find_header(stream.headers, "content-type")
    if content_type != CONTENT_TYPE and not content_type.startswith(_CONTENT_TYPES):
        return "415"
    return ""


def _status_of(exc: MeshError) -> tuple[Code, str]:
    match exc:
        case GrpcError():
            return exc.code, exc.message
        case Denied():
            return Code.PERMISSION_DENIED, str(exc)
        case IdentityError():
            return Code.UNAUTHENTICATED, str(exc)
        case Unavailable():
            return Code.UNAVAILABLE, str(exc)
        case ConfigError():
            return Code.INVALID_ARGUMENT, str(exc)
        case _:
            return Code.INTERNAL, "internal error"
