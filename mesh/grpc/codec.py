"""gRPC as bytes and numbers: message framing, statuses, timeouts (gRPC over HTTP/2).

Pure. A message is five bytes (compressed flag, length) and its protobuf form; compression
is neither offered nor accepted. A status travels in trailers, its text percent-encoded.
Everything a peer can say is bounded here: message size, digits of a timeout, status text.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Generic, Literal, TypeVar
from urllib.parse import quote, unquote

from google.protobuf.message import DecodeError, EncodeError, Message

from mesh.errors import MeshError
from mesh.http.events import Headers

MAX_MESSAGE_BYTES: Final = 4 << 20
MAX_STATUS_TEXT: Final = 2048
Req = TypeVar("Req", bound=Message)
Res = TypeVar("Res", bound=Message)
M = TypeVar("M", bound=Message)

_PREFIX = struct.Struct(">BI")
_PRINTABLE_SAFE = " !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])", re.ASCII)
_UNIT_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_LARGEST_TIMEOUT_DIGITS = 99_999_999


class Code(IntEnum):
    """The status codes of gRPC."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class GrpcError(MeshError):
    """A call ended with a status other than OK: raised by handlers to answer with it, and by
    the client when the server did. `code` compares equal to plain numbers.
    """

    def __init__(self, code: int, message: str = "", *, hint: str = "") -> None:
        self.code = _known_code(code)
        self.message = message
        super().__init__(f"{self.code.name}: {message}" if message else self.code.name, hint=hint)
        self.retryable = self.code in {Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED}


@dataclass(frozen=True, slots=True)
class Method(Generic[Req, Res]):
    """One RPC: `/package.Service/Name`, its message types, and whether messages flow freely
    both ways ("stream") or one goes each way ("unary").
    """

    path: str
    request: type[Req]
    response: type[Res]
    kind: Literal["unary", "stream"]


def _known_code(code: int) -> Code:
    try:
        return Code(code)
    except ValueError:
        return Code.UNKNOWN


# ---- messages


_SMALL = 16_000


@dataclass(frozen=True, slots=True)
class Serialized:
    """A message that is bytes already, in parts that follow each other.

    Protobuf takes fields in any order, so messages that are equal but for a few small fields
    can share the bytes of the rest: one part, sent to everybody and copied for nobody.
    """

    parts: tuple[bytes, ...]

    def encode(self) -> tuple[bytes, ...]:
        """The framed message, in parts."""
        head, *rest = self.parts
        size = sum(map(len, self.parts))
        if size <= _SMALL:
            # A frame of its own for each part costs more than the copy.
            return (_PREFIX.pack(0, size) + b"".join(self.parts),)
        return (_PREFIX.pack(0, size) + head, *rest)


def encode_message(message: Message) -> bytes:
    """The framed message. Raises GrpcError(INTERNAL) when it cannot be serialized."""
    try:
        body = message.SerializeToString()
    except (EncodeError, ValueError) as exc:
        raise GrpcError(Code.INTERNAL, f"cannot serialize {message.DESCRIPTOR.name}") from exc
    return _PREFIX.pack(0, len(body)) + body


def parse_message(cls: type[M], body: bytes) -> M:
    """Raises GrpcError(INTERNAL) when `body` is no such message."""
    try:
        return cls.FromString(body)
    except (DecodeError, ValueError) as exc:  # ValueError: text that is not UTF-8
        raise GrpcError(Code.INTERNAL, f"cannot parse {cls.DESCRIPTOR.name}") from exc


class MessageDecoder:
    """Cuts a stream of bytes into message bodies of at most `max_message` bytes."""

    def __init__(self, max_message: int = MAX_MESSAGE_BYTES) -> None:
        self._max = max_message
        self._buffer = bytearray()

    def receive_data(self, data: bytes) -> None:
        """Take bytes in."""
        self._buffer += data

    def next_body(self) -> bytes | None:
        """The next whole body, or None. Raises GrpcError: RESOURCE_EXHAUSTED as soon as a
        prefix announces too much, UNIMPLEMENTED for a compressed message.
        """
        buffer = self._buffer
        if len(buffer) < _PREFIX.size:
            return None
        compressed, length = _PREFIX.unpack_from(buffer)
        if compressed:
            raise GrpcError(Code.UNIMPLEMENTED, "compressed messages are not supported")
        if length > self._max:
            raise GrpcError(
                Code.RESOURCE_EXHAUSTED,
                f"a message of {length} bytes is over the limit of {self._max}",
            )
        end = _PREFIX.size + length
        if len(buffer) < end:
            return None
        body = bytes(memoryview(buffer)[_PREFIX.size : end])
        del buffer[:end]
        return body

    def receive_eof(self) -> None:
        """Raises GrpcError(INTERNAL) when the stream ended inside a message."""
        if self._buffer:
            raise GrpcError(Code.INTERNAL, "the stream ended inside a message")


