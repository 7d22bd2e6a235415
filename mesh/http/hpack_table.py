"""HPACK (RFC 7541) for the data plane: a stateless encoder and a bounded cache of what was decoded.

The encoder uses the static table and literals without indexing, never Huffman and never
the dynamic table, so a block is plain bytes that can be made once and sent anywhere.
Decoded blocks (`mesh.http.hpack_decoder`) are cached for as long as decoding leaves the dynamic
table unchanged, and fields are judged once, when a block is decoded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mesh.http.h1_lines import NOT_KEPT
from mesh.http.hpack_decoder import STATIC, FieldDecoder

Pair = tuple[bytes, bytes]

TABLE_SIZE_ZERO: Final = b"\x20"
"""Dynamic table size update to 0 (RFC 7541 section 6.3): sent once, before the first block,
it keeps every later HEADER_TABLE_SIZE of the peer satisfied."""

_PAIR_INDEX: Final = {pair: index for index, pair in enumerate(STATIC, 1) if pair[1]}
_NAME_INDEX: Final = {name: index for index, (name, _) in reversed([*enumerate(STATIC, 1)])}

_CACHED_BLOCKS = 64
_CACHED_BLOCK_BYTES = 512

_NAME = re.compile(rb":?[!#$%&'*+\-.^_`|~0-9a-z]+")
_ALLOWED: Final = b"\t" + bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0x100))
"""What a value consists of; the blanks among them neither begin nor end it."""
_MOST_NAMES: Final = 1024
_LONGEST_NAME: Final = 64
_good_names: Final = {name for name, _ in STATIC}
"""Names that were judged good before. Bounded: it is filled once, with the first that come."""
_MOST_FIELDS: Final = 2048
_LONGEST_VALUE: Final = 160
_judged: dict[Pair, bytes] = {}
"""Fields that were judged good before, and how they are encoded: most come again with every
request. Neither pseudo-headers, nor secrets, nor ids; bounded.
"""
_FORBIDDEN = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
)


def encode_integer(value: int, prefix_bits: int, pattern: int) -> bytes:
    """An integer behind a prefix (RFC 7541 section 5.1); `pattern` fills the bits before it."""
    limit = (1 << prefix_bits) - 1
    if value < limit:
        return bytes((pattern | value,))
    out = bytearray((pattern | limit,))
    value -= limit
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_block(pairs: Iterable[Pair]) -> bytes:
    """A header block that any decoder reads in any state. Names must be lower case."""
    parts: list[bytes] = []
    get = _judged.get
    for pair in pairs:
        known = get(pair)
        parts.append(known if known is not None else _encode_field(pair))
    return b"".join(parts)


def _encode_field(pair: Pair) -> bytes:
    index = _PAIR_INDEX.get(pair)
    if index is not None:
        return encode_integer(index, 7, 0x80)
    name, value = pair
    return b"%b%b%b" % (encode_name(name), encode_length(len(value)), value)


@functools.lru_cache(maxsize=256)
def encode_name(name: bytes) -> bytes:
    """The beginning of a literal without indexing."""
    index = _NAME_INDEX.get(name)
    if index is None:
        return b"\x00" + encode_integer(len(name), 7, 0) + name
    return encode_integer(index, 4, 0)


@functools.lru_cache(maxsize=256)
def encode_length(length: int) -> bytes:
    """What precedes a value of that many bytes, not Huffman-coded."""
    return encode_integer(length, 7, 0)


@dataclass(slots=True, init=False)
class Block:
    """A decoded block; `problem` says why it is malformed (RFC 9113 section 8.2), or ""."""

    pairs: tuple[Pair, ...]
    problem: str

    # Written out: one that dataclasses make is not compiled, and this is made for each head.
    def __init__(self, pairs: tuple[Pair, ...], problem: str) -> None:
        self.pairs = pairs
        self.problem = problem


def find_problem(pairs: Iterable[Pair]) -> str:
    """Why a field section is malformed, or empty text."""
    pseudo: set[bytes] = set()
    regular_seen = False
    for pair in pairs:
        if pair in _judged:
            regular_seen = True
            continue
        name, value = pair
        if name not in _good_names:
            if not _NAME.fullmatch(name):
                return "a field name is not lower-case token characters"
            if len(_good_names) < _MOST_NAMES and len(name) <= _LONGEST_NAME:
                _good_names.add(name)
        if value.translate(None, _ALLOWED) or len(value.strip(b" \t")) != len(value):
            return "a field value holds a forbidden character"
        if name[:1] == b":":
            if regular_seen:
                return "a pseudo-header follows a regular header"
            if name in pseudo:
                return "a pseudo-header is repeated"
            pseudo.add(name)
        else:
            regular_seen = True
            if name in _FORBIDDEN or (name == b"te" and value != b"trailers"):
                return "a connection-specific header"
            if len(value) + len(name) <= _LONGEST_VALUE and name not in NOT_KEPT:
                if len(_judged) >= _MOST_FIELDS:
                    _judged.clear()
                _judged[pair] = _encode_field(pair)
    return ""


class BlockDecoder:
    """Decodes the blocks of one connection, in order, and judges them. `max_list` bounds a decoded
    list in bytes (32 more per field, RFC 9113 section 6.5.2).
    """

    __slots__ = ("_cache", "_decoder")

    def __init__(self, max_list: int) -> None:
        self._decoder = FieldDecoder(max_list)
        self._cache: dict[bytes, Block] = {}

    def decode(self, block: bytes) -> Block:
        """Raises RemoteProtocolError; the connection cannot go on after that, because the
        two dynamic tables may differ.
        """
        known = self._cache.get(block)
        if known is not None:
            return known
        decoder = self._decoder
        before = decoder.changes
        pairs = decoder.decode(block)
        decoded = Block(pairs, find_problem(pairs))
        if decoder.changes != before:
            self._cache.clear()
        elif len(block) <= _CACHED_BLOCK_BYTES:
            if len(self._cache) >= _CACHED_BLOCKS:
                self._cache.clear()
            self._cache[block] = decoded
        return decoded
