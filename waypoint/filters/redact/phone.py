"""Telephone numbers: E.164 with a plus, North American, national with a leading nought, and bare
digits that are called a phone. Groups and lengths decide; there is no table of numbering plans.
"""

from __future__ import annotations

import re

from waypoint.filters.redact.spans import Found, is_word, naming, stands_alone

_EXTENSION = rb"(?: ?(?:x|ext\.?) ?\d{1,5})?"
PHONE = (
    rb"\+\(?\d{1,4}\)?(?:[ ./-]{0,2}\(?\d{1,8}\)?){1,7}"
    + _EXTENSION
    + rb"|(?:\b(?:00)?1[ .-])?(?:\(\d{3}\)[ -]?|\b\d{3}[ .-])\d{3}[ .-]\d{4}"
    + _EXTENSION
    + rb"|\b00[1-9](?:[ ./-]?\(?\d{1,8}\)?){2,7}"
    rb"|(?:\(0\d{1,5}\)|\b0[1-9]\d{0,4})(?:[ ./-]{1,2}\d{2,8}){1,5}\b"
    rb"|\(\d{2,4}\)[ -]?\d{3,5}[ -]?\d{4}\b|\b1[3-9]\d[ -]\d{4}[ -]\d{4}\b"
    rb"|\b[6-9]\d{4} \d{5}\b"
    rb"|\b8[ -]?\(?\d{3}\)?[ -]?\d{3}[ -]\d{2}[ -]\d{2}\b"
    rb"|(?:^|[^0-9A-Za-z_.])(?:07[1-9]\d{8}|00[1-9]\d{10,12})\b"
)
"""What needs no name; the others are `named_numbers`'."""
PHONE_NAMES = (
    rb"phone|mobile|cell|fax|\btel|[._-]tel|call|contact|whats|sms|handy|msisdn|dial|telef|movil"
    rb"|fono|nummer"
)
_DATE = re.compile(rb"\d{1,2}([-/.])\d{1,2}\1\d{4}|\d{4}([-/.])\d{1,2}\2\d{1,2}")
_is_named = naming(PHONE_NAMES)
_NANP = re.compile(rb"(?:(?:00)?1[ .-])?\(?(\d{3})\)?[ .-]?(\d{3})[ .-]\d{4}")
_KNOWN = re.compile(
    rb"\((?!0)\d{2,4}\)[ -]?\d{3,5}[ -]?\d{4}|1[3-9]\d([ -])\d{4}\1\d{4}|[6-9]\d{4} \d{5}"
    rb"|8([ -]?)\(?\d{3}\)?\2?\d{3}[ -]\d{2}[ -]\d{2}"
)
"""Brazil and others with an area in brackets, China, India, Russia."""
_EXTENDED = re.compile(rb" ?(?:x|ext\.?) ?\d{1,5}\Z")
_LAST_GROUP = re.compile(rb"[ ./()-]*\d+[ ./()-]*\Z")
_NOT_DIGIT = bytes(byte for byte in range(256) if not 48 <= byte <= 57)


def check_phone(view: bytes, start: int, end: int) -> Found:
    """8 to 15 digits after a plus; with a known shape; or any 7 to 14 that are called a phone."""
    if view[start] != 43 and (view[start] != 40 or b")" not in view[start:end]):
        start += not 48 <= view[start] <= 57  # the byte before bare digits
    text = view[start:end].rstrip(b" ./-(")
    end = start + len(text)
    if text.isdigit():
        return _check_bare(view, start, end, text)
    extension = _EXTENDED.search(text)
    main = text[: extension.start()] if extension else text
    digits = main.translate(None, _NOT_DIGIT)
    before = view[max(0, start - 1) : start]
    if text[:1] == b"+":
        if is_word(before) or before in (b"/", b"+", b"=") or is_word(view[end : end + 1]):
            return start + 1
        while len(digits) > 15 and not extension:  # what follows is no part of it
            text = _LAST_GROUP.sub(b"", text)
            end, digits = start + len(text), text.translate(None, _NOT_DIGIT)
        is_one = 8 <= len(digits) <= 15 and digits[0] != 48 and len(set(digits)) > 1
        return (start, end) if is_one else start + 1
    if _DATE.match(text) or not stands_alone(view, start, end):
        return _next_start(text, start, end)
    north_american = _NANP.fullmatch(main)
    if north_american:
        area, exchange = north_american.group(1), north_american.group(2)
        if area[0] > 49 and area not in (b"000", b"999") and exchange != b"000":
            return start, end
    if digits[:2] == b"00":
        return (start, end) if 10 <= len(digits) <= 17 else _next_start(text, start, end)
    if digits[:1] == b"0":
        size = len(digits)
        if 9 <= size <= 12 or (digits[:3] == b"011" and 13 <= size <= 18):  # from North America
            return start, end
        is_short = 7 <= size <= 8 and _is_named(view, start)
        return (start, end) if is_short else _next_start(text, start, end)
    if _KNOWN.fullmatch(text):
        return start, end
    if 7 <= len(digits) <= 14 and _is_named(view, start):
        return start, end
    return _next_start(text, start, end)


def _check_bare(view: bytes, start: int, end: int, text: bytes) -> Found:
    """A British mobile, an international prefix; all else must be called a phone."""
    is_one = text[0] == 48 and _BARE.fullmatch(text)
    if not is_one and not (7 <= len(text) <= 15 and _is_named(view, start)):
        return end
    return (start, end) if stands_alone(view, start, end) else end


_BARE = re.compile(rb"07[1-9]\d{8}|00[1-9]\d{10,12}")


def _next_start(text: bytes, start: int, end: int) -> int:
    """Where the next group begins: no shape starts in the middle of one."""
    found = re.search(rb"[ ./()-]", text[1:])
    return start + 1 + found.start() if found else max(end, start + 1)
