"""The gRPC client before servers that answer what no gRPC server should."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import pytest
import trio

from mesh.errors import LocalProtocolError, MeshError, Unavailable
from mesh.grpc.client import Channel, open_channel
from mesh.grpc.codec import Code, GrpcError, Method, encode_message
from mesh.http import h2_frames as frames
from mesh.http.events import find_header
from mesh.http.server import serve_http2
from mesh.http.stream import Stream
from mesh.proto.discovery_pb2 import Resource
from mesh.sockets import open_listener

pytestmark = pytest.mark.usefixtures("no_fd_leak")

ECHO: Method[Resource, Resource] = Method("/t.T/Echo", Resource, Resource, "unary")
FLOW: Method[Resource, Resource] = Method("/t.T/Flow", Resource, Resource, "stream")
HEAD = [(":status", "200"), ("content-type", "application/grpc")]
OK = [("grpc-status", "0")]
MESSAGE = encode_message(Resource(name="n"))
Handler = Callable[[Stream], Awaitable[None]]


@contextlib.asynccontextmanager
async def channel_to(
    handler: Handler, metadata: Callable[[], dict[str, str]] | None = None
) -> AsyncIterator[Channel]:
    listener = open_listener(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        address = await nursery.start(partial(serve_http2, listener, None, handler))
        with trio.fail_after(30):
            async with open_channel(*address, None, metadata_provider=metadata) as channel:
                yield channel
        nursery.cancel_scope.cancel()


def answering(
    head: list[tuple[str, str]], body: bytes = b"", trailers: list[tuple[str, str]] | None = None
) -> Handler:
    async def handler(stream: Stream) -> None:
        while await stream.receive():
            pass
        await stream.send_headers(head, end_stream=not body and trailers is None)
        if body:
            await stream.send(body, end_stream=trailers is None)
        if trailers is not None:
            await stream.send_headers(trailers, end_stream=True)

    return handler


@pytest.mark.parametrize(
    ("head", "body", "trailers", "code"),
    [
        ([(":status", "503")], b"busy", None, Code.UNAVAILABLE),
        ([(":status", "404"), ("content-type", "text/html")], b"", None, Code.UNIMPLEMENTED),
        ([(":status", "403"), ("grpc-status", "16")], b"", None, Code.UNAUTHENTICATED),
        ([(":status", "200")], MESSAGE, OK, Code.UNKNOWN),
        ([(":status", "200"), ("content-type", "text/html")], b"x", None, Code.UNKNOWN),
        ([*HEAD, ("grpc-encoding", "gzip")], MESSAGE, OK, Code.INTERNAL),
        (HEAD, MESSAGE, None, Code.UNKNOWN),
        (HEAD, MESSAGE, [("x", "y")], Code.UNKNOWN),
        (HEAD, MESSAGE + MESSAGE, OK, Code.INTERNAL),
        (HEAD, b"", OK, Code.INTERNAL),
        (HEAD, MESSAGE[:-1], OK, Code.INTERNAL),
        (HEAD, MESSAGE, [("grpc-status", "5"), ("grpc-message", "gone")], Code.NOT_FOUND),
        ([*HEAD, ("grpc-status", "9")], b"", None, Code.FAILED_PRECONDITION),
    ],
)
async def test_answers_that_are_failures(head, body, trailers, code):
    async with channel_to(answering(head, body, trailers)) as channel:
        with pytest.raises(GrpcError) as caught:
            await channel.unary(ECHO, Resource())
        assert caught.value.code is code
        assert channel.is_usable


@pytest.mark.parametrize(
    ("h2_code", "expected"),
    [
        (frames.CANCEL, Code.CANCELLED),
        (frames.ENHANCE_YOUR_CALM, Code.RESOURCE_EXHAUSTED),
        (frames.PROTOCOL_ERROR, Code.INTERNAL),
        (frames.REFUSED_STREAM, None),
    ],
)
async def test_streams_that_are_cut(h2_code, expected):
    async def cut(stream: Stream) -> None:
        stream.reset(h2_code)

    async with channel_to(cut) as channel:
        with pytest.raises(MeshError) as caught:
            await channel.unary(ECHO, Resource())
        if expected is None:
            assert isinstance(caught.value, Unavailable)
        else:
            assert isinstance(caught.value, GrpcError)
            assert caught.value.code is expected


async def test_metadata_is_asked_for_at_every_call():
    seen = []

    async def record(stream: Stream) -> None:
        names = ("authorization", "clusterid", ":path", "te", ":authority")
        seen.append([find_header(stream.headers, name) for name in names])
        await answering(HEAD, MESSAGE, OK)(stream)

    tokens = iter(["Bearer a", "Bearer b"])
    provider = lambda: {"authorization": next(tokens), "clusterid": "Kubernetes"}  # noqa: E731
    async with channel_to(record, provider) as channel:
        for _ in range(2):
            await channel.unary(ECHO, Resource())
    assert [call[0] for call in seen] == ["Bearer a", "Bearer b"]
    assert seen[0][1:4] == ["Kubernetes", ECHO.path, "trailers"]
    assert seen[0][4].startswith("127.0.0.1:")


async def test_a_token_that_cannot_be_sent_is_not_shown():
    provider = lambda: {"authorization": "Bearer secret\nx"}  # noqa: E731
    async with channel_to(answering(HEAD, MESSAGE, OK), provider) as channel:
        with pytest.raises(LocalProtocolError) as caught:
            await channel.unary(ECHO, Resource())
        assert "secret" not in str(caught.value)


async def test_leaving_a_stream_early_cancels_it_at_the_server():
    cancelled = trio.Event()

    async def wait(stream: Stream) -> None:
        await stream.send_headers(HEAD)
        await stream.send(MESSAGE)
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with channel_to(wait) as channel:
        async with channel.stream(FLOW) as stream:
            assert (await anext(stream)).name == "n"
        await cancelled.wait()


async def test_the_server_ends_while_we_still_send():
    async def refuse(stream: Stream) -> None:
        await stream.receive()
        await stream.send_headers([*HEAD, ("grpc-status", "7")], end_stream=True)

    async with channel_to(refuse) as channel, channel.stream(FLOW) as stream:
        for _ in range(200):
            await stream.send(Resource(name="x" * 10_000))
        await stream.done_sending()
        with pytest.raises(GrpcError, match="PERMISSION_DENIED"):
            await anext(stream)


async def test_messages_after_the_end_of_sending():
    async with (
        channel_to(answering(HEAD, MESSAGE, OK)) as channel,
        channel.stream(FLOW) as stream,
    ):
        await stream.done_sending()
        await stream.done_sending()
        with pytest.raises(LocalProtocolError):
            await stream.send(Resource())
        assert [message.name async for message in stream] == ["n"]
        assert [message async for message in stream] == []


async def test_deadline_of_a_stream():
    async def wait(stream: Stream) -> None:
        assert find_header(stream.headers, "grpc-timeout") == "200000u"
        await trio.sleep_forever()

    async with channel_to(wait) as channel:
        with pytest.raises(GrpcError) as caught:
            async with channel.stream(FLOW, timeout=0.2) as stream:
                await anext(stream)
        assert caught.value.code is Code.DEADLINE_EXCEEDED
