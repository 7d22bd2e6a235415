"""What the inspecting verbs print, from small literal `/config_dump` pages."""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from click.testing import CliRunner

from mesh.cli import held, inspect
from mesh.cli.main import ambit
from mesh.errors import Unavailable
from mesh.lab.control import LabClient

NOW = datetime(2026, 6, 1, tzinfo=UTC)
WEB = "Kubernetes//Pod/shop/web-1"
READER = "spiffe://cluster.local/ns/shop/sa/reader"

DUMP: dict[str, Any] = {
    "workloads": [
        {
            "uid": WEB,
            "name": "web-1",
            "namespace": "shop",
            "workloadIps": ["10.244.1.10", "fd00:10:244:1::a"],
            "protocol": "HBONE",
            "networkMode": "Standard",
            "status": "Healthy",
            "serviceAccount": "web",
            "node": "node1",
            "waypoint": {
                "destination": "shop/gate.shop.svc.cluster.local",
                "hboneMtlsPort": 15008,
            },
            "authorizationPolicies": ["shop/only-reader"],
        },
        {
            "uid": "Kubernetes//Pod/outside/visitor",
            "name": "visitor",
            "namespace": "outside",
            "workloadIps": ["10.244.1.11"],
            "protocol": "TCP",
            "networkMode": "Standard",
            "status": "Healthy",
            "node": "node1",
        },
    ],
    "services": [
        {
            "name": "web",
            "namespace": "shop",
            "hostname": "web.shop.svc.cluster.local",
            "vips": ["/10.96.1.2", "east/10.97.0.1"],
            "ports": {"80": 8080},
            "endpoints": {
                WEB: {"workloadUid": WEB, "port": {"80": 8080}, "status": "Healthy"},
                "x": {"workloadUid": "x", "port": {"80": 8080}, "status": "Unhealthy"},
            },
        }
    ],
    "policies": [
        {
            "name": "only-reader",
            "namespace": "shop",
            "scope": "WorkloadSelector",
            "action": "Allow",
            "dryRun": False,
            "rules": [[[{"principals": [{"Exact": "cluster.local/ns/shop/sa/reader"}]}]]],
        }
    ],
    "certificates": [
        {
            "identity": READER,
            "state": "Available",
            "certChain": [
                {
                    "pem": "LS0t",
                    "serialNumber": "7",
                    "validFrom": "2026-05-31T00:00:00Z",
                    "expirationTime": "2026-06-02T00:00:00Z",
                },
                {
                    "pem": "LS0t",
                    "serialNumber": "8",
                    "validFrom": "2020-01-01T00:00:00Z",
                    "expirationTime": "2021-01-01T00:00:00Z",
                },
            ],
            "rootCerts": [{"pem": "LS0t", "serialNumber": "9", "validFrom": "soon"}],
        },
        {
            "identity": "spiffe://cluster.local/ns/other/sa/x",
            "state": "Unavailable",
            "error": "no",
        },
    ],
    "workloadState": {
        "uid-of-web": {
            "state": "Up",
            "connections": {
                "inbound": [
                    {
                        "src": "10.244.1.12:40000",
                        "originalDst": "web.shop.svc.cluster.local",
                        "actualDst": "10.244.1.10:8080",
                        "protocol": "HBONE",
                        "srcIdentity": READER,
                        "policy": "shop/only-reader",
                        "id": "0af7",
                    }
                ],
                "outbound": [
                    {
                        "src": "[fd00:10:244:1::a]:41000",
                        "originalDst": "10.96.1.2:80",
                        "actualDst": "10.244.1.11:8080",
                        "protocol": "TCP",
                    }
                ],
            },
            "info": {"name": "web-1", "namespace": "shop", "serviceAccount": "web"},
        },
        "uid-of-waiting": {"state": "Pending", "info": {"name": "late", "namespace": "shop"}},
    },
}


class Lab(LabClient):
    """A client of no lab: its nodes answer with these bodies, or not at all."""

    def __init__(self, bodies: dict[str, Any]) -> None:
        super().__init__("x")
        self.bodies = bodies

    def status(self) -> dict[str, Any]:
        return {"nodes": [{"name": node} for node in self.bodies]}

    def http_get(
        self, place: str, path: str, *, port: int = 15000, host: str = "127.0.0.1"
    ) -> tuple[int, bytes]:
        assert (path, port) == ("/config_dump", 15000)
        body = self.bodies[place]
        if body is None:
            raise Unavailable("connection refused")
        return 200, body if isinstance(body, bytes) else json.dumps(body).encode()


def run(monkeypatch: pytest.MonkeyPatch, bodies: dict[str, Any], *argv: str) -> Any:
    monkeypatch.setattr(inspect, "mesh_client", lambda where: Lab(bodies))
    return CliRunner().invoke(ambit, argv)


def other() -> Any:
    return copy.deepcopy(DUMP)


