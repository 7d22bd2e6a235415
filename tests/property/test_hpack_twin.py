"""Our decoder of HPACK and the library's say the same of the same blocks, or refuse the same."""

from __future__ import annotations

import hpack
import pytest
from hpack.struct import HeaderTuple, NeverIndexedHeaderTuple
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import RemoteProtocolError
from mesh.http.hpack_decoder import FieldDecoder

MAX_LIST = 16_384
NAMES = st.sampled_from([b":path", b":method", b"cookie", b"x-a", b"x-b", b"te", b"x" * 40])
VALUES = st.one_of(st.sampled_from([b"", b"GET", b"/", b"a" * 200]), st.binary(max_size=60))
HEADS = st.lists(
    st.tuples(NAMES, VALUES, st.booleans()), max_size=12
)  # the third: never to be indexed
Step = tuple[list[tuple[bytes, bytes, bool]], bool, int | None]
STEPS = st.lists(
    st.tuples(HEADS, st.booleans(), st.none() | st.sampled_from([0, 64, 200, 4096])), max_size=8
)


def library(decoder: hpack.Decoder, block: bytes) -> tuple[tuple[bytes, bytes], ...] | None:
    """None: refused."""
    try:
        return tuple((bytes(name), bytes(value)) for name, value in decoder.decode(block, raw=True))
    except (hpack.HPACKError, IndexError, ValueError):
        return None


def ours(decoder: FieldDecoder, block: bytes) -> tuple[tuple[bytes, bytes], ...] | None:
    try:
        return decoder.decode(block)
    except RemoteProtocolError:
        return None


@given(STEPS)
def test_what_an_encoder_says_is_read(
    steps: list[Step],
) -> None:
    encoder, theirs, mine = hpack.Encoder(), hpack.Decoder(MAX_LIST), FieldDecoder(MAX_LIST)
    for head, is_huffman, limit in steps:
        if limit is not None:
            encoder.header_table_size = limit
        fields = [
            (NeverIndexedHeaderTuple if secret else HeaderTuple)(name, value)
            for name, value, secret in head
        ]
        block = encoder.encode(fields, huffman=is_huffman)
        assert mine.decode(block) == library(theirs, block) == tuple(map(tuple, fields))


FIELDS = [
    b"\x82",
    b"\xbe",
    b"\xbf",
    b"\xc0",
    b"\xff\x00",
    b"\x20",
    b"\x3f\xe1\x1f",
    b"\x3f\xe2\x1f",
]
PIECES = st.one_of(
    st.binary(min_size=1, max_size=6),
    st.sampled_from(FIELDS),
    st.builds(
        lambda name, value: b"\x40%c%b%c%b" % (len(name), name, len(value), value),
        st.binary(max_size=20),
        st.binary(max_size=60),
    ),
    st.builds(
        lambda index, value: b"%c%c%b" % (0x40 | index, 0x80 | len(value), value),
        st.integers(0, 62),
        st.binary(max_size=9),
    ),
)


@given(st.lists(st.lists(PIECES, max_size=12).map(b"".join), max_size=6))
def test_nonsense_is_refused_alike(blocks: list[bytes]) -> None:
    theirs, mine = hpack.Decoder(MAX_LIST), FieldDecoder(MAX_LIST)
    for block in blocks:
        said = library(theirs, block)
        assert ours(mine, block) == said
        if said is None:
            return


def test_every_byte_and_every_pair_of_bytes_in_huffman() -> None:
    """All transitions, more than are kept."""
    from hpack.huffman import HuffmanEncoder
    from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

    encoder = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)
    decoder = FieldDecoder(1 << 20)
    for first in range(256):
        value = bytes(each for second in range(256) for each in (first, second))
        coded = encoder.encode(value)
        length = len(coded) - 127
        assert 128 <= length < 16_384
        block = b"\x04\xff" + bytes([length & 127 | 128, length >> 7]) + coded
        assert decoder.decode(block) == ((b":path", value),)


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (b"\x80", "field 0 is in neither table"),
        (b"\xbe", "field 62 is in neither table"),
        (b"\x82\x20", "a table size update follows a field"),
        (b"\x3f\xe2\x1f", "a table of 4097 bytes"),
        (b"\xff" + b"\xff" * 12, "an integer is too large"),
        (b"\x04\x05/ab", "it is cut short"),
        (b"\x04", "it is cut short"),
        (b"\xff", "it is cut short"),
        (b"\x04\x84\xff\xff\xff\xff", "a Huffman string holds its end"),
        (b"\x04\x82\xff\xff", "a Huffman string is not padded as it has to be"),
        (b"\x04\x81\x00", "a Huffman string is not padded as it has to be"),
    ],
)
def test_why_a_block_is_refused(block: bytes, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why) as caught:
        FieldDecoder(4096).decode(block)
    assert caught.value.h2_code == 9


def test_a_list_that_grows_out_of_few_bytes_is_bounded() -> None:
    decoder = FieldDecoder(4096)
    decoder.decode(b"\x40\x01a\x7f\x81\x10" + b"v" * (127 + 0x81 - 0x80 + 0x10 * 128))
    with pytest.raises(RemoteProtocolError) as caught:
        decoder.decode(b"\xbe" * 2)
    assert (caught.value.http_status, caught.value.h2_code) == (431, 11)
