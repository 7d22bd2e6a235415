"""Bodies as they are sent: content codings undone before the text is looked at, and redone.

gzip, deflate (zlib), br and zstd are unpacked a piece at a time, within a bound on the whole and
on the ratio; a body that passes either is hostile and blocked whatever the policy says: to pass it
we would have to unpack it, too. So is a coding that breaks when a part of it has been sent on. One
that is none from its first byte cannot be inspected, nor can one that is cut short; what the policy
lets pass of those is as broken as it came. `Inspectable` looks at what must be text.
"""

from __future__ import annotations

import zlib
from codecs import IncrementalDecoder, getincrementaldecoder
from collections.abc import Iterator
from typing import Protocol

import brotli
import zstandard
from mypy_extensions import mypyc_attr

from waypoint.filters.chain import Blocked, BodyFilter
from waypoint.filters.redact.rules import Plan, Report

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

    def sync(self) -> bytes:
        """All so far, without an end."""
        ...

    def flush(self) -> bytes: ...


class _PackZlib:
    def __init__(self, window: int) -> None:
        self._each = zlib.compressobj(4, zlib.DEFLATED, window)

    def compress(self, data: bytes) -> bytes:
        return self._each.compress(data)

    def sync(self) -> bytes:
        return self._each.flush(zlib.Z_SYNC_FLUSH)

    def flush(self) -> bytes:
        return self._each.flush()


class _PackZstd:
    def __init__(self) -> None:
        self._each = zstandard.ZstdCompressor(level=3).compressobj()

    def compress(self, data: bytes) -> bytes:
        return self._each.compress(data)

    def sync(self) -> bytes:
        return self._each.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)

    def flush(self) -> bytes:
        return self._each.flush()


class _PackBrotli:
    def __init__(self) -> None:
        self._each = brotli.Compressor(quality=4)

    def compress(self, data: bytes) -> bytes:
        return bytes(self._each.process(data))

    def sync(self) -> bytes:
        return bytes(self._each.flush())

    def flush(self) -> bytes:
        return bytes(self._each.finish())


def _codec(coding: bytes) -> tuple[_Unpack, _Pack]:
    if coding == b"br":
        return _Brotli(), _PackBrotli()
    if coding == b"zstd":
        return _Zstd(), _PackZstd()
    window = 15 if coding == b"deflate" else 31
    return _Inflate(window), _PackZlib(window)


@mypyc_attr(native_class=False)
class BrokenCoding(Exception):
    """This is not what the coding says, or too much."""


_ERRORS = (zlib.error, brotli.error, zstandard.ZstdError)


def unpack(coding: bytes, data: bytes, limit: int) -> bytes:
    """All of a short message. Raises `BrokenCoding`, also for more than `limit` bytes."""
    unpacker, out, size = _codec(coding)[0], [], 0
    try:
        for piece in unpacker.take(data):
            size += len(piece)
            if size > limit:
                raise BrokenCoding
            out.append(piece)
    except _ERRORS as exc:
        raise BrokenCoding from exc
    if not unpacker.is_whole:
        raise BrokenCoding
    return b"".join(out)


def pack(coding: bytes, data: bytes) -> bytes:
    """A short message as a whole."""
    packer = _codec(coding)[1]
    return packer.compress(data) + packer.flush()


