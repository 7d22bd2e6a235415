"""What a tap reads from a frame."""

from __future__ import annotations

import ipaddress
import struct

import pytest

from mesh.lab.tap import FlowKey, parse_frame


def tcp(source: int, destination: int, payload: bytes) -> bytes:
    return struct.pack("!HHIIBBHHH", source, destination, 0, 0, 5 << 4, 0x18, 0, 0, 0) + payload


def frame4(body: bytes, protocol: int, padding: bytes = b"") -> bytes:
    head = struct.pack(
        "!BBHHHBBH4s4s",
        0x45,
        0,
        20 + len(body),
        0,
        0,
        64,
        protocol,
        0,
        ipaddress.ip_address("10.244.1.10").packed,
        ipaddress.ip_address("10.244.2.10").packed,
    )
    return bytes(12) + b"\x08\x00" + head + body + padding


def frame6(body: bytes, protocol: int) -> bytes:
    packed = ipaddress.ip_address("fd00::1").packed
    head = struct.pack("!IHBB16s16s", 6 << 28, len(body), protocol, 64, packed, packed)
    return bytes(12) + b"\x86\xdd" + head + body


def test_tcp_over_ipv4_without_the_frames_padding() -> None:
    found = parse_frame(frame4(tcp(40000, 15008, b"hello"), 6, padding=b"junk"))
    assert found == (FlowKey("IPv4", "tcp", "10.244.1.10", "10.244.2.10", 15008), b"hello")


def test_udp_over_ipv6() -> None:
    body = struct.pack("!HHHH", 53, 40000, 13, 0) + b"query"
    assert parse_frame(frame6(body, 17)) == (
        FlowKey("IPv6", "udp", "fd00::1", "fd00::1", 53),
        b"query",
    )


def test_icmp_and_others_have_no_port() -> None:
    found = parse_frame(frame4(b"ping", 1))
    assert found is not None
    assert (found[0].protocol, found[0].port) == ("icmp", 0)
    other = parse_frame(frame4(b"data", 132))
    assert other is not None
    assert other[0].protocol == "132"


@pytest.mark.parametrize(
    "frame",
    [b"", bytes(14), bytes(12) + b"\x08\x06" + bytes(28), bytes(12) + b"\x08\x00" + bytes(19)],
)
def test_what_is_not_ip_is_left_out(frame: bytes) -> None:
    assert parse_frame(frame) is None


def test_a_cut_tcp_header_carries_nothing() -> None:
    found = parse_frame(frame4(tcp(1, 2, b"")[:12], 6))
    assert found is not None
    assert found[1] == b""
