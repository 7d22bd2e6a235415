"""The report of `ambit status`: what each part said, and what needs attention."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mesh.cli import status
from mesh.cli.status import age, summarize

NOW = datetime(2026, 5, 1, tzinfo=UTC)
READY = {"state": "ready"}
LAB = {
    "name": "shop",
    "phase": "ready",
    "uptime_seconds": 300,
    "control_plane": {"daemons": {"istiod": READY}},
    "nodes": [{"name": "node1", "daemons": {"ztunnel": READY, "netconfig": READY}}],
    "pods": [{"enrolled": True}, {"enrolled": False}],
}
IN_STEP = {"resources": 4, "pending": 0, "inFlight": "", "refused": 0}
CLIENT = {
    "node": "ztunnel~10.0.0.1~ztunnel-node1.istio-system~istio-system.svc.cluster.local",
    "nodeName": "node1",
    "proxyType": "ztunnel",
    "version": "0.1",
    "connectedSeconds": 300.0,
    "answeredSeconds": 5.0,
    "types": {"istio.workload.Address": IN_STEP},
}


def report(**changed: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "lab": LAB,
        "clients": [CLIENT],
        "version": "0.1",
        "findings": [],
        "objects": [],
        "certificates": [],
        "unreachable": [],
        "now": NOW,
        **changed,
    }
    return summarize(given.pop("lab"), **given)


def messages(found: dict[str, Any]) -> list[str]:
    return [f"{each['object']} {each['message']}".strip() for each in found["attention"]]


def test_when_all_is_well_nothing_needs_attention(capsys):
    found = report()
    assert found["attention"] == []
    assert (found["enrolledPods"], found["pods"]) == (1, 2)
    (proxy,) = found["proxies"]
    assert (proxy["name"], proxy["sync"]) == ("ztunnel-node1.istio-system", "in step")
    json.dumps(found)
    status._show(found, everything=False)
    screen = capsys.readouterr().out
    assert "ztunnel-node1.istio-system   ztunnel   0.1       in step" in screen
    assert "nothing needs attention" in screen


@pytest.mark.parametrize(
    ("type_status", "sync"),
    [
        ({**IN_STEP, "pending": 3}, "pending"),
        ({**IN_STEP, "inFlight": "7"}, "pending"),
        ({**IN_STEP, "refused": 1, "lastNack": "bad prefix"}, "refused"),
    ],
)
def test_how_far_a_proxy_is(type_status, sync):
    found = report(clients=[{**CLIENT, "types": {"x": IN_STEP, "y": type_status}}])
    assert found["proxies"][0]["sync"] == sync
    refused = ["ztunnel-node1.istio-system refused: bad prefix"]
    assert messages(found) == (refused if sync == "refused" else [])


def test_who_does_not_run_or_is_not_connected():
    found = report(clients=[])
    assert messages(found) == ["ztunnel@node1 is not connected to the controller"]
    daemons = {"ztunnel": {"state": "failed"}, "netconfig": READY}
    found = report(lab={**LAB, "nodes": [{"name": "node1", "daemons": daemons}]})
    assert messages(found) == ["ztunnel@node1 is failed"]
    found = report(unreachable=["the controller does not answer"])
    assert messages(found) == ["the controller does not answer"]


def leaf(**changed: Any) -> dict[str, Any]:
    end = NOW + timedelta(hours=20)
    row = {"identity": "spiffe://td/ns/a/sa/b", "type": "Leaf", "valid": True, "state": "Available"}
    return {**row, "error": "", "not_after": end.isoformat(), **changed}


def test_certificates():
    found = report(certificates=[leaf(), {**leaf(), "type": "Root", "valid": False}])
    assert (found["certificates"]["valid"], found["certificates"]["firstEndsInSeconds"]) == (
        1,
        72000,
    )
    assert found["attention"] == []
    soon = (NOW + timedelta(minutes=5)).isoformat()
    found = report(certificates=[leaf(not_after=soon), leaf(valid=False, error="refused")])
    assert messages(found) == [
        "spiffe://td/ns/a/sa/b no valid certificate: refused",
        "spiffe://td/ns/a/sa/b its certificate ends in 5m",
    ]


def test_a_certificate_that_is_being_issued_needs_no_attention(capsys):
    waiting = leaf(valid=None, state="Initializing", not_after=None)
    found = report(certificates=[leaf(), waiting])
    assert found["attention"] == []
    assert (found["certificates"]["valid"], found["certificates"]["pending"]) == (1, 1)
    status._show(found, everything=False)
    assert "certificates: 1 valid, 1 being issued" in capsys.readouterr().out
    refused = {**waiting, "state": "Unavailable", "error": "no such pod"}
    assert messages(report(certificates=[refused])) == [
        "spiffe://td/ns/a/sa/b no valid certificate: no such pod"
    ]


def test_waypoints_and_conditions(capsys):
    programmed = {"type": "Programmed", "status": "False", "reason": "Pending", "message": "0 of 1"}
    gateway = {
        "kind": "Gateway",
        "metadata": {
            "name": "wp",
            "namespace": "shop",
            "annotations": {"ambit.dev/source": "wp.yaml:1"},
        },
        "spec": {"gatewayClassName": "istio-waypoint"},
        "status": {"conditions": [{"type": "Accepted", "status": "True"}, programmed]},
    }
    route = {
        "kind": "HTTPRoute",
        "metadata": {"name": "r", "namespace": "shop"},
        "status": {
            "parents": [
                {"conditions": [{"type": "ResolvedRefs", "status": "False", "reason": "X"}]}
            ]
        },
    }
    found = report(objects=[gateway, route])
    assert found["waypoints"] == [
        {
            "name": "shop/wp",
            "for": "service",
            "programmed": "False",
            "reason": "Pending",
            "message": "0 of 1",
        }
    ]
    assert messages(found) == [
        "Gateway shop/wp Programmed False (Pending): 0 of 1",
        "HTTPRoute shop/r ResolvedRefs False (X)",
    ]
    status._show(found, everything=False)
    assert "wp.yaml:1: warning: Gateway shop/wp" in capsys.readouterr().out


def test_errors_come_before_warnings_and_not_all_are_shown(capsys):
    warning = {"severity": "warning", "object": "Pod a/b", "message": "odd"}
    error = {**warning, "severity": "error", "field": "spec", "hint": "do", "source": "f:1"}
    found = report(findings=[*[warning] * 30, error])
    assert messages(found)[0] == "Pod a/b spec: odd"
    status._show(found, everything=False)
    out = capsys.readouterr().out
    assert "and 11 more" in out
    assert "hint: do" in out


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(None, "-"), (0.4, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (200000, "2d")],
)
def test_ages(seconds, expected):
    assert age(seconds) == expected
