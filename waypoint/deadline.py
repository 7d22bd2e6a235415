"""How much time a request has, and what is told of it along the way. Pure.

A gRPC caller says it in `grpc-timeout` (gRPC over HTTP/2: up to 8 digits and a unit), a route in
`timeouts.request`; the shorter holds. Every try is told what is left then, and not more than its
own limit (`timeouts.backendRequest`): `grpc-timeout` for gRPC, and for all requests with a deadline
`x-envoy-expected-rq-timeout-ms`, as Envoy tells it. A `grpc-timeout` that cannot be read is none.
"""

from __future__ import annotations

import re
from typing import Final

from waypoint.filters.chain import Headers, Request, Respond

GRPC_TIMEOUT: Final = b"grpc-timeout"
EXPECTED: Final = b"x-envoy-expected-rq-timeout-ms"
DEADLINE_EXCEEDED: Final = 4
TRAILERS: Final = ((b"grpc-status", b"4"), (b"grpc-message", b"the deadline passed"))
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNITS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_MOST_DIGITS: Final = 99_999_999


def parse_grpc_timeout(value: bytes) -> float | None:
    """Seconds; None for what is no timeout."""
    found = _TIMEOUT.fullmatch(value)
    return int(found[1]) * _UNITS[found[2]] if found is not None else None


def format_grpc_timeout(seconds: float) -> bytes:
    """In the smallest unit of milliseconds and longer that has room for it; never zero."""
    for unit, size in ((b"m", 1e-3), (b"S", 1.0), (b"M", 60.0)):
        count = int(seconds / size)
        if count <= _MOST_DIGITS:
            return b"%d" % max(1, count) + unit
    return b"%dH" % min(_MOST_DIGITS, int(seconds / 3600))


def request_seconds(routed: float | None, request: Request) -> float | None:
    """How long the whole exchange may take; None: as long as it likes."""
    if not request.is_grpc:
        return routed
    value = request.headers.get(GRPC_TIMEOUT)
    asked = parse_grpc_timeout(value) if value is not None else None
    if asked is None:
        return routed
    return asked if routed is None else min(asked, routed)


def tell(headers: Headers, seconds: float, *, is_grpc: bool) -> None:
    """What one try is told."""
    if is_grpc:
        headers.set(GRPC_TIMEOUT, format_grpc_timeout(seconds))
    headers.set(EXPECTED, b"%d" % max(1, int(seconds * 1000)))


def shortest(left: float | None, per_try: float | None) -> float | None:
    """The time of one try."""
    if left is None or per_try is None:
        return per_try if left is None else left
    return min(left, per_try)


def exceeded(reason: str) -> Respond:
    """504, and DEADLINE_EXCEEDED to callers of gRPC."""
    return Respond(504, flag="UT", reason=reason, grpc_status=DEADLINE_EXCEEDED)
