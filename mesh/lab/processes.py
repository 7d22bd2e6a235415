"""Programs inside namespaces: start, watch, signal, collect; and their logs.

The supervisor is PID 1 of its pid namespace, so orphans become its children: one task reaps
every child that ends, ours or not, and nobody else may wait for one. For the same reason no
parent-death signal is needed: with the supervisor the kernel ends every process of the lab.

Programs are started from trio's thread by fork and exec, without an interpreter in between:
between the two the child only enters its namespaces and directory.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from mesh import netns
from mesh.errors import ConfigError, KernelError

MAX_LOG_BYTES = 10 << 20
MAX_OUTPUT = 1 << 20
CANNOT_START = 126
_CHUNK = 1 << 16
_LAST_BYTES = 2048


@dataclass(frozen=True, slots=True)
class Place:
    """Where a program runs: descriptors of namespaces to enter in order, and a directory."""

    namespaces: tuple[int, ...] = ()
    directory: str = "/"


@dataclass(eq=False, slots=True)
class Child:
    """A program we started. It leads a process group of its own, which ends with it."""

    pid: int
    argv: tuple[str, ...]
    code: int | None = None
    _ended: trio.Event = field(default_factory=trio.Event)
    _process: subprocess.Popen[bytes] | None = None

    async def wait(self) -> int:
        """The exit code; 128+n after signal n."""
        await self._ended.wait()
        return self.code if self.code is not None else -1

    def signal(self, number: int) -> None:
        """Signal the whole group; ended already is fine."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def signal_leader(self, number: int) -> None:
        """Signal the program itself only."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def end(self, status: int) -> None:
        """Note the end; called by the reaper with waitpid's status."""
        code = os.waitstatus_to_exitcode(status)
        self.code = code if code >= 0 else 128 - code
        if self._process is not None:
            # Popen must never ask for a process that was collected already.
            self._process.returncode = self.code
        self._ended.set()

    async def stop(self, grace_seconds: float) -> int:
        """SIGTERM, and SIGKILL when `grace_seconds` are over; the exit code.

        If cancelled: the group is killed at once.
        """
        try:
            self.signal(signal.SIGTERM)
            with trio.move_on_after(grace_seconds):
                return await self.wait()
        finally:
            self.signal(signal.SIGKILL)
        return await self.wait()


