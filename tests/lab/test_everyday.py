"""What people write and do every day, in a harbour: several containers with volumes between
them, Services of every kind, Redis, policies, big and many connections, edits of every sort;
and enrolment to and fro under load, with no request lost.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.labs import TestLab, eventually, running_lab

pytestmark = pytest.mark.lab

DATA = Path(__file__).parent / "data" / "everyday"
CLIENTS = ("island/boat", "island/ferry", "town/citizen")
"""Two in the mesh, one on each node, and one outside it on node2."""

# GREET host port count: the sorted set of what came back.
GREET = """
import json, socket, sys
def one():
    try:
        with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as c:
            return c.makefile("rb").readline().decode().strip() or "cut"
    except OSError as e:
        return "refused" if isinstance(e, ConnectionError) else repr(e)
print(json.dumps(sorted({one() for _ in range(int(sys.argv[3]))})))
"""

RESOLVE = """
import json, socket, sys
print(json.dumps(sorted({i[4][0] for i in socket.getaddrinfo(sys.argv[1], None)})))
"""

POUR = """
import hashlib, socket, sys
c = socket.create_connection((sys.argv[1], 7002), timeout=60)
left, digest = int(sys.argv[2]), hashlib.sha256()
c.sendall(b"%d\\n" % left)
while left:
    d = c.recv(min(left, 1 << 18))
    assert d, left
    digest.update(d); left -= len(d)
print(c.makefile("rb").read() == digest.digest() if c.shutdown(1) is None else 0)
"""

GULP = """
import hashlib, os, socket, sys
c = socket.create_connection((sys.argv[1], 7003), timeout=60)
left, digest, block = int(sys.argv[2]), hashlib.sha256(), os.urandom(1 << 20)
while left:
    part = block[:left]
    c.sendall(part); digest.update(part); left -= len(part)
c.shutdown(socket.SHUT_WR)
print(c.makefile().readline().split() == [sys.argv[2], digest.hexdigest()])
"""

MANY = """
import socket, sys, threading
failed = []
ready = threading.Barrier(int(sys.argv[2]))
def full(c, n):
    b = b""
    while len(b) < n:
        d = c.recv(n - len(b)); assert d, "short"
        b += d
    return b
def one(i):
    try:
        c = socket.create_connection((sys.argv[1], 7000), timeout=60)
        text = b"%08d" % i * 64
        c.sendall(text); assert full(c, 512) == text
        ready.wait(60)
        c.sendall(text); assert full(c, 512) == text
        c.shutdown(1)
        assert c.makefile("rb").read().startswith(b" the end of ")
    except Exception as e:
        failed.append(f"{i} in line {e.__traceback__.tb_lineno}: {e!r}"); ready.abort()
threads = [threading.Thread(target=one, args=(i,)) for i in range(int(sys.argv[2]))]
[t.start() for t in threads]; [t.join() for t in threads]
failed.sort(key=lambda each: "BrokenBarrier" in each)
print(len(failed), failed[:3])
"""

# LOAD file: new connections and one that lasts, until the file exists.
LOAD = """
import json, os, socket, sys, time
def new():
    return socket.create_connection(("quay.harbour", 70), timeout=20)
failed, count, lasting = [], 0, new() if sys.argv[2] == "lasting" else None
while not os.path.exists(sys.argv[1]):
    try:
        with socket.create_connection(("quay.harbour", 3306), timeout=20) as c:
            line = c.makefile("rb").readline()
            if not line.startswith(b"220 "): failed.append(repr(line))
        if lasting:
            lasting.sendall(b"ping")
            if lasting.recv(4) != b"ping": failed.append("lasting ended"); lasting = new()
    except OSError as e:
        failed.append(repr(e))
        if lasting: lasting = new()
    count += 1
    time.sleep(0.01)
