"""Certificates and the root of all trust are exchanged under load, and nobody notices.

Certificates last 14 seconds here, so each is renewed every seven. The root is exchanged as
`istiod_lite.authority` says: first everybody trusts both, then the new one signs, then the old one
goes.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from istiod_lite.authority import open_authority
from tests.lab.test_zero_loss import CALLER, DATA, HOLD, NODES, calling, enrolled, holding
from tests.support.labs import TestLab, eventually, running_lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

TTL_SECONDS = 14


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestLab]:
    directory = tmp_path_factory.mktemp("rotation")
    shutil.copy(DATA / "echo.yaml", directory)
    program = f"ztunnel=/usr/bin/env SECRET_TTL={TTL_SECONDS} {sys.executable} -m ztunnel"
    with running_lab(directory, "--nodes", "2", "--replace", program) as lab:
        eventually(lambda: enrolled(lab))
        yield lab


def serials(lab: TestLab) -> dict[str, str]:
    """The certificate of each identity that a node holds for its pods."""
    found: dict[str, str] = {}
    for node in NODES:
        status, body = lab.client.http_get(node, "/config_dump")
        assert status == 200
        for entry in json.loads(body)["certificates"]:
            chain = entry["certChain"]
            assert chain, entry
            found[f"{node} {entry['identity']}"] = chain[0]["serialNumber"]
    assert len(found) >= len(NODES)
    return found


def wait_renewed(lab: TestLab) -> None:
    """Until every certificate is another one."""
    before = serials(lab)

    def renewed() -> None:
        now = serials(lab)
        assert all(now.get(each) != serial for each, serial in before.items())

    eventually(renewed, seconds=60)


def authority_directory(lab: TestLab) -> Path:
    (pid,) = lab.processes("istiod_lite")
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    variables = dict(each.partition("=")[::2] for each in environment)
    # As its parent sees it, who outlives it.
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    return Path(f"/proc/{parent}/root{variables['CA_DIR']}")


def published(lab: TestLab) -> str:
    found = lab.client.get("ConfigMap", "istio-system", "istio-ca-root-cert")
    return str(found[0]["data"]["root-cert.pem"])


def test_certificates_and_the_root_are_exchanged_and_nobody_notices(
    lab: TestLab, tmp_path: Path
) -> None:
    held = authority_directory(lab)
    trust_domain = "cluster.local"
    new = tmp_path / "new"
    open_authority(new, trust_domain, 1_700_000_000.0)
    old_root = (held / "root-cert.pem").read_bytes()

    def restart_istiod() -> None:
        lab.client.restart("istiod")
        wait_renewed(lab)

    def exchange() -> None:
        wait_renewed(lab)
        shutil.copy(new / "root-cert.pem", held / "extra-roots.pem")
        restart_istiod()
        assert published(lab).count("BEGIN") == 2
        for file in new.iterdir():
            shutil.copy(file, held / file.name)
        (held / "extra-roots.pem").write_bytes(old_root)
        restart_istiod()
        (held / "extra-roots.pem").unlink()
        restart_istiod()
        assert published(lab) == (new / "root-cert.pem").read_text()

    with calling(lab, "rotation") as calls:
        exchange()
    assert calls.failed == []
    assert calls.calls > 300
    # One connection outlives several certificates, and its proxies' trust in one another.
    assert holding(lab, 10, lambda: wait_renewed(lab)) == "held"
    assert lab.python(CALLER, HOLD, "echo", "0.1") == "held"
