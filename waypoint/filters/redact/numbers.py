"""Numbers with check digits: payment cards, IBANs, national identity numbers.

The check digits themselves are python-stdnum's. Here is what a number looks like where it is
written, and whether it must be named beside it: nine bare digits are a social security number
only where something says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType

from stdnum import iban, luhn, numdb

from waypoint.filters.redact.spans import Found, naming, stands_alone

_SEPARATORS = b" -"
_GROUPS = re.compile(rb"\d{4}(?P<s>[ -])\d{4}(?P=s)\d{4}(?P=s)\d{1,4}(?:(?P=s)\d{1,3})?")
_FIRST_GROUPS = re.compile(
    rb"(?:\d{4}([ -])(?:\d{4}\1\d{4}\1\d{4}|\d{6}\1\d{5})|\d{15,16})(?=[ -])"
)
_GROUPS_15 = re.compile(rb"\d{4}([ -])\d{6}\1\d{4,5}")


def check_card(view: bytes, start: int, end: int) -> Found:
    """Luhn, an issuer's prefix, the issuer's length, the usual groups (ISO/IEC 7812)."""
    start += not 48 <= view[start] <= 57
    if not stands_alone(view, start, end):
        return _after_group(view, start, end)
    text = view[start:end]
    if _is_card(text):
        return start, end
    first = _FIRST_GROUPS.match(text)  # a card, then an expiry date or a code
    if first and _is_card(first.group()):
        return start, start + first.end()
    return _after_group(view, start, end)


def _is_card(text: bytes) -> bool:
    digits = text.translate(None, _SEPARATORS)
    if len(digits) != len(text) and not (_GROUPS.fullmatch(text) or _GROUPS_15.fullmatch(text)):
        return False
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


def _after_group(view: bytes, start: int, end: int) -> int:
    """The next number begins with a separator, not in the middle of digits."""
    for place in range(start + 1, end):
        if view[place] in _SEPARATORS:
            return place
    return end


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
        taken += view[place] != 32
        place += 1
    if taken < size or (place < len(view) and view[place : place + 1].isalnum()):
        return start + 1
    text = view[start:place].decode("ascii")
    return (start, place) if iban.is_valid(text, check_country=False) else start + 1


_is_named_id = naming(
    rb"ssn|social|national|tax|\bnino|\bnin\b|identit|insurance|\bsin\b|\btin\b|\bbsn|passport"
    rb"|pesel|aadhaar|\bcpf|idnr|steuer|\bdni|\bnie\b|\bnhs|personnummer|\bnir\b|tfn|citizen"
    rb"|fiscal|\bid[ _-]?(?:number|no|card)"
)


def _by_stdnum(name: str) -> Callable[[str], bool]:
    def is_valid(text: str) -> bool:
        return bool(_module(name).is_valid(text))

    return is_valid


@cache
def _module(name: str) -> ModuleType:
    return import_module("stdnum." + name)


def _is_ssn(text: str) -> bool:
    digits = text.translate({32: None, 45: None})
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    if area[0] == "9":  # ITIN
        return int(group) in {*range(50, 66), *range(70, 89), *range(90, 93), *range(94, 100)}
    return area not in ("000", "666") and group != "00" and serial != "0000"


def _is_nino(text: str) -> bool:
    prefix = text[:2].upper()
    if prefix in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ"):
        return False
    return prefix[0] not in "DFIQUV" and prefix[1] not in "DFIOQUV"


def _shape(
    pattern: bytes, is_valid: Callable[[str], bool], *, is_named: bool = False
) -> tuple[re.Pattern[bytes], Callable[[str], bool], bool]:
    return re.compile(pattern), is_valid, is_named


_SHAPES = (
    _shape(rb"\d{3}([- ])\d{2}\1\d{4}", _is_ssn),
    _shape(rb"\d{9}", _is_ssn, is_named=True),
    _shape(rb"[A-Za-z]{2}[ -]?\d{2}[ -]?\d{2}[ -]?\d{2}[ -]?[A-Da-d]", _is_nino),
    _shape(rb"\d{3}([- ])\d{3}\1\d{4}", _by_stdnum("gb.nhs"), is_named=True),
    _shape(rb"\d{10}", _by_stdnum("gb.nhs"), is_named=True),
    _shape(rb"\d{8}-?[A-Za-z]", _by_stdnum("es.dni")),
    _shape(rb"[XYZxyz]-?\d{7}-?[A-Za-z]", _by_stdnum("es.nie")),
    _shape(rb"[12][ \d]{5,8}[ABab]?[ \d]{7,12}", _by_stdnum("fr.nir")),
    _shape(rb"[A-Za-z]{6}\d{2}[A-Za-z]\d{2}[A-Za-z]\d{3}[A-Za-z]", _by_stdnum("it.codicefiscale")),
    _shape(rb"\d{2} \d{3} \d{3} \d{3}", _by_stdnum("de.idnr")),
    _shape(rb"\d{11}", _by_stdnum("de.idnr"), is_named=True),
    _shape(rb"\d{11}", _by_stdnum("pl.pesel")),
    _shape(rb"\d{11}", _by_stdnum("no.fodselsnummer")),
    _shape(rb"\d{11}|\d{3}\.\d{3}\.\d{3}-\d{2}", _by_stdnum("br.cpf")),
    _shape(rb"\d{11}", _by_stdnum("tr.tckimlik")),
    _shape(rb"\d{9}", _by_stdnum("nl.bsn"), is_named=True),
    _shape(rb"\d{2}\.\d{2}\.\d{2}-\d{3}\.\d{2}", _by_stdnum("be.nn")),
    _shape(rb"(?:\d{2})?\d{6}[-+]\d{4}", _by_stdnum("se.personnummer")),
    _shape(rb"\d{6}-\d{4}", _by_stdnum("dk.cpr"), is_named=True),
    _shape(rb"\d{6}[-+A-F]\d{3}[0-9A-Z]", _by_stdnum("fi.hetu")),
    _shape(rb"[2-9]\d{3}([ -])\d{4}\1\d{4}", _by_stdnum("in_.aadhaar")),
    _shape(rb"[2-9]\d{11}", _by_stdnum("in_.aadhaar"), is_named=True),
    _shape(rb"\d{3}([- ])\d{3}\1\d{3}", _by_stdnum("ca.sin")),
    _shape(rb"\d{3} \d{3} \d{3}", _by_stdnum("au.tfn"), is_named=True),
    _shape(rb"\d{17}[0-9Xx]", _by_stdnum("cn.ric")),
    _shape(rb"\d{6}-[1-8]\d{6}", _by_stdnum("kr.rrn")),
    _shape(rb"\d{13}", _by_stdnum("za.idnr")),
    _shape(rb"756\.\d{4}\.\d{4}\.\d{2}|756\d{10}", _by_stdnum("ch.ssn")),
    _shape(rb"\d{7}[A-Wa-w][A-Ia-iWw]?", _by_stdnum("ie.pps")),
    _shape(rb"[A-Za-z]{4}\d{6}[HMhm][A-Za-z]{5}[A-Za-z0-9]\d", _by_stdnum("mx.curp")),
    _shape(rb"\d{1,2}\.\d{3}\.\d{3}-[0-9kK]", _by_stdnum("cl.rut")),
)


def check_national_id(view: bytes, start: int, end: int) -> Found:
    """One of the shapes, its check digits or forbidden ranges, and its name where digits alone say
    too little.
    """
    start += not view[start : start + 1].isalnum()
    if end - start in _ALWAYS_NAMED and not _is_named_id(view, start) and view[start:end].isdigit():
        return end
    if not stands_alone(view, start, end):
        return _after_group(view, start, end)
    text = view[start:end]
    shapes = _BY_DIGITS.get(len(text), ()) if text.isdigit() else _SHAPES
    if not shapes:
        return end
    written = text.decode("ascii")
    is_named: bool | None = None
    for pattern, is_valid, must_be_named in shapes:
        if not pattern.fullmatch(text):
            continue
        if must_be_named:
            if is_named is None:
                is_named = _is_named_id(view, start)
            if not is_named:
                continue
        if is_valid(written):
            return start, end
    return _after_group(view, start, end)


_ALWAYS_NAMED = (9, 10, 12)
_BY_DIGITS = {
    size: tuple(shape for shape in _SHAPES if shape[0].fullmatch(b"7561" + b"2" * (size - 4))
                or shape[0].fullmatch(b"1990" + b"2" * (size - 4))
                or shape[0].fullmatch(b"2990" + b"2" * (size - 4)))
    for size in (8, 9, 10, 11, 12, 13, 15, 18)
}  # fmt: skip
"""The shapes that bare digits can have, by how many there are."""