print(json.dumps([count, failed[:5]]))
"""


class Harbour:
    """The lab, with the few questions that these tests ask again and again."""

    def __init__(self, lab: TestLab) -> None:
        self.lab = lab
        self.file = lab.directory / "harbour.yaml"

    def greet(self, client: str, host: str, port: int, count: int = 1) -> list[str]:
        return list(json.loads(self.lab.python(client, GREET, host, str(port), str(count))))

    def resolve(self, client: str, host: str) -> list[str]:
        return list(json.loads(self.lab.python(client, RESOLVE, host)))

    def pods(self, start: str, namespace: str = "harbour") -> list[dict[str, Any]]:
        return [
            pod
            for pod in self.lab.client.status()["pods"]
            if pod["namespace"] == namespace and pod["name"].startswith(start)
        ]

    def quay(self, node: str = "node1") -> dict[str, Any]:
        found = [
            pod
            for pod in self.pods("quay-")
            if pod["node"] == node and len(pod["containers"]) > 2 and pod["ready"]
        ]
        assert found, node
        return found[0]

    def run(self, pod: str, *argv: str, container: str | None = None) -> str:
        namespace, _, name = pod.partition("/")
        done = self.lab.client.run(namespace, name, argv, container=container)
        assert done.code == 0, done.stderr.decode()
        return done.stdout.decode()

    def edit(self, *changes: tuple[str, str]) -> None:
        text = self.file.read_text()
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        self.file.write_text(text)

    def served(self, client: str, host: str = "quay.harbour", port: int = 3306) -> bool:
        return all(line.startswith("220 ") for line in self.greet(client, host, port, 4))

    def under_load(self, clients: Sequence[str], kind: str, do: Callable[[], None]) -> None:
        """Do something while clients ask without pause; not one request may fail."""
        said: dict[str, Any] = {}
        flag = self.lab.directory / f"enough-{time.monotonic_ns()}"

        def load(client: str) -> None:
            said[client] = json.loads(self.lab.python(client, LOAD, str(flag), kind))

        threads = [threading.Thread(target=load, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        try:
            time.sleep(0.5)
            do()
            time.sleep(0.5)
        finally:
            flag.touch()
            for thread in threads:
                thread.join(60)
            flag.unlink()
        assert set(said) == set(clients)
        for client, (count, failed) in said.items():
            assert count > 20, client
            assert not failed, (client, count, failed)


@pytest.fixture(scope="module")
def harbour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harbour]:
    directory = tmp_path_factory.mktemp("harbour")
    for file in DATA.iterdir():
        if file.name != "store.yaml" or shutil.which("redis-server"):
            shutil.copy(file, directory)
    with running_lab(directory) as lab:
        found = Harbour(lab)

        def captured() -> None:
            state = {pod["name"]: pod["enrolled"] for pod in lab.client.status()["pods"]}
            assert state.pop("citizen") is False
            assert state.pop("lighthouse") is False
            assert all(state.values()), state

        eventually(captured)
        yield found


def test_containers_share_what_volumes_and_variables_bring(harbour: Harbour) -> None:
    pod = f"harbour/{harbour.quay()['name']}"
    assert harbour.run(pod, "cat", "/charts/depth") == "depth 12\n"
    assert harbour.run(pod, "cat", "/run/seal/word", "/etc/motto") == "wax & stringtide and time"
    assert harbour.run(pod, "stat", "-c", "%a", "/run/seal/word") == "400\n"
    environment = harbour.run(pod, "sh", "-c", "echo $SEAL,$LINE", container="berth")
    assert environment == "wax & string,tide and time on node1, $(MOTTO)\n"
    assert harbour.run(pod, "sh", "-c", "echo $SEAL,$LINE", container="harbourmaster") == ",\n"
    launch = harbour.pods("launch")[0]
    assert (launch["phase"], launch["restarts"]) == ("Succeeded", 0)
    assert b"".join(harbour.lab.client.logs(pod=("harbour", "launch"))) == b"launched\n"


@pytest.fixture(autouse=True)
def _settled(harbour: Harbour) -> Iterator[None]:
    """The next test finds the pods as the files say, none of them on its way out."""
    yield

    def settled() -> None:
        quays = harbour.pods("quay-")
        assert len(quays) == 3
        assert all(pod["ready"] for pod in quays)

    eventually(settled, seconds=90)


@pytest.mark.parametrize("client", CLIENTS)
def test_services_of_every_kind(harbour: Harbour, client: str) -> None:
    here = {"island/boat": "node1"}.get(client, "node2")
    quays = {pod["name"] for pod in harbour.pods("quay-")}
    assert len(quays) == 3

    def names(host: str, port: int, count: int = 1) -> set[str]:
        return {line.split()[1] for line in harbour.greet(client, host, port, count)}

    # The same port name is another number in another version's pods.
    assert names("quay.harbour", 3306, 24) == quays
    assert names("10.96.77.77", 3306, 24) == quays
    assert names("quay-alias.harbour", 3306, 24) == quays
    crane = harbour.greet(client, "quay-here.harbour", 71, 3)
    if here == "node1":
        assert [line.split()[1] for line in crane] == [harbour.pods("crane")[0]["name"]]
    else:
        assert crane == ["refused"]
    assert names("light.harbour", 91) == {"lighthouse"}
    assert harbour.greet(client, "launch.harbour", 80) == ["refused"]
    assert harbour.resolve(client, "quay-names.harbour") == sorted(
        pod["ips"][0] for pod in harbour.pods("quay-")
    )


@pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server is not installed")
def test_redis(harbour: Harbour) -> None:
    assert harbour.run("island/boat", "redis-cli", "-h", "store.harbour", "set", "k", "v") == "OK\n"
    host = "store-0.store.harbour.svc.cluster.local"
    assert harbour.run("town/citizen", "redis-cli", "-h", host, "get", "k") == "v\n"


@pytest.mark.parametrize("code", [POUR, GULP], ids=["pour", "gulp"])
def test_two_hundred_megabytes_arrive_whole(harbour: Harbour, code: str) -> None:
    ip = harbour.quay()["ips"][0]
    assert harbour.lab.python("island/ferry", code, ip, "200000000") == "True"


@pytest.mark.parametrize("client", CLIENTS)
def test_two_hundred_connections_at_once_each_half_closed(harbour: Harbour, client: str) -> None:
    ip = harbour.quay()["ips"][0]
    assert harbour.lab.python(client, MANY, ip, "200") == "0 []"


def policy(spec: str, namespace: str = "harbour", kind: str = "AuthorizationPolicy") -> str:
    return (
        f"apiVersion: security.istio.io/v1\nkind: {kind}\n"
        f"metadata: {{name: p, namespace: {namespace}}}\nspec: {spec}\n---\n"
    )


def from_(source: str, action: str = "ALLOW") -> str:
    return f"{{action: {action}, rules: [{{from: [{{source: {source}}}]}}]}}"


FISHER = "cluster.local/ns/island/sa/fisher"


@pytest.mark.parametrize(
    ("written", "served"),
    [
        (policy("{}"), ""),
        (policy("{rules: [{}]}"), "boat ferry citizen"),
        (policy("{action: DENY, rules: [{}]}", "istio-system"), ""),
        (policy("{selector: {matchLabels: {app: quay}}}"), ""),
        (policy("{selector: {matchLabels: {app: none}}}"), "boat ferry citizen"),
        (policy("{action: DENY, rules: [{to: [{operation: {ports: ['7001', '8001']}}]}]}"), ""),
        (policy(from_("{ipBlocks: [10.244.2.0/24]}", "DENY")), "boat"),
        (policy(from_(f"{{principals: [{FISHER}]}}")), "boat"),
        (policy(from_(f"{{notPrincipals: [{FISHER}]}}", "DENY")), "boat"),
        (policy(from_("{namespaces: ['is*']}")), "boat ferry"),
        (policy(from_("{principals: ['*']}")), "boat ferry"),
        (policy(from_("{principals: ['*/sa/default']}")), "ferry"),
        (policy("{mtls: {mode: STRICT}}", kind="PeerAuthentication"), "boat ferry"),
        (
            policy("{mtls: {mode: STRICT}}", "istio-system", "PeerAuthentication")
            + policy("{mtls: {mode: PERMISSIVE}}", kind="PeerAuthentication"),
            "boat ferry citizen",
        ),
        (
            policy(
                "{selector: {matchLabels: {app: quay}}, mtls: {mode: STRICT}, portLevelMtls: "
                "{7001: {mode: PERMISSIVE}, 8001: {mode: DISABLE}}}",
                kind="PeerAuthentication",
            ),
            "boat ferry citizen",
        ),
    ],
)
def test_policies(harbour: Harbour, written: str, served: str) -> None:
    file = harbour.lab.directory / "policy.yaml"
    file.write_text(written)
    try:

        def decided() -> None:
            found = [client for client in CLIENTS if harbour.served(client)]
            assert [client.partition("/")[2] for client in found] == served.split()

        eventually(decided)
    finally:
        file.unlink()

    def open_again() -> None:
        assert all(harbour.served(client) for client in CLIENTS)

    eventually(open_again)


def test_enrolled_and_unenrolled_twenty_times_under_load(harbour: Harbour) -> None:
    client = harbour.lab.client

    def flap() -> None:
        for round_ in range(20):
            mode = "ambient" if round_ % 2 else None
            patch = {"metadata": {"labels": {"istio.io/dataplane-mode": mode}}}
            for namespace in ("harbour", "island")[: 1 + round_ % 3 % 2]:
                client.patch("Namespace", "", namespace, patch)
            time.sleep((0.05, 0.3, 0.6, 1.0)[round_ % 4])
        patch = {"metadata": {"labels": {"istio.io/dataplane-mode": "ambient"}}}
        for namespace in ("harbour", "island"):
            client.patch("Namespace", "", namespace, patch)

    harbour.under_load(CLIENTS, "lasting", flap)

    def captured() -> None:
        assert all(pod["enrolled"] for pod in [*harbour.pods("quay"), *harbour.pods("", "island")])

    eventually(captured)


def test_a_deployment_rolls_and_shrinks_under_load(harbour: Harbour) -> None:
    def first() -> set[str]:
        return {pod["name"] for pod in harbour.pods("quay-") if len(pod["containers"]) > 2}

    before = first()

    def rolled() -> None:
        assert not first() & before
        assert len(first()) == 2

    def shrunk() -> None:
        assert len(first()) == 1

    def roll_and_shrink() -> None:
        harbour.edit(("image: example.invalid/quay:1", "image: example.invalid/quay:1.1"))
        eventually(rolled)
        harbour.edit(("replicas: 2", "replicas: 1"))
        eventually(shrunk)
        time.sleep(0.5)

    good = harbour.file.read_text()
    try:
        harbour.under_load(("island/boat", "town/citizen"), "new", roll_and_shrink)
    finally:
        harbour.file.write_text(good)
        eventually(lambda: harbour.quay() and harbour.quay("node2"))


def test_a_service_changes_how_it_is_addressed(harbour: Harbour) -> None:
    file = harbour.lab.directory / "changing.yaml"
    pod = harbour.pods("crane")[0]

    def written(spec: str, check: Callable[[list[str]], bool], port: int = 71) -> None:
        file.write_text(
            f"apiVersion: v1\nkind: Service\nmetadata: {{name: changing, namespace: harbour}}\n"
            f"spec: {spec}\n"
        )

        def followed() -> None:
            for client in CLIENTS:
                assert check(harbour.resolve(client, "changing.harbour")), client
                assert harbour.served(client, "changing.harbour", port), client

        eventually(followed)

    def virtual(ips: list[str]) -> bool:
        return len(ips) == 1 and ips[0].startswith("10.96.")

    written("{selector: {app: crane}, ports: [{port: 71}]}", virtual)
    written(
        "{clusterIP: None, selector: {app: crane}, ports: [{port: 71}]}",
        lambda ips: ips == pod["ips"][:1],
    )
    written(
        "{ipFamilies: [IPv6], selector: {app: crane}, ports: [{port: 71}]}",
        lambda ips: len(ips) == 1 and ips[0].startswith("fd00:10:96:"),
    )
    written(
        "{ipFamilyPolicy: RequireDualStack, selector: {app: crane}, ports: [{port: 71}]}",
        lambda ips: len(ips) == 2,
    )
    written("{clusterIP: 10.96.88.88, selector: {app: crane}, ports: [{port: 71}]}", virtual)
    written(
        "{clusterIP: 10.96.88.89, selector: {app: crane}, ports: [{port: 72, targetPort: 71}]}",
        lambda ips: ips == ["10.96.88.89"],
        72,
    )
    written(
        "{type: ExternalName, externalName: quay.harbour.svc.cluster.local}",
        lambda ips: ips == ["10.96.77.77"],
        3306,
    )
    written("{selector: {app: crane}, ports: [{port: 71}]}", virtual)
    file.unlink()


def test_a_cluster_ip_that_is_taken_is_refused_until_it_is_free(harbour: Harbour) -> None:
    thief = harbour.lab.directory / "thief.yaml"
    owner = harbour.lab.directory / "owner.yaml"
    text = (
        "apiVersion: v1\nkind: Service\nmetadata: {name: %s, namespace: harbour}\n"
        "spec:\n  clusterIP: 10.96.99.99\n  selector: {app: %s}\n  ports: [{port: 90%s}]\n"
    )
    owner.write_text(text % ("owner", "crane", ", targetPort: 71"))

    def owned() -> None:
        assert harbour.served("island/boat", "10.96.99.99", 90)

    eventually(owned)
    thief.write_text(text % ("thief", "quay", ", targetPort: hello"))

    def refused() -> None:
        faults = harbour.lab.client.status()["faults"]
        found = [f for f in faults if "belongs to Service harbour/owner" in f["message"]]
        assert [(Path(f["file"]).name, f["line"]) for f in found] == [("thief.yaml", 5)]

    eventually(refused)
    crane = harbour.pods("crane")[0]["name"]
    for client in ("island/boat", "town/citizen"):
        assert {line.split()[1] for line in harbour.greet(client, "10.96.99.99", 90, 9)} == {crane}
    owner.unlink()

    def taken_over() -> None:
        assert not harbour.lab.client.status()["faults"]
        lines = harbour.greet("island/boat", "10.96.99.99", 90, 4)
        assert all(" quay-" in line for line in lines), lines

    eventually(taken_over)
    thief.unlink()


def test_objects_move_between_files_and_nothing_restarts(harbour: Harbour) -> None:
    documents = harbour.file.read_text().split("\n---\n")
    crane = next(each for each in documents if "kind: DaemonSet" in each)
    uid = harbour.pods("crane")[0]["uid"]
    other = harbour.lab.directory / "moved.yaml"
    other.write_text(crane)

    def twice() -> None:
        faults = harbour.lab.client.status()["faults"]
        assert [Path(fault["file"]).name for fault in faults] == ["moved.yaml"]

    eventually(twice)
    harbour.file.write_text("\n---\n".join(each for each in documents if each is not crane))

    def settled() -> None:
        assert not harbour.lab.client.status()["faults"]

    eventually(settled)
    harbour.file.write_text("\n---\n".join(documents))
    other.unlink()
    eventually(settled)
    time.sleep(0.5)
    assert [pod["uid"] for pod in harbour.pods("crane")] == [uid]


def test_a_namespace_without_a_file_goes_on_as_a_plain_one(harbour: Harbour) -> None:
    town = "  - apiVersion: v1\n    kind: Namespace\n    metadata: {name: town}\n"
    good = harbour.file.read_text()
    harbour.edit((town, ""))

    def noted() -> None:
        notes = harbour.lab.client.status()["notes"]
        assert any("namespace town is not written anywhere" in note for note in notes)

    eventually(noted)
    assert harbour.lab.client.get("Namespace", None, "town")
    assert harbour.served("town/citizen")
    harbour.file.write_text(good)

    def written() -> None:
        notes = harbour.lab.client.status()["notes"]
        assert not any("namespace town" in note for note in notes)

    eventually(written)


def test_connections_end_in_order_when_their_pod_is_deleted(harbour: Harbour) -> None:
    code = (
        "import socket, sys\n"
        "c = socket.create_connection((sys.argv[1], 7000), timeout=60)\n"
        "c.sendall(b'hi'); print(c.recv(9), c.recv(9))\n"
    )
    pod = harbour.quay("node2")
    said: list[str] = []

    def hold(client: str) -> None:
        done = harbour.lab.client.run(*client.split("/"), ["python3", "-c", code, pod["ips"][0]])
        said.append((done.stdout + done.stderr).decode().strip())

    threads = [threading.Thread(target=hold, args=(client,)) for client in CLIENTS]
    for thread in threads:
        thread.start()
    established = (
        "rows = [l.split() for f in ('tcp', 'tcp6') for l in open('/proc/net/' + f)]\n"
        "print(sum(r[1].endswith(':1B58') and r[3] == '01' for r in rows))\n"
    )

    def connected() -> None:
        assert not said
        assert harbour.lab.python(f"harbour/{pod['name']}", established) == "3"

    eventually(connected)
    harbour.lab.client.delete("Pod", "harbour", pod["name"])
    for thread in threads:
        thread.join(60)
    assert said == ["b'hi' b''"] * 3


def test_a_name_that_dns_cannot_carry_is_refused(harbour: Harbour) -> None:
    file = harbour.lab.directory / "long.yaml"
    file.write_text(
        f"apiVersion: v1\nkind: Service\nmetadata:\n  name: {'x' * 64}\n"
        "spec: {ports: [{port: 1}], selector: {app: x}}\n"
    )

    def refused() -> None:
        found = [(f["line"], f["message"][:23]) for f in harbour.lab.client.status()["faults"]]
        assert found == [(4, "not a name of a Service")]

    eventually(refused)
    file.unlink()


def test_a_command_that_is_left_alone_may_still_tidy_up(harbour: Harbour, tmp_path: Path) -> None:
    tidied = tmp_path / "tidied"
    command = [sys.executable, "-m", "mesh.cli", "lab", "exec"]
    command += ["--lab", harbour.lab.client.address.name, "town/citizen", "--"]
    command += ["sh", "-c", f"trap 'touch {tidied}; exit' TERM; echo up; sleep 60 & wait"]
    asker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert asker.stdout is not None
    assert asker.stdout.readline() == "up\n"
    asker.stdout.close()
    asker.terminate()
    asker.wait(10)

    def tidy() -> None:
        assert tidied.exists()

    eventually(tidy)
