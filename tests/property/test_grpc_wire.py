"""gRPC framing and the control plane's HTTP/2 against arbitrary bytes and arbitrary cuts."""

from __future__ import annotations

import contextlib
import itertools

import hpack
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import RemoteProtocolError
from mesh.grpc.codec import (
    Code,
    GrpcError,
    MessageDecoder,
    decode_text,
    encode_status,
    encode_text,
    parse_status,
)
from mesh.http import h2_frames as frames
from mesh.http.h2 import H2Codec

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(TEXT)
def test_status_text_survives_and_is_a_legal_field_value(text: str) -> None:
    encoded = encode_text(text)
    assert decode_text(encoded) == text
    assert encoded == encoded.strip()
    assert all(" " <= char <= "~" for char in encoded)


@given(st.sampled_from([code for code in Code if code]), TEXT)
def test_statuses_survive(code: Code, text: str) -> None:
    error = parse_status(encode_status(code, text))
    assert error is not None
    assert (error.code, error.message) == (code, text)


@given(st.lists(st.binary(max_size=50)), st.lists(st.integers(0, 5000), max_size=8))
def test_messages_survive_any_cut(bodies: list[bytes], places: list[int]) -> None:
    wire = b"".join(b"\0" + len(body).to_bytes(4, "big") + body for body in bodies)
    decoder, out = MessageDecoder(50), []
    for piece in cut(wire, places):
        decoder.receive_data(piece)
        while (body := decoder.next_body()) is not None:
            out.append(body)
    decoder.receive_eof()
    assert out == bodies


@given(st.binary(max_size=300))
def test_garbage_is_a_status(data: bytes) -> None:
    decoder = MessageDecoder(100)
    decoder.receive_data(data)
    with contextlib.suppress(GrpcError):
        while decoder.next_body() is not None:
            pass
        decoder.receive_eof()


FIELDS = st.lists(
    st.tuples(
        st.sampled_from([b":path", b":method", b":scheme", b":authority", b"te", b"x", b""])
        | st.binary(max_size=8),
        st.sampled_from([b"/", b"POST", b"http", b"trailers"]) | st.binary(max_size=12),
    ),
    max_size=8,
)
BLOCKS = FIELDS.map(lambda fields: bytes(hpack.Encoder().encode(fields))) | st.binary(max_size=40)


@st.composite
def frame(draw: st.DrawFn) -> bytes:
    kind = draw(st.integers(0, 10))
    payload = draw(BLOCKS if kind in {1, 9} else st.binary(max_size=40))
    stream_id = draw(st.sampled_from([0, 1, 1, 2, 3, 5, 2**31 - 1]))
    flags = draw(st.sampled_from([0, 1, 4, 5]) | st.integers(0, 255))
    return frames.pack_frame(kind, flags, stream_id, payload)


@given(
    st.booleans(),
    st.lists(frame(), max_size=12),
    st.binary(max_size=20),
    st.lists(st.integers(0, 5000), max_size=5),
)
def test_no_peer_raises_anything_but_its_own_error(
    client: bool, sent: list[bytes], rest: bytes, places: list[int]
) -> None:
    codec = H2Codec(client=client)
    if client:
        head = [(":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "x")]
        codec.open_stream(head)
    start = b"" if client else frames.PREFACE
    wire = start + frames.pack_frame(frames.SETTINGS, 0, 0) + b"".join(sent) + rest
    try:
        for piece in cut(wire, places):
            codec.receive_data(piece, 0.0)
    except RemoteProtocolError:
        assert codec.failed
    codec.data_to_send()
