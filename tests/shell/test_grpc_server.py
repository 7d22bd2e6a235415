"""The gRPC server, spoken to in plain HTTP/2: what a well-behaved client library never sends."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
import trio

from mesh.errors import ConfigError, Denied, IdentityError, KernelError, Unavailable
from mesh.grpc.client import open_channel
from mesh.grpc.codec import Code, GrpcError, Method, encode_message, parse_status
from mesh.grpc.server import Call, serve_grpc
from mesh.http.client import open_connection
from mesh.http.driver import Connection
from mesh.http.events import Headers
from mesh.http.stream import StreamReset
from mesh.proto.discovery_pb2 import Resource
from mesh.sockets import SocketAddress, open_listener

pytestmark = pytest.mark.usefixtures("no_fd_leak")

ECHO: Method[Resource, Resource] = Method("/t.T/Echo", Resource, Resource, "unary")
RAISE: Method[Resource, Resource] = Method("/t.T/Raise", Resource, Resource, "unary")
FLOW: Method[Resource, Resource] = Method("/t.T/Flow", Resource, Resource, "stream")
HEAD = {
    ":method": "POST",
    ":scheme": "http",
    ":path": ECHO.path,
    ":authority": "x",
    "content-type": "application/grpc",
}
FAILURES = {
    "denied": (Denied("policy says no"), Code.PERMISSION_DENIED, "policy says no"),
    "identity": (IdentityError("who"), Code.UNAUTHENTICATED, "who"),
    "unavailable": (Unavailable("later"), Code.UNAVAILABLE, "later"),
    "config": (ConfigError("bad csr"), Code.INVALID_ARGUMENT, "bad csr"),
    "kernel": (KernelError("secret detail"), Code.INTERNAL, "internal error"),
    "bug": (ZeroDivisionError("secret detail"), Code.INTERNAL, "internal error"),
}


async def echo(request: Resource, call: Call) -> Resource:
    return request


async def fail(request: Resource, call: Call) -> Resource:
    raise FAILURES[request.name][0]


async def flow(requests: AsyncIterator[Resource], send: Any, call: Call) -> None:
    async for request in requests:
        if request.name == "pour":
            while True:
                await send(Resource(name="x" * 60_000))
        if request.name == "bug":
            raise ZeroDivisionError
        await send(request)


class Bugs:
    """Stands in for lifecycle's supervisor: keeps the bugs, lets the rest pass."""

    def __init__(self) -> None:
        self.seen: list[Exception] = []

    async def __call__(self, name: str, fn: Any, /, *args: object) -> None:
        try:
            await fn(*args)
        except ZeroDivisionError as exc:
            self.seen.append(exc)


