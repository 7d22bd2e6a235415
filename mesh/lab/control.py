"""Speaking with a running lab: the client, and the framing that both ends share.

A lab listens on the abstract unix socket `\\0ambit-lab/<uid>/<name>` of the network namespace
it was started from, so nothing of it lies on disk. One connection carries one request: a line of
JSON, together with file descriptors for `exec`. Answers are lines of JSON too: any number of
`{"data": base64}` (logs), then `{"ok": …}` or `{"error": …, "kind": …, "hint": …}`.
The supervisor admits only the uid that started it, by SO_PEERCRED.

The client is synchronous: it serves the command line and tests. It imports no trio.
"""

from __future__ import annotations

import array
import base64
import contextlib
import json
import os
import re
import select
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mesh.errors import ConfigError, Denied, KernelError, MeshError, Unavailable

MAX_REQUEST = 4 << 20
MAX_ANSWER = 64 << 20
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")

_KINDS: Mapping[str, type[MeshError]] = {
    "ConfigError": ConfigError,
    "KernelError": KernelError,
    "Unavailable": Unavailable,
    "Denied": Denied,
}


class NotThere(MeshError):
    """The lab is up, but the pod, object or daemon asked for does not exist."""


@dataclass(frozen=True, slots=True)
class LabAddress:
    """A lab that is up on this machine: its name and the uid that started it."""

    name: str
    uid: int

    @property
    def socket_name(self) -> str:
        """The abstract socket's name, with the leading NUL."""
        return f"\0ambit-lab/{self.uid}/{self.name}"


@dataclass(frozen=True, slots=True)
class Completed:
    """A command that ended inside a pod: exit code (128+n after signal n) and its output."""

    code: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True, slots=True)
class Flow:
    """Packets seen on the fabric, per direction. `port` is the lower of the two port numbers."""

    family: str  # "IPv4" | "IPv6"
    protocol: str  # "tcp" | "udp" | "icmp" | a number
    source: str
    destination: str
    port: int
    packets: int
    bytes: int


@dataclass(frozen=True, slots=True)
class TapReport:
    """What a tap saw: counters, and for each needle whether it appeared in any payload."""

    flows: tuple[Flow, ...]
    seen: Mapping[bytes, bool] = field(default_factory=dict)
    truncated: bool = False  # more payload than is kept for searching went by


def check_name(name: str) -> str:
    """Return `name` if a lab may be called so. Raises ConfigError."""
    if NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{name!r} is no name for a lab",
            field="name",
            hint="up to 40 of a-z, 0-9 and -, not at either end",
        )
    return name


def list_labs(*, uid: int | None = None) -> list[LabAddress]:
    """Labs that are up in this network namespace; of one user, or of all (None)."""
    found: set[LabAddress] = set()
    for line in Path("/proc/net/unix").read_text("utf-8", "replace").splitlines()[1:]:
        words = line.split(maxsplit=7)
        if len(words) < 8 or not words[7].startswith("@ambit-lab/"):
            continue
        # Flags 0x10000 is the listening socket; accepted connections carry its name as well.
        if not int(words[3], 16) & 0x10000:
            continue
        owner, _, name = words[7].removeprefix("@ambit-lab/").partition("/")
        if owner.isdigit() and NAME.fullmatch(name):
            found.add(LabAddress(name, int(owner)))
    labs = sorted(found, key=lambda lab: (lab.uid, lab.name))
    return labs if uid is None else [lab for lab in labs if lab.uid == uid]


