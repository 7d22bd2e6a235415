"""The lab's end of `mesh.lab.control`: who may ask, what was asked, and the answer.

One task per connection, one request per connection. Only the uid that runs the lab is
answered. A command run by `exec` ends when its connection does.
"""

from __future__ import annotations

import array
import base64
import contextlib
import json
import os
import signal
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import trio

from mesh.cluster.api import NotFound, Ref, ref_of
from mesh.cluster.fields import Reader
from mesh.errors import ConfigError, Denied, MeshError, Unavailable
from mesh.lab import fetch
from mesh.lab.control import MAX_REQUEST, NotThere, error_answer
from mesh.lab.daemons import Daemon
from mesh.lab.kubelet import PodRunner
from mesh.lab.processes import tail_of
from mesh.lab.report import status_of
from mesh.lab.state import LabState
from mesh.lab.supervisor import Supervisor
from mesh.lab.tap import Tap

MAX_CONNECTIONS = 128
MAX_TAPS = 16
MAX_NEEDLES = 64
FOLLOW_SECONDS = 0.1
REQUEST_SECONDS = 10.0
LEFT_SECONDS = 2.0
DRAIN_SECONDS = 1.0
_CHUNK = 1 << 18
_CREDENTIALS = struct.Struct("3i")

Send = Callable[[Mapping[str, Any]], Awaitable[None]]


async def serve_control(supervisor: Supervisor, listener: socket.socket) -> None:
    """Answer requests on `listener`. Never returns."""
    listener.setblocking(False)
    listening = trio.socket.from_stdlib_socket(listener)
    limiter = trio.CapacityLimiter(MAX_CONNECTIONS)
    async with trio.open_nursery() as nursery:
        desk = Desk(supervisor, nursery)
        while True:
            accepted, _ = await listening.accept()
            nursery.start_soon(_serve, desk, accepted, limiter)


async def _serve(
    desk: Desk, connection: trio.socket.SocketType, limiter: trio.CapacityLimiter
) -> None:
    fds: list[int] = []

    async def send(answer: Mapping[str, Any]) -> None:
        data = memoryview(json.dumps(answer).encode() + b"\n")
        while data:
            sent = await connection.send(data)
            data = data[sent:]

    try:
        if not _is_owner(connection):
            await send(error_answer(Denied("this lab belongs to another user")))
            await _drain(connection)
            return
        async with limiter:
            try:
                with trio.fail_after(REQUEST_SECONDS):
                    request = await _receive(connection, fds)
                await send({"ok": await desk.answer(request, fds, connection, send)})
            except MeshError as error:
                await send(error_answer(error))
    except trio.TooSlowError:
        pass
    except OSError:
        pass  # the asker went away
    finally:
        for fd in fds:
            os.close(fd)
        connection.close()


def _is_owner(connection: trio.socket.SocketType) -> bool:
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(found)
    # In a user namespace other users show as the overflow uid, which is nobody's here.
    return bool(uid == os.getuid())


async def _drain(connection: trio.socket.SocketType) -> None:
    """Let the other side read its answer: closing over unread bytes would reset it."""
    connection.shutdown(socket.SHUT_WR)
    with trio.move_on_after(DRAIN_SECONDS):
        while await connection.recv(1 << 16):
            pass


