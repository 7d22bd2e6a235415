"""The log (structlog, to stderr) and the access log (JSON lines, to stdout).

Event names are stable snake_case; values are fields. JSON when a machine reads, pretty on a
terminal. Values under keys that look like secrets (`token`, `key`, `authorization`, ...) are
replaced before anything is rendered. The level can be changed while running, for all or for
one scope. structlog is configured here and nowhere else.

The access log never waits in the event loop: lines go into a buffer bounded in bytes, a
worker thread writes it out in batches, and lines that find it full are counted and dropped.
"""

from __future__ import annotations

import importlib
import json as json_module
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any, TextIO

import msgspec
import trio


def _import_structlog() -> ModuleType:
    """structlog without what it takes wherever it finds it and a JSON log never uses: rich for its
    tracebacks (4 MiB in every daemon) and asyncio for its `alog` methods (2 MiB).
    """
    # None makes the import of rich fail, and structlog does without.
    standins = {"rich": None, "asyncio": ModuleType("asyncio")}
    missing = [name for name in standins if name not in sys.modules]
    for name in missing:
        sys.modules[name] = standins[name]  # type: ignore[assignment]
    try:
        return importlib.import_module("structlog")
    finally:
        for name in missing:
            del sys.modules[name]


if TYPE_CHECKING:
    import structlog
else:
    structlog = _import_structlog()

REDACTED = "[redacted]"
_SECRET_KEY = re.compile(
    r"(^|[_.\-])(token|key|authorization|password|secret|cookie|private_key|key_pem)s?$",
    re.IGNORECASE,
)
LEVELS = {"trace": 5, "debug": 10, "info": 20, "warn": 30, "warning": 30, "error": 40, "off": 100}

_levels: dict[str, int] = {"": LEVELS["info"]}
_configured = ["info"]
# json.dumps makes an encoder for every call that asks for anything special.
_encode = msgspec.json.Encoder(enc_hook=str).encode
_to_json = json_module.JSONEncoder(default=str, ensure_ascii=False).encode

EventDict = MutableMapping[str, Any]


def configure(*, json: bool, level: str = "info", stream: TextIO | None = None) -> None:
    """Send logs to `stream` (stderr by default), as JSON lines or for people.

    `level` is one of LEVELS, or `level,scope=level,...`. Raises ValueError.
    """
    set_level(level)
    _configured[:] = [level]
    renderer: Any = (
        structlog.processors.JSONRenderer(default=str, ensure_ascii=False)
        if json
        else structlog.dev.ConsoleRenderer(colors=(stream or sys.stderr).isatty())
    )
    processors: list[Any] = [
        _drop_below_level,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        redact,
    ]
    if json:
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(0),
        logger_factory=structlog.WriteLoggerFactory(_Patient(stream or sys.stderr)),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )


def get(name: str) -> Any:
    """The logger of scope `name`: `log.info("event_name", field=value)`."""
    return structlog.get_logger(scope=name)


def set_level(text: str) -> None:
    """`debug`, or by scope `info,xds=debug,...`, in place of all levels before.

    Raises ValueError, and then changes nothing.
    """
    levels = {"": LEVELS["info"]}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, has_name, level = part.rpartition("=")
        if level.lower() not in LEVELS or (has_name and not name):
            raise ValueError(f"{part!r} is no log level (one of {', '.join(LEVELS)})")
        levels[name] = LEVELS[level.lower()]
    _levels.clear()
    _levels.update(levels)


def reset_level() -> None:
    """The levels as they were configured."""
    set_level(_configured[0])


def level_text() -> str:
    """The levels in force, in the form that `set_level` reads."""
    names = {number: name for name, number in reversed(LEVELS.items())}
    rest = [f"{name}={names[level]}" for name, level in sorted(_levels.items()) if name]
    return ",".join([names[_levels[""]], *rest])


