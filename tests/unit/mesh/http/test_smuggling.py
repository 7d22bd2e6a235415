"""Request smuggling against mesh.http.h1: every shape of two readings that is known to us is
refused, and what is accepted h11 accepts with the same meaning.
"""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import RemoteProtocolError
from mesh.http import h1
from mesh.http.h1_heads import RequestHead
from mesh.http.h2_stream import find_head_problem
from mesh.http.hpack_table import Block, find_problem
from mesh.http.trailers import safe_trailers


def post(*lines: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([b"POST / HTTP/1.1", b"Host: a", *lines, b"", body])


def line(text: bytes) -> bytes:
    return text + b"\r\nHost: a\r\n\r\n"


def host(name: bytes) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: " + name + b"\r\n\r\n"


CHUNKED = b"Transfer-Encoding: chunked"
REQUESTS = {
    "a length with zeros before it": post(b"Content-Length: 010"),
    "an empty length": post(b"Content-Length:"),
    "a length in hexadecimal": post(b"Content-Length: 0x3", body=b"abc"),
    "two lengths in one": post(b"Content-Length: 3 4", body=b"abc"),
    "a negative length": post(b"Content-Length: -3"),
    "a length of another alphabet": post("Content-Length: ٣".encode()),
    "a length without end": post(b"Content-Length: 9999999999999999999"),
    "two lengths": post(b"Content-Length: 3", b"Content-Length: 4"),
    "coding, then length": post(CHUNKED, b"Content-Length: 3"),
    "chunked twice": post(b"Transfer-Encoding: chunked, chunked"),
    "chunked in two fields": post(CHUNKED, CHUNKED),
    "chunked with a parameter": post(b"Transfer-Encoding: chunked;q=1"),
    "chunked and more": post(b"Transfer-Encoding: chunked, identity"),
    "an empty coding before it": post(b"Transfer-Encoding: , chunked"),
    "quoted chunked": post(b'Transfer-Encoding: "chunked"'),
    "chunked behind a vertical tab": post(b"Transfer-Encoding: \x0bchunked"),
    "xchunked": post(b"Transfer-Encoding: xchunked"),
    "an empty coding": post(b"Transfer-Encoding:"),
    "a length, and a coding in disguise": post(b"Content-Length: 3", b"Transfer_Encoding: chunked"),
    "a blank before a coding's colon": post(b"Transfer-Encoding : chunked"),
    "a folded field": post(b"\tTransfer-Encoding: chunked"),
    "a folded coding": post(b"Transfer-Encoding:", b" chunked"),
    "a folded first field": b"POST / HTTP/1.1\r\n Host: a\r\n\r\n",
    "a field behind a bare CR": post(b"X: y\rTransfer-Encoding: chunked"),
    "a field behind a bare LF": post(b"X: y\nTransfer-Encoding: chunked"),
    "CR CR LF": post(b"X: y\r"),
    "an empty name": post(b": x"),
    "no colon": post(b"x"),
    "a name beyond ASCII": post(b"x\xff: y"),
    "a zero byte in a name": post(b"x\0: y"),
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/1.10": line(b"GET / HTTP/1.10"),
    "HTTP/01.1": line(b"GET / HTTP/01.1"),
    "a version in lower case": line(b"GET / http/1.1"),
    "a tab for a blank": line(b"GET\t/ HTTP/1.1"),
    "a bare CR in the target": line(b"GET /\rx HTTP/1.1"),
    "a blank in the target": line(b"GET /a b HTTP/1.1"),
    "a target beyond ASCII": line(b"GET /\xc3\xa4 HTTP/1.1"),
    "a target without authority": line(b"GET http:///x HTTP/1.1"),
    "another authority": line(b"GET http://b/ HTTP/1.1"),
    "a user in the target": line(b"GET http://me@a/ HTTP/1.1"),
    "another scheme": line(b"GET ftp://a/ HTTP/1.1"),
    "authority form": line(b"GET a HTTP/1.1"),
    "CONNECT": line(b"CONNECT a:80 HTTP/1.1"),
    "GET *": line(b"GET * HTTP/1.1"),
    "a user in the host": host(b"me@a"),
    "a list of hosts": host(b"a, b"),
    "two hosts by a blank": host(b"a b"),
    "an escaped host": host(b"%61dmin"),
    "two ports": host(b"a:80:81"),
    "a host with a query": host(b"a?b"),
    "a host in brackets": host(b"[g]"),
    "Connection takes the length": post(b"Content-Length: 3", b"Connection: content-length"),
    "Connection takes credentials": post(b"Connection: authorization"),
    "an unknown expectation": post(b"Expect: 200-ok"),
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_of_two_readings_is_refused(name: str) -> None:
    with pytest.raises(RemoteProtocolError):
        h1.parse_request(REQUESTS[name])


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 05\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding : chunked\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent_Length: 5\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"\r\nHTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_a_response_of_two_readings_is_refused(head: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        h1.parse_response(head, method=b"GET")
    assert caught.value.http_status == 502


@pytest.mark.parametrize("status", [b"204 No Content", b"103 Early Hints", b"101 Switch"])
def test_a_response_without_content_says_no_length(status: bytes) -> None:
    head = b"HTTP/1.1 " + status + b"\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    with pytest.raises(RemoteProtocolError):
        h1.parse_response(head, method=b"GET")
    parsed = h1.parse_response(head.replace(b"Transfer-Encoding", b"X"), method=b"GET")
    assert parsed is not None
    assert (parsed[0].length, parsed[0].pairs) == (0, [(b"x", b"chunked")])


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ((b"Connection: Upgrade", b"Upgrade: websocket"), b"websocket"),
        ((b"Connection: Upgrade", b"Upgrade: foo", b"Upgrade: bar/2"), b"foo, bar/2"),
        ((b"Upgrade: websocket",), b""),
        ((b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AA"), b""),
        ((b"Connection: Upgrade", b"Upgrade: websocket, h2c"), b""),
        ((b"Connection: Upgrade", b"Upgrade: websocket", b"Upgrade: H2C"), b""),
        ((b"Connection: Upgrade", b"Upgrade: HTTP/2.0"), b""),
        ((b"Connection: Upgrade", b"Upgrade: TLS/1.0, HTTP/1.1"), b""),
    ],
)
def test_no_upgrade_leads_to_http_that_nobody_reads(lines: tuple[bytes, ...], found: bytes) -> None:
    parsed = h1.parse_request(post(*lines))
    assert parsed is not None
    assert (parsed[0].upgrade, parsed[0].pairs) == (found, [])


@pytest.mark.parametrize(
    ("version", "connection", "keeps"),
    [
        (b"1", b"X: y", True),
        (b"1", b"Connection: close", False),
        (b"1", b"Connection: keep-alive, Close", False),
        (b"1", b"Connection: x\r\nConnection: close", False),
        (b"0", b"X: y", False),
        (b"0", b"Connection: Keep-Alive", True),
        (b"0", b"Connection: keep-alive, close", False),
    ],
)
def test_whether_the_connection_stays(version: bytes, connection: bytes, keeps: bool) -> None:
    rest = b"\r\nHost: a\r\nContent-Length: 0\r\n" + connection + b"\r\n\r\n"
    head = h1.parse_request(b"GET / HTTP/1." + version + rest)
    answer = h1.parse_response(b"HTTP/1." + version + b" 200 OK" + rest, method=b"GET")
    assert head is not None
    assert answer is not None
    assert head[0].keeps_alive is answer[0].keeps_alive is keeps


def test_a_head_of_very_many_lines_is_refused_before_its_end() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        h1.parse_request(post(*[b"a:"] * 200)[:-2])
    assert caught.value.http_status == 431


@pytest.mark.parametrize(
    "wire",
    [
        b"+3\r\nabc\r\n",
        b"3_0\r\n",
        b"\r\n3\r\nabc\r\n",
        b"3\r\nabc\n",
        b"3\nabc",
        b"3 3\r\n",
        b"3\t;\x00\r\n",
        b"3;a\rb\r\n",
        b"3;a\nb\r\n",
        b"1" + b"0" * 15 + b"\r\n",
        b"3\r\nabc0\r\n\r\n",
        b"0\r\nx: y\n\r\n",
        b"0\r\n x: y\r\n\r\n",
        b"0\r\nx : y\r\n\r\n",
        b"0\r\n\n",
        b"0\r\n" + b"x: y\r\n" * 2000,
        b"0\r\nExpect: x\r\n\r\n",
        b"0\r\nContent_Length: 3\r\n\r\n",
    ],
)
def test_malformed_chunks_and_trailers_are_refused(wire: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        h1.ChunkReader().feed(memoryview(wire))


def test_trailers_say_nothing_that_a_head_should_have_said() -> None:
    names = (b"Content-Length", b"Transfer-Encoding", b"Host", b"Connection", b"Authorization",
             b"Cookie", b"X-Forwarded-Client-Cert", b"X-Forwarded-For", b"TE")  # fmt: skip
    lines = b"".join(name + b": 5\r\n" for name in names) + b"grpc-status: 0\r\nx-sum: 1\r\n"
    reader = h1.ChunkReader()
    reader.feed(memoryview(b"0\r\n" + lines + b"\r\n"))
    assert reader.trailers == [(b"grpc-status", b"0"), (b"x-sum", b"1")]
    # HTTP/2 keeps hop-by-hop fields and pseudo-headers out before; the rest goes the same way.
    assert safe_trailers([(name.lower(), b"5") for name in names]) == []


@pytest.mark.parametrize(
    "fields",
    [
        [(b":status", b"20")],
        [(b":status", b"2000")],
        [(b":status", b"099")],
        [(b":status", b"101")],
        [(b":status", b"+99")],
        [(b":status", b"200"), (b":path", b"/")],
        [(b":path", b"/")],
        [],
    ],
)
def test_responses_of_http2_that_http1_could_not_say_are_malformed(
    fields: list[tuple[bytes, bytes]],
) -> None:
    block = Block(tuple(fields), find_problem(fields))
    assert find_head_problem(block, is_response=True, ends=False)


FIELDS = [
    b"Host: web", b"Host: other", b"Content-Length: 3", b"Content-Length: 03",
    b"Content-Length: 3, 3", CHUNKED, b"Transfer-Encoding: gzip", b"Connection: close",
    b"Connection: keep-alive", b"Connection: x-one", b"X-One: 1", b"X-One:", b" folded",
    b"X-Two : 2", b"Expect: 100-continue", b"Upgrade: websocket", b"Connection: Upgrade",
    b"Te: trailers", b"content_length: 3",
]  # fmt: skip
LINES = [b"GET / HTTP/1.1", b"POST /a?b HTTP/1.1", b"POST / HTTP/1.0", b"OPTIONS * HTTP/1.1"]
BODIES = [
    b"",
    b"abc",
    b"abcGET / HTTP/1.1\r\n",
    b"3\r\nabc\r\n0\r\n\r\n",
    b"3;x\r\nabc\r\n0\r\nx-sum: 1\r\n\r\nGET ",
]
_mutations = st.lists(
    st.tuples(st.integers(0, 200), st.sampled_from([b"\r", b"\n", b" ", b":", b"\0", b"\t", b","])),
    max_size=2,
)


def _read(data: bytes) -> tuple[RequestHead, bytes, bytes] | None:
    """The head, the body and what follows; None when it is refused or not complete."""
    try:
        parsed = h1.parse_request(data)
        if parsed is None:
            return None
        head, end = parsed
        rest = memoryview(data)[end:]
        if head.length is not None:
            if len(rest) < head.length:
                return None
            return head, bytes(rest[: head.length]), bytes(rest[head.length :])
        reader = h1.ChunkReader()
        views, used = reader.feed(rest)
        return (head, b"".join(views), bytes(rest[used:])) if reader.is_done else None
    except RemoteProtocolError:
        return None


@given(
    st.sampled_from(LINES),
    st.lists(st.sampled_from(FIELDS), max_size=4),
    _mutations,
    st.sampled_from(BODIES),
)
def test_what_we_accept_h11_accepts_with_the_same_meaning(
    start: bytes, fields: list[bytes], mutations: list[tuple[int, bytes]], body: bytes
) -> None:
    """h11 is laxer: bare LF, folding, a length beside a coding, equal lengths. Where we accept, it
    does, and both agree on the request, on its body and on where the next one begins.
    """
    head = b"\r\n".join([start, b"Host: web", *fields]) + b"\r\n\r\n"
    for at, what in mutations:
        head = head[: at % len(head)] + what + head[at % len(head) :]
    found = _read(head + body)
    if found is None:
        return
    ours, payload, after = found
    theirs = h11.Connection(h11.SERVER)
    theirs.receive_data(head + body)
    request = theirs.next_event()
    assert isinstance(request, h11.Request)
    assert request.method == ours.method
    assert request.http_version == (b"1.0" if ours.is_http10 else b"1.1")
    assert request.target == ours.path + (b"" if ours.query is None else b"?" + ours.query)
    assert [value for name, value in request.headers if name == b"host"] == [ours.authority]
    kept = {name for name, _ in ours.pairs}
    assert [pair for pair in request.headers if pair[0] in kept] == ours.pairs
    read = b""
    while isinstance(event := theirs.next_event(), h11.Data):
        read += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert (read, theirs.trailing_data[0]) == (payload, after)
