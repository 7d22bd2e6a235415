"""Who may have a lab, and that nothing of it is left, however it ends.

Every test runs as root (if we are) and in a user namespace, which needs no privilege.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mesh.errors import ConfigError, Unavailable
from mesh.lab.control import LabClient, list_labs
from mesh.lab.launch import LabSettings, start
from tests.support.bare_labs import CALLER, MODES, PROGRAMS, BareLab, lab_of
from tests.support.labs import eventually
from tests.support.tree import ROOT

pytestmark = [pytest.mark.lab, pytest.mark.timeout(90)]

# A length of sleep that nobody else on this machine chooses.
MARK = str(400_000 + os.getpid())


def test_a_name_is_taken_once(lab: BareLab, tmp_path: Path) -> None:
    name = lab.client.address.name
    assert name in [found.name for found in list_labs(uid=os.getuid())]
    with pytest.raises(ConfigError, match=f"a lab named {name} is already up"):
        start(LabSettings(tmp_path, name=name, mesh=False))


def test_another_user_is_refused(lab: BareLab) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user to try")
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as asker:
            asker.connect(lab.client.address.socket_name)
            asker.sendall(b'{"verb": "status"}\n')
            os.write(writing, asker.recv(4096))
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as answer:
        assert json.loads(answer.read())["kind"] == "Denied"


def left_behind(name: str) -> dict[str, list[str]]:
    """Whatever a lab of this name could leave on the machine, and others would not."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return {
        "links": [
            n for _, n in socket.if_nameindex() if n.startswith(("pod", "node", "cbr", "fa"))
        ],
        "mounts": [line for line in mounts if "ambit-" in line],
        "files": [path for path in ("/run/ambit", "/app", "/etc/greeting") if Path(path).exists()],
        "labs": [lab.name for lab in list_labs(uid=os.getuid()) if lab.name == name],
        "processes": processes_named(MARK),
    }


def processes_named(mark: str) -> list[str]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                command = Path("/proc", entry, "cmdline").read_text().replace("\0", " ")
                if f"sleep {mark}" in command and "python" not in command:
                    found.append(command)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("end", ["down", "stop", "keeper", "supervisor"])
def test_nothing_is_left(tmp_path: Path, mode: str, end: str) -> None:
    pod = CALLER.replace("infinity", f"'{MARK}'")
    files = {"p.yaml": PROGRAMS, "caller.yaml": pod}
    name = f"leave-{os.getpid()}-{mode}-{end}"
    with lab_of(tmp_path, name, files, rootless=mode == "rootless") as lab:
        assert len(processes_named(MARK)) == 1
        children = Path(f"/proc/{lab.running.pid}/task/{lab.running.pid}/children")
        supervisor = int(children.read_text().split()[0])
        match end:
            case "down":
                lab.client.down()
            case "stop":
                assert lab.running.stop() == 0
            case "keeper":
                os.kill(lab.running.pid, signal.SIGKILL)
            case "supervisor":
                os.kill(supervisor, signal.SIGKILL)
        lab.running.wait()
        deadline = time.monotonic() + 45
        while any((left := left_behind(name)).values()):
            assert time.monotonic() < deadline, left
            select.select([], [], [], 0.05)


def test_a_detached_lab_outlives_its_caller(tmp_path: Path) -> None:
    (tmp_path / "caller.yaml").write_text(CALLER)
    (tmp_path / "p.yaml").write_text(PROGRAMS)
    name = f"leave-{os.getpid()}-detached"
    pid = os.fork()
    if pid == 0:
        start(LabSettings(tmp_path, name=name, mesh=False, detach=True))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    client = LabClient(name)
    assert client.status()["phase"] == "ready"
    assert client.run("shop", "caller", ["hostname"]).stdout == b"caller\n"
    client.down()
    assert not client.is_up()


def test_a_lab_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no lab named absent is up"):
        LabClient("absent").status()
    with pytest.raises(ConfigError, match="no such directory"):
        start(LabSettings(tmp_path / "absent", name="absent"))


def test_a_lab_of_tests_ends_with_them(tmp_path: Path) -> None:
    """Whoever kills the tests has not to look for their labs."""
    name = f"test-{os.getpid()}-orphan"
    code = f"""
import pathlib, signal
from tests.support.labs import running_lab
with running_lab(pathlib.Path({str(tmp_path)!r}), "--nodes", "1", name={name!r}, settled=False):
    print("up", flush=True)
    signal.pause()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as tests:
        assert tests.stdout is not None
        assert tests.stdout.readline() == b"up\n"
        assert name in [found.name for found in list_labs(uid=os.getuid())]
        tests.kill()
    eventually(lambda: _is_gone(name), seconds=30)


def _is_gone(name: str) -> None:
    assert name not in [found.name for found in list_labs(uid=os.getuid())]
