"""Numbers with check digits that are the same everywhere: payment cards and IBANs.

The check digits themselves are python-stdnum's. Here is what a number looks like where it is
written.
"""

from __future__ import annotations

import re
from functools import cache

from stdnum import iban, luhn, numdb

from waypoint.filters.redact.spans import SEPARATORS, Found, after_group, naming, stands_alone

_is_named_card = naming(rb"card|\bpan\b|visa|maestro|master|diners|credit|debit|\bcc\b|payment")
BLANKS = rb"\xc2\xa0|\xe2\x80[\x80-\x8b\xaf]"
"""Blanks of typography, in UTF-8: no-break, thin, figure and others."""
ODD = rb"(?:[._/]| - |  |\xe2\x80[\x90-\x94]|" + BLANKS + rb")"
"""What stands between the groups of a card beside one blank or dash."""
_ODD_GROUPS = re.compile(
    rb"\d{4}(?P<s>" + ODD + rb")(?:\d{4}(?P=s)\d{4}(?P=s)\d{4}(?:(?P=s)\d{1,3})?"
    rb"|\d{6}(?P=s)\d{4,5})"
)
_NOT_DIGIT = bytes(byte for byte in range(256) if not 48 <= byte <= 57)
_NOT_LETTER = bytes(byte for byte in range(256) if not bytes((byte,)).isalnum())
_GROUPS = re.compile(rb"\d{4}(?P<s>[ -])\d{4}(?P=s)\d{4}(?P=s)\d{1,4}(?:(?P=s)\d{1,3})?")
_FIRST_GROUPS = re.compile(
    rb"(?:\d{4}([ -])(?:\d{4}\1\d{4}\1\d{4}|\d{6}\1\d{5})|\d{15,16})(?=[ -])"
)
_GROUPS_15 = re.compile(rb"\d{4}([ -])\d{6}\1\d{4,5}|62\d{4}[ -]\d{13}")


def check_card(view: bytes, start: int, end: int) -> Found:
    """Luhn, an issuer's prefix, the issuer's length, the usual groups (ISO/IEC 7812)."""
    start += not 48 <= view[start] <= 57
    if not stands_alone(view, start, end):
        return after_group(view, start, end)
    text = view[start:end]
    digits = text.translate(None, _NOT_DIGIT)
    size = len(digits)
    if _ODD_GROUPS.fullmatch(text) and _is_good(digits):
        return start, end
    if _is_card(text):
        # Odd lengths are hardly issued any more, and what else has them is common.
        if len(text) not in (12, 13, 14) or _is_named_card(view, start):
            return start, end
        return end
    if 15 <= size <= 16 and _is_good(digits) and _is_named_card(view, start):
        return start, end  # whatever its groups
    first = _FIRST_GROUPS.match(text)  # a card, then an expiry date or a code
    if first and _is_card(first.group()):
        return start, start + first.end()
    return after_group(view, start, end)


def _is_card(text: bytes) -> bool:
    digits = text.translate(None, SEPARATORS)
    if len(digits) != len(text) and not (_GROUPS.fullmatch(text) or _GROUPS_15.fullmatch(text)):
        return False
    return _is_good(digits)


def _is_good(digits: bytes) -> bool:
    return _is_issued(digits) and len(set(digits)) > 1 and luhn.is_valid(digits.decode())


def _is_issued(digits: bytes) -> bool:
    size, two, three, four = len(digits), int(digits[:2]), int(digits[:3]), int(digits[:4])
    if digits[0] == 52:  # 4: Visa
        return size in (13, 16, 19)
    if 51 <= two <= 55 or 2221 <= four <= 2720:  # Mastercard
        return size == 16
    if two in (34, 37):  # American Express
        return size == 15
    if two == 36 or 300 <= three <= 305 or two in (38, 39):  # Diners Club
        return 14 <= size <= 19
    if four == 6011 or two == 65 or 644 <= three <= 649 or two == 62:  # Discover, UnionPay
        return 16 <= size <= 19
    if 3528 <= four <= 3589:  # JCB
        return 16 <= size <= 19
    if 2200 <= four <= 2204:  # Mir
        return 16 <= size <= 19
    return two in (50, 56, 57, 58, 60, 63, 67) and 12 <= size <= 19  # Maestro, RuPay


@cache
def _iban_size(country: str) -> int:
    """Characters of that country's IBAN; 0: no such country."""
    found = numdb.get("iban").info(country)[0][1].get("bban", "")
    sizes = [int(part) for part in re.findall(r"(\d+)!?[anc]", found)]
    return 4 + sum(sizes) if sizes else 0


def check_iban(view: bytes, start: int, end: int) -> Found:
    """The country's length, then mod 97 (ISO 13616); words after it are not taken along."""
    size = _iban_size(view[start : start + 2].upper().decode("ascii"))
    if not size:
        return start + 1
    taken, place = 0, start
    while place < end and taken < size:
        taken += view[place] not in _NOT_LETTER
        place += 1
    if taken < size or (place < len(view) and view[place : place + 1].isalnum()):
        return start + 1
    text = view[start:place].translate(None, _NOT_LETTER).decode("ascii")
    return (start, place) if iban.is_valid(text, check_country=False) else start + 1
