"""What sensitive values look like: one RE2 pattern for each kind, and a check that it is one.

The pattern finds candidates in linear time; the check, in Python, sees only those: check digits,
lengths, neighbours, and for numbers without a shape of their own the words before them ("phone").
A check answers with the span that is the value, or with the place where the search goes on.

The text is a `view` (`views`): bytes with escapes undone, quotes of JSON as newlines. No pattern
here can match a byte of `DELIMITERS`, save that of private keys, which ends are found by hand; so
a stream may be cut at any of those bytes (`stream`).
"""

from __future__ import annotations

import binascii
import ipaddress
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from mesh.model.l7_policy import DetectorKind
from waypoint.filters.redact.national_ids import NATIONAL, check_national_id
from waypoint.filters.redact.numbers import BLANKS, ODD, check_card, check_iban
from waypoint.filters.redact.phone import PHONE, check_phone
from waypoint.filters.redact.spans import CONTEXT_BYTES, Found, is_word
from waypoint.filters.redact.token_shapes import TOKENS

DELIMITERS = b'\x00\t\n\r",;<>{}[]|`\\'
MAX_KEY_BYTES = 16 << 10
"""Of a private key in PEM; an RSA key of 16384 bits has 12.7 kB."""


@dataclass(frozen=True, slots=True)
class Detector:
    """One kind. `first` holds every byte a match can begin with. `check(view, start, end)`."""

    kind: DetectorKind
    pattern: bytes
    check: Callable[[bytes, int, int], Found]
    first: frozenset[int]


_DIGITS = b"0123456789"
_UPPER = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WORD = _DIGITS + _UPPER + _UPPER.lower() + b"_"
_HIGH = bytes(range(0x80, 0x100))

_EMAIL = (
    rb"[A-Za-z0-9._%+'\x80-\xff-]{1,64}(?:@|%40)"
    rb"(?:[A-Za-z0-9\x80-\xff](?:[A-Za-z0-9\x80-\xff-]*[A-Za-z0-9\x80-\xff])?\.){1,12}"
    rb"[A-Za-z\x80-\xff][A-Za-z0-9\x80-\xff-]*[A-Za-z\x80-\xff]"
)
_NOT_TOP_LEVEL = frozenset(
    b"png jpg jpeg gif svg webp ico bmp css js mjs ts json html htm xml txt md pdf zip gz tgz "
    b"tar py rb go rs java php yaml yml woff woff2 ttf mp3 mp4 local localhost internal".split()
) - {b"md", b"py", b"rs", b"zip", b"local", b"internal"}


def check_email(view: bytes, start: int, end: int) -> Found:
    """RFC 5321 lengths, a top level that is no file ending, and not the user of `git@host:`."""
    at = view.find(b"@", start, end)
    width = 1
    quoted = view.find(b"%40", start, end)
    if quoted >= 0 and (at < 0 or quoted < at):
        at, width = quoted, 3
    domain = view[at + width : end]
    top = domain[domain.rfind(b".") + 1 :].lower()
    if len(domain) > 253 or len(top) > 24 or top in _NOT_TOP_LEVEL:
        return at + width
    local = view[max(start, at - 64) : at].lstrip(b".%'-")
    if not local or (local == b"git" and view[end : end + 1] == b":"):
        return at + width
    return at - len(local), end


_IPV4 = rb"\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b"
_H = rb"[0-9A-Fa-f]{1,4}"
_GROUPS = _H + rb"(?::" + _H + rb"){0,6}"
_IPV6 = (
    rb"\b(?:" + _H + rb":){7}" + _H + rb"\b"
    rb"|(?:\b" + _GROUPS + rb")?::(?:" + _H + rb":){0,6}\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b"
    rb"|(?:\b" + _GROUPS + rb")?::(?:" + _GROUPS + rb")?"
)


def check_ip(view: bytes, start: int, end: int) -> Found:
    """An address that parses, alone: no part of a longer dotted number, version or C++ name."""
    before, after = view[max(start - 1, 0) : start], view[end : end + 2]
    text = view[start:end]
    if is_word(before) or before in (b".", b":", b"-") or is_word(after[:1]):
        return start + 1
    goes_on = after[:1] == b"." or (after[:1] == b"-" and not after[1:].isdigit())
    if goes_on and is_word(after[1:]) and b":" not in text:
        return end
    if b":" in text and (after[:1] == b":" or not any(48 <= byte <= 57 for byte in text)):
        return end
    if view[max(start - 2, 0) : start].lower() in (b"/v", b" v"):
        return end
    try:
        ipaddress.ip_address(text.decode("ascii"))
    except ValueError:
        return start + 1
    return start, end


_PART = rb"[A-Za-z0-9_-]"
_JWT = (
    rb"\be[yw]" + _PART + rb"{8,}\.(?:" + _PART + rb"{2,}(?:\." + _PART + rb"*){1,3}"
    rb"|(?:\." + _PART + rb"+){3})"
)
"""The second part of a JWE is empty when its key was agreed on."""


def check_jwt(view: bytes, start: int, end: int) -> Found:
    """The first part is a JSON object that names an algorithm (RFC 7515, 7516)."""
    head = view[start : view.find(b".", start, end)]
    try:
        found = json.loads(binascii.a2b_base64(head.translate(_URL_SAFE) + b"=="))
    except (ValueError, RecursionError):
        return end
    if not isinstance(found, dict) or not ({"alg", "typ", "enc"} & found.keys()):
        return end
    return start, end


