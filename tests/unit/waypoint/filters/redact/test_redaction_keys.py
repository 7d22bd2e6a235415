"""Keys are plain files of one directory, bounded, and their absence says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.errors import ConfigError
from waypoint.filters.redact.keys import MAX_KEY_BYTES, key_reader


def test_a_key_is_read(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"k" * 32)
    assert key_reader(tmp_path)("key") == b"k" * 32


@pytest.mark.parametrize("name", ["../key", "/etc/passwd", "", ".hidden", "a/b", "x" * 300])
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="plain name"):
        key_reader(tmp_path)(name)


def test_what_is_missing_or_too_long(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        key_reader(tmp_path)("key")
    assert "mount a Secret" in caught.value.hint
    (tmp_path / "key").write_bytes(b"k" * (MAX_KEY_BYTES + 1))
    with pytest.raises(ConfigError, match="longer"):
        key_reader(tmp_path)("key")
