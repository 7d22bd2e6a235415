"""`ambit waypoint`: the Gateway it writes, and what it says when that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mesh.cli import waypoint
from mesh.cli.main import ambit
from mesh.errors import ConfigError


def run(*argv: str) -> Any:
    return CliRunner().invoke(ambit, argv)


def test_the_gateway_is_istios() -> None:
    made = yaml.safe_load(run("waypoint", "generate", "-n", "shop", "--for", "all").stdout)
    assert made == {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {
            "name": "waypoint",
            "namespace": "shop",
            "labels": {"istio.io/waypoint-for": "all"},
        },
        "spec": {
            "gatewayClassName": "istio-waypoint",
            "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
        },
    }


def test_a_revision_is_a_label_and_nothing_else_is() -> None:
    assert waypoint.gateway("a", "b", None, "v2")["metadata"]["labels"] == {"istio.io/rev": "v2"}
    assert "labels" not in waypoint.gateway("a", "b", None, "")["metadata"]


@pytest.mark.parametrize("name", ["none", "Not-DNS", "a" * 64, "-a", ""])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError):
        waypoint.gateway("shop", name, None, "")
    assert run("waypoint", "generate", "--name", name).exit_code == 2


def test_a_condition_that_is_not_there_is_empty() -> None:
    assert waypoint.condition({}, "Programmed") == {}
    told = {"status": {"conditions": [{"type": "Programmed", "status": "True"}]}}
    assert waypoint.condition(told, "Programmed")["status"] == "True"


class Objects:
    """What the live objects answer, without a lab."""

    def __init__(self, *found: dict[str, Any]) -> None:
        self.found = list(found)
        self.patched: list[tuple[str, dict[str, Any]]] = []
        self.applied: list[Any] = []

    def get(
        self, kind: str, namespace: str | None = None, name: str | None = None
    ) -> list[dict[str, Any]]:
        return [
            each
            for each in self.found
            if each["kind"] == kind
            and namespace in (None, each["metadata"].get("namespace"))
            and name in (None, each["metadata"]["name"])
        ]

    def apply(self, *objects: Any) -> None:
        self.applied += objects

    def patch(self, kind: str, namespace: str, name: str, patch: dict[str, Any]) -> None:
        self.patched.append((name, patch))


def _namespace(**labels: str) -> dict[str, Any]:
    named = {key.replace("_", "-"): value for key, value in labels.items()}
    return {
        "kind": "Namespace",
        "metadata": {"name": "shop", "labels": {f"istio.io/{k}": v for k, v in named.items()}},
    }


def test_another_waypoint_of_the_namespace_is_not_replaced_unasked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects = Objects(_namespace(use_waypoint="old"))
    monkeypatch.setattr(waypoint, "mesh_client", lambda where: objects)
    done = run("waypoint", "apply", "-n", "shop", "--enroll-namespace")
    assert done.exit_code == 2
    assert "uses waypoint old already" in done.stderr
    assert not objects.applied
    done = run("waypoint", "apply", "-n", "shop", "--enroll-namespace", "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert objects.patched == [
        ("shop", {"metadata": {"labels": {"istio.io/use-waypoint": "waypoint"}}})
    ]


def test_what_is_not_there_is_told_with_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    there = waypoint.gateway("shop", "l7", None, "")
    monkeypatch.setattr(waypoint, "mesh_client", lambda where: Objects(_namespace(), there))
    done = run("waypoint", "delete", "-n", "shop", "other")
    assert done.exit_code == 3
    assert "there are: l7" in done.stderr
    assert run("waypoint", "apply", "-n", "nowhere").exit_code == 3
    shown = run("waypoint", "list", "-n", "shop")
    assert shown.stdout.split() == [
        *("NAMESPACE", "NAME", "REVISION", "TRAFFIC", "TYPE", "PROGRAMMED"),
        *("shop", "l7", "default", "service", "Unknown"),
    ]


def test_waiting_ends_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    there = waypoint.gateway("shop", "l7", None, "")
    why = {
        "type": "Programmed",
        "status": "False",
        "reason": "Pending",
        "message": "no pod is ready",
    }
    monkeypatch.setattr(
        waypoint,
        "mesh_client",
        lambda where: Objects(_namespace(), {**there, "status": {"conditions": [why]}}),
    )
    done = run("waypoint", "status", "-n", "shop", "l7", "--waypoint-timeout", "0.3")
    assert done.exit_code == 4
    assert "no pod is ready" in done.stderr