_URL_SAFE = bytes.maketrans(b"-_", b"+/")

_CLOUD = (
    rb"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b"
    rb"|(?:^|[^A-Za-z0-9/+])[A-Za-z0-9/+]{40}(?:$|[^A-Za-z0-9/+=])"
    rb"|\b(?:AccountKey|SharedAccessKey)=[A-Za-z0-9+/]{42,86}={1,2}"
    rb"|\bsig=[A-Za-z0-9%+/_-]{40,90}=?"
    rb"|\b[0-9A-Za-z_~.]{3}\dQ~[0-9A-Za-z_~.-]{31,34}|" + TOKENS
)
_DIGIT = re.compile(rb"\d")
_AWS_NAME = re.compile(rb"(?i)secret|aws")


_SECRET = re.compile(rb"[^A-Za-z0-9/+]?([A-Za-z0-9/+]{40})[^A-Za-z0-9/+=]?")


def check_cloud_key(view: bytes, start: int, end: int) -> Found:
    """Formats with a prefix are enough; forty characters of base64 must be called a secret, mix
    cases and digits (a SHA-1 does not). `AccountKey=` and `sig=` (of a SAS) stay.
    """
    text = view[start:end]
    if text.startswith((b"AccountKey=", b"SharedAccessKey=", b"sig=")):
        return start + text.index(b"=") + 1, end
    secret = _SECRET.fullmatch(text)
    if secret is None:
        is_slug = text.startswith(b"sk-") and len(_DIGIT.findall(text)) < 2
        return end if is_slug else (start, end)
    value = secret[1]
    start, end = start + secret.start(1), start + secret.end(1)
    before = view[max(0, start - CONTEXT_BYTES) : start]
    if value.startswith(b"gh"):
        return start, end
    is_mixed = value != value.lower() and value != value.upper() and re.search(rb"\d", value)
    return (start, end) if is_mixed and _AWS_NAME.search(before) else start + 1


_PRIVATE = (
    rb"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    rb"|---- BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY ----"
    rb"|\bPuTTY-User-Key-File-\d: |\bAGE-SECRET-KEY-1[A-Z0-9]{58}\b"
)
_PEM_END = re.compile(rb"---- ?-?END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?(?:-| )----")
_PUTTY_END = re.compile(rb"Private-MAC: [0-9a-f]{40,64}")
_PEM_BODY = re.compile(rb"[A-Za-z0-9+/=\s:,.()-]*")


def check_private_key(view: bytes, start: int, end: int) -> Found:
    """From BEGIN to END; without an END all that could be of a key, `MAX_KEY_BYTES` at most."""
    if view.startswith(b"AGE-", start):
        return start, end
    limit = start + MAX_KEY_BYTES
    closing = _PEM_END if view.startswith(b"----", start) else _PUTTY_END
    found = closing.search(view, end, limit)
    if found:
        return start, found.end()
    rest = _PEM_BODY.match(view, end, limit)
    return start, len(view[:limit][: rest.end() if rest else end].rstrip())


def _detector(
    kind: DetectorKind, pattern: bytes, check: Callable[[bytes, int, int], Found], first: bytes
) -> Detector:
    return Detector(kind, pattern, check, frozenset(first))


_ALONE = rb"(?:^|[^0-9A-Za-z_.])"
"""RE2 has no look-behind: the byte before digits is matched too, and the check steps over it."""
_CARD = (
    _ALONE + rb"(?:[2-6]\d{3}(?:[ -]?\d){8,15}|[2-6]\d{3}(?:" + ODD + rb"\d{4}){3}"
    rb"(?:" + ODD + rb"\d{1,3})?|3\d{3}" + ODD + rb"\d{6}" + ODD + rb"\d{4,5})\b"
)
_BETWEEN = rb"(?:[ .-]|" + BLANKS + rb")"
_IBAN = (
    rb"\b[A-Za-z]{2}\d{2}(?:[A-Za-z0-9]{11,30}"
    rb"|(?:" + _BETWEEN + rb"[A-Za-z0-9]{4}){2,7}(?:" + _BETWEEN + rb"[A-Za-z0-9]{1,3})?)\b"
)
_LETTERS = _UPPER + _UPPER.lower()
_ANY_BUT_WORDS = bytes(byte for byte in range(256) if byte not in _LETTERS + b"_")

BUILT_IN: dict[DetectorKind, Detector] = {
    each.kind: each
    for each in (
        _detector("private-key", _PRIVATE, check_private_key, b"-PA"),
        _detector("cloud-key", _CLOUD, check_cloud_key, bytes(range(256))),
        _detector("jwt", _JWT, check_jwt, b"e"),
        _detector("email", _EMAIL, check_email, _WORD + b".%+'-" + _HIGH),
        _detector("iban", _IBAN, check_iban, _LETTERS),
        _detector("payment-card", _CARD, check_card, _ANY_BUT_WORDS),
        _detector("national-id", NATIONAL, check_national_id, bytes(range(256))),
        _detector("ip", rb"(?:" + _IPV4 + rb"|" + _IPV6 + rb")", check_ip, _WORD + b":"),
        _detector("phone", PHONE, check_phone, _ANY_BUT_WORDS),
    )
}
"""By kind, in the order in which two that begin at the same byte are asked."""
