"""Nothing is lost while parts of the mesh are exchanged or die.

A caller on node1 connects to an echo on node2 all the time, by name and by address, while
ztunnel is restarted, upgraded in place and killed on either node, and netconfig and istiod are
killed. A planned restart loses nothing at all, not even a connection that is open. A kill ends
the connections that went through the dead process, by a reset that nobody can take for an end;
whoever connects meanwhile waits, and is served.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mesh.lab.control import LabClient
from tests.support.labs import TestLab, eventually, running_lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

DATA = Path(__file__).parent / "data" / "echo"
CALLER = "echo/caller"
NODES = ("node1", "node2")

# Calls all the time, in two threads, until the file argv[1] is there. Tells what failed, where.
CALL = """
import json, os, socket, sys, threading, time
stop, hosts = sys.argv[1], sys.argv[2:]
failed, waited, lock = [], [], threading.Lock()

def call(host):
    step, started = "resolve", time.monotonic()
    try:
        where = socket.getaddrinfo(host, 7, type=socket.SOCK_STREAM)[0]
        step = "connect"
        with socket.socket(where[0]) as c:
            c.settimeout(20)
            c.connect(where[4])
            step = "exchange"
            c.sendall(b"hello\\n")
            got = b""
            while not got.endswith(b"\\n"):
                data = c.recv(100)
                if not data:
                    raise EOFError("ended in order, without an answer")
                got += data
            step = "end"
            c.shutdown(socket.SHUT_WR)
            if got != b"hello\\n" or c.recv(100) != b"":
                raise ValueError(got)
    except Exception as error:
        with lock:
            failed.append([step, type(error).__name__, str(error)])
    with lock:
        waited.append(time.monotonic() - started)

def loop(host):
    while not os.path.exists(stop):
        call(host)
        time.sleep(0.01)

