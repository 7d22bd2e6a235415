"""The trace a request belongs to, as its headers tell: W3C Trace Context (level 1, with what it
asks of later versions) and, where that is absent, B3 in one header or in several. Pure.

What is invalid is as if it were not there, and takes its `tracestate` with it. Values are hex in
lower case; a 64-bit trace id of B3 is padded to the left.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

Pair = tuple[bytes, bytes]

MAX_STATE_MEMBERS: Final = 32
MAX_STATE_BYTES: Final = 2048
"""At least 512 have to be passed on; who sends more than this sends nothing that we know of."""

_PARENT = re.compile(
    rb"([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL
)
_KEY = rb"[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13}"
_MEMBER = re.compile(
    rb"(" + _KEY + rb")=([\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e])"
)
_B3 = re.compile(rb"([0-9a-f]{16}|[0-9a-f]{32})-([0-9a-f]{16})(?:-([01d]))?(?:-[0-9a-f]{16})?")
_TRACE_ID = re.compile(rb"[0-9a-f]{16}|[0-9a-f]{32}")
_SPAN_ID = re.compile(rb"[0-9a-f]{16}")
_NO = frozenset({b"0", b"false"})

NAMES: Final = frozenset(
    {b"traceparent", b"tracestate", b"b3", b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid",
     b"x-b3-sampled", b"x-b3-flags"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TraceContext:
    """`trace_id` 32 hex digits, `span_id` (the caller's span) 16."""

    trace_id: str
    span_id: str
    is_sampled: bool
    state: bytes = b""

    @property
    def traceparent(self) -> str:
        """As W3C writes it, in version 00."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.is_sampled else '00'}"


def read_context(pairs: Sequence[Pair]) -> TraceContext | None:
    """The context that these fields carry (names in lower case, others are ignored)."""
    parents = [value for name, value in pairs if name == b"traceparent"]
    if len(parents) == 1 and (found := read_traceparent(parents[0])) is not None:
        states = [value for name, value in pairs if name == b"tracestate"]
        return TraceContext(*found, read_state(states)) if states else TraceContext(*found)
    if parents:
        return None
    fields = {name: value for name, value in pairs if name in NAMES}
    return _read_b3(fields) if fields else None


def read_traceparent(value: bytes) -> tuple[str, str, bool] | None:
    """Trace id, span id, whether it is sampled; None if it is no `traceparent`. Of a version to
    come as much is read as version 00 has.
    """
    found = _PARENT.fullmatch(value.strip(b" \t"))
    if found is None or found[1] == b"ff" or (found[1] == b"00" and found[5] is not None):
        return None
    return found[2].decode(), found[3].decode(), bool(int(found[4], 16) & 1)


def read_state(values: Sequence[bytes]) -> bytes:
    """`tracestate` in one field; empty if it is not valid, which loses all of it."""
    members = [each.strip(b" \t") for value in values for each in value.split(b",")]
    members = [each for each in members if each]
    keys = set()
    for each in members:
        found = _MEMBER.fullmatch(each)
        if found is None or found[1] in keys:
            return b""
        keys.add(found[1])
    joined = b",".join(members)
    is_bounded = len(members) <= MAX_STATE_MEMBERS and len(joined) <= MAX_STATE_BYTES
    return joined if is_bounded else b""


def _read_b3(fields: dict[bytes, bytes]) -> TraceContext | None:
    if (single := _B3.fullmatch(fields.get(b"b3", b""))) is not None:
        trace, span, sampled = single[1], single[2], single[3]
        return _b3(trace, span, is_sampled=sampled != b"0")
    trace, span = fields.get(b"x-b3-traceid", b""), fields.get(b"x-b3-spanid", b"")
    if not _TRACE_ID.fullmatch(trace) or not _SPAN_ID.fullmatch(span):
        return None
    is_sampled = fields.get(b"x-b3-flags") == b"1" or fields.get(b"x-b3-sampled") not in _NO
    return _b3(trace, span, is_sampled=is_sampled)


def _b3(trace: bytes, span: bytes, *, is_sampled: bool) -> TraceContext | None:
    if not trace.strip(b"0") or not span.strip(b"0"):
        return None
    return TraceContext(trace.decode().rjust(32, "0"), span.decode(), is_sampled)


def with_context(pairs: Sequence[Pair], context: TraceContext) -> list[Pair]:
    """`pairs` with `context` in the place of whatever context they had. B3 fields stay B3: who
    reads those is told the same.
    """
    found: list[Pair] = []
    for name, value in pairs:
        if name not in NAMES:
            found.append((name, value))
        elif name == b"b3" and _B3.fullmatch(value):
            flag = b"1" if context.is_sampled else b"0"
            found.append(
                (name, b"-".join((context.trace_id.encode(), context.span_id.encode(), flag)))
            )
        elif name == b"x-b3-traceid":
            found += [
                (name, context.trace_id.encode()),
                (b"x-b3-spanid", context.span_id.encode()),
                (b"x-b3-sampled", b"1" if context.is_sampled else b"0"),
            ]
    found.append((b"traceparent", context.traceparent.encode()))
    if context.state:
        found.append((b"tracestate", context.state))
    return found