GOLDEN: dict[str, Any] = {
    "workloads": [
        {
            "namespace": "outside",
            "name": "visitor",
            "uid": "Kubernetes//Pod/outside/visitor",
            "addresses": ["10.244.1.11"],
            "hostname": "",
            "node": "node1",
            "waypoint": None,
            "protocol": "TCP",
            "status": "Healthy",
            "service_account": "",
            "network": "",
            "network_mode": "Standard",
            "policies": [],
            "held_by": ["node1", "node2"],
        },
        {
            "namespace": "shop",
            "name": "web-1",
            "uid": WEB,
            "addresses": ["10.244.1.10", "fd00:10:244:1::a"],
            "hostname": "",
            "node": "node1",
            "waypoint": "shop/gate.shop.svc.cluster.local",
            "protocol": "HBONE",
            "status": "Healthy",
            "service_account": "web",
            "network": "",
            "network_mode": "Standard",
            "policies": ["shop/only-reader"],
            "held_by": ["node1", "node2"],
        },
    ],
    "services": [
        {
            "namespace": "shop",
            "name": "web",
            "hostname": "web.shop.svc.cluster.local",
            "vips": ["10.96.1.2", "east/10.97.0.1"],
            "ports": {"80": 8080},
            "waypoint": None,
            "endpoints": {
                "healthy": 1,
                "total": 2,
                "members": [
                    {"workload": WEB, "status": "Healthy", "ports": {"80": 8080}},
                    {"workload": "x", "status": "Unhealthy", "ports": {"80": 8080}},
                ],
            },
            "held_by": ["node1", "node2"],
        }
    ],
    "policies": [
        {
            "namespace": "shop",
            "name": "only-reader",
            "action": "Allow",
            "scope": "WorkloadSelector",
            "dry_run": False,
            "rules": [[[{"principals": [{"Exact": "cluster.local/ns/shop/sa/reader"}]}]]],
            "held_by": ["node1", "node2"],
        }
    ],
}
CONNECTIONS = [
    {
        "namespace": "shop",
        "workload": "web-1",
        "direction": "Inbound",
        "local": "10.244.1.10:8080",
        "remote": "10.244.1.12:40000",
        "remote_target": "web.shop.svc.cluster.local",
        "protocol": "HBONE",
        "source_identity": READER,
        "policy": "shop/only-reader",
        "id": "0af7",
        "node": "node1",
    },
    {
        "namespace": "shop",
        "workload": "web-1",
        "direction": "Outbound",
        "local": "[fd00:10:244:1::a]:41000",
        "remote": "10.244.1.11:8080",
        "remote_target": "10.96.1.2:80",
        "protocol": "TCP",
        "source_identity": None,
        "policy": None,
        "id": None,
        "node": "node1",
    },
]


@pytest.mark.parametrize("verb", GOLDEN)
def test_json_of_what_nodes_share(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    done = run(monkeypatch, {"node1": DUMP, "node2": other()}, verb, "-o", "json")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == json.dumps(GOLDEN[verb], indent=2) + "\n"


def test_json_of_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(monkeypatch, {"node1": DUMP}, "connections", "-o", "json")
    assert done.stdout == json.dumps(CONNECTIONS, indent=2) + "\n"
    done = run(monkeypatch, {"node1": DUMP}, "connections", "--direction", "outbound", "-o", "json")
    assert json.loads(done.stdout) == CONNECTIONS[1:]


def test_certificate_rows() -> None:
    rows = held.certificates({"node1": DUMP}, NOW).rows
    assert rows[1:] == [
        {
            "identity": READER,
            "type": kind,
            "state": "Available",
            "valid": valid,
            "serial_number": serial,
            "not_after": ends,
            "not_before": begins,
            "error": "",
            "node": "node1",
        }
        for kind, valid, serial, begins, ends in [
            ("Leaf", True, "7", "2026-05-31T00:00:00Z", "2026-06-02T00:00:00Z"),
            ("Intermediate", False, "8", "2020-01-01T00:00:00Z", "2021-01-01T00:00:00Z"),
            ("Root", None, "9", "soon", None),
        ]
    ]
    assert (rows[0]["type"], rows[0]["valid"], rows[0]["error"]) == ("", None, "no")
    assert {row["identity"] for row in held.certificates({"n": DUMP}, NOW, "shop").rows} == {READER}


TABLES = {
    ("workloads",): """\
NAMESPACE   POD NAME   ADDRESS       NODE    WAYPOINT   PROTOCOL
outside     visitor    10.244.1.11   node1   None       TCP
shop        web-1      10.244.1.10   node1   gate       HBONE
""",
    ("services", "-o", "wide"): """\
NAMESPACE   SERVICE NAME   SERVICE VIP                WAYPOINT   ENDPOINTS   PORTS   \
HOSTNAME                     HELD BY
shop        web            10.96.1.2,east/10.97.0.1   None       1/2         80      \
web.shop.svc.cluster.local   node1
""",
    ("policies", "-o", "wide"): """\
NAMESPACE   POLICY NAME   ACTION   SCOPE              RULES   DRY RUN   HELD BY
shop        only-reader   Allow    WorkloadSelector   1       no        node1
""",
    ("connections",): """\
WORKLOAD     DIRECTION   LOCAL              REMOTE                 \
REMOTE TARGET                   PROTOCOL
web-1.shop   Inbound     web-1.shop:8080    10.244.1.12:40000      \
web.shop.svc.cluster.local      HBONE
web-1.shop   Outbound    web-1.shop:41000   visitor.outside:8080   \
web.shop.svc.cluster.local:80   TCP
""",
    ("connections", "--raw", "--direction", "inbound", "-o", "wide"): f"""\
WORKLOAD     DIRECTION   LOCAL              REMOTE              \
REMOTE TARGET                PROTOCOL   NODE    POLICY             SOURCE IDENTITY
web-1.shop   Inbound     10.244.1.10:8080   10.244.1.12:40000   \
web.shop.svc.cluster.local   HBONE      node1   shop/only-reader   {READER}
""",
    ("workloads", "-n", "nowhere"): """\
NAMESPACE   POD NAME   ADDRESS   NODE   WAYPOINT   PROTOCOL
""",
}


@pytest.mark.parametrize("argv", TABLES, ids=" ".join)
def test_tables(monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]) -> None:
    done = run(monkeypatch, {"node1": DUMP}, *argv)
    assert (done.exit_code, done.stdout) == (0, TABLES[argv])


