"""A directory that the demo does not know: other namespaces, a StatefulSet behind a headless
Service, server-first protocols, two ports, an IPv6-only Service, an opted-out pod; enrolled
from its YAML, used, edited live, un-enrolled and killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.labs import TestLab, eventually, running_lab

pytestmark = pytest.mark.lab

DATA = Path(__file__).parent / "data" / "office"

GREET = """
import socket, sys
c = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20)
print(c.makefile("rb").readline().decode().strip())
"""

MYSQL = """
import socket, sys
c = socket.create_connection((sys.argv[1], 3306), timeout=20)
d = c.recv(100)
while len(d) < 17: d += c.recv(100)
blob = bytes(range(256)) * 4096
import threading
threading.Thread(target=lambda: (c.sendall(blob), c.shutdown(1))).start()
got = b""
while x := c.recv(65536): got += x
print(d[5:10].decode(), len(got), got == blob)
"""

RESOLVE = """
import json, socket, sys
print(json.dumps(sorted({i[4][0] for i in socket.getaddrinfo(sys.argv[1], None)})))
"""


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestLab]:
    directory = tmp_path_factory.mktemp("office")
    shutil.copy(DATA / "office.yaml", directory)
    with running_lab(directory, "--nodes", "2") as lab:
        yield lab


def agent(lab: TestLab, node: str = "node1") -> str:
    pods = lab.client.get("Pod", "office")
    found = [
        pod["metadata"]["name"]
        for pod in pods
        if pod["metadata"]["labels"].get("app") == "agent" and pod["spec"]["nodeName"] == node
    ]
    return f"office/{found[0]}"


def enrolled(lab: TestLab, namespace: str = "office") -> dict[str, bool]:
    return {
        pod["metadata"]["name"]: pod["metadata"]
        .get("annotations", {})
        .get("ambient.istio.io/redirection")
        == "enabled"
        for pod in lab.client.get("Pod", namespace)
    }


def access_records(lab: TestLab, node: str) -> list[dict[str, object]]:
    records = []
    for line in b"".join(lab.client.logs(daemon=f"ztunnel@{node}", tail=500)).splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and "direction" in record:
                records.append(record)
    return records


def test_namespace_enrolled_from_its_yaml_and_one_pod_opted_out(office: TestLab) -> None:
    def settled() -> None:
        state = enrolled(office)
        assert state.pop("loner") is False
        assert len(state) == 4
        assert all(state.values()), state
        assert enrolled(office, "archive") == {"shelf": False}

    eventually(settled)


def test_stateful_names_and_server_first_greeting_by_mtls(office: TestLab) -> None:
    for ordinal in (0, 1):
        host = f"mail-{ordinal}.mail.office.svc.cluster.local"
        greeting = office.python(agent(office), GREET, host, "25")
        assert greeting.startswith(f"220 mail-{ordinal} ESMTP ")
    client = next(
        pod
        for pod in office.client.get("Pod", "office")
        if f"office/{pod['metadata']['name']}" == agent(office)
    )
    assert greeting.split()[-1] in {entry["ip"] for entry in client["status"]["podIPs"]}

    def by_mtls() -> None:
        verified = [
            record
            for node in ("node1", "node2")
            for record in access_records(office, node)
            if record["direction"] == "inbound"
            and record.get("src.identity") == "spiffe://cluster.local/ns/office/sa/default"
            and str(record.get("dst.workload", "")).startswith("mail-")
        ]
        assert len(verified) >= 2

    eventually(by_mtls)


def test_headless_name_gives_every_pod_and_bytes_arrive_whole(office: TestLab) -> None:
    addresses = json.loads(office.python(agent(office), RESOLVE, "mail"))
    assert len([ip for ip in addresses if ":" not in ip]) == 2
    assert office.python(agent(office), MYSQL, "mail") == "8.0.0 1048576 True"


def test_ipv6_only_service(office: TestLab) -> None:
    addresses = json.loads(office.python(agent(office), RESOLVE, "mail6"))
    assert addresses
    assert all(":" in ip for ip in addresses)
    assert office.python(agent(office), GREET, "mail6", "2525").startswith("220 mail-")


@pytest.mark.parametrize("pod", ["office/loner", "archive/shelf"])
def test_pods_outside_the_mesh_reach_it_in_plaintext(office: TestLab, pod: str) -> None:
    host = "mail-0.mail.office.svc.cluster.local"
    assert office.python(pod, GREET, host, "25").startswith("220 mail-0")


def test_a_policy_dropped_in_reaches_the_nodes_and_names_itself(office: TestLab) -> None:
    policy = office.directory / "policy.yaml"
    policy.write_text(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
        "metadata: {name: no-smtp, namespace: office}\n"
        "spec:\n  action: DENY\n  rules:\n  - to: [{operation: {ports: ['25']}}]\n"
    )

    def smtp(pod: str) -> int:
        return office.client.run(
            *pod.split("/"), ["python3", "-c", GREET, "mail-0.mail", "25"]
        ).stdout.startswith(b"220")

    def denied() -> None:
        assert not smtp(agent(office))

    eventually(denied)
    assert office.python(agent(office), MYSQL, "mail-0.mail") == "8.0.0 1048576 True"

    def named() -> None:
        assert any(
            record.get("response_flags") == "DENY" and "office/no-smtp" in str(record.get("policy"))
            for node in ("node1", "node2")
            for record in access_records(office, node)
        )

    eventually(named)
    policy.unlink()

    def allowed() -> None:
        assert smtp(agent(office))

    eventually(allowed)


def test_a_broken_file_is_named_and_changes_nothing(office: TestLab) -> None:
    file = office.directory / "office.yaml"
    good = file.read_text()
    file.write_text(good.replace("replicas: 2", "replicas: two"))

    def named() -> None:
        faults = office.client.status()["faults"]
        assert any("office.yaml" in f["file"] and f["line"] for f in faults), faults

    eventually(named)
    assert office.python(agent(office), GREET, "mail-0.mail", "25").startswith("220 mail-0")
    file.write_text(good[:200] + "\n  : : [\n" + good[200:])
    eventually(named)
    assert office.python(agent(office), GREET, "mail-1.mail", "25").startswith("220 mail-1")
    file.write_text(good)

    def mended() -> None:
        assert not office.client.status()["faults"]

    eventually(mended)


def test_scaling_in_the_file_starts_a_captured_pod(office: TestLab) -> None:
    file = office.directory / "office.yaml"
    good = file.read_text()
    file.write_text(good.replace("replicas: 2", "replicas: 3"))

    def third() -> None:
        assert enrolled(office).get("mail-2") is True
        done = office.client.run(
            *agent(office).split("/"), ["python3", "-c", GREET, "mail-2.mail", "25"]
        )
        assert done.stdout.startswith(b"220 mail-2")

    eventually(third, seconds=20)
    file.write_text(good)

    def gone() -> None:
        assert "mail-2" not in enrolled(office)

    eventually(gone, seconds=40)


def test_unenroll_by_the_command_line_then_enroll_and_write(office: TestLab) -> None:
    name = office.client.address.name
    ambit = [sys.executable, "-m", "mesh.cli"]
    subprocess.run([*ambit, "unenroll", "office", "--lab", name], check=True)

    def released() -> None:
        assert not any(enrolled(office).values())

    eventually(released, seconds=30)
    assert office.python(agent(office), GREET, "mail-0.mail", "25").startswith("220 mail-0")
    file = office.directory / "office.yaml"
    subprocess.run([*ambit, "unenroll", "office", "--write", "--lab", name], check=True)
    assert "dataplane-mode: ambient" not in file.read_text()
    assert "StatefulSet behind a headless" in file.read_text()  # comments stay
    subprocess.run([*ambit, "enroll", "office", "--write", "--lab", name], check=True)
    assert "dataplane-mode: ambient" in file.read_text()

    def captured() -> None:
        assert sum(enrolled(office).values()) == 4

    eventually(captured, seconds=30)
    assert office.python(agent(office), GREET, "mail6", "2525").startswith("220 mail-")


def descendants(root: int) -> set[tuple[int, str]]:
    """(pid, start time) of every process below `root`, so that a reused pid is no false alarm."""
    children: dict[int, list[tuple[int, str]]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(words[1]), []).append((int(stat.parent.name), words[19]))
    found: set[tuple[int, str]] = set()
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found.update(below)
        queue += [pid for pid, _ in below]
    return found


def alive(processes: set[tuple[int, str]]) -> set[int]:
    still = set()
    for pid, started in processes:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if words[19] == started and words[0] != "Z":
                still.add(pid)
    return still


def host_links() -> str:
    return subprocess.run(["ip", "-br", "link"], check=True, capture_output=True, text=True).stdout


def test_sigkill_leaves_nothing(tmp_path: Path) -> None:
    shutil.copy(DATA / "office.yaml", tmp_path)
    links, mounts = host_links(), Path("/proc/self/mountinfo").read_text()
    files = set(Path("/run").iterdir())
    with running_lab(tmp_path, name=f"kill-{os.getpid()}") as lab:
        processes = descendants(lab.process.pid)
        assert len(alive(processes)) > 10
        os.kill(lab.process.pid, signal.SIGKILL)
        lab.process.wait(10)

        def nothing() -> None:
            assert not alive(processes)
            assert not lab.client.is_up()

        eventually(nothing, seconds=10)
    assert host_links() == links
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert set(Path("/run").iterdir()) == files
    assert [path.name for path in tmp_path.iterdir()] == ["office.yaml"]