class LabClient:
    """Requests to one lab. Every call opens a connection of its own and is synchronous.

    All calls raise Unavailable (no such lab, or no answer in `timeout` seconds), NotThere
    (no such pod, object or daemon) or what the supervisor answered: ConfigError, KernelError,
    Denied.
    """

    def __init__(self, name: str, *, uid: int | None = None, timeout: float = 30.0) -> None:
        self.address = LabAddress(check_name(name), os.getuid() if uid is None else uid)
        self.timeout = timeout

    @property
    def where(self) -> str:
        """Which lab this is, for messages."""
        return f"lab {self.address.name}"

    def status(self) -> dict[str, Any]:
        """The lab as data: see `Supervisor.status` for the keys.

        name, directory, phase ("starting"|"ready"|"stopping"), run_directory, pid, uptime_seconds,
        nodes: [{name, ips, pod_cidrs, daemons: {netconfig|ztunnel: {state, pid, restarts}}}],
        control_plane: {ip, daemons: {istiod: …}}, pods: [{namespace, name, uid, node, phase, ready,
        ips, restarts, owner, enrolled, containers, message}], services: [{namespace, name,
        cluster_ips, ports, endpoints}], faults, warnings:
        [{file, line, column, object, field, message, hint}],
        notes: [text].
        """
        return _mapping(self._call({"verb": "status"}))

    def wait_ready(self, timeout: float = 60.0) -> dict[str, Any]:
        """Wait until daemons and pods are ready; the status. Raises Unavailable."""
        answer = self._call({"verb": "wait_ready", "timeout": timeout}, timeout=timeout + 5)
        return _mapping(answer)

    def down(self, *, timeout: float = 30.0) -> None:
        """Stop the lab and wait until nothing of it is left."""
        with self._connect({"verb": "down"}, timeout) as connection:
            # The answer is the end: the supervisor closes the connection by dying.
            for _ in _lines(connection):
                pass
        self._wait_gone(timeout)

    def exec(
        self,
        namespace: str,
        pod: str,
        argv: Sequence[str],
        *,
        container: str | None = None,
        environment: Mapping[str, str] | None = None,
        stdin: int = 0,
        stdout: int = 1,
        stderr: int = 2,
    ) -> int:
        """Run `argv` in a pod on the caller's descriptors; the exit code (128+n: signal n).

        The command is killed when this process goes away.
        """
        request = {
            "verb": "exec",
            "namespace": namespace,
            "pod": pod,
            "container": container,
            "argv": list(argv),
            "environment": dict(environment or {}),
        }
        answer = self._call(request, fds=(stdin, stdout, stderr), timeout=None)
        return int(_mapping(answer)["code"])

    def run(
        self,
        namespace: str,
        pod: str,
        argv: Sequence[str],
        *,
        container: str | None = None,
        stdin: bytes = b"",
    ) -> Completed:
        """Run `argv` in a pod and collect its output (kept in unlinked temporary files)."""
        with contextlib.ExitStack() as stack:
            given, out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            given.write(stdin)
            given.seek(0)
            code = self.exec(
                namespace,
                pod,
                argv,
                container=container,
                stdin=given.fileno(),
                stdout=out.fileno(),
                stderr=err.fileno(),
            )
            out.seek(0)
            err.seek(0)
            return Completed(code, out.read(), err.read())

    def logs(
        self,
        *,
        pod: tuple[str, str] | None = None,
        container: str | None = None,
        daemon: str | None = None,
        tail: int | None = None,
        follow: bool = False,
    ) -> Iterator[bytes]:
        """Chunks of the log of a pod (namespace, name), of a daemon (`ztunnel@node1`, `istiod`)
        or, with neither, of the lab itself. `tail` is a number of lines."""
        request = {
            "verb": "logs",
            "pod": list(pod) if pod else None,
            "container": container,
            "daemon": daemon,
            "tail": tail,
            "follow": follow,
        }
        with self._connect(request, None if follow else self.timeout) as connection:
            for answer in _lines(connection):
                if "data" in answer:
                    yield base64.b64decode(answer["data"])
                else:
                    _result(answer)
                    return

    def get(
        self, kind: str, namespace: str | None = None, name: str | None = None
    ) -> list[dict[str, Any]]:
        """Live objects of a kind (`Pod`, `Service`, …), of one namespace or all, perhaps by name.

        An empty list when there is none; never NotThere.
        """
        answer = self._call({"verb": "get", "kind": kind, "namespace": namespace, "name": name})
        return list(answer)

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Create or replace live objects, as if they stood in the lab's directory.

        They last until the lab goes down, or until a file of the directory says otherwise.
        """
        self._call({"verb": "apply", "objects": [dict(item) for item in objects]})

    def patch(
        self, kind: str, namespace: str, name: str, merge_patch: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Apply a JSON merge patch to a live object; the object after it.

        `namespace` is "" for cluster-wide kinds such as Namespace.
        """
        request = {
            "verb": "patch",
            "kind": kind,
            "namespace": namespace,
            "name": name,
            "patch": dict(merge_patch),
        }
        return _mapping(self._call(request))

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """Delete a live object; a pod of a Deployment is replaced by a new one."""
        self._call({"verb": "delete", "kind": kind, "namespace": namespace, "name": name})

    def tap_start(self) -> str:
        """Start counting packets on the wire between the nodes; the tap's id."""
        return str(_mapping(self._call({"verb": "tap_start"}))["tap"])

    def tap_read(self, tap: str, needles: Sequence[bytes] = (), *, stop: bool = False) -> TapReport:
        """What the tap saw so far, and whether each of `needles` went by in clear."""
        request = {
            "verb": "tap_read",
            "tap": tap,
            "stop": stop,
            "needles": [base64.b64encode(needle).decode() for needle in needles],
        }
        answer = _mapping(self._call(request))
        return TapReport(
            tuple(Flow(**flow) for flow in answer["flows"]),
            dict(zip(needles, answer["seen"], strict=True)),
            bool(answer["truncated"]),
        )

    def tap_stop(self, tap: str, needles: Sequence[bytes] = ()) -> TapReport:
        """As `tap_read`, and the tap is gone."""
        return self.tap_read(tap, needles, stop=True)

    def restart(self, daemon: str, *, timeout: float = 60.0) -> None:
        """SIGTERM a daemon (`ztunnel@node1`) and wait until its successor is up."""
        self._call({"verb": "restart", "daemon": daemon}, timeout=timeout)

    def kill(self, daemon: str) -> None:
        """SIGKILL a daemon; the lab starts it again by itself."""
        self._call({"verb": "kill", "daemon": daemon})

    def http_get(
        self, place: str, path: str, *, port: int = 15000, host: str = "127.0.0.1"
    ) -> tuple[int, bytes]:
        """GET over plain HTTP from inside a place; (status, body of at most 32 MiB).

        `place` is a node (`node1`), a daemon (`ztunnel@node1`, `istiod`) or a pod (`ns/name`).
        """
        request = {"verb": "http_get", "place": place, "host": host, "port": port, "path": path}
        answer = _mapping(self._call(request))
        return int(answer["status"]), base64.b64decode(answer["body"])

    def is_up(self) -> bool:
        """Whether somebody listens under this lab's name."""
        return self.address in list_labs(uid=self.address.uid)

    def _wait_gone(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self.is_up():
            if time.monotonic() > deadline:
                raise Unavailable(f"lab {self.address.name} did not stop in {timeout:.0f} s")
            select.select([], [], [], 0.02)

    def _connect(
        self, request: Mapping[str, Any], timeout: float | None, fds: Sequence[int] = ()
    ) -> socket.socket:
        data = json.dumps(request).encode() + b"\n"
        if len(data) > MAX_REQUEST:
            raise ConfigError(f"the request is larger than {MAX_REQUEST >> 20} MiB")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.settimeout(timeout)
            connection.connect(self.address.socket_name)
            if fds:
                ancillary = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
                sent = connection.sendmsg([data], [ancillary])
                data = data[sent:]
            # A lab that refuses at once may have closed by now: even sending nothing would fail.
            if data:
                connection.sendall(data)
        except ConnectionRefusedError as exc:
            connection.close()
            raise self._no_lab() from exc
        except OSError as exc:
            connection.close()
            raise Unavailable(f"lab {self.address.name}: {exc.strerror or exc}") from exc
        return connection

    def _no_lab(self) -> Unavailable:
        others = ", ".join(lab.name for lab in list_labs(uid=self.address.uid))
        return Unavailable(
            f"no lab named {self.address.name} is up",
            hint=f"up: {others}" if others else "start one with: ambit lab up --dir DIR",
        )

    def _call(
        self,
        request: Mapping[str, Any],
        *,
        fds: Sequence[int] = (),
        timeout: float | None = -1.0,
    ) -> Any:
        limit = self.timeout if timeout is not None and timeout < 0 else timeout
        with self._connect(request, limit, fds) as connection:
            for answer in _lines(connection):
                return _result(answer)
        raise Unavailable(
            f"lab {self.address.name} went away before it answered",
            hint="see its last words where it was started, or start it again",
        )


def error_answer(error: MeshError) -> dict[str, Any]:
    """An expected failure as an answer."""
    return {"error": str(error), "kind": type(error).__name__, "hint": error.hint}


def as_error(answer: Mapping[str, Any]) -> MeshError:
    """The inverse of `error_answer`."""
    kind = str(answer.get("kind", ""))
    raised = NotThere if kind == "NotThere" else _KINDS.get(kind, Unavailable)
    return raised(str(answer["error"]), hint=str(answer.get("hint", "")))


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Unavailable("the lab answered in a form that this version does not know")
    return value


def _result(answer: Mapping[str, Any]) -> Any:
    if "error" in answer:
        raise as_error(answer)
    return answer.get("ok")


def _lines(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """Answers of one connection until its end. Raises Unavailable."""
    buffer = bytearray()
    while True:
        try:
            data = connection.recv(1 << 16)
        except TimeoutError as exc:
            raise Unavailable(f"the lab did not answer in {connection.gettimeout():.0f} s") from exc
        except OSError as exc:
            raise Unavailable(f"the lab went away: {exc.strerror}") from exc
        if not data:
            return
        buffer += data
        while (end := buffer.find(b"\n")) >= 0:
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            yield _mapping(json.loads(line))
        if len(buffer) > MAX_ANSWER:
            raise Unavailable(f"the lab's answer is larger than {MAX_ANSWER >> 20} MiB")
