"""One HTTP/1.1 request over a fresh connection, from any network namespace or to a unix socket.

For probes, for the CNI call and for reading admin pages; not for traffic. It asks for
`Connection: close` and lets `http.client` parse the whole answer.
"""

from __future__ import annotations

import http.client
import io
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from mesh import netns
from mesh.errors import KernelError, Unavailable

MAX_BODY = 32 << 20
MAX_HEAD = 64 << 10


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect: `ip` and `port` seen from the namespace `net`, or a unix socket."""

    ip: str = ""
    port: int = 0
    net: int | None = None
    source: str = ""
    path: Path | None = None


async def connect(target: Target) -> trio.SocketStream:
    """Open the connection. Raises Unavailable."""
    opened = _open_socket(target)
    try:
        address: object = (target.ip, target.port)
        if target.path is not None:
            address = str(target.path)
        await opened.connect(address)
    except OSError as exc:
        opened.close()
        raise Unavailable(f"{_name(target)}: {exc.strerror or exc}") from exc
    except BaseException:
        opened.close()
        raise
    return trio.SocketStream(opened)


def _open_socket(target: Target) -> trio.socket.SocketType:
    try:
        if target.path is not None:
            return trio.socket.from_stdlib_socket(_nonblocking(socket.AF_UNIX))
        family = socket.AF_INET6 if ":" in target.ip else socket.AF_INET
        if target.net is None:
            made = _nonblocking(family)
        else:
            with netns.inside(target.net):
                made = _nonblocking(family)
        try:
            if target.source:
                made.bind((target.source, 0))
        except BaseException:
            made.close()
            raise
        return trio.socket.from_stdlib_socket(made)
    except (OSError, KernelError) as exc:
        raise Unavailable(f"{_name(target)}: {exc}") from exc


def _nonblocking(family: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    made.setblocking(False)
    return made


def _name(target: Target) -> str:
    if target.path is not None:
        return str(target.path)
    return f"[{target.ip}]:{target.port}" if ":" in target.ip else f"{target.ip}:{target.port}"


async def request(
    target: Target,
    method: str,
    path: str,
    *,
    headers: Sequence[tuple[str, str]] = (),
    body: bytes = b"",
    head_only: bool = False,
) -> tuple[int, bytes]:
    """Status and body; with `head_only` the body is not waited for. Raises Unavailable.

    If cancelled: the connection is closed.
    """
    given = {name.lower() for name, _ in headers}
    lines = [f"{method} {path} HTTP/1.1"]
    if "host" not in given:
        lines.append(f"Host: {_name(target) if target.path is None else 'localhost'}")
    lines += [f"{name}: {value}" for name, value in headers]
    lines += ["Connection: close"]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    data = "\r\n".join(lines).encode("utf-8") + b"\r\n\r\n" + body
    async with await connect(target) as stream:
        try:
            await stream.send_all(data)
            answer = await _receive(stream, head_only=head_only)
        except trio.BrokenResourceError as exc:
            raise Unavailable(f"{_name(target)}: the connection broke") from exc
    return _parse(answer, target, head_only=head_only)


async def _receive(stream: trio.SocketStream, *, head_only: bool) -> bytes:
    received = bytearray()
    while data := await stream.receive_some(1 << 16):
        received += data
        if head_only and (b"\r\n\r\n" in received or len(received) > MAX_HEAD):
            break
        if len(received) > MAX_BODY + MAX_HEAD:
            raise Unavailable(f"the answer is larger than {MAX_BODY >> 20} MiB")
    return bytes(received)


class _Received:
    """Received bytes in the shape that `http.client` reads from."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *_: object, **__: object) -> io.BytesIO:
        return io.BytesIO(self._data)


def _parse(answer: bytes, target: Target, *, head_only: bool) -> tuple[int, bytes]:
    response = http.client.HTTPResponse(_Received(answer))  # type: ignore[arg-type]
    try:
        response.begin()
        return response.status, b"" if head_only else response.read()
    except (http.client.HTTPException, ValueError, OSError) as exc:
        reason = "no answer" if not answer else f"no HTTP: {type(exc).__name__}"
        raise Unavailable(f"{_name(target)}: {reason}") from exc
