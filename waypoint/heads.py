"""What the proxy itself does to heads: own answers, trace context, changes of a route. Pure."""

from __future__ import annotations

import re
from typing import Protocol

from mesh.http.trace_context import NAMES as _TRACED
from mesh.http.trace_context import TraceContext, read_context, with_context
from mesh.identity import SpiffeId
from mesh.model.route import HeaderChange, PathChange, Redirect
from waypoint.filters.chain import FRAMING, OWN_ID, Headers, Pair, Request, Respond, Response

_TRACEPARENT = re.compile(rb"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
CLIENT_CERTIFICATE = b"x-forwarded-client-cert"
CLAIMS = frozenset(
    b"x" + b + b"forwarded" + c + b"client" + d + b"cert"
    for b in (b"-", b"_")
    for c in (b"-", b"_")
    for d in (b"-", b"_")
)
"""Fields that say who the caller is, in every spelling that some server takes for it."""
NOTED = CLAIMS | {b"content-type"}
"""Fields that are looked at in every request."""
_GRPC_OF_STATUS = {
    400: 13, 401: 16, 403: 7, 404: 12, 429: 14, 502: 14, 503: 14, 504: 14,
}  # fmt: skip
_UNKNOWN = 2
_PORTS = {b"http": 80, b"https": 443}


class RandomBytes(Protocol):
    """The part of `random.Random` used here; nothing secret depends on it."""

    def randbytes(self, n: int) -> bytes:
        """`n` bytes."""
        ...


def is_grpc(content_type: bytes) -> bool:
    """Whether it is gRPC's; gRPC-Web is plain HTTP to us (its trailers are in the body)."""
    return content_type[:16].lower() == b"application/grpc" and content_type[16:17] in b"+; \t"


def is_client_certificate(name: bytes) -> bool:
    """Whether a field says who the caller is, in a spelling that some server takes for it."""
    return name in CLAIMS


def client_certificate(own: SpiffeId, caller: SpiffeId) -> Pair:
    """What says who calls, as Envoy writes it."""
    return CLIENT_CERTIFICATE, f"By={own};URI={caller}".encode()


def local_response(request: Request, respond: Respond) -> Response:
    """Our own answer: trailers-only for gRPC (the gRPC over HTTP/2 protocol), else plain."""
    if request.is_grpc and not 300 <= respond.status < 400:
        code = respond.grpc_status
        if code is None:
            code = _GRPC_OF_STATUS.get(respond.status, _UNKNOWN)
        pairs: list[Pair] = [
            (b"content-type", b"application/grpc"),
            (b"grpc-status", b"%d" % code),
        ]
        if respond.reason:
            pairs.append((b"grpc-message", _percent(respond.reason)))
        return Response(status=200, headers=Headers([*pairs, *respond.headers]))
    pairs = list(respond.headers)
    if respond.body:
        if not any(name == b"content-type" for name, _ in pairs):
            pairs.append((b"content-type", b"text/plain"))
        pairs.append((b"content-length", b"%d" % len(respond.body)))
    return Response(status=respond.status, headers=Headers(pairs))


def _percent(text: str) -> bytes:
    data = text.encode()[:500]
    return b"".join(bytes((c,)) if 32 <= c < 127 and c != 37 else b"%%%02X" % c for c in data)


def trace(request: Request, rng: RandomBytes) -> None:
    """A request id for who has none; and a trace context, not sampled, where there is none that is
    valid. Several `traceparent` fields are none, and a `tracestate` goes with its parent.
    """
    headers = request.headers
    has_id, fields = False, []
    for pair in headers.pairs:
        if pair[0] in _TRACED:
            fields.append(pair)
        elif pair[0] == b"x-request-id":
            has_id = True
    if not has_id:
        _add_id(request, rng)
    if not fields:
        raw = rng.randbytes(24).hex().encode()
        headers.add(b"traceparent", b"00-" + raw[:32] + b"-" + raw[32:] + b"-00")
        return
    name, value = fields[0]
    if len(fields) == 1 and name == b"traceparent" and _TRACEPARENT.fullmatch(value):
        return
    context = read_context(fields)
    if context is None:
        context = TraceContext(rng.randbytes(16).hex(), rng.randbytes(8).hex(), is_sampled=False)
    headers.pairs = with_context(headers.pairs, context)


def traceparent(request: Request) -> str:
    """Of a request whose context is settled; empty if it has none, as a copy may."""
    return (request.headers.get(b"traceparent") or b"").decode("latin-1")


def identify(request: Request, rng: RandomBytes) -> None:
    """A request id for who has none."""
    if not request.headers.has(b"x-request-id"):
        _add_id(request, rng)


def _add_id(request: Request, rng: RandomBytes) -> None:
    raw = rng.randbytes(16).hex().encode()
    made = b"-".join((raw[:8], raw[8:12], b"4" + raw[13:16], b"a" + raw[17:20], raw[20:]))
    request.notes[OWN_ID] = made
    request.headers.add(b"x-request-id", made)


def change(headers: Headers, changes: HeaderChange) -> None:
    """RequestHeaderModifier or ResponseHeaderModifier; of duplicate names the first counts. What
    frames a message is not changed: another framing would be another message.
    """
    seen = set(FRAMING)
    for name, value in changes.set:
        key = name.lower().encode()
        if key not in seen:
            seen.add(key)
            headers.set(key, value.encode("latin-1", "replace"))
    for name, value in changes.add:
        key = name.lower().encode()
        if key in seen:
            continue
        seen.add(key)
        old = headers.get(key)
        new = value.encode("latin-1", "replace")
        if old is None:
            headers.add(key, new)
        else:
            headers.set(key, old + b"," + new)
    for name in changes.remove:
        headers.remove(name.lower().encode())


def new_path(path: bytes, changed: PathChange, prefix: str) -> bytes:
    """A path after ReplaceFullPath, or ReplacePrefixMatch of the matched `prefix`."""
    value = changed.value.encode()
    if changed.kind == "ReplaceFullPath":
        return value or b"/"
    rest = path[len(prefix.rstrip("/").encode()) :]
    return value.rstrip(b"/") + rest or b"/"


def redirect(request: Request, rule: Redirect, prefix: str) -> Respond:
    """RequestRedirect: the answer with its Location."""
    scheme = rule.scheme.encode() or request.scheme
    host, port_text = _split_authority(request.authority)
    if rule.hostname:
        host = rule.hostname.encode()
    if rule.port is not None:
        port = rule.port
    elif rule.scheme:
        port = _PORTS.get(scheme, 80)
    else:
        port = request.destination_port or int(port_text or 80)
    path = request.path if rule.path is None else new_path(request.path, rule.path, prefix)
    query = b"?" + request.query if request.query else b""
    shown = b"" if _PORTS.get(scheme) == port else b":%d" % port
    location = scheme + b"://" + host + shown + path + query
    return Respond(rule.status, headers=((b"location", location),))


def _split_authority(authority: bytes) -> tuple[bytes, bytes]:
    if authority[:1] == b"[":
        host, _, rest = authority.partition(b"]")
        return host + b"]", rest[1:]
    host, _, port = authority.partition(b":")
    return host, port
