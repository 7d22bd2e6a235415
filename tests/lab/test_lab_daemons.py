"""The lab and the mesh's daemons: started, watched, replaced; pods captured before they run."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import KeySet

from mesh.errors import ConfigError, Unavailable
from mesh.lab.control import LabClient, NotThere
from mesh.lab.launch import LabSettings, start

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]

SHOP = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: first, namespace: shop, labels: {app: first}}
spec: {containers: [{name: main, command: [sleep, infinity]}]}
"""
PROJECTED = """
apiVersion: v1
kind: Pod
metadata: {name: bearer, namespace: shop, labels: {app: bearer}}
spec:
  serviceAccountName: bearer
  containers:
    - name: main
      command: [sleep, infinity]
      volumeMounts: [{name: tokens, mountPath: /var/run/secrets/tokens}]
  volumes:
    - name: tokens
      projected: {sources: [{serviceAccountToken: {path: token, audience: istio-ca}}]}
"""

NUMBERS = itertools.count()


@contextlib.contextmanager
def lab_of(directory: Path, **settings: Any) -> Iterator[LabClient]:
    name = f"daemons-{os.getpid()}-{next(NUMBERS)}"
    running = start(LabSettings(directory, name=name, **settings))
    try:
        yield running.client
    finally:
        running.stop()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LabClient, Path]]:
    directory = tmp_path_factory.mktemp("mesh")
    (directory / "shop.yaml").write_text(SHOP)
    with lab_of(directory) as client:
        yield client, directory


def until(what: Callable[[], bool], seconds: float = 45.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.05)


def pod(client: LabClient, name: str) -> dict[str, Any]:
    return next(pod for pod in client.status()["pods"] if pod["name"] == name)


def daemon(client: LabClient, node: int, name: str) -> dict[str, Any]:
    found: dict[str, Any] = client.status()["nodes"][node]["daemons"][name]
    return found


def test_every_daemon_is_ready(lab: tuple[LabClient, Path]) -> None:
    status = lab[0].status()
    assert status["control_plane"]["daemons"]["istiod"]["state"] == "ready"
    for node in status["nodes"]:
        assert {name: d["state"] for name, d in node["daemons"].items()} == {
            "netconfig": "ready",
            "ztunnel": "ready",
        }


def test_the_mesh_has_its_own_objects(lab: tuple[LabClient, Path]) -> None:
    client = lab[0]
    names = {pod["metadata"]["name"]: pod for pod in client.get("Pod", "istio-system")}
    assert set(names) == {"istiod", "ztunnel-node1", "ztunnel-node2"}
    assert names["ztunnel-node2"]["spec"]["nodeName"] == "node2"
    accounts = {each["metadata"]["name"] for each in client.get("ServiceAccount", "istio-system")}
    assert accounts >= {"default", "istiod", "ztunnel"}
    service = client.get("Service", "istio-system", "istiod")[0]["spec"]
    found = client.run("shop", "first", ["getent", "hosts", "istiod.istio-system.svc"])
    assert found.stdout.decode().split()[0] == service["clusterIP"]


def test_a_pod_is_captured_before_its_containers_run(lab: tuple[LabClient, Path]) -> None:
    client, directory = lab
    assert pod(client, "first")["enrolled"]
    # The program itself looks whether its traffic is caught: 15008 listens in its namespace.
    probe = "import pathlib; print('3AA0 ' in pathlib.Path('/proc/net/tcp6').read_text())"
    second = SHOP.split("---")[1].replace("first", "second")
    second = second.replace("[sleep, infinity]", f'[sh, -c, "python3 -c \\"{probe}\\"; sleep 99"]')
    (directory / "second.yaml").write_text(second)
    until(lambda: len(client.get("Pod", "shop", "second")) == 1)
    client.wait_ready()
    until(lambda: b"".join(client.logs(pod=("shop", "second"))) == b"True\n")
    assert pod(client, "second")["enrolled"]


