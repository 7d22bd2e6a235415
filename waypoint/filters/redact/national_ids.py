"""National identity numbers: how each is written, and what proves that it is one.

A shape stands for one way of writing: 9 is a digit, A a letter, all else itself. The check digits
are python-stdnum's. A shape that says too little alone must be named beside it: nine bare digits
are a social security number only where something says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType

from stdnum import luhn

from waypoint.filters.redact.spans import Found, after_group, naming, stands_alone

ID_NAMES = (
    rb"ssn|social|national|\btax|[._-]tax|\bnino|\bnin\b|identi|insurance|\bsin\b|\btin\b|\bbsn"
    rb"|passport|pesel|aad?haa?r|\bcpf|idnr|steuer|\bdni|\bnie\b|\bnhs|person|\bnir\b|\btfn|citizen"
    rb"|fiscal|\bid[ _-]?(?:number|no|card)|burger|\bpan\b|\bcnp\b|\begn|\boib\b|\bamka|rodn"
    rb"|\bnif\b|\bnik\b|\bnric|\bcurp|\brut\b|\binn\b|snils|kimlik|isikukood|asmens|fodsel"
    rb"|kennitala|\bsvnr|\bcpr\b|\bssi\b|\bahv|\bcuit|\bcedula|\bidn\b|my ?number|teudat"
    rb"|\bsocsec|\bitin"
)
is_named_id = naming(ID_NAMES)
_is_numbered_thing = re.compile(
    rb"(?i)(?:order|invoice|ticket|track(?:ing)?|serial|batch|transaction|shipment|item|sku|parcel"
    rb"|account|message|request|event|session|build|version|time(?:stamp)?|bytes|count|total)"
    rb"[ _.-]?(?:id|no|nr|num|number)?[^0-9A-Za-z]{0,6}\Z|(?:\#|[/=]v?)\Z"
)
Check = Callable[[str], bool]


def _by_stdnum(name: str) -> Check:
    def is_valid(text: str) -> bool:
        return bool(_module(name).is_valid(text))

    return is_valid


@cache
def _module(name: str) -> ModuleType:
    return import_module("stdnum." + name)


def _is_ssn(text: str) -> bool:
    digits = text.replace("-", "").replace(" ", "")
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    if area[0] == "9":  # ITIN
        return int(group) in {*range(50, 66), *range(70, 89), *range(90, 93), *range(94, 100)}
    return area not in ("000", "666") and group != "00" and serial != "0000"


def _is_nino(text: str) -> bool:
    prefix, suffix = text[:2].upper(), text[-1].upper()
    if prefix in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ") or suffix not in "ABCD":
        return False
    return prefix[0] not in "DFIQUV" and prefix[1] not in "DFIOQUV"


_NRIC = (2, 7, 6, 5, 4, 3, 2)


def _is_nric(text: str) -> bool:
    """Singapore: weights, an offset by the century, a letter."""
    first = text[0].upper()
    if first not in "STFGM":
        return False
    total = sum(int(digit) * weight for digit, weight in zip(text[1:8], _NRIC, strict=True))
    total += {"T": 4, "G": 4, "M": 3}.get(first, 0)
    letters = {"S": "JZIHGFEDCBA", "T": "JZIHGFEDCBA", "M": "XWUTRQPNJLK"}.get(first, "XWUTRQPNMLK")
    return text[8].upper() == letters[total % 11]


def _is_snils(text: str) -> bool:
    digits = [int(char) for char in text if char.isdigit()]
    total = sum(digit * (9 - place) for place, digit in enumerate(digits[:9]))
    return total % 101 % 100 == digits[9] * 10 + digits[10]


def _is_pan(text: str) -> bool:
    return text.isupper() and _module("in_.pan").is_valid(text)


def _is_personnummer(text: str) -> bool:
    return _module("se.personnummer").is_valid(text)  # type: ignore[no-any-return]


def _is_swedish_bare(text: str) -> bool:
    return luhn.is_valid(text[-10:]) and _is_personnummer(f"{text[:-4]}-{text[-4:]}")


_ALONE: dict[str, tuple[Check, ...]] = {}
"""By shape: what proves it without a name."""
_NAMED: dict[str, tuple[Check, ...]] = {}
"""By shape: what proves it where it is named."""


def _add(shapes: str, *checks: Check | str, named: bool = False) -> None:
    table = _NAMED if named else _ALONE
    for shape in shapes.split("|"):
        made = tuple(_by_stdnum(each) if isinstance(each, str) else each for each in checks)
        table[shape] = table.get(shape, ()) + made


_add("999-99-9999|999 99 9999", _is_ssn)
_add("999999999", _is_ssn, "nl.bsn", "pt.nif", "ca.sin", "au.tfn", "il.idnr", "cz.rc", named=True)
_add("AA999999A|AA 99 99 99 A|AA-99-99-99-A|AA 999999 A|AA99 99 99 A|AA 99 99 99A", _is_nino)
_add("999 999 9999|999-999-9999", "gb.nhs", named=True)
_add("9999999999", "gb.nhs", "at.vnr", "bg.egn", "cz.rc", "dk.cpr", "ec.ci", "ua.rntrc",
     "is_.kennitala", _is_swedish_bare, named=True)  # fmt: skip
_add("99999999A|99999999-A|99999999 A", "es.dni")
_add("A9999999A", "es.nie", _is_nric)
_add("A-9999999-A|A9999999-A|A-9999999A", "es.nie")
_add("9 99 99 99 999 999 99|9 99 99 9A 999 999 99|999999999999999|999999A99999999", "fr.nir")
_add("AAAAAA99A99A999A", "it.codicefiscale")
_add("99 999 999 999", "de.idnr")
_add("99999999999", "pl.pesel", "no.fodselsnummer", "br.cpf", "tr.tckimlik")
_add("99999999999", "de.idnr", "ee.ik", "lt.asmens", "hr.oib", "gr.amka", "be.nn", _is_snils,
     named=True)  # fmt: skip
_add("999999 99999", "no.fodselsnummer")
_add("999999-99999", "lv.pvn", named=True)
_add("999.999.999-99", "br.cpf")
_add("99.99.99-999.99", "be.nn")
_add("999999-9999|999999+9999|99999999-9999", _is_personnummer)
_add("999999-9999", "is_.kennitala", "fi.hetu")
_add("999999-9999", "dk.cpr", named=True)
_add("999999999999", _is_swedish_bare, "in_.aadhaar", "jp.in_", "ru.inn", named=True)
_add("999999-999A|999999+999A|999999A999A|999999A9999", "fi.hetu")
_add("999999/9999", "cz.rc")
_add("999999/999", "cz.rc", named=True)
_add("9999.99.999|9999 99 999", "nl.bsn", named=True)
_add("999 999 999", "ca.sin", "au.tfn", "nl.bsn", "pt.nif", named=True)
_add("999-999-999", "ca.sin")
_add("9999 999999", "at.vnr", named=True)
_add("99999999 9 AA9", "pt.cc")
_add("9999999A|9999999AA", "ie.pps")
_add("9999 9999 9999|9999-9999-9999", "in_.aadhaar")
_add("9999 9999 9999|9999-9999-9999", "jp.in_", named=True)
_add("AAAAA9999A", _is_pan)
_add("999999999999999999|99999999999999999A", "cn.ric")
_add("999999-9999999", "kr.rrn")
_add("9999999999999", "za.idnr", "ro.cnp", "si.emso", "ch.ssn")
_add("9999999999999", "th.pin", named=True)
_add("756.9999.9999.99", "ch.ssn")
_add("9-9999-99999-99-9", "th.pin")
_add("999999-99-9999", "my.nric")
_add("99999-9999999-9", "pk.cnic")
_add("9999999999999999", "id.nik", named=True)
_add("999-999-999 99|999-999-999-99", _is_snils)
_add("AAAA999999AAAAAA99|AAAA999999AAAAAAA9", "mx.curp")
_add("99-99999999-9", "ar.cuit")
_add("99.999.999", "ar.dni", named=True)
_add("99.999.999-9|9.999.999-9|99.999.999-A|9.999.999-A", "cl.rut")
_add("99999999-9|9999999-9", "cl.rut", named=True)

_SHAPED = bytes.maketrans(
    b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", b"9" * 10 + b"A" * 52
)
_FIXED = {"756.9999.9999.99": "999.9999.9999.99"}
for _fixed, _shape in _FIXED.items():
    _ALONE[_shape] = _ALONE.pop(_fixed)


def _expression(shape: str) -> bytes:
    """The shape as RE2, runs counted."""
    parts = []
    for run in re.findall(r"9+|A+|.", shape):
        kind = {"9": rb"\d", "A": b"[A-Za-z]"}.get(run[0], re.escape(run[0]).encode())
        parts.append(kind + (b"{%d}" % len(run) if len(run) > 1 else b""))
    return b"".join(parts)


_GROUPED = sorted(
    (shape for shape in {*_ALONE, *_NAMED} if not shape.isdigit()), key=len, reverse=True
)
_DATE = rb"(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
NATIONAL = (
    rb"\b(?:" + b"|".join(_expression(shape) for shape in _GROUPED) + rb")\b"
    # Bare digits that prove themselves; timestamps in milliseconds have no such month.
    rb"|(?:^|[^0-9A-Za-z_.])(?:\d{11}|\d{2}" + _DATE + rb"\d{7}|\d{3}" + _DATE + rb"\d{6}|756\d{10}"
    rb"|(?:0[1-9]|[12]\d|3[01])(?:0[1-9]|1[0-2])\d{9}|[1278]\d{14}"
    rb"|[1-9]\d{5}(?:19|20)\d{2}" + _DATE + rb"\d{4})\b"
)


def check_national_id(view: bytes, start: int, end: int) -> Found:
    """One of the shapes, its check digits or forbidden ranges, and its name where digits alone say
    too little.
    """
    start += not view[start : start + 1].isalnum()
    text = view[start:end]
    shape = text.translate(_SHAPED).decode("ascii")
    alone, named = _ALONE.get(shape, ()), _NAMED.get(shape, ())
    if not (alone or named) or not stands_alone(view, start, end):
        return after_group(view, start, end)
    written = text.decode("ascii")
    is_named: bool | None = None
    if _any(alone, written):
        if not _is_part_or_other(view, start, end, shape) or is_named_id(view, start):
            return start, end
        is_named = False
    if named and is_named is None and is_named_id(view, start) and _any(named, written):
        return start, end
    return after_group(view, start, end)


def _any(checks: tuple[Check, ...], written: str) -> bool:
    return any(check(written) for check in checks)


def _is_part_or_other(view: bytes, start: int, end: int, shape: str) -> bool:
    """Whether groups go on before or after it, or bare digits are called something else."""
    if " " in shape and shape.replace(" ", "").isdigit():
        if view[end : end + 1] == b" " and view[end + 1 : end + 2].isdigit():
            return True
        return view[start - 1 : start] == b" " and view[max(0, start - 2) : start - 1].isdigit()
    return shape.isdigit() and bool(_is_numbered_thing.search(view, max(0, start - 32), start))
