"""What load_l7.py asks for and is answered: heads of HTTP/1.1, blocks of HTTP/2 fields, bodies."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

HOST = "web.shop.svc.cluster.local"


@dataclass(frozen=True)
class Kind:
    """Requests, as many as there are heads, and the answer that the workload gives."""

    requests: tuple[bytes, ...]
    answer: bytes
    length: int
    http2: bool = False
    answer_block: bytes = b""
    body: bytes = b""
    trailers: bytes = b""
    asked: bytes = b""


def _heads(kind: str, line: str, more: str = "", *, tail: bytes = b"") -> tuple[bytes, ...]:
    """512 requests, each with its own ids, as browsers and traced services send them."""
    draw = random.Random(7)
    made = []
    for number in range(512):
        head = (
            f"{line} /a/{kind}?id={number}&q=abc HTTP/1.1\r\nHost: {HOST}:80\r\n"
            "User-Agent: Mozilla/5.0 (X11; Linux x86_64) load/1.0\r\n"
            "Accept: application/json, text/plain, */*\r\nAccept-Encoding: gzip, deflate, br\r\n"
            f"Cookie: session={draw.getrandbits(64):016x}; theme=dark\r\n"
            f"x-user: {'alice' if number % 2 else 'bob'}\r\n"
            f"x-ver: {'v1' if number % 4 else 'v2'}\r\n"
            "Authorization: Bearer eyJhbGciOiJSUzI1NiIsImtpZCI6IjEifQ.eyJzdWIiOiJhbGljZSIsImV4cCI6"
            "MTcwMDAwMDAwMH0.c2lnbmF0dXJl\r\n"
            f"traceparent: 00-{draw.getrandbits(128):032x}-{draw.getrandbits(64):016x}-00\r\n"
            f"{more}\r\n"
        )
        made.append(head.encode() + tail)
    return tuple(made)


_HUFFMAN = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)


def _literal(name: str, value: str) -> bytes:
    """A field that no table keeps."""
    return b"\x00" + _string(name) + _string(value)


def _string(text: str) -> bytes:
    """By Huffman's code where that is shorter, as all clients write it."""
    plain, coded = text.encode(), _HUFFMAN.encode(text.encode())
    mark, text_bytes = (0x80, coded) if len(coded) < len(plain) else (0, plain)
    size = len(text_bytes)
    assert size < 255
    return bytes([mark | size] if size < 127 else [mark | 127, size - 127]) + text_bytes


def _blocks(
    path: str, *, method: bytes = b"\x82", more: tuple[tuple[str, str], ...] = ()
) -> tuple[bytes, ...]:
    """The same as blocks of HTTP/2 fields."""
    draw = random.Random(7)
    made = []
    for number in range(512):
        target = f"{path}?id={number}&q=abc" if "?" not in path and method == b"\x82" else path
        fields = [
            ("user-agent", "Mozilla/5.0 (X11; Linux x86_64) load/1.0"),
            ("accept", "application/json, text/plain, */*"),
            ("accept-encoding", "gzip, deflate, br"),
            ("cookie", f"session={draw.getrandbits(64):016x}; theme=dark"),
            ("x-user", "alice" if number % 2 else "bob"),
            ("x-ver", "v1" if number % 4 else "v2"),
            ("traceparent", f"00-{draw.getrandbits(128):032x}-{draw.getrandbits(64):016x}-00"),
            *more,
        ]
        block = method + b"\x86" + b"\x04" + _string(target) + b"\x01" + _string(HOST)
        made.append(block + b"".join(_literal(*each) for each in fields))
    return tuple(made)


def _answer(body: bytes, content_type: str = "application/octet-stream") -> bytes:
    return (
        f"HTTP/1.1 200 OK\r\nServer: load\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def _json(size: int) -> bytes:
    """Orders of a shop, without anything that a detector of the bench finds."""
    draw = random.Random(3)
    rows: list[dict[str, object]] = []
    while len(json.dumps(rows)) < size:
        row = {"item": f"part {draw.getrandbits(40):x}", "count": draw.randrange(9)}
        rows.append({**row, "note": "leave it at the door, please"})
    return json.dumps(rows).encode()


def _kinds() -> dict[str, Kind]:
    small, big, rows = b"x" * 1024, b"y" * 102_400, _json(10_240)
    end = b"\r\n\r\n"
    answer = _answer(small)
    many = "".join(f"x-extra-{number}: value {number}\r\n" for number in range(15))
    twice = "x-twice: one\r\nx-twice: two\r\naccept: text/html\r\n"
    grpc = (("content-type", "application/grpc"), ("te", "trailers"))
    block = (
        b"\x88" + _literal("content-type", "application/octet-stream") + _literal("server", "load")
    )
    reply = b"\x88" + _literal("content-type", "application/grpc")
    message = b"\x00\x00\x00\x00\x64" + b"m" * 100
    return {
        "1k": Kind(_heads("1k", "GET"), answer, 1024, asked=end),
        "many": Kind(_heads("1k", "GET", many), answer, 1024, asked=end),
        "twice": Kind(_heads("1k", "GET", twice), answer, 1024, asked=end),
        "post": Kind(
            _heads("post", "POST", "Content-Length: 1024\r\n", tail=b"p" * 1020 + end),
            _answer(b"ok"),
            2,
            asked=b"p" + end,
        ),
        "chunked": Kind(
            _heads(
                "post",
                "POST",
                "Transfer-Encoding: chunked\r\n",
                tail=b"400\r\n" + small + b"\r\n0\r\n\r\n",
            ),
            _answer(b"ok"),
            2,
            asked=b"0" + end,
        ),
        "10kjson": Kind(
            _heads("j", "GET"), _answer(rows, "application/json"), len(rows), asked=end
        ),
        "100k": Kind(_heads("big", "GET"), _answer(big), len(big), asked=end),
        "h2": Kind(_blocks("/a/1k"), b"", 1024, True, block, small),
        "grpc": Kind(
            _blocks("/shop.Orders/Get", method=b"\x83", more=grpc),
            b"",
            len(message),
            True,
            reply,
            message,
            _literal("grpc-status", "0"),
            asked=message,
        ),
    }


KINDS = _kinds()
