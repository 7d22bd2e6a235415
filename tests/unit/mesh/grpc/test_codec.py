"""Messages, statuses and timeouts of gRPC, as bytes and text."""

from __future__ import annotations

import struct

import pytest

from mesh.grpc.codec import (
    MAX_STATUS_TEXT,
    Code,
    GrpcError,
    MessageDecoder,
    Method,
    code_from_h2,
    code_from_http,
    decode_text,
    encode_message,
    encode_status,
    encode_text,
    encode_timeout,
    has_status,
    parse_message,
    parse_status,
    parse_timeout,
)
from mesh.proto.discovery_pb2 import DeltaDiscoveryRequest, Resource


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def decode_all(pieces: list[bytes], max_message: int = 1000) -> list[bytes]:
    decoder = MessageDecoder(max_message)
    bodies = []
    for piece in pieces:
        decoder.receive_data(piece)
        while (body := decoder.next_body()) is not None:
            bodies.append(body)
    decoder.receive_eof()
    return bodies


def code_of(caught: pytest.ExceptionInfo[GrpcError]) -> Code:
    return caught.value.code


@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 7, 100])
def test_messages_cut_anywhere(size: int) -> None:
    wire = b"\0\0\0\0\x02ab" + b"\0\0\0\0\0" + b"\0\0\0\0\x01c"
    assert decode_all(cut(wire, size)) == [b"ab", b"", b"c"]


def test_encode_is_prefix_and_protobuf() -> None:
    message = Resource(name="n")
    body = message.SerializeToString()
    assert encode_message(message) == struct.pack(">BI", 0, len(body)) + body


def test_a_message_at_the_limit_passes_and_one_over_fails_by_its_prefix() -> None:
    assert decode_all([b"\0\0\0\0\x0a" + b"x" * 10], max_message=10) == [b"x" * 10]
    decoder = MessageDecoder(10)
    decoder.receive_data(b"\0\0\0\0\x0b")
    with pytest.raises(GrpcError, match="over the limit of 10") as caught:
        decoder.next_body()
    assert code_of(caught) is Code.RESOURCE_EXHAUSTED


def test_compressed_messages_are_refused() -> None:
    decoder = MessageDecoder()
    decoder.receive_data(b"\x01\0\0\0\x01")
    with pytest.raises(GrpcError) as caught:
        decoder.next_body()
    assert code_of(caught) is Code.UNIMPLEMENTED


@pytest.mark.parametrize("rest", [b"\0", b"\0\0\0\0\x02a"])
def test_an_end_inside_a_message(rest: bytes) -> None:
    with pytest.raises(GrpcError, match="inside a message"):
        decode_all([rest])


@pytest.mark.parametrize("body", [b"\xff", b"\x12\x05ab", b"\x12\x02\xff\xfe"])
def test_bytes_that_are_no_message(body: bytes) -> None:
    with pytest.raises(GrpcError, match="cannot parse DeltaDiscoveryRequest") as caught:
        parse_message(DeltaDiscoveryRequest, body)
    assert code_of(caught) is Code.INTERNAL


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("", ""),
        ("plain text: 1/2", "plain text: 1/2"),
        ("100%", "100%25"),
        ("é", "%C3%A9"),
        ("a\nb\0", "a%0Ab%00"),
        ("~ \x7f", "~ %7F"),
        (" both ends ", "%20both ends%20"),
        ("   ", "%20%20%20"),
        ("\ud800", "?"),
    ],
)
def test_status_text(text: str, encoded: str) -> None:
    assert encode_text(text) == encoded
    if "\ud800" not in text:
        assert decode_text(encoded) == text


@pytest.mark.parametrize(("wire", "text"), [("%", "%"), ("%zz", "%zz"), ("%FF", "\ufffd")])
def test_broken_escapes_are_text(wire: str, text: str) -> None:
    assert decode_text(wire) == text


def test_status_round_trip() -> None:
    error = parse_status(encode_status(Code.NOT_FOUND, "wo? ☂"))
    assert error is not None
    assert (error.code, error.message) == (Code.NOT_FOUND, "wo? ☂")
    assert parse_status(encode_status(Code.OK)) is None
    assert encode_status(Code.OK) == (("grpc-status", "0"),)


@pytest.mark.parametrize(
    ("status", "code"),
    [("7", 7), ("07", 7), ("17", 2), ("-1", 2), ("", 2), ("abc", 2), ("9" * 40, 2), ("²", 2)],
)
def test_strange_statuses(status: str, code: int) -> None:
    error = parse_status((("grpc-status", status),))
    assert error is not None
    assert error.code == code


def test_no_status_is_unknown_and_text_is_bounded() -> None:
    error = parse_status((("content-type", "application/grpc"),))
    assert error is not None
    assert error.code is Code.UNKNOWN
    assert not has_status((("content-type", "application/grpc"),))
    assert has_status(encode_status(Code.OK))
    error = parse_status((("grpc-status", "5"), ("grpc-message", "x" * 9000)))
    assert error is not None
    assert len(error.message) == MAX_STATUS_TEXT
    assert len(encode_status(5, "x" * 9000)[1][1]) == MAX_STATUS_TEXT


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1H", 3600), ("2M", 120), ("3S", 3), ("250m", 0.25), ("5u", 5e-6), ("7n", 7e-9),
     ("99999999H", 99999999 * 3600.0), ("0S", 0)],
)  # fmt: skip
def test_timeouts(text: str, seconds: float) -> None:
    assert parse_timeout(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "S", "1", "1s", "-1S", "1.5S", "100000000S", " 1S", "1S ", "1S\n", "١S", "1e3S"]
)
def test_malformed_timeouts(text: str) -> None:
    with pytest.raises(GrpcError, match="grpc-timeout"):
        parse_timeout(text)


@pytest.mark.parametrize("seconds", [0.0, 1e-6, 0.1, 5.0, 99.9, 3600.0, 86400.0 * 30, 1e9])
def test_a_timeout_survives_the_wire(seconds: float) -> None:
    text = encode_timeout(seconds)
    assert len(text) <= 9
    assert parse_timeout(text) == pytest.approx(seconds, rel=1e-3)


def test_timeouts_out_of_range() -> None:
    assert encode_timeout(-1) == "0u"
    assert encode_timeout(1e30) == "99999999H"


def test_other_protocols_failures() -> None:
    assert [code_from_http(status) for status in (400, 401, 403, 404, 429, 503, 500, 302)] == [
        Code.INTERNAL,
        Code.UNAUTHENTICATED,
        Code.PERMISSION_DENIED,
        Code.UNIMPLEMENTED,
        Code.UNAVAILABLE,
        Code.UNAVAILABLE,
        Code.UNKNOWN,
        Code.UNKNOWN,
    ]
    assert [code_from_h2(code) for code in (0, 7, 8, 11, 12, 99)] == [
        Code.INTERNAL,
        Code.UNAVAILABLE,
        Code.CANCELLED,
        Code.RESOURCE_EXHAUSTED,
        Code.PERMISSION_DENIED,
        Code.INTERNAL,
    ]


def test_errors_and_methods() -> None:
    assert GrpcError(14).retryable
    assert not GrpcError(7, "no").retryable
    assert GrpcError(99).code is Code.UNKNOWN
    assert str(GrpcError(7, "no")) == "PERMISSION_DENIED: no"
    method = Method("/a.B/C", Resource, Resource, "unary")
    assert {method: 1}[Method("/a.B/C", Resource, Resource, "unary")] == 1
