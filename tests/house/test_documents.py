"""What the documents say is there, is there; and nothing is there that must not be."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from mesh.cli.output import FAILED, NOT_FOUND, UNREACHABLE, USAGE
from mesh.cli.reference import render as render_commands
from mesh.runtime.config_docs import find_class, render
from tests.support.tree import PACKAGES, ROOT, modules, resolves

DOCUMENTS = sorted((ROOT / "docs").rglob("*.md"))
WALKS = sorted((ROOT / "docs" / "walks").glob("*.md"))
NAME = re.compile(rf"`((?:{'|'.join(PACKAGES)})(?:\.\w+)+)(?:\([^`]*\))?`")
FILE = re.compile(rf"`((?:{'|'.join((*PACKAGES, 'tests', 'docs', 'manifests'))})/[\w./-]+)`")
LINK = re.compile(r"\]\((?!\w+:)([^)#]+)(?:#[^)]*)?\)")
WITH_CONFIG = ("istiod_lite", "netconfig", "waypoint", "ztunnel")


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:  # a tarball without git
        paths = [path for path in ROOT.rglob("*") if ".venv" not in path.parts]
    return [path for path in paths if path.is_file()]


def test_there_are_walks() -> None:
    assert {path.stem for path in WALKS} >= {
        "outbound",
        "inbound",
        "config-push",
        "certificates",
        "enrol-pod",
        "l7-request",
    }


@pytest.mark.parametrize("path", WALKS, ids=lambda path: path.stem)
def test_a_walk_names_its_steps(path: Path) -> None:
    assert len(set(NAME.findall(path.read_text()))) >= 8


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT / "docs")))
def test_every_name_in_a_document_exists(path: Path) -> None:
    text = path.read_text()
    missing = [name for name in NAME.findall(text) if not resolves(name)]
    missing += [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    missing += [link for link in LINK.findall(text) if not (path.parent / link).exists()]
    assert not missing


def test_every_document_can_be_reached_from_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    lost = []
    for path in DOCUMENTS:
        place = path.relative_to(ROOT / "docs")
        is_listed = str(place) in index or f"{place.parent}/" in index
        if not is_listed and place.name != "index.md":
            lost.append(str(place))
    assert not lost


def test_settings_page_is_what_the_classes_say() -> None:
    page = (ROOT / "docs" / "reference" / "config.md").read_text()
    classes = {daemon: find_class(f"{daemon}.config") for daemon in WITH_CONFIG}
    assert page == render(classes), "run `make docs`"


def test_command_line_page_is_what_the_commands_say() -> None:
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    assert page == render_commands(), "run `make docs`"


def first_column(page: str, heading: str) -> list[str]:
    """The names in the first column of the table below a heading."""
    section = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)


def response_flags() -> set[str]:
    """Every flag that the mesh's code gives to an error, a refusal or an ending."""
    found = set()
    for module in modules().values():
        if module.name.startswith(("mesh.lab", "mesh.cli", "mesh.proto")):
            continue
        for node in ast.walk(module.tree):
            value: ast.expr | None = None
            if isinstance(node, ast.keyword) and node.arg == "flag":
                value = node.value
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "Refusal" and node.args:
                value = node.args[0]
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                if any(isinstance(each, ast.Name) and each.id == "flag" for each in targets):
                    value = node.value
            for inner in ast.walk(value) if value is not None else ():
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    found.add(inner.value)
    return found


def test_errors_page_has_every_flag_and_no_other() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    assert sorted(first_column(page, "Response flags")) == sorted(response_flags())


def test_errors_page_has_every_exit_code_of_the_command_line() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    codes = {int(code) for code in first_column(page, "Exit codes of `ambit`")}
    assert codes == {0, FAILED, USAGE, NOT_FOUND, UNREACHABLE, 130}


def test_access_log_page_has_the_fields_in_their_order() -> None:
    tree = modules()["ztunnel.record"].tree
    function = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "access_fields"
    )
    written = next(node for node in ast.walk(function) if isinstance(node, ast.Dict))
    names = [ast.literal_eval(key) for key in written.keys if key is not None]
    page = (ROOT / "docs" / "reference" / "access-log.md").read_text()
    assert first_column(page, "Fields") == ["time", "scope", *names]


SECRETS = (
    re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/=\s]{40}"),
    re.compile(rb"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{20,}"),  # a signed token
    re.compile(rb"\b(AKIA[0-9A-Z]{16}|gh[pousr]_\w{36}|xox[bp]-[\w-]{20,})"),
)


def test_no_secret_in_the_tree() -> None:
    guilty = [
        str(path.relative_to(ROOT))
        for path in tracked_files()
        if any(secret.search(path.read_bytes()) for secret in SECRETS)
    ]
    assert not guilty


def test_lock_files_name_no_host() -> None:
    for name in ("requirements.lock", "requirements-dev.lock"):
        text = (ROOT / name).read_text()
        assert "://" not in text
        pinned = re.findall(r"^[\w.-]+==", text, re.MULTILINE)
        assert pinned
        assert text.count("--hash=sha256:") >= len(pinned)


def test_development_lock_holds_the_other_at_the_same_versions() -> None:
    def pins(name: str) -> set[str]:
        return set(re.findall(r"^[\w.-]+==[^ \\]+", (ROOT / name).read_text(), re.MULTILINE))

    assert pins("requirements.lock") <= pins("requirements-dev.lock")
