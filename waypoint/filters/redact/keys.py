"""Keys of redaction: files of one directory, so that a policy cannot name just any file."""

from __future__ import annotations

import re
from pathlib import Path

from mesh.errors import ConfigError
from waypoint.filters.redact.filter import ReadKey

MAX_KEY_BYTES = 4 << 20
"""Descriptor sets are beside the keys, and as long as that."""
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252})")


def key_reader(directory: Path) -> ReadKey:
    """Reads a policy's `keyFile`, a plain name in `directory`. It raises ConfigError."""

    def read(name: str) -> bytes:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is no plain name of a file", field="keyFile")
        try:
            with (directory / name).open("rb") as file:
                key = file.read(MAX_KEY_BYTES + 1)
        except OSError as exc:
            raise ConfigError(
                f"key {name} cannot be read: {exc.strerror}",
                field="keyFile",
                hint=f"mount a Secret with that file at {directory} of the waypoint's pods",
            ) from exc
        if len(key) > MAX_KEY_BYTES:
            raise ConfigError(f"key {name} is longer than {MAX_KEY_BYTES} bytes", field="keyFile")
        return key

    return read
