"""Counting proxied connections in the kernel's table."""

from __future__ import annotations

import sys

import pytest

from netconfig.connections import count_proxied, parse_address

pytestmark = pytest.mark.skipif(
    sys.byteorder != "little", reason="the literals are as a little-endian kernel prints them"
)

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid"
OWN = frozenset({"10.244.1.10", "fd00::10", "127.0.0.1", "::1"})
POD, LOOP, CLIENT = "0A01F40A", "0100007F", "0B01F40A"
MAPPED_POD = "0000000000000000FFFF00000A01F40A"
POD6 = "000000FD000000000000000010000000"
CLIENT6 = "000000FD000000000000000011000000"


def row(local: str, port: int, state: str = "01", inode: int = 4711) -> str:
    return (
        f"   0: {local}:{port:04X} {CLIENT}:8000 {state} 00000000:00000000 00:00000000 00000000"
        f"     0        0 {inode} 1 0000000000000000 20 4 30 10 -1"
    )


def test_addresses_are_read_in_the_machines_order() -> None:
    assert parse_address(POD) == "10.244.1.10"
    assert parse_address(MAPPED_POD) == "10.244.1.10"
    assert parse_address(POD6) == "fd00::10"
    assert parse_address("00000000000000000000000001000000") == "::1"


@pytest.mark.parametrize(
    ("line", "count"),
    [
        (row(LOOP, 15001), 1),  # captured outbound: the proxy accepted it
        (row(MAPPED_POD, 15006), 1),  # captured inbound in plain text
        (row(CLIENT, 40001), 1),  # the proxy speaking to the application as the client
        (row(CLIENT6, 40001), 1),
        (row(POD, 15008), 0),  # a tunnel: pooled
        (row(POD, 8080), 0),  # direct
        (row(POD6, 8080), 0),
        (row(LOOP, 5432), 0),
        (row(LOOP, 15001, "0A"), 0),  # the listener itself
        (row(LOOP, 15001, "06"), 0),  # TIME_WAIT
        (row(LOOP, 15001, "08"), 1),  # CLOSE_WAIT: half closed, still alive
        (row(LOOP, 15001, "05"), 1),
        (row(LOOP, 15001, "05", inode=0), 0),  # closed by us, waiting for the peer
        (HEAD, 0),
        ("", 0),
    ],
)
def test_what_counts(line: str, count: int) -> None:
    assert count_proxied([line], OWN) == count


def test_a_table_is_the_sum_of_its_lines() -> None:
    assert count_proxied([HEAD, row(LOOP, 15001), row(POD, 80), row(CLIENT, 9)], OWN) == 2
