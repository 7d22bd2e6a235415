"""One container: its process, its probes, its restarts.

A container is a program of this machine, run in its pod's namespaces. What happens to it is
kept in a `ContainerState`, which the pod's status shows; `tell` is called at every change.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from mesh.errors import MeshError
from mesh.lab.environment import command_line
from mesh.lab.pod_files import wall_clock
from mesh.lab.podspec import Container, Probe
from mesh.lab.probes import Prober
from mesh.lab.processes import Child, Log, Place, Processes, log_pipe
from mesh.retry import Backoff

STABLE_SECONDS = 60.0
# What it started may hold its output open for longer than it lives.
LAST_WORDS_SECONDS = 0.5
_LONGEST_WORDS = 200
_ADVICE = {
    "address already in use": " (the containers of a pod share its ports: change one of the two)"
}


@dataclass(slots=True)
class ContainerState:
    """How a container is. `state` is waiting, running or terminated."""

    name: str
    state: str = "waiting"
    reason: str = "ContainerCreating"
    message: str = ""
    code: int = 0
    restarts: int = 0
    failure: str = ""
    failed_at: float = -math.inf
    is_ready: bool = False
    is_started: bool = False
    since: str = ""
    child: Child | None = None

    def status(self, image: str) -> dict[str, Any]:
        """As `containerStatuses` has it."""
        state: dict[str, Any]
        if self.state == "running":
            state = {"running": {"startedAt": self.since}}
        elif self.state == "terminated":
            ended = {"exitCode": self.code, "reason": self.reason, "finishedAt": self.since}
            state = {"terminated": {**ended, "message": self.message}}
        else:
            state = {"waiting": {"reason": self.reason, "message": self.message}}
        return {
            "name": self.name,
            "image": image,
            "imageID": "",
            "ready": self.is_ready,
            "started": self.is_started,
            "restartCount": self.restarts,
            "state": state,
        }

    def summary(self) -> dict[str, Any]:
        """For the lab's status."""
        alive = self.child is not None and self.child.code is None
        return {
            "name": self.name,
            "state": self.state,
            "reason": self.reason,
            "ready": self.is_ready,
            "restarts": self.restarts,
            "pid": self.child.pid if self.child is not None and alive else None,
        }


@dataclass(slots=True)
class Room:
    """What a container needs of its pod."""

    processes: Processes
    logs: trio.Nursery
    node_net: int
    ip: str
    probe_source: str
    policy: str
    place: Callable[[str], Place]
    """By container name. Raises Unavailable."""
    environment: Callable[[Container], dict[str, str]]
    """Raises Unavailable, ConfigError."""
    log_path: Callable[[str], Path]
    grace: Callable[[], float]
    tell: Callable[[], Awaitable[None]]


