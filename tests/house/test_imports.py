"""Who may import whom: ranks, fences, purity. The lists are [tool.house] of pyproject.toml."""

from __future__ import annotations

import ast

from tests.support.tree import DAEMONS, ROOT, is_within, modules, settings


def group_of(name: str) -> str:
    """The entry of the rank table that a module belongs to; empty when there is none."""
    return max((key for key in settings()["ranks"] if is_within(name, key)), key=len, default="")


def complaints(found: list[str]) -> str:
    return "\n" + "\n".join(sorted(set(found)))


def test_every_module_has_a_rank() -> None:
    assert modules()
    without = [
        name for name in modules() if not group_of(name) and name not in {"mesh", "waypoint"}
    ]
    assert not without, complaints(
        [f"{name} has no rank in [tool.house.ranks]" for name in without]
    )


def test_imports_go_down_the_ranks() -> None:
    ranks = settings()["ranks"]
    wrong = []
    for module in modules().values():
        own = group_of(module.name)
        for imported, line in module.imports():
            other = group_of(imported)
            if not own or not other or own == other:
                continue
            if own.startswith("mesh.") and other in DAEMONS:
                why = "nothing in mesh may know a daemon"
            elif own in DAEMONS and other in DAEMONS:
                why = "daemons meet only on the wire"
            elif ranks[other] > ranks[own]:
                why = f"rank {ranks[own]} may not import rank {ranks[other]}"
            elif ranks[other] == ranks[own] and ranks[own] > 0:
                why = f"both are of rank {ranks[own]}"
            else:
                continue
            place = f"{module.path.relative_to(ROOT)}:{line}"
            wrong.append(f"{place}: {module.name} may not import {imported}: {why}")
    assert not wrong, complaints(wrong)


def test_no_import_cycles() -> None:
    graph = {
        module.name: sorted(
            {
                imported
                for imported, _ in module.imports(only_at_start=True)
                if imported in modules() and imported != module.name
            }
        )
        for module in modules().values()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> list[str]:
        if name in trail:
            return [" -> ".join([*trail[trail.index(name) :], name])]
        if name in done:
            return []
        found = [cycle for other in graph[name] for cycle in visit(other, (*trail, name))]
        done.add(name)
        return found

    cycles = [cycle for name in graph for cycle in visit(name, ())]
    assert not cycles, complaints(cycles)


def test_fences() -> None:
    wrong = []
    for module in modules().values():
        if is_within(module.name, "mesh.proto"):
            continue
        for imported, line in module.imports():
            for fenced, places in settings()["fences"].items():
                if is_within(imported, fenced) and not any(
                    is_within(module.name, place) for place in places
                ):
                    place = f"{module.path.relative_to(ROOT)}:{line}"
                    wrong.append(f"{place}: {fenced} may be imported only in {', '.join(places)}")
    assert not wrong, complaints(wrong)


def test_pure_modules_do_no_io() -> None:
    wrong = []
    for name in settings()["pure"]:
        inside = [module for module in modules().values() if is_within(module.name, name)]
        if not inside:
            wrong.append(f"[tool.house] pure names {name}, which does not exist")
        for module in inside:
            for imported, line in module.imports():
                if any(is_within(imported, banned) for banned in settings()["impure"]):
                    place = f"{module.path.relative_to(ROOT)}:{line}"
                    wrong.append(f"{place}: {module.name} is pure and may not import {imported}")
    assert not wrong, complaints(wrong)


def test_each_pure_module_is_imported_by_some_test() -> None:
    """By a test itself, or by a module beside it that is: a part is tested through its whole."""
    tested: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                tested.add(node.module)
                tested.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                tested.update(alias.name for alias in node.names)
    for name in sorted(tested & modules().keys()):
        beside = name.rpartition(".")[0]
        tested |= {other for other, _ in modules()[name].imports() if is_within(other, beside)}
    untested = [
        module.name
        for module in modules().values()
        if any(is_within(module.name, pure) for pure in settings()["pure"])
        and not is_within(module.name, "mesh.proto")
        and module.path.stem != "__init__"
        and module.name not in tested
    ]
    assert not untested, complaints([f"no test imports {name}" for name in untested])


def test_one_place_opens_namespaces() -> None:
    """`mesh.netns` is the only caller of setns; whoever else needs it goes through it."""
    wrong = [
        module.name
        for module in modules().values()
        if module.name != "mesh.netns"
        and any(
            isinstance(node, ast.Attribute) and node.attr == "setns"
            for node in ast.walk(module.tree)
        )
    ]
    assert not wrong


def test_only_guards_catch_everything() -> None:
    """`except Exception` hides bugs. It stands in `lifecycle.supervise`, and where callbacks are
    called outside of any task; each of those hands the bug to its owner.
    """
    wrong = []
    for module in modules().values():
        if module.name in settings()["guards"]:
            continue
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            is_broad = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}
            )
            if is_broad and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
                wrong.append(f"{module.path.relative_to(ROOT)}:{node.lineno}: a broad except")
    assert not wrong, complaints(wrong)


def test_files_are_short() -> None:
    allowed = settings()["long_files"]
    limits = {name: settings()["max_lines"] for name in (*DAEMONS, "mesh")}
    limits["tests"] = settings().get("max_test_lines", 700)
    long = {}
    for folder, limit in limits.items():
        for path in (ROOT / folder).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            count = len(path.read_text().splitlines())
            if count > limit and not name.startswith("mesh/proto/"):
                long[name] = count
    surprises = {name: count for name, count in long.items() if name not in allowed}
    assert not surprises, "too long and not in [tool.house.long_files]"
    assert not set(allowed) - set(long), "in [tool.house.long_files], but short by now"
