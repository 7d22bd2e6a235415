"""Bodies as they are sent: content codings undone before the text is looked at, and redone.

gzip, deflate (zlib), br and zstd are unpacked a piece at a time, within a bound on the whole and
on the ratio; a body that passes either is hostile and blocked whatever the policy says. So is a
coding that ends early or has bytes after its end. `Seen` refuses text that is none: zero bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Protocol

import brotli
import zstandard

from waypoint.filters.chain import BodyFilter
from waypoint.filters.redact.rules import Plan

MAX_DECODED_BYTES = 64 << 20
MAX_RATIO = 200
FREE_BYTES = 1 << 20
"""Below this many decoded bytes no ratio is asked: small bodies of blanks pack well."""
_STEP = 64 << 10
CODINGS = frozenset((b"gzip", b"x-gzip", b"deflate", b"br", b"zstd"))


class _Unpack(Protocol):
    def take(self, data: bytes) -> Iterator[bytes]: ...

    @property
    def is_whole(self) -> bool: ...


class _Inflate:
    """gzip (every member of it) or zlib."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._each = zlib.decompressobj(window)
        self._has_begun = False

    def take(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._each.eof:
                self._each = zlib.decompressobj(self._window)
            yield self._each.decompress(data, _STEP)
            data = self._each.unused_data if self._each.eof else self._each.unconsumed_tail

    @property
    def is_whole(self) -> bool:
        return self._each.eof


class _Brotli:
    def __init__(self) -> None:
        self._each = brotli.Decompressor()

    def take(self, data: bytes) -> Iterator[bytes]:
        yield self._each.process(data, output_buffer_limit=_STEP)
        while not self._each.can_accept_more_data():
            yield self._each.process(b"", output_buffer_limit=_STEP)

    @property
    def is_whole(self) -> bool:
        return bool(self._each.is_finished())


class _Zstd:
    def __init__(self) -> None:
        self._each = zstandard.ZstdDecompressor(max_window_size=8 << 20).decompressobj()

    def take(self, data: bytes) -> Iterator[bytes]:
        # Four bytes can stand for a block of 128 KiB: a few at a time unpack to a bounded piece.
        for place in range(0, len(data), 64):
            if self._each.eof:
                raise zstandard.ZstdError("bytes after the frame")
            yield self._each.decompress(data[place : place + 64])
        if self._each.unused_data:
            raise zstandard.ZstdError("bytes after the frame")

    @property
    def is_whole(self) -> bool:
        return bool(self._each.eof)


class _Pack(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _PackBrotli:
    def __init__(self) -> None:
        self._each = brotli.Compressor(quality=4)

    def compress(self, data: bytes) -> bytes:
        return bytes(self._each.process(data)) + bytes(self._each.flush())

    def flush(self) -> bytes:
        return bytes(self._each.finish())


def _codec(coding: bytes) -> tuple[_Unpack, _Pack]:
    if coding == b"br":
        return _Brotli(), _PackBrotli()
    if coding == b"zstd":
        return _Zstd(), zstandard.ZstdCompressor(level=3).compressobj()
    if coding == b"deflate":
        return _Inflate(15), zlib.compressobj(4)
    return _Inflate(31), zlib.compressobj(4, zlib.DEFLATED, 31)


class Recoded:
    """A `BodyFilter` around one that sees what the coding holds."""

    __slots__ = ("_decoded", "_inner", "_pack", "_plan", "_sent", "_unpack")

    def __init__(self, plan: Plan, coding: bytes, inner: BodyFilter) -> None:
        self._plan = plan
        self._inner = inner
        self._unpack, self._pack = _codec(coding)
        self._sent = self._decoded = 0

    def feed(self, data: bytes) -> bytes:
        """Packed bytes in, packed bytes out. Raises `Blocked`."""
        self._sent += len(data)
        out: list[bytes] = []
        try:
            for piece in self._unpack.take(data):
                self._decoded += len(piece)
                allowed = max(FREE_BYTES, self._sent * MAX_RATIO)
                if self._decoded > min(allowed, MAX_DECODED_BYTES):
                    raise self._plan.refuse_uninspectable("it unpacks to too much")
                out.append(self._pack.compress(self._inner.feed(piece)))
        except (zlib.error, brotli.error, zstandard.ZstdError) as exc:
            raise self._plan.refuse_uninspectable("its content coding is broken") from exc
        return b"".join(out)

    def finish(self) -> bytes:
        """The rest. Raises `Blocked`, also for a coding that was cut short."""
        if self._sent and not self._unpack.is_whole:
            raise self._plan.refuse_uninspectable("its content coding is cut short")
        if not self._sent:
            return self._inner.finish()
        return self._pack.compress(self._inner.finish()) + self._pack.flush()


class Refused:
    """A body that cannot be looked into: refused at its first byte; an empty one is none."""

    __slots__ = ("_plan", "_why")

    def __init__(self, plan: Plan, why: str) -> None:
        self._plan = plan
        self._why = why

    def feed(self, data: bytes) -> bytes:
        """Raises `Blocked` if there is a byte."""
        if data:
            raise self._plan.refuse_uninspectable(self._why)
        return b""

    def finish(self) -> bytes:
        """Nothing."""
        return b""


class Seen:
    """Text only: a zero byte (UTF-16, or no text at all) cannot be inspected."""

    __slots__ = ("_inner", "_plan")

    def __init__(self, plan: Plan, inner: BodyFilter) -> None:
        self._plan = plan
        self._inner = inner

    def feed(self, data: bytes) -> bytes:
        """Raises `Blocked`."""
        if b"\x00" in data:
            raise self._plan.refuse_uninspectable("it is not text")
        return self._inner.feed(data)

    def finish(self) -> bytes:
        """Raises `Blocked`."""
        return self._inner.finish()
