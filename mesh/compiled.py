"""The data path as machine code, where somebody built it: the same modules, compiled by mypyc.

`.ci/compile` builds the modules that pyproject.toml names into `.compiled/` beside the packages and
notes the hash of each source. The proxies then take all of them instead of the sources, or none:
only if every source is what was compiled and this is the Python it was compiled for. What is
missing or stale costs speed and nothing else, and the log says it.

    AMBIT_COMPILED=auto     the default: if they are there
    AMBIT_COMPILED=off      never
    AMBIT_COMPILED=require  or do not start
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Final

from mesh.errors import ConfigError

SWITCH: Final = "AMBIT_COMPILED"
SUFFIX: Final = EXTENSION_SUFFIXES[0]
"""How this Python names compiled modules; it holds its version and the kind of machine."""
MANIFEST: Final = "manifest.json"
_WAYS = ("auto", "off", "require")

in_use: str = "no"
"""`yes`, or `no` and why, for logs."""


def directory(root: Path) -> Path:
    """Where the compiled modules of the packages in `root` are for this Python."""
    return root / ".compiled" / SUFFIX.strip(".").removesuffix(".so")


def digest(source: Path) -> str:
    """SHA-256 of a file, in hex. Raises OSError."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def use(environ: Mapping[str, str] = os.environ, root: Path | None = None) -> None:
    """Take compiled modules for everything imported from now on, as AMBIT_COMPILED says.

    Raises ConfigError for another value, or when they are required and cannot be had.
    """
    global in_use
    way = environ.get(SWITCH, "auto")
    if way not in _WAYS:
        raise ConfigError(f"{SWITCH}: {way!r} is none of {', '.join(_WAYS)}")
    if way == "off":
        in_use = f"no: {SWITCH}=off"
        return
    root = root if root is not None else Path(__file__).parents[1]
    try:
        files = find(root)
    except ValueError as exc:
        if way == "require":
            raise ConfigError(f"{SWITCH}: {exc}") from exc
        in_use = f"no: {exc}"
        return
    sys.meta_path.insert(0, _Finder(files))
    in_use = "yes"


def find(root: Path) -> dict[str, Path]:
    """The compiled modules by name, if they are those of the sources in `root`. Raises ValueError,
    which says why they are not.
    """
    place = directory(root)
    try:
        manifest = json.loads((place / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError("nothing was compiled for this Python") from None
    files: dict[str, Path] = {}
    for name, source_hash in manifest["sources"].items():
        source = root.joinpath(*name.split(".")).with_suffix(".py")
        try:
            current = digest(source)
        except OSError:
            current = ""
        if current != source_hash:
            raise ValueError(f"{name} is not what was compiled")
        files[name] = place.joinpath(*name.split(".")).with_suffix(SUFFIX)
    for name in manifest["shared"]:
        files[name] = place / f"{name}{SUFFIX}"
    return files


class _Finder:
    """Finds compiled modules before their sources are."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As importlib asks."""
        del path, target
        file = self._files.get(name)
        if file is None:
            return None
        return spec_from_file_location(name, file, loader=ExtensionFileLoader(name, str(file)))


def run(name: str) -> int:
    """A daemon's `__main__`: `run()` of module `name`, compiled if it can be. Its exit code."""
    try:
        use()
    except ConfigError as exc:
        sys.stderr.write(f"{name.partition('.')[0]}: {exc}\n")
        return 2
    code: int = importlib.import_module(name).run()
    return code
