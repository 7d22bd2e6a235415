"""One pod's life: network, files, init containers, containers, and the end of it all.

As a kubelet does it, with the machine's own programs as containers. A pod runs in one task:
`PodRunner.run` returns when it was told to stop, after the containers got their SIGTERM, their
grace and their SIGKILL, and nothing of the pod is left.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from mesh.errors import ConfigError, KernelError, MeshError, Unavailable
from mesh.lab import mounts
from mesh.lab.containers import ContainerRunner, ContainerState, Room
from mesh.lab.environment import Objects, variables_of
from mesh.lab.kernel import Kernel
from mesh.lab.pod_files import PodFiles, containers_of, wall_clock
from mesh.lab.podspec import Container, VolumeSource
from mesh.lab.processes import Place, Processes, kill_inside
from mesh.lab.topology import NodePlan, PodPlan

_FLAPPING_SECONDS = 10.0  # a container restarted since then may well end again
RETRY_SECONDS = 1.0


@dataclass(slots=True)
class Host:
    """What pods share: the machine under them, and whom to tell."""

    processes: Processes
    kernel: Kernel
    run: Path
    hide: str
    domain: str
    path: str
    logs: trio.Nursery
    objects: Callable[[str], Objects]
    """For a namespace: its ConfigMaps and Secrets."""
    publish: Callable[[PodRunner], Awaitable[None]]
    """Called after every change of a pod's state."""
    capture: Callable[[PodRunner], Awaitable[None]]
    """Called when the network is there and no container ran yet; returns when they may."""
    unrouted: Callable[[], Awaitable[None]]
    """Returns when nobody sends new connections to pods that are terminating."""
    token: Callable[[PodPlan, VolumeSource], str]
    most_grace: float = 1e9
    """Upper bound of every grace, lowered when the lab goes down."""
    is_ending: bool = False
    """Whether the whole lab goes down: its end takes namespaces and files with it."""


