"""`python -m netconfig` as a process of its own, in a network namespace of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from mesh import netns
from tests.support.pairs import dial

pytestmark = pytest.mark.lab

ROOT = Path(__file__).parents[2]


def environment(path: Path) -> dict[str, str]:
    (path / "cluster").mkdir(exist_ok=True)
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "NODE_NAME": "node1",
        "CLUSTER_DIR": str(path / "cluster"),
        "NETNS_DIR": str(path),
        "ZTUNNEL_UDS_ADDRESS": str(path / "zds.sock"),
        "CNI_AGENT_RUN_DIR": str(path / "cni"),
    }


@contextlib.contextmanager
def running(path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        ["unshare", "--net", sys.executable, "-m", "netconfig"],
        env=environment(path),
        stderr=subprocess.PIPE,
        text=True,
    )
    fd = -1
    try:
        plugin = path / "cni" / "pluginevent.sock"
        deadline = time.monotonic() + 45
        while not plugin.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"it did not start: {process.communicate()[1]}")
            time.sleep(0.02)
        fd = os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY)
        with netns.inside(fd):
            netlink = IPRoute()
        netlink.link("set", index=1, state="up")
        netlink.close()
        yield process, fd
    finally:
        if fd >= 0:
            os.close(fd)
        process.kill()
        process.communicate()


def fetch(fd: int, port: int, path: str) -> tuple[int, str]:
    with dial(fd, "127.0.0.1", port) as sock:
        sock.send(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        answer = b""
        while data := sock.recv(65536):
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="unshare --net needs root")
def test_it_starts_answers_and_ends_in_good_order(tmp_path: Path) -> None:
    with running(tmp_path) as (process, fd):
        assert fetch(fd, 8000, "/healthz") == (200, "ok\n")
        assert fetch(fd, 8000, "/readyz") == (200, "ready\n")
        assert '"pods": []' in fetch(fd, 8000, "/debug/pods")[1]
        metrics = fetch(fd, 15014, "/metrics")[1]
        assert 'ambit_netconfig_pods{state="captured"} 0.0' in metrics
        assert 'istio_build{component="netconfig"' in metrics
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert not (tmp_path / "zds.sock").exists()


def test_a_missing_setting_is_one_line_and_exit_code_two(tmp_path: Path) -> None:
    without = environment(tmp_path)
    del without["NODE_NAME"]
    done = subprocess.run(
        [sys.executable, "-m", "netconfig"], env=without, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "netconfig: NODE_NAME: is required but not set"


@pytest.mark.skipif(os.geteuid() != 0, reason="unshare --net needs root")
def test_a_second_agent_does_not_take_the_firsts_place(tmp_path: Path) -> None:
    with running(tmp_path) as (process, _):
        done = subprocess.run(
            ["unshare", "--net", sys.executable, "-m", "netconfig"],
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert done.returncode == 2
        assert "another node agent answers there" in done.stderr
        assert process.poll() is None
