"""What a caller speaks, from its first bytes. Sans-IO, pure."""

from __future__ import annotations

import enum
import re

from mesh.http.h2_frames import PREFACE

MAX_BYTES = 4096
_METHODS = (b"GET ", b"POST ", b"PUT ", b"HEAD ", b"DELETE ", b"OPTIONS ", b"PATCH ", b"TRACE ",
            b"CONNECT ")  # fmt: skip
_LINE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32} [\x21-\x7e]+ HTTP/1\.[01]\r?\n")
_LINE_SO_FAR = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}(?: [\x21-\x7e]*(?: [HTP/1.0\r]*)?)?")


class Speech(enum.Enum):
    """What it is."""

    HTTP1 = "http/1.1"
    HTTP2 = "h2"
    TLS = "tls"
    OPAQUE = "opaque"
    NEED_DATA = "?"


def sniff(data: bytes, *, is_http: bool) -> Speech:
    """What begins with `data`. With `is_http` (the port says so) everything but HTTP/2 is left to
    the strict parser of HTTP/1.1, which answers what it does not like.
    """
    if PREFACE.startswith(data[: len(PREFACE)]):
        return Speech.HTTP2 if len(data) >= len(PREFACE) else Speech.NEED_DATA
    if is_http:
        return Speech.HTTP1
    if data[:1] == b"\x16":
        if len(data) < 3:
            return Speech.NEED_DATA
        return Speech.TLS if data[1] == 3 else Speech.OPAQUE
    if data.startswith(_METHODS) or _LINE.match(data):
        return Speech.HTTP1
    if len(data) < MAX_BYTES and _LINE_SO_FAR.fullmatch(data):
        return Speech.NEED_DATA
    return Speech.OPAQUE


def is_nonsense(data: bytes) -> bool:
    """Whether a first line is there that nobody meant for HTTP/1."""
    line, found, _ = data.partition(b"\n")
    return bool(found) and line not in {b"", b"\r"} and b"HTTP/1." not in line


def server_name(data: bytes) -> str | None:
    """The SNI of a TLS ClientHello (RFC 8446 section 4.1.2); empty without one; None: more bytes
    are needed. What is malformed has none.
    """
    hello = bytearray()
    offset = 0
    while len(data) - offset >= 5 and data[offset] == 0x16:
        size = int.from_bytes(data[offset + 3 : offset + 5], "big")
        hello += data[offset + 5 : offset + 5 + size]
        if len(data) - offset - 5 < size:
            break
        offset += 5 + size
        if len(hello) >= 4 and len(hello) - 4 >= int.from_bytes(hello[1:4], "big"):
            break
    if len(hello) < 4 or len(hello) - 4 < int.from_bytes(hello[1:4], "big"):
        return None if len(data) < 1 << 14 else ""
    return _find_name(bytes(hello[4:]))


def _find_name(hello: bytes) -> str:
    try:
        at = 34  # version and random
        at += 1 + hello[at]
        at += 2 + int.from_bytes(hello[at : at + 2], "big")
        at += 1 + hello[at]
        end = at + 2 + int.from_bytes(hello[at : at + 2], "big")
        at += 2
        while at + 4 <= end:
            kind = int.from_bytes(hello[at : at + 2], "big")
            size = int.from_bytes(hello[at + 2 : at + 4], "big")
            if kind == 0:
                length = int.from_bytes(hello[at + 7 : at + 9], "big")
                return hello[at + 9 : at + 9 + length].decode("ascii").lower()
            at += 4 + size
    except (IndexError, UnicodeDecodeError):
        return ""
    return ""
