"""Compiled modules are taken all or none, and only for the sources that were compiled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mesh import compiled
from mesh.errors import ConfigError

ROOT = Path(compiled.__file__).parents[1]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Packages of one module, and what somebody compiled of it."""
    (tmp_path / "mesh").mkdir()
    source = tmp_path / "mesh" / "fast.py"
    source.write_text("x = 1\n")
    place = compiled.directory(tmp_path)
    (place / "mesh").mkdir(parents=True)
    manifest = {"sources": {"mesh.fast": compiled.digest(source)}, "shared": ["abc__mypyc"]}
    (place / compiled.MANIFEST).write_text(json.dumps(manifest))
    return tmp_path


def test_modules_of_unchanged_sources_are_found(root: Path) -> None:
    place = compiled.directory(root)
    assert compiled.find(root) == {
        "mesh.fast": place / "mesh" / f"fast{compiled.SUFFIX}",
        "abc__mypyc": place / f"abc__mypyc{compiled.SUFFIX}",
    }


@pytest.mark.parametrize("text", ["x = 2\n", None])
def test_a_changed_or_missing_source_leaves_all_out(root: Path, text: str | None) -> None:
    source = root / "mesh" / "fast.py"
    source.unlink() if text is None else source.write_text(text)
    with pytest.raises(ValueError, match=r"mesh\.fast is not what was compiled"):
        compiled.find(root)


def test_what_was_not_built_is_not_used_and_may_be_required(tmp_path: Path) -> None:
    before = list(sys.meta_path)
    compiled.use({}, tmp_path)
    assert compiled.in_use == "no: nothing was compiled for this Python"
    compiled.use({"AMBIT_COMPILED": "off"}, tmp_path)
    assert compiled.in_use == "no: AMBIT_COMPILED=off"
    with pytest.raises(ConfigError, match="AMBIT_COMPILED: nothing was compiled"):
        compiled.use({"AMBIT_COMPILED": "require"}, tmp_path)
    with pytest.raises(ConfigError, match="'maybe' is none of auto, off, require"):
        compiled.use({"AMBIT_COMPILED": "maybe"}, tmp_path)
    assert sys.meta_path == before


def test_a_waypoint_refuses_another_value() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "waypoint"], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={"AMBIT_COMPILED": "yes"}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "waypoint: AMBIT_COMPILED: 'yes' is none of auto, off, require\n"