threads = [threading.Thread(target=loop, args=(host,)) for host in hosts]
[t.start() for t in threads]
[t.join() for t in threads]
os.unlink(stop)
waited.sort()
print(json.dumps({"calls": len(waited), "failed": failed,
                  "p99": waited[len(waited) * 99 // 100], "longest": waited[-1]}))
"""

# One connection, used ten times a second for argv[2] seconds, then ended in order.
HOLD = """
import socket, sys, time
c = socket.create_connection((sys.argv[1], 7), timeout=20)
until, count = time.monotonic() + float(sys.argv[2]), 0
try:
    while time.monotonic() < until:
        c.sendall(b"still here\\n")
        got = b""
        while not got.endswith(b"\\n"):
            data = c.recv(100)
            if not data:
                print("ended in order after", count)
                sys.exit()
            got += data
        assert got == b"still here\\n"
        count += 1
        time.sleep(0.1)
    c.shutdown(socket.SHUT_WR)
    assert c.recv(100) == b""
    print("held")
except ConnectionResetError:
    print("reset")
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestLab]:
    directory = tmp_path_factory.mktemp("echo")
    shutil.copy(DATA / "echo.yaml", directory)
    with running_lab(directory, "--nodes", "2") as lab:
        eventually(lambda: enrolled(lab))
        yield lab


def enrolled(lab: TestLab) -> None:
    for pod in lab.client.get("Pod", "echo"):
        assert pod["metadata"].get("annotations", {}).get("ambient.istio.io/redirection") == (
            "enabled"
        ), pod["metadata"]
    assert lab.python(CALLER, HOLD, "echo", "0.1") == "held"


def daemon(lab: TestLab, name: str) -> dict[str, Any]:
    kind, _, node = name.partition("@")
    status = lab.client.status()
    places = [each for each in status["nodes"] if each["name"] == node]
    state: dict[str, Any] = (places or [status["control_plane"]])[0]["daemons"][kind]
    return state


def kill(lab: TestLab, name: str) -> None:
    """SIGKILL, and wait until the lab has started it again."""
    before = daemon(lab, name)["restarts"]
    lab.client.kill(name)

    def back() -> None:
        now = daemon(lab, name)
        assert now["restarts"] > before, now
        assert now["state"] == "ready", now

    eventually(back, seconds=30)


class Calls:
    """What the calls came to, once the context that made them is left."""

    calls: int
    failed: list[tuple[str, str, str]]
    p99: float
    longest: float


@contextmanager
def calling(lab: TestLab, name: str) -> Iterator[Calls]:
    """Calls are made all the time while in this context."""
    stop = f"/tmp/{lab.client.address.name}-{name}-stop"
    vip = lab.client.get("Service", "echo", "echo")[0]["spec"]["clusterIP"]
    result: list[bytes] = []
    patient = LabClient(lab.client.address.name, timeout=200)
    argv = ["python3", "-c", CALL, stop, "echo", vip]

    def run() -> None:
        done = patient.run("echo", "caller", argv)
        result.append(done.stdout or done.stderr)

    thread = threading.Thread(target=run)
    thread.start()
    calls = Calls()
    try:
        time.sleep(1)
        yield calls
        time.sleep(1)
    finally:
        lab.python(CALLER, "import sys; open(sys.argv[1], 'w')", stop)
        thread.join(60)
    assert result, "the caller was not heard of again"
    told = json.loads(result[0])
    calls.calls, calls.p99, calls.longest = told["calls"], told["p99"], told["longest"]
    calls.failed = [tuple(each) for each in told["failed"]]
    print(f"{name}: {calls.calls} calls, {len(calls.failed)} failed {calls.failed[:5]},", end=" ")
    print(f"p99 {calls.p99 * 1000:.0f} ms, longest {calls.longest * 1000:.0f} ms")


def holding(lab: TestLab, seconds: float, meanwhile: Callable[[], None]) -> str:
    """How a connection fares that is open while something happens."""
    said: list[str] = []
    thread = threading.Thread(
        target=lambda: said.append(lab.python(CALLER, HOLD, "echo", str(seconds)))
    )
    thread.start()
    time.sleep(0.7)
    meanwhile()
    thread.join(60)
    return said[0]


def test_a_planned_restart_loses_nothing(lab: TestLab) -> None:
    lives: list[str] = []
    with calling(lab, "restarts") as calls:
        for _ in range(2):
            for node in NODES:
                before = daemon(lab, f"ztunnel@{node}")["pid"]
                lives.append(holding(lab, 5, lambda n=node: lab.client.restart(f"ztunnel@{n}")))
                assert daemon(lab, f"ztunnel@{node}")["pid"] != before
    assert calls.failed == []
    assert calls.calls > 200
    assert lives == ["held"] * 4


def test_a_supervisor_that_starts_the_successor_after_the_end_loses_nothing(lab: TestLab) -> None:
    """As systemd and the kubelet do: SIGTERM, wait for the exit, start anew. Who connects in
    between waits in the backlog of the listeners that the node agent keeps.
    """
    lives: list[str] = []
    with calling(lab, "sigterm") as calls:
        for node in NODES:
            lives.append(holding(lab, 1.5, lambda n=node: end_by_sigterm(lab, f"ztunnel@{n}")))
    assert calls.failed == []
    assert calls.calls > 100
    assert lives == ["held"] * 2


def end_by_sigterm(lab: TestLab, name: str) -> None:
    """SIGTERM from outside of the lab, and wait until the lab has started a successor."""
    before = daemon(lab, name)
    kind, _, node = name.partition("@")
    (pid,) = (
        each
        for each in lab.processes(kind)
        if f"NODE_NAME={node}".encode() in Path(f"/proc/{each}/environ").read_bytes().split(b"\0")
    )
    os.kill(pid, signal.SIGTERM)

    def back() -> None:
        now = daemon(lab, name)
        assert now["pid"] != before["pid"], now
        assert now["state"] == "ready", now

    eventually(back, seconds=30)


@pytest.mark.parametrize("node", NODES)
def test_a_kill_refuses_nobody_and_never_looks_like_an_end(lab: TestLab, node: str) -> None:
    with calling(lab, f"kill-{node}") as calls:
        ends = [holding(lab, 8, lambda: kill(lab, f"ztunnel@{node}")) for _ in range(2)]
    assert ends == ["reset", "reset"]
    # Only what went through the dead process at that moment, and visibly.
    assert {(step, error) for step, error, _ in calls.failed} <= {
        ("exchange", "ConnectionResetError"),
        ("end", "ConnectionResetError"),
    }
    assert len(calls.failed) <= 8
    assert calls.calls > 100


def test_the_node_agents_death_is_not_noticed(lab: TestLab) -> None:
    with calling(lab, "netconfig") as calls:
        for node in NODES:
            assert holding(lab, 4, lambda n=node: kill(lab, f"netconfig@{n}")) == "held"
    assert calls.failed == []

    # The agent's next life got the listeners back, so that this refuses nobody either.
    time.sleep(1)
    with calling(lab, "netconfig-then-ztunnel") as calls:
        kill(lab, "ztunnel@node2")
    assert all(error == "ConnectionResetError" for _, error, _ in calls.failed), calls.failed


def test_the_controllers_death_is_not_noticed(lab: TestLab) -> None:
    with calling(lab, "istiod") as calls:
        assert holding(lab, 4, lambda: kill(lab, "istiod")) == "held"
    assert calls.failed == []


def test_known_workloads_go_on_while_the_controller_is_gone(lab: TestLab) -> None:
    """Stopped, not killed: it answers nobody, as if it were gone for an hour."""
    (pid,) = lab.processes("istiod_lite")
    os.kill(pid, signal.SIGSTOP)
    try:
        with calling(lab, "istiod-gone") as calls:
            assert holding(lab, 3, lambda: lab.client.restart("netconfig@node1")) == "held"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert calls.failed == []


def test_agent_and_proxy_killed_together_come_back_and_lie_to_nobody(lab: TestLab) -> None:
    with calling(lab, "both") as calls:
        lab.client.kill("netconfig@node2")
        kill(lab, "ztunnel@node2")
        eventually(lambda: enrolled(lab))
    # The listeners are gone with both: who connects then is refused or reset, visibly.
    assert {error for _, error, _ in calls.failed} <= {
        "ConnectionResetError",
        "ConnectionRefusedError",
        "gaierror",
    }
    with calling(lab, "afterwards") as calls:
        pass
    assert calls.failed == []