class Processes:
    """All programs of the lab. `reap` must run as long as it is used."""

    def __init__(self) -> None:
        self._children: dict[int, Child] = {}

    def spawn(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        place: Place = Place(),
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> Child:
        """Start a program; descriptors not given are /dev/null.

        `argv[0]` is looked up in the environment's PATH, inside the place.
        Raises ConfigError when there is no such program, KernelError when it cannot start.
        """

        def enter() -> None:
            try:
                for fd in place.namespaces:
                    netns.enter(fd, 0)
                os.chdir(place.directory)
            except OSError as exc:
                os.write(2, f"directory {place.directory}: {exc.strerror}\n".encode())
                os._exit(CANNOT_START)
            except KernelError as error:
                os.write(2, f"{error}\n".encode())
                os._exit(CANNOT_START)

        try:
            process = subprocess.Popen(  # noqa: S603 - that is the point
                list(argv),
                env=dict(environment),
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=subprocess.DEVNULL if stdout is None else stdout,
                stderr=subprocess.DEVNULL if stderr is None else stderr,
                preexec_fn=enter,
                start_new_session=True,
            )
        except (FileNotFoundError, PermissionError, ValueError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise ConfigError(
                f"cannot start {argv[0]}: {reason}",
                field="command",
                hint="the lab runs programs of this machine; is it installed and in PATH?",
            ) from exc
        except (OSError, subprocess.SubprocessError) as exc:
            raise KernelError(f"cannot start {argv[0]}: {exc}", command=argv[0]) from exc
        child = Child(process.pid, tuple(argv), _process=process)
        self._children[process.pid] = child
        return child

    async def run(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        place: Place = Place(),
        stdin: bytes = b"",
        timeout: float = 20.0,
    ) -> tuple[int, bytes]:
        """Run a program to its end; exit code and output (at most 1 MiB of it).

        Killed after `timeout` seconds (code 137), or when cancelled. Raises as `spawn`.
        """
        given, said = os.memfd_create("stdin"), os.memfd_create("output")
        try:
            os.write(given, stdin)
            os.lseek(given, 0, os.SEEK_SET)
            child = self.spawn(
                argv,
                environment=environment,
                place=place,
                stdin=given,
                stdout=said,
                stderr=said,
            )
            try:
                with trio.move_on_after(timeout):
                    await child.wait()
            finally:
                child.signal(signal.SIGKILL)
            code = await child.wait()
            return code, os.pread(said, MAX_OUTPUT, 0)
        finally:
            os.close(given)
            os.close(said)

    async def reap(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Collect every child that ends. Never returns."""
        with trio.open_signal_receiver(signal.SIGCHLD) as signals:
            task_status.started()
            self._collect()
            async for _ in signals:
                self._collect()

    def _collect(self) -> None:
        while True:
            try:
                # Look first: while the leader is still a zombie its group's number is its own.
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            child = self._children.pop(found.si_pid, None)
            if child is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(found.si_pid, signal.SIGKILL)
            _, status = os.waitpid(found.si_pid, 0)
            if child is not None:
                child.end(status)


def kill_inside(namespace: int) -> int:
    """SIGKILL every process of a mount namespace (descriptor); how many there were."""
    wanted = netns.identity(namespace)
    killed = 0
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            status = os.stat(f"/proc/{entry}/ns/mnt")
            if (status.st_dev, status.st_ino) == wanted:
                os.kill(int(entry), signal.SIGKILL)
                killed += 1
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return killed


class Log:
    """A log of bounded size: when the file is full it becomes `.1` and a new one begins.

    `last` is the end of what was written through this very object.
    """

    def __init__(self, path: Path, *, limit: int = MAX_LOG_BYTES) -> None:
        self.path = path
        self.last = b""
        self._limit = limit
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size

    def write(self, data: bytes) -> None:
        """Append; a full disk (the lab's tmpfs) loses the data and nothing else."""
        self.last = (self.last + data[-_LAST_BYTES:])[-_LAST_BYTES:]
        if self._size + len(data) > self._limit and self._size:
            os.replace(self.path, self.earlier)
            os.close(self._fd)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
            self._fd = os.open(self.path, flags, 0o600)
            self._size = 0
        with contextlib.suppress(OSError):
            self._size += os.write(self._fd, data)

    @property
    def earlier(self) -> Path:
        """Where the lines before the last turn-over are."""
        return self.path.with_name(self.path.name + ".1")

    def tail(self, lines: int) -> bytes:
        """The last lines."""
        return tail_of(self.path, lines)

    def close(self) -> None:
        """Let go of the file; it stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    async def pump(self, fd: int) -> None:
        """Copy from a pipe's descriptor, which this closes, until its end."""
        async with trio.lowlevel.FdStream(fd) as stream:
            with contextlib.suppress(trio.BrokenResourceError):
                while data := await stream.receive_some(_CHUNK):
                    self.write(data)


def tail_of(path: Path, lines: int, *, most: int = 4 << 20) -> bytes:
    """The last `lines` of a log and of the one before it, at most `most` bytes; b"" for none."""
    if lines <= 0:
        return b""
    data = b""
    for part in (path, path.with_name(path.name + ".1")):
        try:
            with part.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - most))
                data = file.read() + data
        except FileNotFoundError:
            break
        if data.count(b"\n") > lines:
            break
    return b"".join(data.splitlines(keepends=True)[-lines:])[-most:]


def log_pipe() -> tuple[int, int]:
    """A pipe for a program's output: (ours, non-inheritable; theirs)."""
    return os.pipe2(os.O_CLOEXEC)
