"""What is compiled keeps to what mypyc compiles rightly (docs/decisions/0012)."""

from __future__ import annotations

import ast
import builtins
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
LISTS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ambit"][
    "compiled"
]
NAMES = [name for names in LISTS.values() for name in names]
TREES = {
    name: ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text(), name) for name in NAMES
}


def test_the_lists_are_sorted_and_share_nothing() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all(sorted(names) == names for names in LISTS.values())


def test_heirs_of_builtin_classes_are_not_native() -> None:
    """A native class has its method table where an exception has its fields: calls would crash."""
    wrong = [
        f"{module}: {node.name} inherits from {base.id} without mypyc_attr(native_class=False)"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and not any("native_class=False" in ast.unparse(each) for each in node.decorator_list)
        for base in node.bases
        if isinstance(base, ast.Name) and isinstance(getattr(builtins, base.id, None), type)
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_of_ours_is_copied_by_copy() -> None:
    """`copy.copy` makes an object without its constructor, which a native class does not take."""
    wrong = [
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and any(each.name == "copy" for each in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module == "copy")
    ]
    assert not wrong, f"use dataclasses.replace: {wrong}"