class PodRunner:
    """Runs one pod of a Plan on its node. `ended` is set when nothing of it is left."""

    def __init__(self, pod: PodPlan, node: NodePlan, host: Host) -> None:
        self.pod = pod
        self.node = node
        self.host = host
        self.phase = "Pending"
        self.message = ""
        self.is_terminating = False
        self.namespaces: mounts.Namespaces | None = None
        self.ended = trio.Event()
        objects = host.objects(pod.namespace)
        self.files = PodFiles(pod, node, host.run, host.domain, objects, host.token)
        self._scope = trio.CancelScope()
        self._started_at = wall_clock()
        self._ready_since = ""
        room = Room(
            processes=host.processes,
            logs=host.logs,
            node_net=host.kernel.nodes[pod.node],
            ip=pod.ips[0],
            probe_source="" if pod.spec.host_network else node.gateway_ips[0],
            policy=pod.spec.restart_policy,
            place=self.place,
            environment=self.environment,
            log_path=self.log_path,
            grace=self._grace,
            tell=self._tell,
        )
        self.containers = {c.name: ContainerRunner(c, room) for c in containers_of(pod)}

    @property
    def is_ready(self) -> bool:
        """Whether traffic may be sent here."""
        return (
            self.phase == "Running"
            and not self.is_terminating
            and all(runner.state.is_ready for runner in self._lasting())
        )

    @property
    def failure(self) -> str:
        """Why a container ended that was started again just now; empty if none was."""
        now = trio.current_time()
        states = [runner.state for runner in self._lasting()]
        return next((s.failure for s in states if now - s.failed_at < _FLAPPING_SECONDS), "")

    @property
    def flaps(self) -> bool:
        """Whether it counts as ready only because a failing container has just been restarted."""
        return self.is_ready and bool(self.failure)

    @property
    def netns_path(self) -> Path:
        """Where the node agent finds the pod's network namespace."""
        return self.host.run / "netns" / self.pod.uid

    async def run(self) -> None:
        """Live until `stop`; then end in good order."""
        try:
            with self._scope:
                await self._tell()
                await self._prepare()
                await self.host.capture(self)
                await self._run_containers()
                await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await self._end()

    def stop(self) -> None:
        """Ask for the end; `ended` is set when it is over."""
        self._scope.cancel()

    async def explain(self, message: str) -> None:
        """Say what the pod waits for."""
        if self.message != message:
            self.message = message
            await self._tell()

    async def _run_containers(self) -> None:
        spec = self.pod.spec
        async with trio.open_nursery() as sidecars:
            for container in spec.init_containers:
                runner = self.containers[container.name]
                if container.is_sidecar:
                    sidecars.start_soon(runner.keep)
                elif not await runner.complete():
                    self.phase = "Failed"
                    await self.explain(f"init container {container.name} failed")
                    return
            self.phase, self.message = "Running", ""
            await self._tell()
            async with trio.open_nursery() as nursery:
                for container in spec.containers:
                    nursery.start_soon(self.containers[container.name].keep)
            sidecars.cancel_scope.cancel()
        codes = [self.containers[c.name].state.code for c in spec.containers]
        self.phase = "Failed" if any(codes) else "Succeeded"
        await self._tell()

    async def _prepare(self) -> None:
        while True:
            try:
                await self._make_namespaces()
                return
            except MeshError as error:
                for runner in self.containers.values():
                    runner.state.reason = "CreateContainerConfigError"
                await self.explain(str(error))
                # Nothing else changes by trying again; a new spec makes another pod.
                await trio.sleep(RETRY_SECONDS if isinstance(error, Unavailable) else 1e9)

    async def _make_namespaces(self) -> None:
        self.files.write()
        binds = self.files.binds()
        is_host = self.pod.spec.host_network
        network = self.host.kernel.nodes[self.pod.node] if is_host else None

        def make() -> mounts.Namespaces:
            return mounts.create_pod(
                binds, hide=self.host.hide, hostname=self.files.hostname, network=network
            )

        self.namespaces = await trio.to_thread.run_sync(make)
        if network is None:
            self.host.kernel.add_pod(self.pod, self.namespaces.net)
            mounts.keep_namespace(self.namespaces.net, self.netns_path)

    # For containers, and for commands that others run here.

    def place(self, container: str | None = None) -> Place:
        """Where to run a command of the pod. Raises Unavailable before there is such a place."""
        if self.namespaces is None or self.is_terminating:
            raise Unavailable(
                f"pod {self.pod.namespace}/{self.pod.name} does not run",
                hint=self.message or "it is being started or stopped",
            )
        directory = self.container(container).directory
        return Place(self.namespaces.all(), directory or "/")

    def environment(self, container: Container) -> dict[str, str]:
        """A container's variables. Raises Unavailable, ConfigError."""
        base = {
            "PATH": self.host.path,
            "HOME": "/root" if os.access("/root", os.R_OK | os.X_OK) else "/",
            "HOSTNAME": self.files.hostname,
            "LANG": "C.UTF-8",
        }
        objects = self.host.objects(self.pod.namespace)
        return variables_of(container, base, self.files.facts, objects)

    def container(self, name: str | None) -> Container:
        """A container by name, or the first. Raises ConfigError."""
        if name is None:
            return self.pod.spec.containers[0]
        runner = self.containers.get(name)
        if runner is None:
            names = ", ".join(self.containers)
            raise ConfigError(f"the pod has no container {name!r}", hint=f"containers: {names}")
        return runner.container

    def log_path(self, container: str) -> Path:
        """Where a container's output goes."""
        name = f"{self.pod.name}-{self.pod.uid[:8]}"
        return self.host.run / "logs" / self.pod.namespace / name / f"{container}.log"

    def _lasting(self) -> list[ContainerRunner]:
        return [
            runner
            for runner in self.containers.values()
            if runner.container.is_sidecar or runner.container in self.pod.spec.containers
        ]

    def _grace(self) -> float:
        return min(self.pod.spec.grace_seconds, self.host.most_grace)

    # Telling.

    async def _tell(self) -> None:
        if self.is_ready != bool(self._ready_since):
            self._ready_since = wall_clock() if self.is_ready else ""
        await self.host.publish(self)

    def status(self) -> dict[str, Any]:
        """The Pod object's status; None stands for a field that is absent."""
        spec = self.pod.object["spec"]
        images = {
            c.get("name"): str(c.get("image", ""))
            for key in ("containers", "initContainers")
            for c in spec.get(key) or []
        }
        inits = {c.name for c in self.pod.spec.init_containers}
        states = [(n, r.state.status(images.get(n, ""))) for n, r in self.containers.items()]
        conditions = {
            "PodScheduled": True,
            "Initialized": self.phase != "Pending",
            "ContainersReady": self.is_ready,
            "Ready": self.is_ready,
        }
        return {
            "phase": self.phase,
            "podIP": self.pod.ips[0],
            "podIPs": [{"ip": ip} for ip in self.pod.ips],
            "hostIP": self.node.ips[0],
            "hostIPs": [{"ip": ip} for ip in self.node.ips],
            "startTime": self._started_at,
            "message": self.message or None,
            "conditions": [
                {
                    "type": kind,
                    "status": "True" if holds else "False",
                    "lastTransitionTime": self._ready_since or self._started_at,
                }
                for kind, holds in conditions.items()
            ],
            "initContainerStatuses": [s for name, s in states if name in inits] or None,
            "containerStatuses": [s for name, s in states if name not in inits],
        }

    def summary(self) -> dict[str, Any]:
        """One row of the lab's status."""
        states = [runner.state for runner in self.containers.values()]
        return {
            "namespace": self.pod.namespace,
            "name": self.pod.name,
            "uid": self.pod.uid,
            "node": self.pod.node,
            "phase": "Terminating" if self.is_terminating else self.phase,
            "ready": self.is_ready,
            "ips": list(self.pod.ips),
            "restarts": sum(state.restarts for state in states),
            "owner": self.pod.owner,
            "containers": [state.summary() for state in states],
            "message": self.message or _first_message(states),
        }

    # The end.

    async def _end(self) -> None:
        self.is_terminating = True
        with contextlib.suppress(MeshError):
            await self.host.publish(self)
        if self.namespaces is not None and not self.host.is_ending:
            await self.host.unrouted()
        async with trio.open_nursery() as nursery:
            for runner in self.containers.values():
                child = runner.state.child
                if child is not None and child.code is None:
                    nursery.start_soon(child.stop, self._grace())
        if self.namespaces is not None and not self.host.is_ending:
            # What left its process group is still inside the pod.
            kill_inside(self.namespaces.mount)
            if not self.pod.spec.host_network:
                mounts.release_namespace(self.netns_path)
                with contextlib.suppress(KernelError):
                    self.host.kernel.remove_pod(self.pod)
            self.namespaces.close()
            self.namespaces = None
            self.files.remove()
        self.ended.set()


def _first_message(states: list[ContainerState]) -> str:
    """What the first container with anything to say says, by name if it is one of several."""
    for state in states:
        if state.message:
            return f"{state.name}: {state.message}" if len(states) > 1 else state.message
    return ""
