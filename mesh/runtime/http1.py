"""The admin endpoint's HTTP/1.1, sans-IO: bytes in, whole bounded requests out.

httptools (llhttp) judges the syntax; this adds the bounds and nothing else. It is not the
waypoint's codec: bodies are collected, not streamed, and nothing is ever forwarded.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, unquote

import httptools

from mesh.errors import RemoteProtocolError

MAX_HEAD_BYTES = 16 << 10
MAX_HEADERS = 64
MAX_BODY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Request:
    """One request; header names are in lower case, of repeated ones the last wins."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    keep_alive: bool = True


@dataclass(frozen=True, slots=True)
class Response:
    """What a handler answers."""

    status: int = 200
    content_type: str = "text/plain; charset=utf-8"
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def text(text: str, status: int = 200) -> Response:
        """Plain text, with a line end added."""
        return Response(status, body=text.encode() + b"\n")

    @staticmethod
    def json(value: Any, status: int = 200) -> Response:
        """A JSON document; unknown types are shown by `str`."""
        body = json.dumps(value, indent=2, default=str, ensure_ascii=False).encode() + b"\n"
        return Response(status, "application/json", body)


def encode_response(response: Response, *, keep_alive: bool, head_only: bool = False) -> bytes:
    """The bytes of a response; its length is always stated."""
    reason = HTTPStatus(response.status).phrase
    lines = [
        f"HTTP/1.1 {response.status} {reason}",
        f"content-type: {response.content_type}",
        f"content-length: {len(response.body)}",
        "x-content-type-options: nosniff",
        "cache-control: no-store",
        f"connection: {'keep-alive' if keep_alive else 'close'}",
        *(f"{name}: {value}" for name, value in response.headers),
    ]
    head = "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"
    return head if head_only else head + response.body


class RequestReader:
    """Feed it with `receive_data`, take requests with `next_request`.

    After a RemoteProtocolError the connection can only be answered and closed.
    """

    def __init__(self, *, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._max_body = max_body_bytes
        self._parser = httptools.HttpRequestParser(self)
        self._ready: deque[Request] = deque()
        self._failure: RemoteProtocolError | None = None
        self._clear()

    def _clear(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._header_count = 0
        self._body: list[bytes] = []
        self._body_size = 0
        self._head_size = 0
        self._fed_bytes = 0
        self._in_head = True

    def receive_data(self, data: bytes) -> None:
        """Raises RemoteProtocolError with the status to answer."""
        if self._in_head:
            self._fed_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            raise RemoteProtocolError("no protocol upgrade here", http_status=400) from exc
        except httptools.HttpParserError as exc:
            raise self._failure or RemoteProtocolError(f"bad request: {exc}") from exc
        # Counts what llhttp keeps to itself until a header is whole.
        if self._in_head and self._fed_bytes > MAX_HEAD_BYTES:
            raise RemoteProtocolError("request head too large", http_status=431)

    def next_request(self) -> Request | None:
        """The oldest whole request not yet taken."""
        return self._ready.popleft() if self._ready else None

    @property
    def is_idle(self) -> bool:
        """Whether no request has begun: closing now loses nothing."""
        return self._in_head and self._fed_bytes == 0 and not self._ready

    @property
    def wants_continue(self) -> bool:
        """Whether the peer waits for `100 Continue` before it sends the body."""
        return not self._in_head and self._headers.get("expect", "").lower() == "100-continue"

    # What httptools calls; an exception raised here stops it and comes out of feed_data.

    def on_url(self, url: bytes) -> None:
        """Part of the request target."""
        self._url += url
        if len(self._url) > MAX_HEAD_BYTES:
            self._fail("request target too long", 414)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._header_count += 1
        self._head_size += len(name) + len(value)
        if self._header_count > MAX_HEADERS or self._head_size > MAX_HEAD_BYTES:
            self._fail("too many or too large headers", 431)
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False

    def on_body(self, body: bytes) -> None:
        """Part of the body."""
        self._body_size += len(body)
        if self._body_size > self._max_body:
            self._fail(f"body larger than {self._max_body} bytes", 413)
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        try:
            url = httptools.parse_url(self._url)
        except httptools.HttpParserInvalidURLError:
            self._fail("bad request target", 400)
        query = (url.query or b"").decode("latin-1")
        self._ready.append(
            Request(
                method=self._parser.get_method().decode("ascii"),
                path=unquote((url.path or b"/").decode("latin-1")),
                query=dict(parse_qsl(query, keep_blank_values=True, max_num_fields=MAX_HEADERS)),
                headers=self._headers,
                body=b"".join(self._body),
                keep_alive=self._parser.should_keep_alive(),
            )
        )
        self._clear()

    def _fail(self, message: str, status: int) -> None:
        self._failure = RemoteProtocolError(message, http_status=status)
        raise self._failure
