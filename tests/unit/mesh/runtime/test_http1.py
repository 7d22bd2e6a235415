from __future__ import annotations

import contextlib

import pytest

from mesh.errors import RemoteProtocolError
from mesh.runtime import http1
from mesh.runtime.http1 import Request, RequestReader, Response, encode_response


def read(data: bytes, cut: int = 0) -> list[Request]:
    reader = RequestReader(max_body_bytes=1000)
    for piece in [data[:cut], data[cut:]] if cut else [data]:
        reader.receive_data(piece)
    found = []
    while (request := reader.next_request()) is not None:
        found.append(request)
    return found


def status_of(data: bytes) -> int:
    with pytest.raises(RemoteProtocolError) as caught:
        read(data)
    return caught.value.http_status


POST = (
    b"POST /logging?level=debug&empty= HTTP/1.1\r\n"
    b"Host: x\r\nContent-Length: 3\r\nX-A: 1\r\n\r\nabc"
)


def test_request_is_read_whole() -> None:
    (request,) = read(POST)
    assert request == Request(
        method="POST",
        path="/logging",
        query={"level": "debug", "empty": ""},
        headers={"host": "x", "content-length": "3", "x-a": "1"},
        body=b"abc",
        keep_alive=True,
    )


@pytest.mark.parametrize("cut", range(1, len(POST)))
def test_any_cut_gives_the_same_request(cut: int) -> None:
    assert read(POST, cut) == read(POST)


def test_pipelined_and_chunked() -> None:
    chunked = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
    assert [request.body for request in read(POST + chunked)] == [b"abc", b"abc"]


def test_old_client_and_close_end_the_connection() -> None:
    assert not read(b"GET / HTTP/1.0\r\n\r\n")[0].keep_alive
    assert not read(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")[0].keep_alive


def test_path_is_decoded() -> None:
    assert read(b"GET /a%20b HTTP/1.1\r\n\r\n")[0].path == "/a b"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 1001\r\n\r\n" + b"a" * 1001, 413),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 65 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * http1.MAX_HEAD_BYTES, 431),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * http1.MAX_HEAD_BYTES + b"\r\n\r\n", 431),
        (b"GET /" + b"b" * (http1.MAX_HEAD_BYTES + 1), 414),
        (b"GET / HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", 400),
        (b"CONNECT x:1 HTTP/1.1\r\n\r\n", 400),
    ],
)
def test_bad_requests_are_refused(data: bytes, status: int) -> None:
    assert status_of(data) == status


def test_head_trickled_without_end_is_bounded() -> None:
    reader = RequestReader()
    reader.receive_data(b"GET / HTTP/1.1\r\n")
    accepted = 0
    with contextlib.suppress(RemoteProtocolError):
        while accepted < 10 * http1.MAX_HEAD_BYTES:
            reader.receive_data(b"a")
            accepted += 1
    assert accepted < http1.MAX_HEAD_BYTES


def test_idle_until_a_request_begins() -> None:
    reader = RequestReader()
    assert reader.is_idle
    reader.receive_data(b"G")
    assert not reader.is_idle
    reader.receive_data(b"ET / HTTP/1.1\r\n\r\n")
    assert not reader.is_idle
    assert reader.next_request() is not None
    assert reader.is_idle


def test_continue_is_wanted_only_before_the_body() -> None:
    reader = RequestReader()
    reader.receive_data(b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n")
    assert reader.wants_continue
    reader.receive_data(b"a")
    assert not reader.wants_continue


def test_response_states_its_length() -> None:
    data = encode_response(Response.text("ready"), keep_alive=True)
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\ncontent-length: 6" in head
    assert b"\r\nconnection: keep-alive" in head
    assert body == b"ready\n"
    assert encode_response(Response.text("x"), keep_alive=False, head_only=True).endswith(
        b"\r\n\r\n"
    )
