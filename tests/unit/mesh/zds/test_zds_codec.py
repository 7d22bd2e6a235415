"""ZDS bytes: the fixed ones of the protocol, round trips, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import LocalProtocolError, RemoteProtocolError
from mesh.proto import zds_pb2
from mesh.zds import Add, Del, Keep, SnapshotSent
from mesh.zds.codec import (
    PACKET_BYTES,
    decode_ack,
    decode_hello,
    decode_request,
    encode_ack,
    encode_hello,
    encode_request,
)

ADD = Add("uid-1", "web-0", "shop", "web", (7,))


def test_the_bytes_that_every_implementation_sends() -> None:
    assert encode_hello() == bytes.fromhex("0801")
    assert encode_ack() == bytes.fromhex("0a00")
    assert encode_request(SnapshotSent()) == bytes.fromhex("1a00")
    # The uid is field 1 of keep (5), but field 2 of del (2).
    assert encode_request(Keep("u")) == bytes.fromhex("2a03") + b"\x0a\x01u"
    assert encode_request(Del("u")) == bytes.fromhex("1203") + b"\x12\x01u"


@pytest.mark.parametrize("message", [ADD, Keep("uid-1"), Del("uid-1"), SnapshotSent()])
def test_a_request_survives_the_wire(message: Add | Keep | Del | SnapshotSent) -> None:
    fds = message.fds if isinstance(message, Add) else ()
    assert decode_request(encode_request(message), fds) == message


def test_an_add_needs_exactly_one_descriptor() -> None:
    data = encode_request(ADD)
    for fds in ((), (3, 4)):
        with pytest.raises(RemoteProtocolError, match="instead of one"):
            decode_request(data, fds)


def test_no_other_message_carries_a_descriptor() -> None:
    for message in (Keep("u"), Del("u"), SnapshotSent()):
        with pytest.raises(RemoteProtocolError, match="1 descriptors"):
            decode_request(encode_request(message), (3,))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "unknown kind"),
        (b"\xff\xff", "not readable"),
        (b"\x3a\x00", "unknown kind"),
        (zds_pb2.WorkloadRequest(add={"uid": "u"}).SerializeToString(), "no workload_info"),
        (bytes.fromhex("2a00"), "uid of 0"),
        (encode_request(Keep("u" * 129)), "uid of 129"),
    ],
)
def test_an_impossible_request_is_the_peers_fault(data: bytes, message: str) -> None:
    with pytest.raises(RemoteProtocolError, match=message):
        decode_request(data)


def test_names_of_an_add_are_bounded() -> None:
    for bad in ("", "n" * 254):
        data = encode_request(Add("u", bad, "ns", "sa"))
        with pytest.raises(RemoteProtocolError, match="name"):
            decode_request(data, (3,))


def test_the_longest_kubernetes_names_fit_a_packet() -> None:
    longest = Add("0" * 36, "n" * 253, "s" * 63, "a" * 253)
    assert len(encode_request(longest)) <= PACKET_BYTES


def test_a_request_that_fits_no_packet_is_our_fault() -> None:
    with pytest.raises(LocalProtocolError):
        encode_request(Del("u" * PACKET_BYTES))


def test_a_long_error_is_cut_at_a_character() -> None:
    data = encode_ack("é" * 2000)
    assert len(data) <= PACKET_BYTES
    assert decode_ack(data).error == "é" * 450


def test_an_answer_must_be_an_ack() -> None:
    for data in (b"", b"\xff"):
        with pytest.raises(RemoteProtocolError):
            decode_ack(data)


def test_only_version_one_is_spoken() -> None:
    decode_hello(encode_hello())
    for data in (b"", b"\x08\x02", b"\xff"):
        with pytest.raises(RemoteProtocolError):
            decode_hello(data)


@given(st.binary(max_size=1100), st.lists(st.integers(3, 9), max_size=2))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes, fds: list[int]) -> None:
    try:
        message = decode_request(data, fds)
    except RemoteProtocolError:
        return
    assert isinstance(message, Add) == bool(fds)


@given(st.text(max_size=2000))
def test_any_error_text_fits_and_is_understood(text: str) -> None:
    data = encode_ack(text)
    assert len(data) <= PACKET_BYTES
    # The replacement character stands for what UTF-8 cannot say (lone surrogates).
    assert text.encode("utf-8", "replace").decode().startswith(decode_ack(data).error)
