"""Keys are plain files of one directory, bounded, and their absence says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.errors import ConfigError
from mesh.model.l7_policy import RedactionAction, RedactionPolicy, RedactionRule
from waypoint.filters.chain import Headers, Request, Respond
from waypoint.filters.redact.filter import RedactionFilter
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


def test_a_key_that_comes_late_and_one_that_is_rotated(tmp_path: Path) -> None:
    rule = RedactionRule("r", headers=("x-user",), action=RedactionAction("hash"))
    policy = RedactionPolicy("shop", "p", rules=(rule,), key_file="k")
    each = RedactionFilter([policy], key_reader(tmp_path))

    def ask(now: float) -> bytes | int:
        request = Request(method=b"GET", scheme=b"http", authority=b"a", path=b"/", now=now,
                          headers=Headers([(b"x-user", b"bob")]))  # fmt: skip
        said = each.on_request(request)
        if isinstance(said, Respond):
            return said.status
        return request.headers.get(b"x-user") or b""

    assert ask(100.0) == 500
    (tmp_path / "k").write_bytes(b"k" * 32)
    assert ask(101.0) == 500
    first = ask(120.0)
    assert isinstance(first, bytes)
    assert first.startswith(b"hash_")
    assert ask(131.0) == first
    (tmp_path / "k").write_bytes(b"n" * 32)
    second = ask(145.0)
    assert second != first
    (tmp_path / "k").write_bytes(b"short")
    assert ask(160.0) == second
    (tmp_path / "k").unlink()
    assert ask(180.0) == second