@contextlib.asynccontextmanager
async def serving(**kwargs: Any) -> AsyncIterator[tuple[SocketAddress, Bugs]]:
    bugs = Bugs()
    methods = {ECHO: echo, RAISE: fail, FLOW: flow}
    listener = open_listener(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        serve = partial(serve_grpc, listener, None, methods, supervise=bugs, **kwargs)
        with trio.fail_after(20):
            yield await nursery.start(serve), bugs
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def connected(**kwargs: Any) -> AsyncIterator[Connection]:
    async with serving(**kwargs) as (address, _), open_connection(*address, None) as connection:
        yield connection


async def post(
    connection: Connection, body: bytes, **changes: str | None
) -> tuple[Headers, bytes, Headers]:
    """Head, body and trailers of the answer to a request made of HEAD and `changes`."""
    fields = dict(HEAD)
    for name, value in changes.items():
        key = name.replace("__", ":").replace("_", "-")
        if value is None:
            del fields[key]
        else:
            fields[key] = value
    stream = await connection.open_stream(list(fields.items()))
    with contextlib.suppress(StreamReset):
        await stream.send(body, end_stream=True)
    head = await stream.wait_headers()
    answer = b""
    while data := await stream.receive():
        answer += data
    stream.finish()
    return head, answer, stream.trailers


def status(fields: Headers) -> tuple[Code, str]:
    error = parse_status(fields)
    return (Code.OK, "") if error is None else (error.code, error.message)


async def test_a_call_in_plain_http2():
    async with connected() as connection:
        body = encode_message(Resource(name="n"))
        head, answer, trailers = await post(connection, body, te="trailers")
        assert head == ((":status", "200"), ("content-type", "application/grpc"))
        assert answer == body
        assert trailers == (("grpc-status", "0"),)


@pytest.mark.parametrize(
    ("changes", "http_status"),
    [
        ({"__method": "GET"}, "405"),
        ({"content_type": "application/json"}, "415"),
        ({"content_type": None}, "415"),
        ({"content_type": "application/grpc-web"}, "415"),
    ],
)
async def test_not_grpc(changes, http_status):
    async with connected() as connection:
        head, answer, _ = await post(connection, b"", **changes)
        assert head == ((":status", http_status),)
        assert answer == b""


@pytest.mark.parametrize("content_type", ["application/grpc+proto", "application/grpc;x=y"])
async def test_other_names_of_grpc(content_type):
    async with connected() as connection:
        body = encode_message(Resource())
        _, answer, _ = await post(connection, body, content_type=content_type)
        assert answer == body


@pytest.mark.parametrize(
    ("changes", "body", "code", "text"),
    [
        ({"__path": "/t.T/No"}, b"", Code.UNIMPLEMENTED, "unknown method"),
        ({"__path": "/"}, b"", Code.UNIMPLEMENTED, "unknown method"),
        ({"grpc_encoding": "gzip"}, b"", Code.UNIMPLEMENTED, "gzip"),
        ({"grpc_timeout": "1"}, b"", Code.INVALID_ARGUMENT, "grpc-timeout"),
        ({"grpc_timeout": "999999999S"}, b"", Code.INVALID_ARGUMENT, "grpc-timeout"),
        ({"grpc_timeout": "0n"}, b"\0\0\0\0\0", Code.DEADLINE_EXCEEDED, "deadline"),
        ({}, b"", Code.INTERNAL, "no request"),
        ({}, b"\0\0\0\0\0" * 2, Code.INTERNAL, "more than one"),
        ({}, b"\0\0\0\0\x05ab", Code.INTERNAL, "inside a message"),
        ({}, b"\x01\0\0\0\x01x", Code.UNIMPLEMENTED, "compressed"),
        ({}, b"\0\xff\xff\xff\xff", Code.RESOURCE_EXHAUSTED, "limit"),
        ({}, b"\0\0\0\0\x02\xff\xff", Code.INTERNAL, "cannot parse Resource"),
    ],
)
async def test_refused_in_trailers_only(changes, body, code, text):
    async with connected() as connection:
        head, answer, trailers = await post(connection, body, **changes)
        assert head[:2] == ((":status", "200"), ("content-type", "application/grpc"))
        assert (answer, trailers) == (b"", ())
        got, message = status(head)
        assert got is code
        assert text in message
        # and the connection is as good as before
        assert (await post(connection, encode_message(Resource())))[2] == (("grpc-status", "0"),)


@pytest.mark.parametrize("name", FAILURES)
async def test_what_handlers_raise(name):
    async with serving() as (address, bugs), open_channel(*address, None) as channel:
        with pytest.raises(GrpcError) as caught:
            await channel.unary(RAISE, Resource(name=name))
        assert (caught.value.code, caught.value.message) == FAILURES[name][1:]
        assert len(bugs.seen) == (name == "bug")
        await channel.unary(ECHO, Resource())


async def test_a_bug_in_a_stream_is_internal_in_trailers():
    async with serving() as (address, bugs), open_channel(*address, None) as channel:
        async with channel.stream(FLOW) as stream:
            await stream.send(Resource(name="a"))
            assert (await anext(stream)).name == "a"
            await stream.send(Resource(name="bug"))
            with pytest.raises(GrpcError, match="INTERNAL: internal error"):
                await anext(stream)
        assert len(bugs.seen) == 1


async def test_a_stuck_client_holds_little_and_the_deadline_ends_it():
    async with connected() as connection:
        stream = await connection.open_stream(
            [*({**HEAD, ":path": FLOW.path}).items(), ("grpc-timeout", "300m")]
        )
        await stream.send(encode_message(Resource(name="pour")))
        await stream.wait_headers()
        await trio.sleep(0.5)  # nothing is read meanwhile: the server sits inside a message
        with pytest.raises(StreamReset, match="CANCEL"):  # noqa: PT012
            while await stream.receive():
                pass
        assert (await post(connection, encode_message(Resource())))[2] == (("grpc-status", "0"),)


async def test_the_head_of_a_stream_comes_before_the_first_message():
    async with connected() as connection:
        fields = {**HEAD, ":path": FLOW.path}
        stream = await connection.open_stream(list(fields.items()))
        with trio.fail_after(30):
            assert (await stream.wait_headers())[0] == (":status", "200")
        stream.finish()
