"""ZDS bytes: the fixed ones of the protocol, round trips, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import LocalProtocolError, RemoteProtocolError
from mesh.proto import zds_pb2
from mesh.zds import Add, Answer, Del, Keep, Listener, SnapshotSent
from mesh.zds.codec import (
    MAX_LISTENERS,
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


# ---- listeners, our addition


def test_who_does_not_announce_it_sees_the_bytes_it_always_saw() -> None:
    assert encode_hello(takes_listeners=False) == bytes.fromhex("0801")
    assert encode_ack("", ()) == bytes.fromhex("0a00")
    data = encode_request(ADD)
    assert data == bytes.fromhex("0a1b") + b"\x0a\x05uid-1\x12\x12" + (
        b"\x0a\x05web-0\x12\x04shop\x1a\x03web"
    )
    decoded = decode_request(data, (7,))
    assert isinstance(decoded, Add)
    assert not decoded.keeps_listeners
    assert decoded.listener_fds() == {}
    assert decode_hello(encode_hello()) is False


def test_who_announces_it_still_says_a_hello_that_others_understand() -> None:
    data = encode_hello(takes_listeners=True)
    # Version first, then a field that a decoder without it skips.
    assert data == bytes.fromhex("0801") + bytes.fromhex("c03e01")
    assert decode_hello(data) is True


def test_an_add_with_listeners_survives_the_wire() -> None:
    for kinds in ((), (Listener.OUTBOUND,), tuple(Listener), (99,)):
        fds = tuple(range(7, 8 + len(kinds)))
        message = Add("uid-1", "web-0", "shop", "web", fds, tuple(map(int, kinds)))
        decoded = decode_request(encode_request(message), fds)
        assert decoded == message
        assert isinstance(decoded, Add)
        assert decoded.keeps_listeners
        assert decoded.listener_fds() == dict(zip(kinds, fds[1:], strict=True))


def test_an_answer_with_listeners_survives_the_wire() -> None:
    data = encode_ack("", (Listener.OUTBOUND, Listener.DNS_UDP))
    assert data.startswith(bytes.fromhex("0a"))
    answer = decode_ack(data, (8, 9))
    assert answer == Answer("", {Listener.OUTBOUND: 8, Listener.DNS_UDP: 9})


@pytest.mark.parametrize("fds", [(), (1,), (1, 2, 3)])
def test_names_and_descriptors_must_agree(fds: tuple[int, ...]) -> None:
    with pytest.raises(RemoteProtocolError, match="descriptors"):
        decode_ack(encode_ack("", (1, 2)), fds)
    with pytest.raises(RemoteProtocolError, match="instead of 3"):
        decode_request(encode_request(Add("u", "n", "ns", "sa", (), (1, 2))), fds[:2])


def test_listeners_are_bounded_and_named_once() -> None:
    for kinds in ((1, 1), tuple(range(1, MAX_LISTENERS + 2))):
        fds = tuple(range(len(kinds)))
        with pytest.raises(RemoteProtocolError, match="listeners"):
            decode_ack(encode_ack("", kinds), fds)
        with pytest.raises(RemoteProtocolError, match="listeners"):
            decode_request(encode_request(Add("u", "n", "ns", "sa", (), kinds)), (0, *fds))


def test_the_longest_messages_fit_with_every_listener() -> None:
    kinds = tuple(range(1, MAX_LISTENERS + 1))
    longest = Add("0" * 36, "n" * 253, "s" * 63, "a" * 253, (), kinds)
    assert len(encode_request(longest)) <= PACKET_BYTES
    assert len(encode_ack("e" * 2000, kinds)) <= PACKET_BYTES
