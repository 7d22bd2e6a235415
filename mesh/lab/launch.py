"""Starting a lab: from the caller's process to the supervisor as PID 1 of namespaces of its own.

    caller ── fork ── keeper ── fork ── supervisor (execs `python -m mesh.lab`)

The keeper makes the user namespace (when not root) and the pid namespace, waits and hands on
signals; the supervisor gets new network, mount, UTS and IPC namespaces. Kill any of the three with
SIGKILL and the kernel ends the rest: parent-death signals down the line, then the end of the pid
namespace. The control socket is made in the caller's network namespace before anything else, so
a name that is taken is refused at once.

Only the calling thread may exist in the caller when `start` forks; it imports no trio.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from mesh.errors import ConfigError, KernelError, MeshError, Unavailable
from mesh.lab import control, door

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
PR_SET_PDEATHSIG = 1

OLDEST_KERNEL = (5, 10)
LISTENER_ENVIRONMENT = "AMBIT_LAB_LISTENER"
REPORT_ENVIRONMENT = "AMBIT_LAB_REPORT"
SETTINGS_ENVIRONMENT = "AMBIT_LAB_SETTINGS"

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class LabSettings:
    """What `lab up` was asked for.

    `nodes`: how many (None: the Node objects of the directory, else 2). `mesh=False` leaves the
    daemons out: pods, Services and names only. `replace` and `environment` are keyed by daemon
    (`istiod`, `netconfig`, `ztunnel`) or by daemon on a node (`ztunnel@node1`, which wins):
    another program's argv, and variables added to the daemon's own. `rootless` asks for a user
    namespace (None: exactly when the caller is not root). `detach` lets the lab outlive its caller.
    `outside`: one address of the caller's network, which nodes reach at that port of loopback.
    """

    directory: Path
    name: str = "lab"
    nodes: int | None = None
    mesh: bool = True
    replace: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    rootless: bool | None = None
    detach: bool = False
    outside: tuple[str, int] | None = None

    def to_json(self) -> str:
        """The settings for the supervisor's environment."""
        return json.dumps(
            {
                "directory": str(self.directory),
                "name": self.name,
                "nodes": self.nodes,
                "mesh": self.mesh,
                "replace": {key: list(argv) for key, argv in self.replace.items()},
                "environment": {key: dict(value) for key, value in self.environment.items()},
                "rootless": self.rootless,
                "detach": self.detach,
                "outside": self.outside,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> LabSettings:
        """The inverse of `to_json`."""
        data = json.loads(text)
        data["directory"] = Path(data["directory"])
        data["outside"] = tuple(data["outside"]) if data["outside"] else None
        data["replace"] = {key: tuple(argv) for key, argv in data["replace"].items()}
        return cls(**data)


@dataclass(slots=True)
class RunningLab:
    """A lab that this process started. `pid` is the keeper's, in the caller's pid namespace."""

    settings: LabSettings
    pid: int
    client: control.LabClient
    status: dict[str, Any]
    code: int | None = None

    def wait(self) -> int:
        """Wait until the lab ends; its exit code. SIGINT and SIGTERM end it in good order."""
        if self.code is not None:
            return self.code

        def hand_on(number: int, _: object) -> None:
            os.kill(self.pid, signal.SIGTERM)

        earlier = {number: signal.signal(number, hand_on) for number in _ENDING}
        try:
            _, status = os.waitpid(self.pid, 0)
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
        self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def stop(self) -> int:
        """End the lab in good order and wait; its exit code."""
        if self.code is None:
            os.kill(self.pid, signal.SIGTERM)
        return self.wait()


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def start(
    settings: LabSettings,
    *,
    timeout: float = 90.0,
    progress: Callable[[str], None] | None = None,
) -> RunningLab:
    """Start a lab and return when its daemons are up and its pods were started.

    `timeout` in seconds; `progress` gets short texts for a person. The lab writes its own
    messages to the caller's stderr until then, and after it unless `detach`.
    Raises ConfigError (name taken, directory, missing program), KernelError (no privilege, old
    kernel) or Unavailable (a daemon did not start, timeout).
    """
    control.check_name(settings.name)
    check_machine(settings)
    listener = _listen(settings.name)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _Child(settings, listener, writing).keep()
    listener.close()
    os.close(writing)
    try:
        status = _await_report(reading, timeout, progress)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        _await_end(reading)
        raise
    finally:
        os.close(reading)
    return RunningLab(settings, pid, control.LabClient(settings.name), status)


def check_machine(settings: LabSettings) -> None:
    """Refuse what cannot work, with a hint, before anything is made."""
    try:
        os.scandir(settings.directory).close()
    except OSError as exc:
        missing = isinstance(exc, FileNotFoundError)
        raise ConfigError(
            "no such directory" if missing else (exc.strerror or str(exc)).lower(),
            file=str(settings.directory),
            hint="give the directory that holds the Kubernetes YAML",
        ) from exc
    if settings.nodes is not None and not 1 <= settings.nodes <= 64:
        raise ConfigError(f"{settings.nodes} is out of range 1..64", field="nodes")
    release = os.uname().release
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if numbers < OLDEST_KERNEL:
        raise KernelError(
            f"Linux {release} is too old for a lab",
            hint="Linux {}.{} or newer is needed".format(*OLDEST_KERNEL),
        )
    if find_program("nft") is None:
        raise ConfigError("the program nft is missing", hint="apt-get install nftables")


def find_program(name: str) -> str | None:
    """A program's path, looking into the sbin directories that users often lack in PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")


def _listen(name: str) -> socket.socket:
    address = control.LabAddress(name, os.getuid())
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(address.socket_name)
        listener.listen(64)
    except OSError as exc:
        listener.close()
        if exc.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"a lab named {name} is already up",
                hint=f"ambit lab down --lab {name}, or give this one another --name",
            ) from exc
        raise KernelError(f"control socket: {exc.strerror}", errno=exc.errno or 0) from exc
    return listener


def _await_report(
    reading: int, timeout: float, progress: Callable[[str], None] | None
) -> dict[str, Any]:
    buffer = b""
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reading], [], [], left)[0]:
            raise Unavailable(
                f"the lab was not ready within {timeout:.0f} s",
                hint="its messages above say what it waited for",
            )
        data = os.read(reading, 1 << 16)
        if not data:
            raise Unavailable("the lab ended while it started", hint="see its messages above")
        buffer += data
        while (end := buffer.find(b"\n")) >= 0:
            report = json.loads(buffer[:end])
            buffer = buffer[end + 1 :]
            if "error" in report:
                raise control.as_error(report)
            if "ready" in report:
                return dict(report["ready"])
            if progress is not None and "progress" in report:
                progress(str(report["progress"]))


def _await_end(reading: int, seconds: float = 5.0) -> None:
    """Wait until the supervisor is gone too: then the lab's name is free again."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0] and not os.read(reading, 1 << 16):
            return


def namespace_refusal(number: int) -> KernelError:
    """Why the kernel refused new namespaces (errno `number`), with the sysctl to look at."""
    reasons = (
        ("kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        ("user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"),
    )
    hints = []
    for path, forbidding, remedy in reasons:
        try:
            value = Path("/proc/sys", path).read_text("ascii").strip()
        except OSError:
            continue
        if value == forbidding:
            hints.append(f"{path.replace('/', '.')} is {value}: {remedy}")
    hint = "; ".join(hints) or "run it as root, or allow unprivileged user namespaces"
    return KernelError(
        f"this user may not make namespaces: {os.strerror(number)}", errno=number, hint=hint
    )


class _Child:
    """The keeper and, forked off it, the process that becomes the supervisor."""

    def __init__(self, settings: LabSettings, listener: socket.socket, report: int) -> None:
        self.settings = settings
        self.listener = listener
        self.report = report
        self.door: socket.socket | None = None
        self.rootless = os.getuid() != 0 if settings.rootless is None else settings.rootless

    def keep(self) -> NoReturn:
        """Make the outer namespaces, fork the supervisor, wait for it. Never returns."""
        try:
            if self.settings.detach:
                os.setsid()
            if self.settings.outside is not None:
                # Before the namespaces: the first child after them is the lab.
                self.door = door.leave_behind(*self.settings.outside)
            self._outer_namespaces()
            if not self.settings.detach:
                _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            # Blocked before the fork, so that no signal falls between it and the handlers.
            signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
            pid = os.fork()
            if pid == 0:
                self._become_supervisor()
            self.listener.close()
            os.close(self.report)
            if self.door is not None:
                self.door.close()
            if self.settings.detach:
                # Whoever reads the caller's output to its end must not wait for the lab's.
                let_go_of_terminal()
            for number in _ENDING:
                signal.signal(number, lambda *_: os.kill(pid, signal.SIGTERM))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
        except MeshError as error:
            self._refuse(error)
        except OSError as exc:
            self._refuse(KernelError(f"{exc}", errno=exc.errno or 0))

    def _outer_namespaces(self) -> None:
        uid, gid = os.getuid(), os.getgid()
        try:
            _call("unshare", CLONE_NEWPID | (CLONE_NEWUSER if self.rootless else 0))
        except OSError as exc:
            raise namespace_refusal(exc.errno or 0) from exc
        if self.rootless:
            Path("/proc/self/setgroups").write_text("deny", "ascii")
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1", "ascii")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1", "ascii")

    def _become_supervisor(self) -> NoReturn:
        try:
            _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            try:
                _call("unshare", CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWIPC)
                _call("mount", b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
                _call("mount", b"proc", b"/proc", b"proc", ctypes.c_ulong(0), None)
            except OSError as exc:
                raise namespace_refusal(exc.errno or 0) from exc
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
            for number in _ENDING:
                signal.signal(number, signal.SIG_DFL)
            environment = dict(os.environ)
            # The package must be found however the caller found it.
            root = str(Path(__file__).resolve().parents[2])
            paths = [root, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
            environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
            environment[LISTENER_ENVIRONMENT] = str(self.listener.fileno())
            environment[REPORT_ENVIRONMENT] = str(self.report)
            environment[SETTINGS_ENVIRONMENT] = self.settings.to_json()
            if self.door is not None:
                environment[door.ENVIRONMENT] = str(self.door.fileno())
                os.set_inheritable(self.door.fileno(), True)
            os.set_inheritable(self.listener.fileno(), True)
            os.set_inheritable(self.report, True)
            argv = [sys.executable, "-m", "mesh.lab"]
            os.execve(sys.executable, argv, environment)  # noqa: S606 - that is the point
        except MeshError as error:
            self._refuse(error)
        except OSError as exc:
            self._refuse(KernelError(f"{exc}", errno=exc.errno or 0))

    def _refuse(self, error: MeshError) -> NoReturn:
        os.write(self.report, json.dumps(control.error_answer(error)).encode() + b"\n")
        os._exit(1)


def let_go_of_terminal() -> None:
    """Nothing is read from, or written to, the terminal the lab was started from."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def _call(name: str, *arguments: Any) -> None:
    """A libc call that returns -1 on failure. Raises OSError."""
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
