"""mesh.http.h1: what is refused, how bodies leave their framing; llhttp gives second opinions."""

from __future__ import annotations

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import RemoteProtocolError
from mesh.http import h1

REFUSED = {
    "two lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n"
    b"Content-Length: 3\r\n\r\nabc",
    "a list of lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3, 3\r\n\r\nabc",
    "a signed length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\nabc",
    "length and coding": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two codings": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "identity": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n",
    "coding in 1.0": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    "a host with a path": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "another host in the target": b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: a\n\n",
    "bare LF in a field": b"GET / HTTP/1.1\r\nHost: a\r\nX: y\nZ: w\r\n\r\n",
    "folding": b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n z\r\n\r\n",
    "blank before the colon": b"GET / HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n",
    "a zero byte": b"GET / HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n",
    "two blanks": b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "a fragment": b"GET /#x HTTP/1.1\r\nHost: a\r\n\r\n",
    "a disguise": b"POST / HTTP/1.1\r\nHost: a\r\nContent_Length: 3\r\n\r\n",
    "Connection takes the host": b"GET / HTTP/1.1\r\nHost: a\r\nConnection: host\r\n\r\n",
    "a target without slash": b"GET x HTTP/1.1\r\nHost: a\r\n\r\n",
}


@pytest.mark.parametrize("name", REFUSED)
def test_ambiguous_requests_are_refused(name: str) -> None:
    with pytest.raises(RemoteProtocolError):
        h1.parse_request(REFUSED[name])


def test_a_head_is_read_and_hop_by_hop_fields_are_gone() -> None:
    data = (
        b"POST /a?b=c HTTP/1.1\r\nHost: web:80\r\nX-One: 1\r\nConnection: keep-alive, x-two\r\n"
        b"X-Two: 2\r\nKeep-Alive: timeout=5\r\nContent-Length: 3\r\n\r\nabcGET"
    )
    parsed = h1.parse_request(data)
    assert parsed is not None
    head, end = parsed
    assert data[end:] == b"abcGET"
    assert (head.method, head.path, head.query, head.authority) == (
        b"POST",
        b"/a",
        b"b=c",
        b"web:80",
    )
    assert head.pairs == [(b"x-one", b"1"), (b"content-length", b"3")]
    assert (head.length, head.keeps_alive) == (3, True)
    assert all(h1.parse_request(data[:cut]) is None for cut in range(end))


def test_limits() -> None:
    many = b"".join(b"x%d: y\r\n" % number for number in range(200))
    for data in (
        b"GET / HTTP/1.1\r\nHost: a\r\n" + many + b"\r\n",
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /" + b"x" * 70_000,
    ):
        with pytest.raises(RemoteProtocolError) as caught:
            h1.parse_request(data)
        assert caught.value.http_status == 431


@pytest.mark.parametrize(
    ("head", "method", "length"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"GET", 5),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"HEAD", 0),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"GET", 0),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", b"GET", 0),
        (b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n", b"GET", None),
        (b"HTTP/1.0 200 OK\r\n\r\n", b"GET", -1),
    ],
)
def test_where_a_response_ends(head: bytes, method: bytes, length: int | None) -> None:
    parsed = h1.parse_response(head, method=method)
    assert parsed is not None
    assert parsed[0].length == length


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: y\r\n folded\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
    ],
)
def test_ambiguous_responses_are_refused(head: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        h1.parse_response(head, method=b"GET")
    assert caught.value.http_status == 502


bodies = st.lists(st.binary(min_size=1, max_size=40), max_size=6)


@given(bodies, st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_chunks_come_out_whole_however_they_are_cut(parts: list[bytes], cuts: list[int]) -> None:
    wire = b"".join(map(h1.encode_chunk, parts)) + h1.encode_last_chunk([(b"x", b"y")]) + b"GET"
    reader = h1.ChunkReader()
    found, offset, step = b"", 0, 0
    while not reader.is_done:
        piece = memoryview(wire)[offset : offset + cuts[step % len(cuts)]]
        views, used = reader.feed(piece)
        found += b"".join(views)
        offset += used
        step += 1
    assert (found, wire[offset:], reader.trailers) == (b"".join(parts), b"GET", [(b"x", b"y")])


@pytest.mark.parametrize(
    "wire",
    [b"3\nabc\r\n", b"g\r\n", b" 3\r\nabc\r\n", b"3\r\nabcd\r\n", b"0x3\r\nabc\r\n", b"-1\r\n",
     b"f" * 20 + b"\r\n", b"3;" + b"x" * 400, b"3\r\nabc\rX", b"0\r\nx y\r\n\r\n"],
)  # fmt: skip
def test_malformed_chunks_are_refused(wire: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        h1.ChunkReader().feed(memoryview(wire))


class _Seen:
    def __init__(self) -> None:
        self.is_complete = False
        self.fields: list[tuple[bytes, bytes]] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self.is_complete = True


_mutations = st.lists(
    st.tuples(st.integers(0, 200), st.sampled_from([b"\r", b"\n", b" ", b":", b"\0", b"\t", b","])),
    max_size=3,
)


@given(_mutations)
def test_what_we_accept_llhttp_reads_alike(mutations: list[tuple[int, bytes]]) -> None:
    data = (
        b"POST /a HTTP/1.1\r\nHost: web\r\nX-One: 1, 2\r\nContent-Length: 3\r\nAccept: *\r\n\r\nabc"
    )
    for at, what in mutations:
        data = data[: at % len(data)] + what + data[at % len(data) :]
    try:
        parsed = h1.parse_request(data)
    except RemoteProtocolError:
        return
    if parsed is None:
        return
    head, end = parsed
    seen = _Seen()
    httptools.HttpRequestParser(seen).feed_data(data[:end])
    assert seen.is_complete
    assert [f for f in seen.fields if f[0] not in {b"host", b"connection"}] == head.pairs
