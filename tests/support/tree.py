"""The repository as data, for the tests of the house: its modules, their imports, their names."""

from __future__ import annotations

import ast
import functools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("mesh", "ztunnel", "waypoint", "istiod_lite", "netconfig")
DAEMONS = PACKAGES[1:]


@dataclass(frozen=True)
class Module:
    """One source file of the product."""

    name: str
    path: Path
    tree: ast.Module

    def imports(self, *, only_at_start: bool = False) -> Iterator[tuple[str, int]]:
        """(imported module, line); for `from package import name` also `package.name`.

        With `only_at_start`: only what runs when the module is imported.
        """
        nodes = self.tree.body if only_at_start else list(ast.walk(self.tree))
        for node in nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name, node.lineno
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    package = self.name.split(".")
                    package = package[
                        : len(package) - node.level + self.path.stem.count("__init__")
                    ]
                    base = ".".join(filter(None, [*package, base]))
                for alias in node.names:
                    full = f"{base}.{alias.name}"
                    yield (full if full in names() else base), node.lineno


@functools.cache
def names() -> frozenset[str]:
    """Names of all modules and packages of the product."""
    return frozenset(_name(path) for path in _files())


@functools.cache
def modules() -> dict[str, Module]:
    """Every module by its dotted name."""
    return {
        _name(path): Module(_name(path), path, ast.parse(path.read_text(), str(path)))
        for path in _files()
    }


def _files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def settings() -> dict[str, Any]:
    """[tool.house] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["house"]


def is_within(name: str, prefix: str) -> bool:
    """Whether `name` is `prefix` or lies in it."""
    return name == prefix or name.startswith(prefix + ".")


def resolves(dotted: str) -> bool:
    """Whether `package.module.Class.method` exists, by the source alone."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        module = modules().get(".".join(parts[:cut]))
        if module is not None:
            return _has(module.tree.body, parts[cut:])
    return False


def _has(body: list[ast.stmt], path: list[str]) -> bool:
    if not path:
        return True
    for node in ast.walk(ast.Module(body, [])):
        match node:
            case ast.ClassDef(name=name) if name == path[0]:
                return _has(node.body, path[1:])
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) if name == path[0]:
                return len(path) == 1
            case ast.Name(id=name, ctx=ast.Store()) if name == path[0]:
                return len(path) == 1
            case ast.Attribute(attr=name, ctx=ast.Store()) if name == path[0]:
                return len(path) == 1
    return False
