"""What a person sees: help with examples, one-line errors with hints, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from mesh.cli import choose, enroll, lab
from mesh.cli.main import ambit
from mesh.cli.output import NotFound, emit, exit_code
from mesh.errors import ConfigError, Denied, KernelError, Unavailable
from mesh.lab.control import LabClient


def run(*argv: str) -> Any:
    return CliRunner().invoke(ambit, argv)


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            found += leaves(command, (*path, name))
        else:
            found.append((*path, name))
    return found


@pytest.mark.parametrize("verb", leaves(ambit), ids=" ".join)  # type: ignore[arg-type]
def test_every_verb_has_help(verb: tuple[str, ...]) -> None:
    shown = run(*verb, "-h")
    assert shown.exit_code == 0
    if verb != ("version",):
        examples = shown.output.partition("Examples:")[2]
        assert len([line for line in examples.splitlines() if line.strip()][:3]) == 3


def test_version_as_data() -> None:
    assert set(json.loads(run("version", "-o", "json").stdout)) == {"version"}


def test_no_lab_is_unreachable_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "list_labs", lambda uid: [])
    done = run("lab", "status")
    assert done.exit_code == 4
    assert done.stderr.splitlines()[0] == "ambit: no lab is up"
    assert done.stderr.splitlines()[1].startswith("ambit: hint: ")


def test_a_bad_name_is_a_usage_error() -> None:
    done = run("lab", "status", "--lab", "Bad Name")
    assert done.exit_code == 2
    assert "Bad Name" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (NotFound("x"), 3),
        (Unavailable("x"), 4),
        (KernelError("x"), 1),
        (Denied("x"), 1),
    ],
)
def test_exit_codes(error: Any, code: int) -> None:
    assert exit_code(error) == code


@pytest.mark.parametrize("form", ["json", "yaml", "table"])
def test_emit(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"name": "a", "ready": True, "ips": ["10.0.0.1", "fd00::1"], "message": ""}
    emit([row], form, columns=[("NAME", "name"), ("READY", "ready"), ("M", "message")], rows=[row])
    out = capsys.readouterr().out
    assert (
        out
        == {
            "json": json.dumps([row], indent=2) + "\n",
            "yaml": "- name: a\n  ready: true\n  ips:\n  - 10.0.0.1\n  - fd00::1\n  message: ''\n",
            "table": "NAME   READY   M\na      yes     -\n",
        }[form]
    )


def test_replacements() -> None:
    assert lab.parse_replacements(("ztunnel=/bin/zt proxy 'a b'",), ("node2",)) == {
        "ztunnel@node2": ("/bin/zt", "proxy", "a b")
    }
    assert lab.parse_replacements(("istiod_lite=x",), ()) == {"istiod": ("x",)}
    assert lab.parse_replacements(("netconfig=x",), ()) == {"netconfig": ("x",)}
    for bad in ("ztunnel", "ztunnel=", "envoy=x", "ztunnel='open"):
        with pytest.raises(ConfigError, match=bad):
            lab.parse_replacements((bad,), ())
    with pytest.raises(ConfigError, match="--on"):
        lab.parse_replacements((), ("node1",))


def pod(namespace: str, name: str) -> dict[str, Any]:
    return {"metadata": {"namespace": namespace, "name": name}}


class Pods(LabClient):
    def __init__(self, *pods: dict[str, Any]) -> None:
        super().__init__("x")
        self.pods = pods

    def get(
        self, kind: str, namespace: str | None = None, name: str | None = None
    ) -> list[dict[str, Any]]:
        return [p for p in self.pods if namespace in {None, p["metadata"]["namespace"]}]


def test_choosing_a_pod() -> None:
    client = Pods(pod("shop", "web-1-a"), pod("shop", "web-1-b"), pod("shop", "reader"))
    assert choose.choose_pod(client, "reader", None) == ("shop", "reader")
    assert choose.choose_pod(client, "shop/rea", None) == ("shop", "reader")
    assert choose.choose_pod(client, "deploy/web", "shop") == ("shop", "web-1-a")
    with pytest.raises(ConfigError, match="several"):
        choose.choose_pod(client, "shop/web", None)
    with pytest.raises(NotFound, match="nobody"):
        choose.choose_pod(client, "nobody", None)


NAMESPACES = """\
# keep me
apiVersion: v1
kind: Namespace
metadata:
  name: a  # and me
---
apiVersion: v1
kind: Namespace
metadata:
  name: b
  labels:
    team: x
"""


def live(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "annotations": {"ambit.dev/source": "n.yaml:2"}}}


def test_write_label_keeps_comments_and_neighbours(tmp_path: Path) -> None:
    file = tmp_path / "n.yaml"
    file.write_text(NAMESPACES)
    enroll.write_label(tmp_path, live("b"), "ambient")
    text = file.read_text()
    assert "# keep me" in text
    assert "# and me" in text
    assert "    team: x\n    istio.io/dataplane-mode: ambient\n" in text
    enroll.write_label(tmp_path, live("b"), None)
    enroll.write_label(tmp_path, live("a"), "ambient")
    enroll.write_label(tmp_path, live("a"), None)
    assert file.read_text() == NAMESPACES
    assert [p.name for p in tmp_path.iterdir()] == ["n.yaml"]


def test_write_label_says_when_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in no file"):
        enroll.write_label(tmp_path, {"metadata": {"name": "c"}}, "ambient")