async def _receive(connection: trio.socket.SocketType, fds: list[int]) -> Reader:
    data = bytearray()
    while b"\n" not in data:
        chunk, ancillary, _, _ = await connection.recvmsg(
            1 << 16, socket.CMSG_SPACE(3 * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                given = array.array("i")
                given.frombytes(content[: len(content) - len(content) % given.itemsize])
                fds.extend(given)
        if not chunk or len(data) > MAX_REQUEST:
            raise ConfigError("the request is cut off or too large")
        data += chunk
    try:
        request = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise ConfigError("the request is not JSON") from exc
    return Reader(request)


class Desk:
    """Answers one lab's requests."""

    def __init__(self, supervisor: Supervisor, nursery: trio.Nursery) -> None:
        self._supervisor = supervisor
        self._lab: LabState = supervisor.state
        self._nursery = nursery
        self._taps: dict[str, Tap] = {}
        self._next_tap = 1

    async def answer(
        self,
        request: Reader,
        fds: list[int],
        connection: trio.socket.SocketType,
        send: Send,
    ) -> Any:
        """The answer to a request. Raises MeshError."""
        verb = request.get("verb").name()
        match verb:
            case "status":
                return status_of(self._lab)
            case "wait_ready":
                return await self._wait_ready(request)
            case "down":
                self._lab.end.set()
                await trio.sleep_forever()
            case "exec":
                return await self._exec(request, fds, connection)
            case "logs":
                return await self._logs(request, send)
            case "get" | "apply" | "patch" | "delete":
                return await self._objects(verb, request)
            case "tap_start" | "tap_read":
                return self._tap(verb, request)
            case "restart":
                await self._daemon(request).restart()
                return None
            case "kill":
                self._daemon(request).signal(signal.SIGKILL)
                return None
            case "http_get":
                return await self._http_get(request)
        raise ConfigError(f"this lab does not know the verb {verb!r}")

    async def _wait_ready(self, request: Reader) -> dict[str, Any]:
        timeout = request.get("timeout").value
        with trio.move_on_after(float(timeout) if isinstance(timeout, int | float) else 60.0):
            while self._lab.phase == "starting":
                await self._lab.changed.wait()
            await self._lab.wait_settled()
            return status_of(self._lab)
        status = status_of(self._lab)
        late = [f"{p['namespace']}/{p['name']}" for p in status["pods"] if not p["ready"]]
        raise Unavailable(
            f"not ready: {', '.join(late) or 'the lab'}", hint="ambit lab status shows why"
        )

    async def _exec(
        self, request: Reader, fds: list[int], connection: trio.socket.SocketType
    ) -> dict[str, int]:
        runner = self._runner(request.get("namespace").name(), request.get("pod").name())
        if len(fds) != 3:
            raise ConfigError("exec needs three descriptors")
        container = runner.container(request.get("container").text() or None)
        argv = [each.text() for each in request.get("argv").items()]
        if not argv:
            raise ConfigError("no command")
        place = runner.place(container.name)
        environment = {
            **runner.environment(container),
            **request.get("environment").labels(),
        }
        child = self._lab.processes.spawn(
            argv,
            environment=environment,
            place=place,
            stdin=fds[0],
            stdout=fds[1],
            stderr=fds[2],
        )
        # The command's input must see its end when the asker's does.
        while fds:
            os.close(fds.pop())
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_until_gone, connection, nursery.cancel_scope)
                code = await child.wait()
                nursery.cancel_scope.cancel()
                return {"code": code}
            await child.stop(LEFT_SECONDS)
        finally:
            child.signal(signal.SIGKILL)
        raise Unavailable("the asker went away")

    async def _logs(self, request: Reader, send: Send) -> None:
        path = self._log_path(request)
        tail = request.get("tail").value
        follow = request.get("follow").boolean()
        if not isinstance(tail, int):
            tail = 1 << 30
        data = tail_of(path, tail, most=32 << 20)
        position, inode = _end_of(path)
        for start in range(0, len(data), _CHUNK):
            await send({"data": base64.b64encode(data[start : start + _CHUNK]).decode()})
        while follow:
            await trio.sleep(FOLLOW_SECONDS)
            size, now = _end_of(path)
            if now != inode:
                # Turned over: the rest of the old one first.
                position, inode = 0, now
            while position < size:
                with path.open("rb") as file:
                    file.seek(position)
                    chunk = file.read(min(_CHUNK, size - position))
                if not chunk:
                    break
                position += len(chunk)
                await send({"data": base64.b64encode(chunk).decode()})

    def _log_path(self, request: Reader) -> Path:
        pod = [each.text() for each in request.get("pod").items()]
        if len(pod) == 2:
            runner = self._runner(pod[0], pod[1])
            container = runner.container(request.get("container").text() or None)
            return runner.log_path(container.name)
        daemon = request.get("daemon").text()
        if daemon:
            return self._daemon(request).log.path
        return self._lab.speaker.log.path

    async def _objects(self, verb: str, request: Reader) -> Any:
        live = self._lab.live
        if verb == "apply":
            for each in request.get("objects").items():
                await live.apply(dict(each.value) if isinstance(each.value, dict) else each.value)
            return None
        kind = request.get("kind").name()
        namespace, name = request.get("namespace").text(), request.get("name").text()
        if verb == "get":
            return [
                obj
                for ref, obj in sorted(live.objects.items())
                if ref.kind == kind
                and (not namespace or ref.namespace == namespace)
                and (not name or ref.name == name)
            ]
        ref = ref_of(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "namespace": namespace or None},
            }
        )
        ref = Ref(kind, namespace, ref.name)
        if verb == "patch":
            patch = request.get("patch").value
            if not isinstance(patch, dict):
                raise ConfigError("must be a mapping", field="patch")
            try:
                return await live.patch(ref, patch)
            except NotFound as error:
                raise NotThere(str(error)) from error
        if ref not in live.objects:
            raise NotThere(f"{ref} does not exist")
        if kind == "Pod":
            await self._supervisor.delete_pod(ref)
        else:
            await live.delete(ref)
        return None

    def _tap(self, verb: str, request: Reader) -> dict[str, Any]:
        if verb == "tap_start":
            if len(self._taps) >= MAX_TAPS:
                raise Unavailable(f"{MAX_TAPS} taps are open", hint="stop one")
            tap = Tap(self._lab.kernel.fabric)
            name = f"tap{self._next_tap}"
            self._next_tap += 1
            self._taps[name] = tap
            self._nursery.start_soon(tap.run)
            return {"tap": name}
        name = request.get("tap").name()
        found = self._taps.get(name)
        if found is None:
            raise NotThere(f"no tap {name!r}")
        needles = [base64.b64decode(each.text()) for each in request.get("needles").items()]
        if len(needles) > MAX_NEEDLES:
            raise ConfigError(f"more than {MAX_NEEDLES} needles")
        report = found.report(needles)
        if request.get("stop").boolean():
            del self._taps[name]
            found.close()
        return report

    async def _http_get(self, request: Reader) -> dict[str, Any]:
        path = request.get("path").name()
        if not path.startswith("/") or any(ord(c) <= 0x20 or ord(c) >= 0x7F for c in path):
            raise ConfigError("not a path", field="path")
        net = self._net_of(request.get("place").name())
        target = fetch.Target(request.get("host").name(), request.get("port").port(), net)
        with trio.move_on_after(20.0):
            status, body = await fetch.request(target, "GET", path)
            return {"status": status, "body": base64.b64encode(body).decode()}
        raise Unavailable(f"{target.ip}:{target.port}: no answer in 20 s")

    def _net_of(self, place: str) -> int:
        """The network namespace of a node, daemon or pod."""
        kernel = self._lab.kernel
        if "/" in place:
            namespace, _, name = place.partition("/")
            namespaces = self._runner(namespace, name).namespaces
            if namespaces is None:
                raise Unavailable(f"pod {place} has no network yet")
            return namespaces.net
        node = place.rpartition("@")[2]
        if node in kernel.nodes:
            return kernel.nodes[node]
        if node in ("istiod", "control-plane"):
            return kernel.control_plane
        raise NotThere(f"no place {place!r}", hint=f"nodes: {', '.join(kernel.nodes)}")

    def _runner(self, namespace: str, name: str) -> PodRunner:
        runner = self._lab.runners.get((namespace, name))
        if runner is None:
            there = ", ".join(f"{key[0]}/{key[1]}" for key in sorted(self._lab.runners))
            raise NotThere(f"no pod {namespace}/{name}", hint=f"pods: {there or 'none'}")
        return runner

    def _daemon(self, request: Reader) -> Daemon:
        name = request.get("daemon").name()
        daemon = self._lab.daemons.get(name)
        if daemon is None:
            there = ", ".join(sorted(self._lab.daemons))
            raise NotThere(f"no daemon {name!r}", hint=f"daemons: {there or 'none'}")
        return daemon


async def _until_gone(connection: trio.socket.SocketType, scope: trio.CancelScope) -> None:
    """Cancel when the other side closes."""
    with contextlib.suppress(OSError):
        while await connection.recv(1024):
            pass
    scope.cancel()


def _end_of(path: Path) -> tuple[int, int]:
    """Size and inode of a log; zeros when it is not there yet."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_size, status.st_ino
