"""WebSockets of HTTP/2: extended CONNECT (RFC 8441) in terms of the upgrade (RFC 6455). Pure.

Between a caller and an endpoint of any version an exchange knows one form, the upgrade: a GET with
`sec-websocket-key`, a 101 with `sec-websocket-accept`. HTTP/2 has neither field, so who comes from
there is given a key of ours, and an endpoint there is spoken for. Policy and routes see a GET.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Final

from waypoint.filters.chain import Headers, Pair, Request, Response
from waypoint.heads import RandomBytes

WEBSOCKET: Final = b"websocket"
_KEY: Final = b"sec-websocket-key"
_ACCEPT: Final = b"sec-websocket-accept"
_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def new_key(rng: RandomBytes) -> Pair:
    """The field of a request that had none: 16 bytes, which no peer needs to guess at."""
    return _KEY, base64.b64encode(rng.randbytes(16))


def accept_of(key: bytes) -> bytes:
    """What a server that understood `key` answers (RFC 6455 section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())


def request_head(request: Request) -> list[Pair]:
    """The extended CONNECT of a request for a WebSocket."""
    target = request.path + b"?" + request.query if request.query else request.path
    return [
        (b":method", b"CONNECT"), (b":protocol", WEBSOCKET),
        (b":scheme", request.scheme or b"http"), (b":authority", request.authority),
        (b":path", target),
        *(
            pair for pair in request.headers.pairs
            if pair[0] not in {_KEY, b"host", b"expect", b"content-length"}
        ),
    ]  # fmt: skip


def switched(fields: list[Pair], request_key: bytes) -> Response:
    """The 101 of a 2xx answer to an extended CONNECT."""
    kept = [pair for pair in fields if pair[0] not in {_ACCEPT, b"content-length"}]
    return Response(status=101, headers=Headers([*kept, (_ACCEPT, accept_of(request_key))]))


def opened(response: Response, key: bytes) -> list[Pair] | None:
    """The head of the 200 for a 101; None when the endpoint did not answer to our `key`."""
    if response.headers.get(_ACCEPT) != accept_of(key):
        return None
    rest = [pair for pair in response.headers.pairs if pair[0] not in {_ACCEPT, b"content-length"}]
    return [(b":status", b"200"), *rest]


def refused(response: Response) -> int:
    """The status of an answer that opens nothing: success would open a tunnel."""
    return 502 if 200 <= response.status < 300 else response.status