def test_nodes_that_disagree_are_told_and_every_version_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    behind = other()
    behind["workloads"][0]["protocol"] = "TCP"
    del behind["workloads"][1]
    done = run(monkeypatch, {"node1": DUMP, "node2": behind}, "workloads", "-o", "json")
    assert done.exit_code == 0
    assert done.stderr.splitlines()[:2] == [
        "ambit: workload outside/visitor is on node1 but not on node2",
        "ambit: workload shop/web-1: protocol is HBONE on node1, but TCP on node2",
    ]
    assert done.stderr.splitlines()[2].startswith("ambit: hint: ")
    shown = [(row["name"], row["protocol"], row["held_by"]) for row in json.loads(done.stdout)]
    assert shown == [
        ("visitor", "TCP", ["node1"]),
        ("web-1", "HBONE", ["node1"]),
        ("web-1", "TCP", ["node2"]),
    ]


def test_disagreement_about_endpoints_and_policies_is_in_words() -> None:
    behind = other()
    behind["services"][0]["endpoints"].pop("x")
    behind["policies"][0]["action"] = "Deny"
    dumps = {"node1": DUMP, "node2": behind}
    (said,) = held.services(dumps).disagreements
    assert said.startswith("service shop/web: endpoints is 1/2 (")
    assert "on node1, but 1/1 (" in said
    assert held.policies(dumps).disagreements == [
        "policy shop/only-reader: action is Allow on node1, but Deny on node2"
    ]
    # Another order of the same, or another program's own keys, is no disagreement.
    same = other()
    same["services"][0]["endpoints"] = dict(reversed(same["services"][0]["endpoints"].items()))
    same["services"][0]["stateOfMind"] = "calm"
    assert held.services({"node1": DUMP, "node2": same}).disagreements == []


def test_one_node_only(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = other()
    behind["workloads"].clear()
    bodies = {"node1": DUMP, "node2": behind}
    done = run(monkeypatch, bodies, "workloads", "--node", "node2", "-o", "json")
    assert (json.loads(done.stdout), done.stderr) == ([], "")
    done = run(monkeypatch, bodies, "workloads", "--node", "node3")
    assert done.exit_code == 3
    assert "nodes: node1, node2" in done.stderr


def test_a_silent_proxy_is_told_and_the_rest_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(monkeypatch, {"node1": DUMP, "node2": None}, "policies")
    assert done.exit_code == 4
    assert "only-reader" in done.stdout
    assert done.stderr.startswith("ambit: node2: its proxy does not answer")
    done = run(monkeypatch, {"node2": None}, "policies")
    assert (done.exit_code, done.stdout) == (4, "")


@pytest.mark.parametrize(
    "body", [b"<html>", [], {"workloads": 7}, {"policies": ["x"]}, {"workloadState": {"u": []}}]
)
def test_what_is_no_dump_is_an_error_and_no_bug(monkeypatch: pytest.MonkeyPatch, body: Any) -> None:
    done = run(monkeypatch, {"node1": body}, "workloads")
    assert done.exit_code == 4
    assert done.stderr.startswith("ambit: node1: what the proxy dumped is not")


def test_names_for_addresses() -> None:
    names = held.names_of({"node1": DUMP})
    assert held.named("10.97.0.1:443", names) == "web.shop.svc.cluster.local:443"
    assert held.named("8.8.8.8:53", names) == "8.8.8.8:53"
    assert held.named("web.shop.svc.cluster.local", names) == "web.shop.svc.cluster.local"
    assert held.named(None, names) is None
    assert held.waypoint_name("east/10.0.0.9") == "east/10.0.0.9"