class Recoded:
    """A `BodyFilter` around one that sees what the coding holds. What a feed gives is all of it: a
    stream of events waits for nothing.
    """

    __slots__ = (
        "_begin", "_decoded", "_inner", "_is_raw", "_pack", "_plan", "_report", "_sent", "_unpack",
    )  # fmt: skip

    def __init__(self, plan: Plan, report: Report, coding: bytes, inner: BodyFilter) -> None:
        self._plan = plan
        self._report = report
        self._inner = inner
        self._unpack, self._pack = _codec(coding)
        self._sent = self._decoded = 0
        self._begin = b""
        """What has come before the first decoded byte."""
        self._is_raw = False

    def feed(self, data: bytes) -> bytes:
        """Packed bytes in, packed bytes out. Raises `Blocked`."""
        if self._is_raw:
            return data
        self._sent += len(data)
        if not self._decoded:
            self._begin += data[: _STEP - len(self._begin)]
        out: list[bytes] = []
        try:
            for piece in self._unpack.take(data):
                self._decoded += len(piece)
                allowed = max(FREE_BYTES, self._sent * MAX_RATIO)
                if self._decoded > min(allowed, MAX_DECODED_BYTES):
                    raise self._refused("it unpacks to too much")
                redacted = self._inner.feed(piece)
                if redacted:
                    out.append(self._pack.compress(redacted))
        except _ERRORS as exc:
            if self._decoded or self._sent > len(self._begin):
                raise self._refused("its content coding is broken") from exc
            self._plan.pass_unseen(self._report, "its content coding is broken")
            self._is_raw = True
            return self._begin
        if self._decoded:
            self._begin = b""
            out.append(self._pack.sync())
        return b"".join(out)

    def finish(self) -> bytes:
        """The rest. Raises `Blocked`, also for a coding that was cut short."""
        if self._is_raw:
            return b""
        if not self._sent:
            return self._inner.finish()
        if not self._unpack.is_whole:
            self._plan.pass_unseen(self._report, "its content coding is cut short")
            if not self._decoded:
                return self._begin
            return self._pack.compress(self._inner.finish()) + self._pack.sync()
        return self._pack.compress(self._inner.finish()) + self._pack.flush()

    def _refused(self, why: str) -> Blocked:
        self._report.unseen(why)
        return self._plan.refuse_uninspectable(why)


class Refused:
    """A body that cannot be looked into: refused at its first byte; an empty one is none."""

    __slots__ = ("_plan", "_report", "_why")

    def __init__(self, plan: Plan, report: Report, why: str) -> None:
        self._plan = plan
        self._report = report
        self._why = why

    def feed(self, data: bytes) -> bytes:
        """Raises `Blocked` if there is a byte and a policy says so; else it passes, counted."""
        if data and self._why:
            why, self._why = self._why, ""
            self._plan.pass_unseen(self._report, why)
        return data

    def finish(self) -> bytes:
        """Nothing."""
        return b""


class Inspectable:
    """What must be text in a charset that is a superset of ASCII: no zero bytes (UTF-16, or no text
    at all), UTF-8 where it is said to be that, and no more than the policy's `maxBodyBytes`.
    """

    __slots__ = ("_decoder", "_inner", "_is_over", "_is_utf8", "_left", "_plan", "_report")

    def __init__(self, plan: Plan, report: Report, inner: BodyFilter, *, is_utf8: bool) -> None:
        self._plan = plan
        self._report = report
        self._inner = inner
        self._left = plan.max_body_bytes
        self._is_utf8 = is_utf8
        self._decoder: IncrementalDecoder | None = None
        """Made when the first byte comes that is not ASCII."""
        self._is_over = False

    def feed(self, data: bytes) -> bytes:
        """Raises `Blocked`."""
        if self._is_over:
            return data
        if data.find(b"\x00") >= 0:
            return self._give_up(data, "it is not text")
        if self._plan.max_body_bytes:
            self._left -= len(data)
            if self._left < 0:
                return self._give_up(data, "the body is larger than maxBodyBytes")
        if self._is_utf8 and (self._decoder is not None or not data.isascii()):
            self._decoder = self._decoder or getincrementaldecoder("utf-8")()
            try:
                self._decoder.decode(data)
            except UnicodeDecodeError:
                return self._give_up(data, "it is not UTF-8")
        return self._inner.feed(data)

    def _give_up(self, data: bytes, why: str) -> bytes:
        self._plan.pass_unseen(self._report, why)
        self._is_over = True
        return self._inner.finish() + data

    def finish(self) -> bytes:
        """Raises `Blocked`."""
        return b"" if self._is_over else self._inner.finish()


class Chained:
    """One `BodyFilter` after the other."""

    __slots__ = ("_filters",)

    def __init__(self, filters: list[BodyFilter]) -> None:
        self._filters = filters

    def feed(self, data: bytes) -> bytes:
        """Raises `Blocked`."""
        for each in self._filters:
            if not data:
                break
            data = each.feed(data)
        return data

    def finish(self) -> bytes:
        """Raises `Blocked`."""
        data = b""
        for each in self._filters:
            data = (each.feed(data) if data else b"") + each.finish()
        return data
