"""The inspecting verbs over a running shop: what the real proxies hold, by the command line."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.labs import TestLab, eventually, running_lab
from tests.support.tree import ROOT

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]

READER = "spiffe://cluster.local/ns/shop/sa/reader"
POLICY = {
    "apiVersion": "security.istio.io/v1",
    "kind": "AuthorizationPolicy",
    "metadata": {"name": "only-reader", "namespace": "shop"},
    "spec": {
        "selector": {"matchLabels": {"app": "web"}},
        "action": "ALLOW",
        "rules": [{"from": [{"source": {"principals": ["cluster.local/ns/shop/sa/reader"]}}]}],
    },
}


def run(lab: TestLab, *argv: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "mesh.cli", *argv, "--lab", lab.client.address.name],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def ask(lab: TestLab, *argv: str) -> list[dict[str, Any]]:
    rows = json.loads(run(lab, *argv, "-o", "json").stdout)
    assert isinstance(rows, list)
    return rows


@contextlib.contextmanager
def held_connection(lab: TestLab) -> Iterator[None]:
    """`reader` speaks with the echo port of `web` until the end."""
    command = [sys.executable, "-m", "mesh.cli", "lab", "exec"]
    command += ["--lab", lab.client.address.name, "shop/reader", "--"]
    command += ["python3", "/app/hold.py", "web", "9000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline().startswith(b"220 web-")
            yield
        finally:
            process.stdin.close()
            process.wait(20)


def test_what_the_proxies_of_an_enrolled_shop_hold() -> None:
    with running_lab(ROOT / "manifests" / "examples" / "shop", name="test-inspect") as lab:
        before = ask(lab, "workloads", "-n", "shop")
        assert {row["protocol"] for row in before} == {"TCP"}
        assert ask(lab, "certificates", "-n", "shop") == []

        run(lab, "enroll", "shop")
        lab.client.apply(POLICY)
        eventually(lambda: enrolled(lab))
        eventually(lambda: allowed(lab))
        services = {row["name"]: row for row in ask(lab, "services", "-n", "shop")}
        assert services["web"]["endpoints"]["healthy"] == 2
        assert services["web"]["held_by"] == ["node1", "node2"]
        eventually(lambda: certified(lab))

        assert ask(lab, "connections") == []
        with held_connection(lab):
            eventually(lambda: connected(lab))
        eventually(lambda: gone(lab))

        restarts = restarts_of_ztunnel(lab)
        run(lab, "lab", "restart", "ztunnel@node1")
        assert restarts_of_ztunnel(lab) == restarts + 1
        enrolled(lab)
        run(lab, "lab", "kill", "ztunnel@node1")
        lab.client.wait_ready()
        eventually(lambda: enrolled(lab))
        run(lab, "lab", "kill", "ztunnel@node9", code=3)


def enrolled(lab: TestLab) -> None:
    done = run(lab, "workloads", "-o", "json")
    rows = json.loads(done.stdout)
    protocols = {(row["namespace"], row["protocol"]) for row in rows}
    assert ("shop", "HBONE") in protocols
    assert ("shop", "TCP") not in protocols
    assert ("outside", "TCP") in protocols
    assert all(row["held_by"] == ["node1", "node2"] for row in rows), rows
    assert done.stderr == ""


def allowed(lab: TestLab) -> None:
    (row,) = ask(lab, "policies", "-n", "shop")
    assert (row["name"], row["action"], row["scope"]) == (
        "only-reader",
        "Allow",
        "WorkloadSelector",
    )
    assert row["held_by"] == ["node1", "node2"]


def certified(lab: TestLab) -> None:
    rows = ask(lab, "certificates", "-n", "shop")
    leaves = [row for row in rows if row["type"] == "Leaf"]
    assert {row["identity"] for row in leaves} >= {READER, READER.replace("reader", "web")}
    assert all(row["valid"] is True and row["state"] == "Available" for row in rows), rows
    assert {row["node"] for row in leaves if row["identity"].endswith("/web")} == {
        "node1",
        "node2",
    }


def connected(lab: TestLab) -> None:
    rows = ask(lab, "connections", "-n", "shop")
    sides = {row["direction"]: row for row in rows}
    assert set(sides) == {"Inbound", "Outbound"}
    outbound, inbound = sides["Outbound"], sides["Inbound"]
    assert (outbound["workload"], outbound["node"]) == ("reader", "node1")
    assert inbound["workload"].startswith("web-")
    assert inbound["local"].endswith(":9000")
    assert inbound["source_identity"] == READER
    assert inbound["policy"] == "shop/only-reader"
    assert {row["protocol"] for row in rows} == {"HBONE"}
    wide = run(lab, "connections", "--direction", "inbound", "-o", "wide").stdout
    assert "shop/only-reader" in wide
    assert ".shop:9000" in wide


def gone(lab: TestLab) -> None:
    assert ask(lab, "connections") == []


def restarts_of_ztunnel(lab: TestLab) -> int:
    node = next(node for node in lab.client.status()["nodes"] if node["name"] == "node1")
    return int(node["daemons"]["ztunnel"]["restarts"])