def redact(_logger: object, _method: str, event: EventDict) -> EventDict:
    """A structlog processor: values under secret-looking keys are replaced, at any depth."""
    for key, value in event.items():
        if _SECRET_KEY.search(key):
            event[key] = REDACTED
        elif isinstance(value, Mapping):
            event[key] = redact(_logger, _method, dict(value))
    return event


def _drop_below_level(_logger: object, method: str, event: EventDict) -> EventDict:
    threshold = _levels.get(str(event.get("scope", "")), _levels[""])
    if LEVELS.get(method, 40) < threshold:
        raise structlog.DropEvent
    return event


class _Patient:
    """A text stream whose reader may go away without taking the daemon along."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return


class AccessLog:
    """One JSON line per connection or request, to the descriptor `fd` (stdout).

    `record` may be called at any time; `run` must run somewhere in the daemon's tree. The
    descriptor stays the caller's. `dropped` counts lines lost because the reader was slower
    than the traffic.
    """

    def __init__(
        self,
        fd: int = 1,
        *,
        limit_bytes: int = 4 << 20,
        linger_seconds: float = 0.05,
        flush_seconds: float = 1.0,
    ) -> None:
        self._fd = fd
        self._limit = limit_bytes
        self._linger = linger_seconds
        self._flush = flush_seconds
        self._lines: list[bytes] = []
        self._size = 0
        self._wake = trio.Event()
        self._second = -1
        self._second_ends = datetime.min.replace(tzinfo=UTC)
        self._second_text = b""
        self.recorded = 0
        self.dropped = 0

    @staticmethod
    def takes(level: str) -> bool:
        """Whether lines of `level` are written: all of them, unless the levels name `access`."""
        threshold = _levels.get("access")
        return threshold is None or LEVELS[level] >= threshold

    def record(self, fields: dict[str, object]) -> None:
        """Queue one line of one field or more, with `time` and `scope` added; drops it when the
        buffer is full, or when its `level` is not wanted.
        """
        if "access" in _levels and not self.takes(str(fields.get("level", "info"))):
            return
        try:
            data = _encode(fields)
        except UnicodeEncodeError:  # half a surrogate pair, from a peer's text
            data = _to_json(fields).encode("utf-8", "backslashreplace")
        # The two at its front are written as text: a copy of all the others costs more.
        data = b'{"time":"%b","scope":"access",%b\n' % (self._now(), data[1:])
        if self._size + len(data) > self._limit:
            self.dropped += 1
            return
        self.recorded += 1
        if not self._lines:
            self._wake.set()
        self._lines.append(data)
        self._size += len(data)

    def _now(self) -> bytes:
        """The time in milliseconds (RFC 3339); the seconds' text is made once a second."""
        now = datetime.now(tz=UTC)
        if now.second != self._second or now >= self._second_ends:
            self._second = now.second
            self._second_ends = now + timedelta(seconds=1)
            self._second_text = now.isoformat()[:19].encode()
        return b"%b.%03dZ" % (self._second_text, now.microsecond // 1000)

    async def run(self) -> None:
        """Write out what was recorded. If cancelled: flushes, for at most `flush_seconds`."""
        try:
            while True:
                await self._wake.wait()
                # A thread hop per line would cost more than the line; wait for company.
                await trio.sleep(self._linger)
                await self._write_out()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + self._flush):
                # Connections cancelled together with us write their last line just now.
                await trio.sleep(min(self._linger, self._flush / 4))
                while self._lines:
                    await self._write_out()

    async def _write_out(self) -> None:
        self._wake = trio.Event()
        lines, self._lines = self._lines, []
        if not lines:
            return
        data = b"".join(lines)
        try:
            # Abandoned when the reader never drains the pipe: shutting down must not hang.
            await trio.to_thread.run_sync(_write_all, self._fd, data, abandon_on_cancel=True)
        except OSError:
            self.dropped += len(lines)
        finally:
            self._size -= len(data)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
