"""HPACK (RFC 7541) for the data plane: a stateless encoder and a bounded, caching decoder.

The encoder uses the static table and literals without indexing, never Huffman and never
the dynamic table, so a block is plain bytes that can be made once and sent anywhere.
Blocks as that encoder makes them are decoded here, all others by the hpack package; decoded
blocks are cached for as long as decoding leaves the dynamic table unchanged, and fields are
judged once, when a block is decoded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import hpack

from mesh.errors import RemoteProtocolError
from mesh.http.h1_lines import NOT_KEPT

Pair = tuple[bytes, bytes]

COMPRESSION_ERROR: Final = 0x9
ENHANCE_YOUR_CALM: Final = 0xB

TABLE_SIZE_ZERO: Final = b"\x20"
"""Dynamic table size update to 0 (RFC 7541 section 6.3): sent once, before the first block,
it keeps every later HEADER_TABLE_SIZE of the peer satisfied."""

_STATIC: Final[tuple[Pair, ...]] = (
    (b":authority", b""),
    (b":method", b"GET"),
    (b":method", b"POST"),
    (b":path", b"/"),
    (b":path", b"/index.html"),
    (b":scheme", b"http"),
    (b":scheme", b"https"),
    (b":status", b"200"),
    (b":status", b"204"),
    (b":status", b"206"),
    (b":status", b"304"),
    (b":status", b"400"),
    (b":status", b"404"),
    (b":status", b"500"),
    (b"accept-charset", b""),
    (b"accept-encoding", b"gzip, deflate"),
    (b"accept-language", b""),
    (b"accept-ranges", b""),
    (b"accept", b""),
    (b"access-control-allow-origin", b""),
    (b"age", b""),
    (b"allow", b""),
    (b"authorization", b""),
    (b"cache-control", b""),
    (b"content-disposition", b""),
    (b"content-encoding", b""),
    (b"content-language", b""),
    (b"content-length", b""),
    (b"content-location", b""),
    (b"content-range", b""),
    (b"content-type", b""),
    (b"cookie", b""),
    (b"date", b""),
    (b"etag", b""),
    (b"expect", b""),
    (b"expires", b""),
    (b"from", b""),
    (b"host", b""),
    (b"if-match", b""),
    (b"if-modified-since", b""),
    (b"if-none-match", b""),
    (b"if-range", b""),
    (b"if-unmodified-since", b""),
    (b"last-modified", b""),
    (b"link", b""),
    (b"location", b""),
    (b"max-forwards", b""),
    (b"proxy-authenticate", b""),
    (b"proxy-authorization", b""),
    (b"range", b""),
    (b"referer", b""),
    (b"refresh", b""),
    (b"retry-after", b""),
    (b"server", b""),
    (b"set-cookie", b""),
    (b"strict-transport-security", b""),
    (b"transfer-encoding", b""),
    (b"user-agent", b""),
    (b"vary", b""),
    (b"via", b""),
    (b"www-authenticate", b""),
)
_PAIR_INDEX: Final = {pair: index for index, pair in enumerate(_STATIC, 1) if pair[1]}
_NAME_INDEX: Final = {name: index for index, (name, _) in reversed([*enumerate(_STATIC, 1)])}

_CACHED_BLOCKS = 64
_CACHED_BLOCK_BYTES = 512

_NAME = re.compile(rb":?[!#$%&'*+\-.^_`|~0-9a-z]+")
_ALLOWED: Final = b"\t" + bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0x100))
"""What a value consists of; the blanks among them neither begin nor end it."""
_MOST_NAMES: Final = 1024
_LONGEST_NAME: Final = 64
_good_names: Final = {name for name, _ in _STATIC}
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


def decode_plain(block: bytes, max_list: int) -> tuple[Pair, ...] | None:
    """The fields of a block that neither knows the dynamic table nor Huffman codes. None for
    every other block, one that is too long or broken among them: the hpack package judges it.
    """
    pairs: list[Pair] = []
    offset, size, left = 0, len(block), max_list
    try:
        while offset < size:
            index = block[offset]
            offset += 1
            if index > 0x80:
                pair = _STATIC[index - 0x81]
            elif index < 0x20:
                index &= 15
                if index == 15:
                    index += block[offset]
                    offset += 1
                if index:
                    name = _STATIC[index - 1][0]
                else:
                    start = offset + 1
                    offset = start + block[offset]
                    if offset - start >= 127:
                        return None
                    name = block[start:offset]
                length = block[offset]
                offset += 1
                if length == 127:
                    length += block[offset]
                    offset += 1
                    if length >= 255:
                        return None
                elif length > 127:
                    return None
                pair = (name, block[offset : offset + length])
                offset += length
                if offset > size:
                    return None
            else:
                return None
            left -= len(pair[0]) + len(pair[1]) + 32
            pairs.append(pair)
    except IndexError:
        return None
    return tuple(pairs) if left >= 0 else None


class BlockDecoder:
    """Decodes the blocks of one connection, in order. `max_list` bounds a decoded list in
    bytes (32 more per field, RFC 9113 section 6.5.2).
    """

    __slots__ = ("_cache", "_decoder", "_max_list", "_table")

    def __init__(self, max_list: int) -> None:
        self._max_list = max_list
        self._decoder = hpack.Decoder(max_header_list_size=max_list)
        self._table = self._decoder.header_table
        self._cache: dict[bytes, Block] = {}

    def decode(self, block: bytes) -> Block:
        """Raises RemoteProtocolError; the connection cannot go on after that, because the
        two dynamic tables may differ.
        """
        known = self._cache.get(block)
        if known is not None:
            return known
        plain = decode_plain(block, self._max_list)
        if plain is not None:
            decoded = Block(plain, find_problem(plain))
            self._remember(block, decoded)
            return decoded
        count, first, size = self._state()
        try:
            pairs = tuple(
                (bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)
            )
        except hpack.OversizedHeaderListError as exc:
            raise RemoteProtocolError(
                "the header list is too long", http_status=431, h2_code=ENHANCE_YOUR_CALM
            ) from exc
        except (hpack.HPACKError, ValueError, IndexError) as exc:
            raise RemoteProtocolError(
                "a header block cannot be decoded", h2_code=COMPRESSION_ERROR
            ) from exc
        decoded = Block(pairs, find_problem(pairs))
        count_now, first_now, size_now = self._state()
        if count_now != count or first_now is not first or size_now != size:
            self._cache.clear()
        elif block[:1] and block[0] & 0xE0 != 0x20:
            self._remember(block, decoded)
        return decoded

    def _remember(self, block: bytes, decoded: Block) -> None:
        if len(block) <= _CACHED_BLOCK_BYTES:
            if len(self._cache) >= _CACHED_BLOCKS:
                self._cache.clear()
            self._cache[block] = decoded

    def _state(self) -> tuple[int, object, int]:
        # Adding an entry always puts a new object first, evicting alone always shortens.
        entries = self._table.dynamic_entries
        return len(entries), entries[0] if entries else None, self._table.maxsize