def test_a_killed_daemon_comes_back_by_itself(lab: tuple[LabClient, Path]) -> None:
    client, _ = lab
    before = daemon(client, 0, "ztunnel")
    client.kill("ztunnel@node1")
    until(lambda: daemon(client, 0, "ztunnel")["restarts"] == before["restarts"] + 1)
    until(lambda: daemon(client, 0, "ztunnel")["state"] == "ready")
    assert daemon(client, 0, "ztunnel")["pid"] != before["pid"]
    assert b"ztunnel@node1 ended with code 137" in b"".join(client.logs())


def test_restart_returns_when_the_next_life_is_ready(lab: tuple[LabClient, Path]) -> None:
    client, _ = lab
    before = daemon(client, 1, "netconfig")
    client.restart("netconfig@node2")
    after = daemon(client, 1, "netconfig")
    assert (after["state"], after["restarts"]) == ("ready", before["restarts"] + 1)
    with pytest.raises(NotThere, match="no daemon 'ztunnel@node9'"):
        client.restart("ztunnel@node9")


def test_admin_pages_are_read_from_inside_the_node(lab: tuple[LabClient, Path]) -> None:
    client, _ = lab
    status, body = client.http_get("node1", "/config_dump")
    assert (status, body[:1]) == (200, b"{")
    assert client.http_get("istiod", "/ready", port=15014)[0] == 200
    with pytest.raises(NotThere, match="no place"):
        client.http_get("moon", "/")


def test_a_projected_token_speaks_for_the_pod(lab: tuple[LabClient, Path]) -> None:
    client, directory = lab
    (directory / "bearer.yaml").write_text(PROJECTED)
    until(lambda: len(client.get("Pod", "shop", "bearer")) == 1)
    client.wait_ready()
    token = client.run("shop", "bearer", ["cat", "/var/run/secrets/tokens/token"]).stdout
    claims = jwt.decode(token.decode(), KeySet([_any_key(client)]), algorithms=["ES256"]).claims
    assert claims["sub"] == "system:serviceaccount:shop:bearer"
    assert claims["aud"] == ["istio-ca"]
    assert claims["kubernetes.io"]["pod"]["uid"] == pod(client, "bearer")["uid"]


def _any_key(client: LabClient) -> Any:
    """The lab's public key, read where the controller reads it."""
    import json

    from joserfc.jwk import ECKey

    status = client.status()
    supervisor = Path(f"/proc/{_host_pid(client)}/root{status['run_directory']}")
    keys = json.loads((supervisor / "istiod" / "token-keys.json").read_text())["keys"]
    assert all("d" not in key for key in keys)
    return ECKey.import_key(keys[0])


def _host_pid(client: LabClient) -> int:
    mark = f'"name": "{client.address.name}"'.encode()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if mark in Path("/proc", entry, "environ").read_bytes():
                    return int(entry)
    raise AssertionError("the supervisor is not found")


def test_a_daemon_that_dies_at_start_is_one_clear_message(tmp_path: Path) -> None:
    replace = {"istiod": ("sh", "-c", "echo no luck today >&2; exit 3")}
    with pytest.raises(Unavailable) as caught, lab_of(tmp_path, replace=replace):
        pass
    assert str(caught.value) == "istiod ended with code 3 before it was ready\nno luck today"
    assert "sh -c" in caught.value.hint


def test_a_program_that_does_not_exist_is_one_clear_message(tmp_path: Path) -> None:
    replace = {"ztunnel@node2": ("/no/such/ztunnel",)}
    refused = pytest.raises(Unavailable, match=r"ztunnel@node2: .*cannot start /no/such/ztunnel")
    with refused, lab_of(tmp_path, replace=replace):
        pass


def test_variables_and_replacement_of_one_node(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "nodes": 1,
        "environment": {"ztunnel": {"SECRET_TTL": "for ever"}},
    }
    refused = pytest.raises(Unavailable, match="ztunnel@node1 ended with code 2")
    with refused, lab_of(tmp_path, **settings):
        pass


def test_a_wrong_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no name for a lab"):
        start(LabSettings(tmp_path, name="Not/A/Name"))
