"""`ambit check`: every fault with its place, past the first one, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mesh.cli.main import ambit
from tests.support.tree import ROOT

NAMESPACE = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n"
BAD = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
spec:
  ports:
    - {name: http, port: 70000}
    - {name: good, port: 80}
    - {name: tls, port: abc}
  type: Nonsense
---
kind: Oops
metadata: {name: x}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec:
  selectr: {}
  rules:
    - from:
        - source: {principals: [a, 7]}
      to:
        - operation: {ports: ["abc", "80", "99999"]}
"""


def run(monkeypatch: pytest.MonkeyPatch, directory: Path, *argv: str) -> Any:
    monkeypatch.chdir(directory)
    return CliRunner().invoke(ambit, ["check", *argv])


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if ": error: " in line]


def test_every_fault_of_a_file_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.yaml").write_text(BAD)
    done = run(monkeypatch, tmp_path, "a.yaml")
    assert done.exit_code == 2
    assert errors(done.stdout) == [
        "a.yaml:12:26: error: spec.ports[0].port: not a port: 70000",
        'a.yaml:14:25: error: spec.ports[2].port: not a port: "abc"',
        'a.yaml:15:9: error: spec.type: unknown value "Nonsense"',
        "a.yaml:17:1: error: apiVersion: missing",
        "a.yaml:24:3: error: spec.selectr: unknown field",
        "a.yaml:27:36: error: spec.rules[0].from[0].source.principals[1]: expected text, not 7",
        'a.yaml:29:31: error: spec.rules[0].to[0].operation.ports[0]: not a port: "abc"',
        "a.yaml:29:44: error: spec.rules[0].to[0].operation.ports[2]: not a port: 99999",
    ]
    assert "    hint: one of: ClusterIP, NodePort, LoadBalancer, ExternalName\n" in done.stdout
    assert done.stderr.startswith("ambit: 8 errors, 0 warnings in 3 objects\n")


def test_a_directory_is_read_past_bad_files_and_duplicates_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text(BAD)
    (tmp_path / "sub" / "b.yaml").write_text(NAMESPACE)
    (tmp_path / "sub" / "c.yml").write_text("a: [\n")
    (tmp_path / ".hidden.yaml").write_text("a: [\n")
    done = run(monkeypatch, tmp_path)
    assert done.exit_code == 2
    found = errors(done.stdout)
    assert len(found) == 10
    assert len([line for line in found if line.startswith("./a.yaml:")]) == 8
    assert "already defined at ./a.yaml:1" in found[8]
    assert found[8].startswith("./sub/b.yaml:")
    assert found[9].startswith("./sub/c.yml:2:1: error: not YAML")


def test_the_same_mistake_in_two_files_is_told_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(BAD.replace("name: shop}", f"name: shop-{name}}}"))
    done = run(monkeypatch, tmp_path, "a.yaml", "b.yaml")
    found = errors(done.stdout)
    assert [line.replace("b.yaml", "a.yaml") for line in found if line.startswith("b")] != []
    assert sum("spec.type" in line for line in found) == 2


def test_warnings_alone_are_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = "apiVersion: v1\nkind: Service\nmetadata: {name: w, namespace: nowhere}\n"
    (tmp_path / "a.yaml").write_text(service + "spec: {ports: [{port: 80}]}\n")
    done = run(monkeypatch, tmp_path)
    assert done.exit_code == 0
    assert "./a.yaml:3:32: warning: metadata.namespace: " in done.stdout
    assert "0 errors, 1 warning in 1 object" in done.stderr
    assert "warning: Service nowhere/w: metadata" in run(monkeypatch, tmp_path, "-o", "wide").stdout


def test_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    route = "apiVersion: gateway.networking.k8s.io/v1\nkind: UDPRoute\nmetadata: {name: r}\n"
    peer = "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\n"
    peer += "metadata: {name: p}\nspec: {mtls: {mode: SURE}}\n"
    (tmp_path / "a.yaml").write_text(route + peer)
    done = run(monkeypatch, tmp_path, "-o", "json")
    assert done.exit_code == 2
    report = json.loads(done.stdout)
    hint = report["findings"][0].pop("hint")
    assert "STRICT" in hint
    assert report == {
        "ok": False,
        "objects": 2,
        "errors": 1,
        "warnings": 0,
        "unchecked": {"UDPRoute": 1},
        "findings": [
            {
                "severity": "error",
                "file": "./a.yaml",
                "line": 8,
                "column": 21,
                "kind": "PeerAuthentication",
                "namespace": "default",
                "name": "p",
                "field": "spec.mtls.mode",
                "message": 'unknown value "SURE"',
            }
        ],
    }


def test_a_missing_field_is_told_once_and_what_stands_beside_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = "apiVersion: v1\nkind: Service\nmetadata: {name: w}\nspec:\n  type: Odd\n  ports:\n"
    (tmp_path / "a.yaml").write_text(service + "  - {name: a}\n  - {name: b, port: 0}\n")
    done = run(monkeypatch, tmp_path)
    assert [line.split(": ")[2] for line in errors(done.stdout)] == [
        "spec.type",
        "spec.ports[0].port",
        "spec.ports[1].port",
    ]


def test_the_example_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(monkeypatch, ROOT / "manifests" / "examples" / "shop")
    assert (done.exit_code, done.stdout) == (0, "")


def test_a_path_that_is_not_there_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(monkeypatch, tmp_path, "nothing.yaml")
    assert done.exit_code == 2
    assert "nothing.yaml" in done.stderr
