r"""Text as its reader will see it: escapes undone, with the way back to the bytes that were sent.

A detector looks at the view; what is rewritten are the bytes behind it. `\u0040`, `%40` and
`&#64;` are all an at sign, and so are `\\u0040` (JSON in a JSON string) and `%2540`: every level of
escaping is undone at once. Structure (quotes, markup, `&` of forms) becomes newlines, which no
pattern crosses and at which `^` and `$` of custom patterns hold: they mean one value.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote_from_bytes


class View:
    """`text` of the view. `raw_start` and `raw_end` lead back."""

    __slots__ = ("raw_sizes", "raws", "sizes", "starts", "text")

    def __init__(
        self,
        text: bytes,
        starts: list[int] | None = None,
        sizes: list[int] | None = None,
        raws: list[int] | None = None,
        raw_sizes: list[int] | None = None,
    ) -> None:
        self.text = text
        self.starts = starts
        """Where each undone escape begins in the view; None: the view is as long as the bytes."""
        self.sizes = sizes
        self.raws = raws
        self.raw_sizes = raw_sizes

    def raw_start(self, place: int) -> int:
        """The byte at which the character at `place` begins."""
        return self._raw(place, is_end=False)

    def raw_end(self, place: int) -> int:
        """The byte after the character before `place`."""
        return self._raw(place, is_end=True)

    def _raw(self, place: int, *, is_end: bool) -> int:
        if not self.starts:
            return place
        assert self.sizes is not None  # noqa: S101
        assert self.raws is not None  # noqa: S101
        assert self.raw_sizes is not None  # noqa: S101
        index = bisect_right(self.starts, place - is_end) - 1
        if index < 0:
            return place
        within = place - self.starts[index]
        if within < self.sizes[index] or (is_end and within == self.sizes[index]):
            return self.raws[index] + (self.raw_sizes[index] if is_end else 0)
        return self.raws[index] + self.raw_sizes[index] + within - self.sizes[index]


@dataclass(frozen=True, slots=True)
class Syntax:
    """One way of escaping. `boundaries`: bytes after which no match goes on, nor any escape.

    `narrow` are those that even a custom pattern cannot cross. `unfinished` finds what may be the
    begin of an escape at the end. `write` escapes what is put in a value's place.
    """

    name: str
    look: Callable[[bytes], View]
    boundaries: bytes
    narrow: bytes
    unfinished: re.Pattern[bytes] | None
    write: Callable[[bytes], bytes]


def _undo(
    raw: bytes,
    escapes: re.Pattern[bytes],
    decode: Callable[[re.Match[bytes]], bytes],
    plain: Callable[[bytes], bytes],
) -> View:
    pieces: list[bytes] = []
    starts: list[int] = []
    sizes: list[int] = []
    raws: list[int] = []
    raw_sizes: list[int] = []
    done = place = 0
    for found in escapes.finditer(raw):
        begin, end = found.span()
        decoded = decode(found)
        pieces.append(raw[done:begin])
        pieces.append(decoded)
        place += begin - done
        starts.append(place)
        sizes.append(len(decoded))
        raws.append(begin)
        raw_sizes.append(end - begin)
        place += len(decoded)
        done = end
    pieces.append(raw[done:])
    return View(plain(b"".join(pieces)), starts, sizes, raws, raw_sizes)


def _same(text: bytes) -> bytes:
    return text


_JSON_ESCAPE = re.compile(rb"\\{1,8}(?:u([0-9A-Fa-f]{4})|([^u\\]))", re.DOTALL)
_JSON_LETTERS = {b"n": b"\n", b"r": b"\n", b"t": b"\t", b"b": b" ", b"f": b" ", b'"': b"\n"}


def _json_char(found: re.Match[bytes]) -> bytes:
    code = found.group(1)
    if code:
        return chr(int(code, 16)).encode("utf-8", "surrogatepass")
    letter: bytes = found.group(2)
    return _JSON_LETTERS.get(letter, letter)


def _quotes_as_lines(text: bytes) -> bytes:
    return text.replace(b'"', b"\n")


# `find` for `in`, which asks whether it is given a number, by an exception.
def _look_json(raw: bytes) -> View:
    if raw.find(b"\\") >= 0:
        return _undo(raw, _JSON_ESCAPE, _json_char, _quotes_as_lines)
    return View(raw.replace(b'"', b"\n"))


def _look_text(raw: bytes) -> View:
    return _undo(raw, _JSON_ESCAPE, _json_char, _same) if raw.find(b"\\") >= 0 else View(raw)


_JSON_UNSAFE = re.compile(rb'[\x00-\x1f"\\]')


def write_json(text: bytes) -> bytes:
    """Escaped as the inside of a JSON string (RFC 8259 section 7)."""
    return _JSON_UNSAFE.sub(lambda found: b"\\u%04x" % found.group()[0], text)


_PERCENT = re.compile(rb"%(?:25){0,4}([0-9A-Fa-f]{2})")
_FORM_PLAIN = bytes.maketrans(b"+", b" ")


def _percent_char(found: re.Match[bytes]) -> bytes:
    return bytes((int(found.group(1), 16),))


def _look_form(raw: bytes) -> View:
    plain = raw.translate(_FORM_LINES)
    if raw.find(b"%") < 0:
        return View(plain)
    return _undo(plain, _PERCENT, _percent_char, _same)


_FORM_LINES = bytes.maketrans(b"+&=", b" \n\n")


def write_form(text: bytes) -> bytes:
    """Percent-encoded, but for the star of masks."""
    return quote_from_bytes(text, safe="*").encode("ascii")


_ENTITY = re.compile(
    rb"&(?:amp;){0,4}(?:#0{0,8}([0-9]{1,7})|#[xX]0{0,8}([0-9A-Fa-f]{1,6})|([a-z]{2,6}));"
)
_NAMED = {b"quot": b"\n", b"apos": b"'", b"lt": b"\n", b"gt": b"\n", b"amp": b"&", b"nbsp": b" ",
          b"commat": b"@", b"period": b".", b"hyphen": b"-", b"plus": b"+"}  # fmt: skip


def _entity_char(found: re.Match[bytes]) -> bytes:
    if found.group(3):
        return _NAMED.get(found.group(3), b" ")
    code = int(found.group(1)) if found.group(1) else int(found.group(2), 16)
    return chr(code).encode("utf-8", "surrogatepass") if code < 0x110000 else b" "


_MARKUP_LINES = bytes.maketrans(b'<>"', b"\n\n\n")


def _look_xml(raw: bytes) -> View:
    plain = raw.translate(_MARKUP_LINES)
    return _undo(plain, _ENTITY, _entity_char, _same) if raw.find(b"&") >= 0 else View(plain)


_XML_UNSAFE = re.compile(rb"[<>&\"']")


def write_xml(text: bytes) -> bytes:
    """With the five characters that markup keeps for itself as entities."""
    return _XML_UNSAFE.sub(lambda found: b"&#%d;" % found.group()[0], text)


_UNFINISHED_JSON = re.compile(rb"\\{1,8}(?:u[0-9A-Fa-f]{0,3})?\Z")
_CONTROL = b"\x00\t\n\r"

JSON = Syntax("json", _look_json, _CONTROL + b'",<>{}[]|`', b'\n"', _UNFINISHED_JSON, write_json)
TEXT = Syntax("text", _look_text, _CONTROL + b'",;<>{}[]|`', b"\n", _UNFINISHED_JSON, _same)
FORM = Syntax(
    "form", _look_form, _CONTROL + b"&=,;<>", b"\n&=",
    re.compile(rb"%(?:25){0,4}2?[0-9A-Fa-f]?\Z"), write_form,
)  # fmt: skip
XML = Syntax(
    "xml", _look_xml, _CONTROL + b'",<>{}[]|`', b'\n<>"',
    re.compile(rb"&(?:amp;){0,4}#?[0-9A-Za-z]{0,16}\Z"), write_xml,
)  # fmt: skip
