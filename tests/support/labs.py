"""Labs for tests: brought up by the command line, as a user would, and always taken down."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mesh.lab.control import LabClient

T = TypeVar("T")


@dataclass
class TestLab:
    """A lab that is up: its client, the process that holds it, and its directory."""

    __test__ = False

    client: LabClient
    process: subprocess.Popen[bytes]
    directory: Path
    log: Path

    def said(self) -> str:
        """Everything the lab printed so far."""
        return self.log.read_text(errors="replace")

    def processes(self, word: str) -> list[int]:
        """The lab's processes with this word on their command line, by our own numbers."""
        found, looking = [], [self.process.pid]
        while looking:
            pid = looking.pop()
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    looking += map(int, (task / "children").read_text().split())
                if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    found.append(pid)
        return found

    def python(self, pod: str, code: str, *argv: str) -> str:
        """Run Python code in a pod; its output. Fails the test when the code failed."""
        namespace, _, name = pod.partition("/")
        done = self.client.run(namespace, name, ["python3", "-c", code, *argv])
        assert done.code == 0, f"in {pod}: exit {done.code}: {done.stderr.decode()}"
        return done.stdout.decode().strip()


def eventually(check: Callable[[], T], *, seconds: float = 45.0) -> T:
    """Call `check` until it no longer raises AssertionError; its result."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return check()
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def running_lab(
    directory: Path,
    *arguments: str,
    name: str = "",
    under: Sequence[str] = (),
    settled: bool = True,
) -> Iterator[TestLab]:
    """`ambit lab up` over `directory`, ready; ended on the way out, by force if need be.

    `under` is a command to run it by; `settled=False` does not wait for daemons and pods.
    """
    name = name or f"test-{os.getpid()}-{directory.name[-8:].strip('_-').lower()}"
    # Whoever kills these tests does not leave their labs behind.
    command = [*under, "setpriv", "--pdeathsig", "TERM"]
    command += [sys.executable, "-m", "mesh.cli", "lab", "up", "--name", name]
    command += ["--dir", str(directory), *arguments]
    with tempfile.NamedTemporaryFile(prefix="ambit-test-lab-") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            client = LabClient(name, timeout=60)

            def up() -> None:
                assert process.poll() is None, Path(log.name).read_text(errors="replace")
                assert client.is_up()
                # Not one that somebody else has up under this name.
                assert client.status()["directory"] == os.path.realpath(directory)

            eventually(up, seconds=30)
            lab = TestLab(client, process, directory, Path(log.name))
            if settled:
                client.wait_ready(90)
            yield lab
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
