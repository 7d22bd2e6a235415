"""Which mesh a verb speaks to: what is named, else the lab that is up, else kubectl's cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mesh.cli import choose, kube
from mesh.cli.choose import Where, mesh_client
from mesh.cli.kube import KubeClient
from mesh.cli.main import ambit
from mesh.cluster.port_forward import _code, _reason
from mesh.errors import ConfigError, Unavailable
from mesh.lab.control import LabAddress, LabClient


def _up(monkeypatch: pytest.MonkeyPatch, *names: str, default: bool = False) -> None:
    labs = [LabAddress(name, 0) for name in names]
    monkeypatch.setattr(choose, "list_labs", lambda uid: labs)
    monkeypatch.setattr(choose, "_has_default", lambda: default)


FILE = Path("/nowhere/config")


@pytest.mark.parametrize(
    ("labs", "where", "expected"),
    [
        (["one"], Where(), "lab one"),
        (["one", "two"], Where("two"), "lab two"),
        # What is only in the environment gives way to a lab; what is named does not.
        (["one"], Where(kubeconfig=FILE), "lab one"),
        (["one"], Where(kubeconfig=FILE, is_chosen=True), "the cluster"),
        (["one"], Where(context="x", is_chosen=True), "context x"),
        ([], Where(kubeconfig=FILE), "the cluster"),
    ],
)
def test_the_order(
    monkeypatch: pytest.MonkeyPatch, labs: list[str], where: Where, expected: str
) -> None:
    _up(monkeypatch, *labs)
    found = mesh_client(where)
    assert found.where == expected
    assert isinstance(found, LabClient if expected.startswith("lab") else KubeClient)


def test_what_is_not_clear_or_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    _up(monkeypatch, "one", "two")
    with pytest.raises(ConfigError, match="several labs"):
        mesh_client(Where())
    with pytest.raises(ConfigError, match="either --lab"):
        mesh_client(Where("one", context="x", is_chosen=True))
    _up(monkeypatch)
    with pytest.raises(Unavailable, match="no lab is up"):
        mesh_client(Where())
    _up(monkeypatch, default=True)
    assert mesh_client(Where()).where == "the cluster"


def test_the_environment_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Where] = []

    def client(where: Where) -> Any:
        seen.append(where)
        raise Unavailable("enough")

    monkeypatch.setattr("mesh.cli.enroll.mesh_client", client)
    CliRunner().invoke(ambit, ["enroll", "shop"], env={"KUBECONFIG": "/a:/b"})
    CliRunner().invoke(ambit, ["enroll", "shop", "--kubeconfig", "/c"])
    assert seen == [Where(kubeconfig=Path("/a:/b")), Where(kubeconfig=Path("/c"), is_chosen=True)]


def _pod(name: str, app: str, node: str, ready: str, **annotations: str) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": "istio-system" if app else "shop",
            "labels": {"app": app},
            "annotations": annotations,
        },
        "spec": {"nodeName": node},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]},
    }


def test_the_state_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = {
        "Node": [
            {"metadata": {"name": "n1"}},
            {"metadata": {"name": "n2"}},
            {"metadata": {"name": "w", "labels": {"kubernetes.io/os": "windows"}}},
        ],
        "Pod": [
            _pod("istiod-a", "istiod", "n1", "True"),
            _pod("istiod-b", "istiod", "n2", "False"),
            _pod("ztunnel-a", "ztunnel", "n1", "True"),
            _pod("ztunnel-b", "ztunnel", "n2", "False"),
            _pod("cni-a", "netconfig", "n1", "True"),
            _pod("web", "", "n1", "True", **{"ambient.istio.io/redirection": "enabled"}),
            _pod("out", "", "n1", "True"),
        ],
    }
    client = kube.KubeClient(None, "", "istio-system")
    monkeypatch.setattr(client, "get", lambda kind, namespace=None: objects[kind])
    found = client.status()
    assert found["phase"] == "ready"
    assert found["controllers"] == ["istio-system/istiod-a"]
    assert found["control_plane"]["daemons"] == {
        "istiod": {"state": "ready"},
        "istiod-b": {"state": "not ready"},
    }
    assert found["nodes"] == [
        {"name": "n1", "daemons": {"ztunnel": {"state": "ready"}, "netconfig": {"state": "ready"}}},
        {
            "name": "n2",
            "daemons": {"ztunnel": {"state": "not ready"}, "netconfig": {"state": "absent"}},
        },
    ]
    assert [each["name"] for each in found["pods"] if each["enrolled"]] == ["web"]
    with pytest.raises(Unavailable, match="no ztunnel runs on node n2"):
        client.http_get("n2", "/config_dump")
    objects["Pod"] = []
    assert client.status()["control_plane"] == {"daemons": {"istiod": {"state": "absent"}}}


class _Refused(Exception):
    def __init__(self, reason: str) -> None:
        self.reason = reason


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (
            "Handshake status 403 Forbidden -+-+- {'a': 'b'} -+-+- b'{\"kind\":\"Status\","
            '"message":"pods \\"x\\" is forbidden","code":403}\'',
            403,
            'pods "x" is forbidden',
        ),
        ("Handshake status 502 Bad Gateway -+-+- {} -+-+- None", 502, "502 Bad Gateway"),
        ("[Errno 111] Connection refused", 0, "[Errno 111] Connection refused"),
    ],
)
def test_why_a_port_is_not_forwarded(text: str, code: int, message: str) -> None:
    refused = _Refused(text)
    assert _code(refused) == code
    assert _reason(refused) == f"forwarding a port: {message}"
