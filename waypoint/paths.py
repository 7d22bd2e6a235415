"""Path normalisation (MeshConfig's pathNormalization): what policy judges, what is routed and what
the endpoint sees are the same path. Pure.

A dot segment that only some endpoints would find (`..;x`, `..%2f`, `%252e%252e/`, an overlong
encoding of it) has no normal form: the path is refused, unless normalization is switched off.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal
from urllib.parse import unquote_to_bytes

Mode = Literal["NONE", "BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES"]

_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})?")
_SLASHES = re.compile(rb"//+")
# Nothing to do: no escape, no backslash, no dot segment, no double slash.
_PLAIN = re.compile(rb"/(?:(?!/|\.\.?(?:/|;|\Z))[^%\\/]++/?+)*")
_HIDDEN = re.compile(rb"(?:^|/)\.\.?(?:;[^/]*)?(?:/|\Z)")
# Bytes that no UTF-8 has, but that lax decoders read as ASCII.
_OVERLONG = re.compile(
    rb"[\xc0\xc1][\x80-\xbf]|\xe0[\x80\x81][\x80-\xbf]|\xf0\x80[\x80\x81][\x80-\xbf]"
)
MOST_DECODINGS = 4


def decode_lax(path: bytes) -> bytes:
    """One decoding by somebody who takes overlong forms for what they mean."""
    decoded = unquote_to_bytes(path)
    return _OVERLONG.sub(_ascii, decoded) if _OVERLONG.search(decoded) else decoded


def _ascii(match: re.Match[bytes]) -> bytes:
    form = match[0]
    return bytes(((form[-2] & 1) << 6 | form[-1] & 0x3F,))


def normalizer(mode: Mode) -> Callable[[bytes], bytes | None]:
    """The function for a mode: a path without query in, its normal form out; None: refuse it."""

    def normalize(path: bytes) -> bytes | None:
        if _PLAIN.fullmatch(path) or path == b"*":
            return path
        if b"%00" in path:
            return None
        if mode == "NONE":
            return path
        if mode == "DECODE_AND_MERGE_SLASHES":
            path = re.sub(rb"%2[fF]|%5[cC]", b"/", path)
        decoded = _decode(path)
        if decoded is None:
            return None
        path = decoded.replace(b"\\", b"/")
        if mode != "BASE":
            path = _SLASHES.sub(b"/", path)
        path = _without_dots(path)
        return None if _hides_dots(path) else path

    return normalize


def _hides_dots(path: bytes) -> bool:
    """Whether somebody who decodes more than we do would find dot segments, or never an end."""
    for _ in range(MOST_DECODINGS):
        if _HIDDEN.search(path):
            return True
        decoded = decode_lax(path).replace(b"\\", b"/")
        if decoded == path:
            return False
        path = decoded
    return True


def _decode(path: bytes) -> bytes | None:
    """Unreserved characters out of their escapes; None when an escape is broken."""
    is_broken = False

    def one(match: re.Match[bytes]) -> bytes:
        nonlocal is_broken
        if match[1] is None:
            is_broken = True
            return b""
        code = int(match[1], 16)
        return bytes((code,)) if code in _UNRESERVED else match[0]

    decoded = _ESCAPE.sub(one, path)
    return None if is_broken else decoded


def _without_dots(path: bytes) -> bytes:
    """RFC 3986 section 5.2.4, keeping empty segments."""
    out: list[bytes] = []
    segments = path[1:].split(b"/")
    for index, segment in enumerate(segments):
        is_last = index == len(segments) - 1
        if segment == b"..":
            if out:
                out.pop()
            if is_last:
                out.append(b"")
        elif segment == b".":
            if is_last:
                out.append(b"")
        else:
            out.append(segment)
    return b"/" + b"/".join(out)
