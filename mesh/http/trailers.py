"""Which trailers may be sent on, of any version of HTTP (RFC 9110 section 6.5.1).

What comes after the body was seen by no policy. A receiver that merges trailers into the head, as
some do, would take them for judged: so no framing, routing or credentials, nothing that says who
somebody is and nothing that we would have taken from a head, with dashes or underscores (CGI reads
both alike). All else passes, gRPC's among it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

Pair = tuple[bytes, bytes]

_FORBIDDEN: Final = frozenset({
    b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade",
    b"host", b"content-length", b"content-type", b"content-encoding", b"content-range", b"expect",
    b"max-forwards", b"trailer", b"authorization", b"proxy-authorization", b"cookie",
    b"set-cookie", b"forwarded", b"traceparent", b"tracestate", b"baggage", b"x-request-id",
    b"cache-control", b"range", b"location", b"vary", b"age", b"date", b"expires",
    b"x-real-ip", b"x-original-url", b"x-rewrite-url", b"x-http-method-override",
})  # fmt: skip


def safe_trailers(pairs: Sequence[Pair]) -> list[Pair]:
    """Those that may be sent on, in order."""
    return [pair for pair in pairs if not _is_forbidden(pair[0].replace(b"_", b"-"))]


def _is_forbidden(name: bytes) -> bool:
    return name in _FORBIDDEN or name.startswith((b":", b"x-forwarded-"))
