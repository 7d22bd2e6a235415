"""The demo is a contract: names, order, and every step holds. Once as we are, once rootless."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.lab

NAMES = [
    "lab-up",
    "plaintext-before-enroll",
    "enroll",
    "only-hbone-on-the-wire",
    "pod-ip",
    "service-vip",
    "dns-name",
    "ipv6",
    "same-node",
    "source-address-kept",
    "identities",
    "deny-by-identity",
    "strict",
    "waypoint-apply",
    "route-split",
    "route-by-header",
    "retry-hides-failure",
    "l7-deny",
    "jwt",
    "rate-limited",
    "redacted-request",
    "redacted-response",
    "trace-joined",
    "live-connection-survives-enroll",
    "unenroll",
]


def tell() -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "mesh.cli", "lab", "demo", "-o", "json"],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    report["code"] = done.returncode
    return report


@pytest.mark.timeout(200)
def test_every_step_holds() -> None:
    report = tell()
    assert [step["name"] for step in report["steps"]] == NAMES, report
    assert all(step["ok"] for step in report["steps"]), report
    assert all(step["detail"] for step in report["steps"])
    assert report["ok"] is True
    assert report["code"] == 0
    assert report["seconds"] < 150
    assert os.getuid() == 0 or report["ok"]