# ---- status


def encode_status(code: int, message: str = "") -> Headers:
    """The two trailer fields of a status."""
    fields: list[tuple[str, str]] = [("grpc-status", str(int(code)))]
    if message:
        fields.append(("grpc-message", encode_text(message[:MAX_STATUS_TEXT])))
    return tuple(fields)


def parse_status(fields: Headers) -> GrpcError | None:
    """The failure that trailers speak of, or None for OK. A missing status is UNKNOWN."""
    status = text = None
    for name, value in fields:
        if name == "grpc-status" and status is None:
            status = value
        elif name == "grpc-message" and text is None:
            text = value
    if status == "0":
        return None
    message = decode_text(text or "")[:MAX_STATUS_TEXT]
    if status is None:
        return GrpcError(Code.UNKNOWN, "the server ended the call without a status")
    if not (status.isascii() and status.isdigit() and len(status) <= 10):
        return GrpcError(Code.UNKNOWN, f"unreadable status {status[:20]!r}: {message}")
    return GrpcError(int(status), message)


def has_status(fields: Headers) -> bool:
    """Whether a status is among the fields."""
    return any(name == "grpc-status" for name, _ in fields)


def encode_text(text: str) -> str:
    """Percent-encode a status text: printable ASCII stays, also inside, but not at, the ends
    a space, because a field value may not start or end with one.
    """
    encoded = quote(text, safe=_PRINTABLE_SAFE, errors="replace")
    inner = encoded.strip(" ")
    lead = len(encoded) - len(encoded.lstrip(" "))
    trail = len(encoded) - lead - len(inner)
    return "%20" * lead + inner + "%20" * trail


def decode_text(text: str) -> str:
    """Undo `encode_text`, taking what is not an escape as it is; never fails."""
    return unquote(text, errors="replace")


# ---- timeouts


def parse_timeout(text: str) -> float:
    """`grpc-timeout` in seconds. Raises GrpcError(INVALID_ARGUMENT)."""
    match = _TIMEOUT.fullmatch(text)
    if match is None:
        raise GrpcError(Code.INVALID_ARGUMENT, f"malformed grpc-timeout {text[:20]!r}")
    return int(match[1]) * _UNIT_SECONDS[match[2]]


def encode_timeout(seconds: float) -> str:
    """`grpc-timeout` for a time in seconds, in the finest unit that fits eight digits."""
    for unit, factor in (("u", 1e6), ("m", 1e3), ("S", 1.0)):
        value = max(0, round(seconds * factor))
        if value <= _LARGEST_TIMEOUT_DIGITS:
            return f"{value}{unit}"
    return f"{min(int(seconds / 3600), _LARGEST_TIMEOUT_DIGITS)}H"


# ---- other protocols' ways to fail

_FROM_HTTP: Final = {
    400: Code.INTERNAL,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.UNIMPLEMENTED,
    429: Code.UNAVAILABLE,
    502: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    504: Code.UNAVAILABLE,
}
_REFUSED_STREAM, _CANCEL, _ENHANCE_YOUR_CALM, _INADEQUATE_SECURITY = 7, 8, 11, 12
_FROM_H2: Final = {
    _REFUSED_STREAM: Code.UNAVAILABLE,
    _CANCEL: Code.CANCELLED,
    _ENHANCE_YOUR_CALM: Code.RESOURCE_EXHAUSTED,
    _INADEQUATE_SECURITY: Code.PERMISSION_DENIED,
}


def code_from_http(status: int) -> Code:
    """What an HTTP status means when no gRPC server answered."""
    return _FROM_HTTP.get(status, Code.UNKNOWN)


def code_from_h2(error: int) -> Code:
    """What RST_STREAM with this error code means for the call."""
    return _FROM_H2.get(error, Code.INTERNAL)
