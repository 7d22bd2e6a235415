"""The stateless encoder and the caching decoder, against the hpack package."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import RemoteProtocolError
from mesh.http.hpack_decoder import STATIC
from mesh.http.hpack_table import (
    TABLE_SIZE_ZERO,
    BlockDecoder,
    encode_block,
    encode_integer,
    find_problem,
)

_NAME = st.from_regex(rb"[a-z0-9-]{1,20}", fullmatch=True)
_PAIRS = st.lists(
    st.one_of(st.tuples(_NAME, st.binary(max_size=300)), st.sampled_from(STATIC)), max_size=8
)


@given(_PAIRS)
def test_blocks_read_back(pairs: list[tuple[bytes, bytes]]) -> None:
    decoded = hpack.Decoder().decode(encode_block(pairs), raw=True)
    assert [(bytes(name), bytes(value)) for name, value in decoded] == pairs


@given(_PAIRS)
def test_the_table_note_satisfies_a_decoder_without_a_table(
    pairs: list[tuple[bytes, bytes]],
) -> None:
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = 0
    decoded = decoder.decode(TABLE_SIZE_ZERO + encode_block(pairs), raw=True)
    assert [(bytes(name), bytes(value)) for name, value in decoded] == pairs


@given(st.integers(0, 1 << 30), st.integers(1, 8))
def test_integers_read_back(value: int, bits: int) -> None:
    assert hpack.hpack.decode_integer(encode_integer(value, bits, 0), bits)[0] == value


def test_known_bytes() -> None:
    assert encode_block(((b":status", b"200"),)) == b"\x88"
    head = ((b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80"))
    assert encode_block(head) == b"\x02\x07CONNECT\x01\x0b10.0.0.1:80"


@given(st.lists(_PAIRS, max_size=12), st.lists(st.integers(0, 300), max_size=3))
def test_the_cache_never_changes_what_is_read(
    blocks: list[list[tuple[bytes, bytes]]], sizes: list[int]
) -> None:
    """Against an encoder that uses its dynamic table, resizes it and repeats itself."""
    encoder, decoder = hpack.Encoder(), BlockDecoder(1 << 20)
    for number, pairs in enumerate(blocks * 2):
        if sizes and number % 5 == 4:
            encoder.header_table_size = sizes[number % len(sizes)]
        block = encoder.encode(pairs, huffman=bool(number % 2))
        assert list(decoder.decode(block).pairs) == pairs


def test_blocks_are_remembered_only_while_the_table_stands_still() -> None:
    decoder = BlockDecoder(4096)
    plain = encode_block(((b"x", b"1"),))
    first = decoder.decode(plain)
    assert decoder.decode(plain) is first
    decoder.decode(b"\x40\x01a\x01b")  # inserts
    again = decoder.decode(plain)
    assert again is not first
    assert again == first
    assert decoder.decode(b"\xbe").pairs == ((b"a", b"b"),)
    decoder.decode(b"\x40\x01a\x01c")
    assert decoder.decode(b"\xbe").pairs == ((b"a", b"c"),)


@pytest.mark.parametrize(
    "block", [b"\x80", b"\xff\xff\xff\xff\xff\xff", b"\x40\x05ab", b"\x3f\xff"]
)
def test_broken_blocks(block: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        BlockDecoder(4096).decode(block)
    assert caught.value.h2_code == 9


@pytest.mark.parametrize(
    ("pairs", "problem"),
    [
        (((b":method", b"CONNECT"), (b"x", b"y z\t\xff")), ""),
        (((b"x", b""),), ""),
        (((b"X", b"y"),), "name"),
        (((b"", b"y"),), "name"),
        (((b"a b", b"y"),), "name"),
        (((b"x", b"a\r\nb"),), "value"),
        (((b"x", b"a\0"),), "value"),
        (((b"x", b" a"),), "value"),
        (((b"x", b"a "),), "value"),
        (((b"x", b"y"), (b":method", b"GET")), "follows"),
        (((b":method", b"GET"), (b":method", b"GET")), "repeated"),
        (((b"connection", b"close"),), "connection-specific"),
        (((b"te", b"gzip"),), "connection-specific"),
        (((b"te", b"trailers"),), ""),
    ],
)
def test_fields_are_judged(pairs: tuple[tuple[bytes, bytes], ...], problem: str) -> None:
    found = find_problem(pairs)
    assert (problem in found) if problem else not found
