"""FAST PATH: HPACK decoding (RFC 7541) of any encoder's blocks, with its dynamic table.

One pass over a block, nothing copied but names and values. Huffman strings go through an automaton
that takes a byte at a time: its transitions are found when they are first needed, a row of 1 KiB
for each of its 256 states. The hpack package gives the code's table, and the second opinion in the
tests.
"""

from __future__ import annotations

from typing import Final

import hpack.huffman_constants
from mypy_extensions import i64

from mesh.errors import RemoteProtocolError

Pair = tuple[bytes, bytes]

COMPRESSION_ERROR: Final = 0x9
ENHANCE_YOUR_CALM: Final = 0xB
TABLE_SIZE: Final = 4096
"""Bytes of the dynamic table: the default of SETTINGS_HEADER_TABLE_SIZE, which we never change."""
_ENTRY_OVERHEAD: Final = 32
_LARGEST_INTEGER: Final = 1 << 28
_EOS: Final = 256
_ENDED: Final = 255
"""For the number of symbols: EOS is among them."""

STATIC: Final[tuple[Pair, ...]] = (
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
_STATIC_COUNT: Final = len(STATIC)


def broken(reason: str) -> RemoteProtocolError:
    """A block that cannot be decoded; the two dynamic tables may differ after it."""
    return RemoteProtocolError(
        f"a header block cannot be decoded: {reason}", h2_code=COMPRESSION_ERROR
    )


# ---- Huffman


class _Huffman:
    """The code of RFC 7541 appendix B as a tree, and what is known of its transitions by bytes.

    A state is an inner node, of which there are 256; `_zero` and `_one` have the node that a bit
    leads to, or -2 less the symbol. A row has four bytes for each byte that may come next: the
    state after it, how many symbols it completes (two at most, as none is shorter than five bits),
    and these.
    """

    __slots__ = ("_ends", "_one", "_rows", "_zero")

    def __init__(self) -> None:
        self._zero: list[int] = [-1]
        self._one: list[int] = [-1]
        codes = hpack.huffman_constants.REQUEST_CODES
        lengths = hpack.huffman_constants.REQUEST_CODES_LENGTH
        for symbol in range(_EOS + 1):
            self._plant(symbol, codes[symbol], lengths[symbol])
        # Padding is the beginning of EOS, which is ones, and shorter than a byte.
        self._ends = {0}
        state = 0
        for _ in range(7):
            state = self._one[state]
            self._ends.add(state)
        self._rows: list[bytes] = [b""] * len(self._zero)

    def _plant(self, symbol: int, code: int, length: int) -> None:
        state = 0
        for place in range(length - 1, -1, -1):
            side = self._one if code >> place & 1 else self._zero
            if place == 0:
                side[state] = -2 - symbol
            elif side[state] >= 0:
                state = side[state]
            else:
                self._zero.append(-1)
                self._one.append(-1)
                side[state] = state = len(self._zero) - 1

    def decode(self, data: bytes) -> bytes:
        """Raises RemoteProtocolError for EOS inside, or wrong padding."""
        rows = self._rows
        state: i64 = 0
        text: list[int] = []
        size: i64 = len(data)
        place: i64 = 0
        while place < size:
            row = rows[state]
            if not row:
                row = self._row(state)
            at: i64 = data[place] << 2
            place += 1
            state = row[at]
            count: i64 = row[at + 1]
            if count:
                text.append(row[at + 2])
                if count > 1:
                    if count == _ENDED:
                        raise broken("a Huffman string holds its end")
                    text.append(row[at + 3])
        if state not in self._ends:
            raise broken("a Huffman string is not padded as it has to be")
        return bytes(text)

    def _row(self, state: int) -> bytes:
        """Found when it is first needed: all of them would take a tenth of a second."""
        row = bytearray()
        for byte in range(256):
            at, found = state, bytearray()
            count = 0
            for place in range(7, -1, -1):
                at = self._one[at] if byte >> place & 1 else self._zero[at]
                if at == -2 - _EOS:
                    count, at = _ENDED, 0
                    break
                if at < 0:
                    found.append(-2 - at)
                    count += 1
                    at = 0
            row += bytes((at, count)) + bytes(found).ljust(2, b"\0")[:2]
        made = bytes(row)
        self._rows[state] = made
        return made


_huffman = _Huffman()


# ---- blocks


class FieldDecoder:
    """Decodes the blocks of one connection, in order. `max_list` bounds a decoded list in bytes (32
    more per field, RFC 9113 section 6.5.2). `changes` counts what was done to the dynamic table.
    """

    __slots__ = ("_entries", "_limit", "_max_list", "_size", "changes")

    def __init__(self, max_list: int) -> None:
        self._max_list = max_list
        self._entries: list[Pair] = []  # the newest last
        self._size = 0
        self._limit = TABLE_SIZE
        self.changes = 0

    def decode(self, block: bytes) -> tuple[Pair, ...]:
        """The fields. Raises RemoteProtocolError; the connection cannot go on after that."""
        pairs: list[Pair] = []
        offset, size, left = 0, len(block), self._max_list
        try:
            while offset < size:
                first = block[offset]
                offset += 1
                if first & 0x80:
                    index = first & 0x7F
                    if index == 0x7F:
                        index, offset = _integer(block, offset, 0x7F)
                    pair = STATIC[index - 1] if 0 < index <= _STATIC_COUNT else self._entry(index)
                elif first & 0xE0 == 0x20:
                    if pairs:
                        raise broken("a table size update follows a field")
                    limit = first & 0x1F
                    if limit == 0x1F:
                        limit, offset = _integer(block, offset, 0x1F)
                    self._resize(limit)
                    continue
                else:
                    is_kept = first & 0x40
                    most = 0x3F if is_kept else 0x0F
                    index = first & most
                    if index == most:
                        index, offset = _integer(block, offset, most)
                    if not index:
                        name, offset = _string(block, offset)
                    elif index <= _STATIC_COUNT:
                        name = STATIC[index - 1][0]
                    else:
                        name = self._entry(index)[0]
                    value, offset = _string(block, offset)
                    pair = (name, value)
                    if is_kept:
                        self._add(pair)
                left -= len(pair[0]) + len(pair[1]) + _ENTRY_OVERHEAD
                if left < 0:
                    raise RemoteProtocolError(
                        "the header list is too long", http_status=431, h2_code=ENHANCE_YOUR_CALM
                    )
                pairs.append(pair)
        except IndexError:
            raise broken("it is cut short") from None
        return tuple(pairs)

    def _entry(self, index: int) -> Pair:
        """Of the dynamic table; 62 is the newest."""
        place = len(self._entries) - (index - _STATIC_COUNT)
        if index <= _STATIC_COUNT or place < 0:
            raise broken(f"field {index} is in neither table")
        return self._entries[place]

    def _add(self, pair: Pair) -> None:
        self.changes += 1
        cost = len(pair[0]) + len(pair[1]) + _ENTRY_OVERHEAD
        self._evict(self._limit - cost)
        if cost <= self._limit:  # else there is none at all any more
            self._entries.append(pair)
            self._size += cost

    def _resize(self, limit: int) -> None:
        if limit > TABLE_SIZE:
            raise broken(f"a table of {limit} bytes")
        if limit != self._limit:
            self.changes += 1
        self._limit = limit
        self._evict(limit)

    def _evict(self, room: int) -> None:
        """Forget the oldest until at most `room` bytes are taken."""
        gone, entries = 0, self._entries
        while self._size > room and gone < len(entries):
            name, value = entries[gone]
            self._size -= len(name) + len(value) + _ENTRY_OVERHEAD
            gone += 1
        if gone:
            del entries[:gone]


def _integer(block: bytes, offset: int, most: int) -> tuple[int, int]:
    """An integer whose prefix was `most` (RFC 7541 section 5.1), and where it ends. IndexError when
    it is cut short.
    """
    value, shift = most, 0
    while True:
        byte = block[offset]
        offset += 1
        value += (byte & 0x7F) << shift
        if value > _LARGEST_INTEGER or shift > 28:
            raise broken("an integer is too large")
        if byte < 0x80:
            return value, offset
        shift += 7


def _string(block: bytes, offset: int) -> tuple[bytes, int]:
    """A string (RFC 7541 section 5.2), and where it ends. IndexError when it is cut short."""
    first = block[offset]
    offset += 1
    length = first & 0x7F
    if length == 0x7F:
        length, offset = _integer(block, offset, 0x7F)
    end = offset + length
    text = block[offset:end]
    if len(text) != length:
        raise IndexError
    return (_huffman.decode(text) if first & 0x80 else text), end
