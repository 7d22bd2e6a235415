"""Endpoints that break rules: their callers get one answer each, an error at worst, and others go
on. The endpoint says by its path's name what it does.
"""

from __future__ import annotations

import contextlib
import struct

import pytest
import trio

from mesh.http import h2_frames as h2
from mesh.model.service import AppProtocol
from tests.support.raw_http2 import END, HELLO, RawPeer, get, head
from tests.support.waypoints import key, running_app, running_waypoint, service

pytestmark = pytest.mark.usefixtures("no_fd_leak")

OK = b"HTTP/1.1 200 OK\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: "
INJECTED = OK + b"x-injected: 1\r\ncontent-length: 0\r\n\r\n"
# What the endpoint says, and the status that its caller may see (0: the connection is cut).
HTTP1: dict[str, tuple[bytes, int]] = {
    "a switch nobody asked for": (SWITCH + b"websocket\r\n\r\n" + INJECTED, 503),
    "a switch to nothing": (b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + INJECTED, 503),
    "content after 204": (b"HTTP/1.1 204 No Content\r\n\r\n" + INJECTED, 204),
    "a length with 204": (b"HTTP/1.1 204 x\r\ncontent-length: 5\r\n\r\nhello" + INJECTED, 204),
    "content after 304": (b"HTTP/1.1 304 x\r\ncontent-length: 5\r\n\r\nhello" + INJECTED, 304),
    "two responses": (OK + b"content-length: 0\r\n\r\n" + INJECTED, 200),
    "two chunked responses": (
        OK + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n" + INJECTED, 200),
    "more than announced": (OK + b"content-length: 2\r\n\r\nok" + INJECTED, 200),
    "two lengths": (OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\nok!", 503),
    "length and coding": (
        OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 503),
    "a bare LF": (OK + b"x: a\nx-injected: 1\r\ncontent-length: 0\r\n\r\n", 503),
    "a folded field": (OK + b"x: a\r\n x-injected: 1\r\ncontent-length: 0\r\n\r\n", 503),
    "a broken chunk": (OK + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 200),
    "endless interim responses": (b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" * 1000, 503),
    "an endless head": (OK + b"x: " + b"y" * 200_000, 503),
    "very many fields": (OK + b"x: y\r\n" * 1000 + b"content-length: 0\r\n\r\n", 503),
    "not HTTP": (b"\x00\x01\x02\r\n\r\n", 503),
    "nothing": (b"", 503),
    "framing in trailers": (
        OK + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\ncontent-length: 5\r\n"
        b"set-cookie: a=b\r\nx-sum: 1\r\n\r\n", 200),
}  # fmt: skip


async def settle(stream: trio.SocketStream, until: bytes) -> bytes:
    """Read until `until` has come, or the end, of whatever kind."""
    data = b""
    with trio.fail_after(20), contextlib.suppress(trio.BrokenResourceError):
        while until not in data and (piece := await stream.receive_some(65536)):
            data += piece
    return data


def _final(heard: bytes) -> bytes:
    """Without interim responses."""
    while heard.startswith(b"HTTP/1.1 103"):
        heard = heard.partition(b"\r\n\r\n")[2]
    return heard


async def _speak_http1(stream: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        async with stream:
            while block := await settle(stream, b"\r\n\r\n"):
                name = block.split(b" ")[1][1:].decode().replace("_", " ")
                if name == "good":
                    await stream.send_all(OK + b"content-length: 2\r\n\r\nok")
                    continue
                await stream.send_all(HTTP1[name][0])
                if name in {"nothing", "a broken chunk"}:
                    return


def _request(name: str, method: str = "GET") -> bytes:
    return f"{method} /{name.replace(' ', '_')} HTTP/1.1\r\nhost: web\r\n\r\n".encode()


async def test_an_endpoint_of_http1_answers_its_own_request_only() -> None:
    async with (
        running_app("web-1", key("web"), serve=_speak_http1) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        connection = await mesh.connect()
        for name, (_, status) in HTTP1.items():
            stream = await mesh.open("10.96.0.1:80", connection)
            await stream.send_all(_request(name) + _request("good"))
            answer = _final(await settle(stream, b"\r\n\r\nok"))
            first = answer.partition(b"\r\n")[0]
            assert first.startswith(b"HTTP/1.1 %d" % (status or 0)), (name, answer)
            assert b"x-injected" not in answer, name
            assert b"set-cookie" not in answer, name
            # The next request's answer is its own, unless the connection ended with the first.
            assert answer.endswith(b"\r\n\r\nok") or first.startswith(b"HTTP/1.1 200"), name
            await stream.aclose()


def reply(*fields: tuple[bytes, bytes], flags: int = END, stream_id: int = 1) -> bytes:
    return head(stream_id, fields, flags)


OPEN = h2.END_HEADERS
S200, HELLO_S = (b":status", b"200"), h2.pack_frame(h2.SETTINGS, 0, 0)
BODY = h2.pack_frame(h2.DATA, h2.END_STREAM, 1, INJECTED)
HTTP2: dict[str, tuple[bytes, int]] = {
    "101": (reply((b":status", b"101"), flags=OPEN) + BODY, 503),
    "content after 204": (reply((b":status", b"204"), flags=OPEN) + BODY, 204),
    "content after 304": (reply((b":status", b"304"), flags=OPEN) + BODY, 304),
    "content after trailers-only": (reply(S200, (b"grpc-status", b"0"), flags=OPEN) + BODY, 200),
    "content after a length of 0": (reply(S200, (b"content-length", b"0"), flags=OPEN) + BODY, 200),
    "more than announced": (reply(S200, (b"content-length", b"2"), flags=OPEN) + BODY, 200),
    "less than announced": (reply(S200, (b"content-length", b"2000"), flags=OPEN) + BODY, 200),
    "nothing of what is announced": (reply(S200, (b"content-length", b"2")), 200),
    "two lengths": (
        reply(S200, (b"content-length", b"2"), (b"content-length", b"3"), flags=OPEN) + BODY, 503),
    "a long status": (reply((b":status", b"2000")), 503),
    "no status": (reply((b"x", b"y")), 503),
    "a status and a path": (reply(S200, (b":path", b"/")), 503),
    "CRLF in a value": (reply(S200, (b"x", b"a\r\n\r\n" + INJECTED)), 503),
    "connection": (reply(S200, (b"connection", b"close")), 503),
    "content before the head": (BODY, 503),
    "endless interim responses": (reply((b":status", b"103"), flags=OPEN) * 100, 503),
    "an interim response at the end": (reply((b":status", b"103")), 503),
    "a push": (h2.pack_frame(h2.PUSH_PROMISE, h2.END_HEADERS, 1, bytes(4)), 503),
    "a very long head": (reply(S200, *[(b"x", b"y" * 4000)] * 40), 503),
    "GOAWAY": (h2.pack_goaway(0, 0), 503),
    "RST_STREAM": (h2.pack_rst(1, h2.INTERNAL_ERROR), 503),
    "a flood of PING": (h2.pack_frame(h2.PING, 0, 0, bytes(8)) * 3000, 503),
    "a flood of SETTINGS": (h2.pack_frame(h2.SETTINGS, 0, 0) * 3000, 503),
    "another preface": (b"HTTP/1.1 400 Bad Request\r\n\r\n", 503),
    "the end": (b"", 503),
}  # fmt: skip


class Http2Endpoints:
    """Says what `answer` is to the first request of each connection."""

    def __init__(self) -> None:
        self.answer = b""
        self.ends_at_once = False
        self.connections = 0
        self.hello = HELLO_S

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                if self.ends_at_once:
                    return
                data = bytearray(await settle(stream, h2.PREFACE))
                del data[: len(h2.PREFACE)]
                await stream.send_all(self.hello)
                while True:
                    for stream_id in _take_requests(data):
                        await stream.send_all(_renumber(self.answer, stream_id))
                        if not self.answer:
                            return
                    piece = await stream.receive_some(65536)
                    if not piece:
                        return
                    data += piece


def _take_requests(data: bytearray) -> list[int]:
    """The streams whose HEADERS are in `data`, which loses all whole frames."""
    found = []
    while len(data) >= 9:
        high, low, kind, _, stream_id = h2.HEADER.unpack_from(data)
        size = 9 + (high << 8 | low)
        if len(data) < size:
            break
        found += [stream_id] if kind == h2.HEADERS else []
        del data[:size]
    return found


def _renumber(frames: bytes, stream_id: int) -> bytes:
    """The same frames for another stream than 1."""
    out, offset = bytearray(frames), 0
    while offset + 9 <= len(out):
        high, low, kind, flags, was = h2.HEADER.unpack_from(out, offset)
        h2.HEADER.pack_into(out, offset, high, low, kind, flags, stream_id if was == 1 else was)
        offset += 9 + (high << 8 | low)
    return bytes(out)


async def test_an_endpoint_of_http2_answers_its_own_request_only() -> None:
    endpoint = Http2Endpoints()
    web = service("web", 1, protocol=AppProtocol.HTTP2)
    async with (
        running_app("web-1", key("web"), serve=endpoint.serve) as app,
        running_waypoint([web, app.workload]) as mesh,
    ):
        connection = await mesh.connect()
        for name, (answer, status) in HTTP2.items():
            endpoint.answer = answer
            stream = await mesh.open("10.96.0.1:80", connection)
            await stream.send_all(b"POST /x HTTP/1.1\r\nhost: web\r\nconnection: close\r\n"
                                  b"content-length: 0\r\n\r\n")  # fmt: skip
            heard = _final(await settle(stream, b"never"))
            assert heard.startswith(b"HTTP/1.1 %d" % status), (name, heard)
            assert b"x-injected" not in heard.partition(b"\r\n\r\n")[0], name
            if status != 200:
                assert b"x-injected" not in heard, name
            assert heard.count(b"HTTP/1.1 101") == 0, name
        # A HEAD has no content, whatever its length says.
        endpoint.answer = reply(S200, (b"content-length", b"2"), flags=OPEN) + BODY
        stream = await mesh.open("10.96.0.1:80", connection)
        await stream.send_all(b"HEAD /x HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n")
        assert b"x-injected" not in await settle(stream, b"never")


async def test_endpoints_that_take_no_requests_are_not_dialled_for_ever() -> None:
    endpoint = Http2Endpoints()
    endpoint.ends_at_once = True
    web = service("web", 1, protocol=AppProtocol.HTTP2)
    async with (
        running_app("web-1", key("web"), serve=endpoint.serve) as app,
        running_waypoint([web, app.workload]) as mesh,
    ):
        peer = RawPeer(await mesh.open("10.96.0.1:80"))
        await peer.send(HELLO + get(1, path=b"/x"))
        heard = await peer.read(1)
        assert heard.heads[1][0][b":status"] == b"503"
        assert endpoint.connections < 10
        endpoint.ends_at_once = False
        none = h2.pack_frame(h2.SETTINGS, 0, 0, struct.pack(">HI", h2.MAX_CONCURRENT_STREAMS, 0))
        endpoint.hello, endpoint.answer = none, reply(S200)
        await peer.send(get(3, path=b"/x"))
        assert (await peer.read(3)).heads[3][0][b":status"] == b"200"


async def test_an_answer_before_the_body_is_the_answer() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                block = await settle(stream, b"\r\n\r\n")
                code = b"417 Expectation Failed" if b"expect" in block else b"413 Too Large"
                await stream.send_all(b"HTTP/1.1 " + code + b"\r\ncontent-length: 0\r\n\r\n")
                while await stream.receive_some(65536):
                    pass

    async with (
        running_app("web-1", key("web"), serve=serve) as app,
        running_waypoint([service("web", 1), app.workload]) as mesh,
    ):
        for extra, code in ((b"", b"413"), (b"expect: 100-continue\r\n", b"417")):
            stream = await mesh.open("10.96.0.1:80")
            await stream.send_all(
                b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n" + extra + b"\r\n"
            )
            heard = await settle(stream, b"never")
            assert heard.startswith(b"HTTP/1.1 " + code)
            assert heard.count(b"HTTP/1.1") == 1
            assert b"connection: close" in heard
