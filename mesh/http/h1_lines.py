"""FAST PATH: field lines of HTTP/1.1 heads, read once (RFC 9112 section 5).

Most lines of a head came before, on this connection or another, and a line always means the same:
name in lower case, value without blanks around it, and the line as it is sent on, which is made
from the two. So lines are remembered, bounded in number and length. Those that come but once
(ids, dates of traces) are not, and neither are secrets.
"""

from __future__ import annotations

from typing import Final

Pair = tuple[bytes, bytes]
Line = tuple[Pair, bytes, int]
"""The field, its line as it is sent on, and what is special about it (the marks below)."""

SPECIAL: Final = 1
"""Hop by hop, or read by the codec: never sent on as it came."""
LENGTH: Final = 2
"""content-length."""

HOP_BY_HOP: Final = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade"}
)
# Applications behind CGI-like interfaces cannot tell these from the real ones.
DISGUISED: Final = frozenset({b"content_length", b"transfer_encoding"})
_SPECIAL_NAMES: Final = HOP_BY_HOP | DISGUISED | {b"host", b"expect"}
NOT_KEPT: Final = frozenset(
    {b"authorization", b"proxy-authorization", b"cookie", b"set-cookie", b"x-api-key",
     b"x-request-id", b"traceparent", b"tracestate", b"b3", b"x-b3-traceid", b"x-b3-spanid",
     b"x-b3-parentspanid", b"baggage", b"forwarded"}
)  # fmt: skip
_MOST_LINES: Final = 2048
_LONGEST_LINE: Final = 160

known: Final[dict[bytes, Line]] = {}
"""Lines that were read before. Ask with `get`, else `read`."""


def encode(pair: Pair) -> bytes:
    """A field as it is sent."""
    return b"%b: %b\r\n" % pair


def read(line: bytes) -> Line:
    """Read a line whose syntax was judged; without its CRLF."""
    name, _, value = line.partition(b":")
    name = name.lower()
    pair = (name, value.strip(b" \t"))
    mark = SPECIAL if name in _SPECIAL_NAMES else LENGTH if name == b"content-length" else 0
    found = pair, b"%b: %b\r\n" % pair, mark
    if len(line) <= _LONGEST_LINE and name not in NOT_KEPT:
        if len(known) >= _MOST_LINES:
            known.clear()
        known[line] = found
    return found
