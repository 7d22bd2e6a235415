"""The admin endpoint's reader: cuts do not matter, and only RemoteProtocolError comes out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hypothesis import example, given
from hypothesis import strategies as st

from mesh.errors import RemoteProtocolError
from mesh.runtime.http1 import Request, RequestReader

names = st.text("abcdefgXYZ-", min_size=1, max_size=10)
values = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    body = draw(st.binary(max_size=50))
    method = draw(st.sampled_from(["GET", "POST", "DELETE"]))
    path = draw(st.text("ab/%20?&=", max_size=12))
    fields = draw(st.lists(st.tuples(names, values), max_size=5))
    lines = [f"{method} /{path} HTTP/1.1", *(f"x-{name}: {value}" for name, value in fields)]
    lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def outcome(pieces: Iterable[bytes]) -> tuple[list[Request], int]:
    """(requests, status of the refusal or 0)."""
    reader = RequestReader(max_body_bytes=200)
    found: list[Request] = []
    status = 0
    try:
        for piece in pieces:
            reader.receive_data(piece)
    except RemoteProtocolError as exc:
        status = exc.http_status
    while (request := reader.next_request()) is not None:
        found.append(request)
    return found, status


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(bounds)]


@given(st.lists(messages(), min_size=1, max_size=4), st.lists(st.integers(0, 10_000), max_size=12))
def test_any_cut_gives_the_same_requests(sent: list[bytes], places: list[int]) -> None:
    data = b"".join(sent)
    whole = outcome([data])
    assert len(whole[0]) == len(sent)
    assert outcome(cut(data, places)) == whole


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
@example(b"GET /?" + b"&".join([b"a=b"] * 100) + b" HTTP/1.1\r\n\r\n", [])
@example(b"GET /%ff%00 HTTP/1.1\r\n\r\n", [])
def test_garbage_is_refused_or_read_but_never_a_crash(data: bytes, places: list[int]) -> None:
    for pieces in ([data], cut(data, places)):
        _, status = outcome(pieces)
        assert status in {0, 400, 413, 414, 431}


@given(messages(), st.binary(max_size=60))
def test_garbage_after_a_request_does_not_change_it(sent: bytes, garbage: bytes) -> None:
    found, _ = outcome([sent, garbage])
    assert found[:1] == outcome([sent])[0]