@dataclass(eq=False, slots=True)
class ContainerRunner:
    """Runs one container."""

    container: Container
    room: Room
    state: ContainerState = field(init=False)
    _log: Log | None = None
    _said_all: trio.Event = field(default_factory=trio.Event)
    _killed_for: str = ""

    def __post_init__(self) -> None:
        self.state = ContainerState(self.container.name)

    async def complete(self) -> bool:
        """Run an init container until it succeeds; False if it failed and may not again."""
        backoff = _restart_backoff()
        while await self.once() != 0:
            if self.room.policy == "Never":
                return False
            await self._wait_to_restart(backoff.next())
        self.state.is_ready = True
        return True

    async def keep(self) -> None:
        """Run it as long as its restart policy asks for.

        If cancelled: the process runs on; who runs the pod ends it.
        """
        backoff = _restart_backoff()
        policy = "Always" if self.container.is_sidecar else self.room.policy
        while True:
            started = trio.current_time()
            code = await self.once()
            if policy == "Never" or (policy == "OnFailure" and code == 0):
                return
            if trio.current_time() - started > STABLE_SECONDS:
                backoff.reset()
            await self._wait_to_restart(backoff.next())

    async def _wait_to_restart(self, seconds: float) -> None:
        state = self.state
        if state.state == "terminated":
            message = state.message or f"exit code {state.code}"
            state.message = f"{message}; starts again in {seconds:.0f} s"
            state.failure, state.failed_at = message, trio.current_time()
        state.state, state.reason = "waiting", "CrashLoopBackOff"
        state.restarts += 1
        await self.room.tell()
        await trio.sleep(seconds)

    async def once(self) -> int:
        """Run it once; the exit code."""
        state, container = self.state, self.container
        try:
            environment = self.room.environment(container)
            child = self._start(environment)
        except MeshError as error:
            state.state, state.reason = "waiting", "CreateContainerConfigError"
            state.message = f"{error}; {error.hint}" if error.hint else str(error)
            await self.room.tell()
            return 1
        self._killed_for = ""
        state.child, state.state, state.reason = child, "running", ""
        state.message, state.since = "", wall_clock()
        state.is_started = container.startup is None
        state.is_ready = state.is_started and container.readiness is None
        await self.room.tell()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._probe, child, environment)
                code = await child.wait()
                nursery.cancel_scope.cancel()
        finally:
            state.is_ready = False
        if code != 0:
            with trio.move_on_after(LAST_WORDS_SECONDS):
                await self._said_all.wait()
        state.state, state.code, state.since = "terminated", code, wall_clock()
        state.reason = "Completed" if code == 0 else "Error"
        state.message = "" if code == 0 else self._explain(code)
        await self.room.tell()
        return code

    def _start(self, environment: Mapping[str, str]) -> Child:
        reading, writing = log_pipe()
        try:
            child = self.room.processes.spawn(
                command_line(self.container, environment),
                environment=environment,
                place=self.room.place(self.container.name),
                stdout=writing,
                stderr=writing,
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self._log = Log(self.room.log_path(self.container.name))
        self._said_all = trio.Event()
        self.room.logs.start_soon(self._pump, self._log, reading, self._said_all)
        return child

    async def _pump(self, log: Log, reading: int, said_all: trio.Event) -> None:
        try:
            await log.pump(reading)
        finally:
            log.close()
            said_all.set()

    def _explain(self, code: int) -> str:
        """Why it ended: the probe that had it killed, or its own last words."""
        said = self._log.last if self._log is not None else b""
        words = self._killed_for or last_line(said)
        advice = next((each for text, each in _ADVICE.items() if text in words.lower()), "")
        return f"exit code {code}" + (f": {words}" if words else "") + advice

    # Probes.

    async def _probe(self, child: Child, environment: Mapping[str, str]) -> None:
        container = self.container
        prober = Prober(
            self.room.processes,
            container,
            self.room.node_net,
            self.room.ip,
            self.room.probe_source,
            self.room.place(container.name),
            environment,
        )
        if container.startup is not None:
            await self._await_startup(prober, container.startup, child)

        async def on_readiness(passed: bool, reason: str) -> None:
            if child.code is None:
                self.state.is_ready = passed
                self.state.message = "" if passed else f"readiness: {reason}"
                await self.room.tell()

        async def on_liveness(passed: bool, reason: str) -> None:
            if not passed:
                self.state.message = self._killed_for = f"liveness: {reason}"
                await child.stop(self.room.grace())

        async with trio.open_nursery() as nursery:
            if container.readiness is not None:
                nursery.start_soon(prober.watch, container.readiness, on_readiness)
            if container.liveness is not None:
                nursery.start_soon(prober.watch, container.liveness, on_liveness)

    async def _await_startup(self, prober: Prober, probe: Probe, child: Child) -> None:
        passed = trio.Event()

        async def on_change(ok: bool, reason: str) -> None:
            if ok:
                passed.set()
            else:
                self.state.message = self._killed_for = f"startup: {reason}"
                await child.stop(self.room.grace())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(prober.watch, probe, on_change)
            await passed.wait()
            nursery.cancel_scope.cancel()
        self.state.is_started = True
        self.state.is_ready = self.container.readiness is None
        await self.room.tell()


def last_line(said: bytes) -> str:
    """The last line of an output that says anything, shortened."""
    lines = (line.strip() for line in reversed(said.decode("utf-8", "replace").splitlines()))
    found = next((line for line in lines if line), "")
    return "".join(each if each.isprintable() else " " for each in found)[:_LONGEST_WORDS]


def _restart_backoff() -> Backoff:
    return Backoff(random.Random(), base=1.0, cap=60.0, jitter=0.1)  # noqa: S311 - jitter
