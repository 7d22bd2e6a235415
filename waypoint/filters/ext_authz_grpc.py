"""ext_authz over gRPC: `envoy.service.auth.v3.Authorization/Check`, as messages. Pure.

What is sent is what Envoy's filter sends of an HTTP request: who calls (address and SPIFFE ID),
where to, the head with pseudo-fields and each field once, and so much of the body as the provider
wants. `context_extensions` say which policy and rule ask. Of the answer, fields that frame a
message, name the caller or cannot be sent are not taken; an answer with one that cannot be sent is
no answer at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from mesh.errors import Unavailable
from mesh.grpc import codec
from mesh.proto import ext_authz_pb2 as pb
from waypoint.filters.chain import Answer, Headers, Pair, Request

METHOD: Final = b"/envoy.service.auth.v3.Authorization/Check"
PARTIAL: Final = b"x-envoy-auth-partial-body"
MAX_FIELDS: Final = 64
_NAME: Final = re.compile(rb"[a-z0-9!#$%&'*+.^_`|~-]{1,256}")
_VALUE: Final = re.compile(rb"[\t\x20-\x7e\x80-\xff]{0,8192}")
_TRACED: Final = frozenset({b"traceparent", b"tracestate"})
_ADD, _ADD_IF_ABSENT, _SET, _SET_IF_THERE = range(4)

Change = tuple[int, bytes, bytes]
"""How, the field's name, its value."""


def check_request(
    request: Request,
    *,
    body: bytes | None,
    packs_as_bytes: bool,
    is_partial: bool,
    protocol: str,
    extensions: dict[str, str],
    epoch: float,
) -> pb.CheckRequest:
    """The question. `epoch` is when the request began, in seconds; `body` None: not wanted."""
    target = request.path + b"?" + request.query if request.query else request.path
    fields: dict[str, str] = {}
    for name, value in request.headers.pairs:
        if name == PARTIAL:
            continue
        key, text = _text(name), _text(value)
        joint = "; " if key == "cookie" else ","
        fields[key] = f"{fields[key]}{joint}{text}" if key in fields else text
    if body is not None:
        fields[_text(PARTIAL)] = "true" if is_partial else "false"
    size = fields.get("content-length", "")
    scheme = _text(request.scheme) or "http"
    host = _text(request.authority)
    http = pb.AttributeContext.HttpRequest(
        id=fields.get("x-request-id", ""),
        method=_text(request.method),
        path=_text(target),
        host=host,
        scheme=scheme,
        size=int(size) if size.isdecimal() and len(size) < 19 else -1,
        protocol=protocol,
    )
    http.headers.update(fields)
    http.headers.update({
        ":method": http.method, ":path": http.path, ":scheme": scheme, ":authority": host,
    })  # fmt: skip
    if body is not None:
        if packs_as_bytes:
            http.raw_body = body
        else:
            http.body = _text(body)
    asked = pb.CheckRequest()
    attributes = asked.attributes
    attributes.source.address.socket_address.address = request.source_ip
    if request.source is not None:
        attributes.source.principal = str(request.source)
    destination = attributes.destination.address.socket_address
    destination.address = request.destination_ip
    destination.port_value = request.destination_port
    attributes.request.http.CopyFrom(http)
    attributes.request.time.FromNanoseconds(int(epoch * 1e9))
    attributes.context_extensions.update(extensions)
    return asked


def call(service: str, method: bytes, seconds: float, caller: Request) -> Request:
    """The head of a unary call to `service` (`namespace/hostname`), on behalf of `caller`."""
    traced = [pair for pair in caller.headers.pairs if pair[0] in _TRACED]
    return Request(
        method=b"POST",
        scheme=b"http",
        authority=service.rpartition("/")[2].encode(),
        path=method,
        headers=Headers(
            [
                (b"content-type", b"application/grpc"),
                (b"te", b"trailers"),
                (b"grpc-timeout", codec.encode_timeout(seconds).encode()),
                *traced,
            ]
        ),
        is_grpc=True,
    )


def message_of(answer: Answer) -> bytes:
    """The one message of a call that went well. Raises Unavailable with what went wrong."""
    if answer.response.status != 200:
        raise Unavailable(f"it answers {answer.response.status}")
    fields = [*answer.response.headers.pairs, *answer.trailers]
    failed = codec.parse_status(tuple((_text(name), _text(value)) for name, value in fields))
    if failed is not None:
        raise Unavailable(f"it answers {failed}")
    decoder = codec.MessageDecoder()
    decoder.receive_data(answer.body)
    try:
        body = decoder.next_body()
        decoder.receive_eof()
    except codec.GrpcError as exc:
        raise Unavailable(f"it answers nonsense: {exc}") from exc
    if body is None:
        raise Unavailable("it answers nothing")
    return body


def hear(answer: Answer) -> pb.CheckResponse:
    """What it says. Raises Unavailable."""
    try:
        return codec.parse_message(pb.CheckResponse, message_of(answer))
    except codec.GrpcError as exc:
        raise Unavailable(f"it answers nonsense: {exc}") from exc


def changes(options: Iterable[pb.HeaderValueOption], *, by_action: bool = False) -> list[Change]:
    """Changes of fields, checked. Raises Unavailable for one that cannot be sent.

    As in Envoy, `append` is false unless it is written, and `append_action` counts `by_action`
    alone: for fields of the response.
    """
    found: list[Change] = []
    for each in options:
        read = field_of(each.header)
        if read is None:
            continue
        name, value = read
        how = _ADD if each.append.value else (by_action and each.append_action) or _SET
        found.append((how if how in (_ADD, _ADD_IF_ABSENT, _SET_IF_THERE) else _SET, name, value))
    if len(found) > MAX_FIELDS:
        raise Unavailable(f"its answer has more than {MAX_FIELDS} fields")
    return found


def field_of(header: pb.HeaderValue) -> Pair | None:
    """A field, checked; None: a pseudo-field. Raises Unavailable for one that cannot be sent."""
    name = header.key.lower().encode()
    value = (header.raw_value or header.value.encode()).strip(b" \t")
    if name[:1] == b":":
        return None
    if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
        raise Unavailable("its answer has a field that cannot be sent")
    return name, value


def apply(found: Iterable[Change], headers: Headers) -> None:
    """Carry changes out."""
    for how, name, value in found:
        if how == _ADD or (how == _ADD_IF_ABSENT and not headers.has(name)):
            headers.add(name, value)
        elif how == _SET or (how == _SET_IF_THERE and headers.has(name)):
            headers.set(name, value)


def pairs_of(found: Iterable[Change]) -> tuple[Pair, ...]:
    """The fields that changes make where there are none."""
    headers = Headers()
    apply(found, headers)
    return tuple(headers.pairs)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
