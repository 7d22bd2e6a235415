"""The mesh's own programs in the lab: how each is started, when it is ready, and its next life.

The controller runs in the control plane's namespace, node agent and node proxy in each node's,
with mounts of their own: /etc/hosts knows the controller, /etc/resolv.conf the cluster DNS.
They are programs named by an argv; any of them may be replaced by another that speaks the same
protocols and takes the same variables.
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import trio

from mesh.errors import ConfigError, MeshError, Unavailable
from mesh.lab import addresses, fetch
from mesh.lab.processes import Child, Log, Place, Processes, log_pipe
from mesh.lab.system_objects import CONTROLLER_MONITORING_PORT, XDS_PORT
from mesh.retry import Backoff

POLL_SECONDS = 0.05
STOP_SECONDS = 5.0
RESTART_SECONDS = 30.0
DRAIN_SECONDS = 120.0
LAST_LINES = 12
CLUSTER_ID = "Kubernetes"
CONTROLLER_NAME = "istiod.istio-system.svc"
AGENT_HEALTH_PORT = 8000
PROXY_READINESS_PORT = 15021
ON_NODES = ("netconfig", "ztunnel")
TRUSTED_PROXY = "istio-system/ztunnel"


@dataclass(frozen=True, slots=True)
class DaemonSpec:
    """How to run one daemon. `ready` is asked by GET until it answers 200."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    place: Place
    ready: fetch.Target
    ready_path: str
    overlaps: bool = False
    """Whether its next life begins before this one ends, and says which of the two it is."""


@dataclass(eq=False, slots=True)
class Daemon:
    """A daemon that is kept running. `state` is starting, ready, waiting or stopped."""

    spec: DaemonSpec
    processes: Processes
    log: Log
    say: Callable[[str], None]
    logs: trio.Nursery
    notify: Callable[[], None]
    state: str = "starting"
    restarts: int = 0
    child: Child | None = None
    changed: trio.Event = field(default_factory=trio.Event)
    _was_ready: bool = False
    _wants_next: trio.Event = field(default_factory=trio.Event)
    _said_all: trio.Event = field(default_factory=trio.Event)

    def summary(self) -> dict[str, object]:
        """For the lab's status."""
        alive = self.child is not None and self.child.code is None
        pid = self.child.pid if self.child is not None and alive else None
        return {"state": self.state, "pid": pid, "restarts": self.restarts}

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run it for ever; started when it is ready for the first time.

        Raises Unavailable when it ends before it was ever ready, with its last words.
        If cancelled: SIGTERM, then SIGKILL.
        """
        backoff = Backoff(random.Random(), base=0.1, cap=10.0)  # noqa: S311 - jitter
        async with trio.open_nursery() as predecessors:
            while True:
                started = trio.current_time()
                code = await self._live(task_status, predecessors)
                if trio.current_time() - started > RESTART_SECONDS:
                    backoff.reset()
                delay = backoff.next()
                self.say(f"{self.spec.name} ended with code {code}; starts again in {delay:.1f} s")
                self._become("waiting")
                await trio.sleep(delay)
                self.restarts += 1

    async def _live(self, task_status: trio.TaskStatus[None], predecessors: trio.Nursery) -> int:
        """One life, or several that follow without a gap; the exit code of the last."""
        self._become("starting")
        child = self.child = self._start()
        self._wants_next = trio.Event()
        code = 0

        async def watch(watched: Child) -> None:
            nonlocal code
            ended = await watched.wait()
            if watched is self.child:
                code = ended
                nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, child)
                nursery.start_soon(self._await_ready, child, task_status)
                while True:
                    await self._wants_next.wait()
                    before, following = child, await self._follow()
                    if following is not None:
                        child = self.child = following
                        nursery.start_soon(watch, child)
                        before.signal_leader(signal.SIGTERM)
                        predecessors.start_soon(_see_off, before)
                        self.restarts += 1
                        self.notify()
                    self._wants_next = trio.Event()
                    self._tell()
        finally:
            with trio.CancelScope(shield=True):
                await child.stop(STOP_SECONDS)
        if not self._was_ready:
            with trio.move_on_after(1.0):
                await self._said_all.wait()
            raise Unavailable(
                f"{self.spec.name} ended with code {code} before it was ready"
                f"\n{self.last_words()}".rstrip(),
                hint=f"its command: {shlex.join(self.spec.argv)}",
            )
        return code

    async def _follow(self) -> Child | None:
        """The next life beside this one, ready; None when it did not come so far."""
        following = self._start()
        is_ready = False
        try:
            async with trio.open_nursery() as nursery:

                async def ready() -> None:
                    nonlocal is_ready
                    await self._poll(following)
                    is_ready = True
                    nursery.cancel_scope.cancel()

                nursery.start_soon(ready)
                code = await following.wait()
                self.say(f"the next {self.spec.name} ended with code {code}; this one goes on")
                nursery.cancel_scope.cancel()
        finally:
            if not is_ready:
                with trio.CancelScope(shield=True):
                    await following.stop(STOP_SECONDS)
        return following if is_ready else None

    def last_words(self) -> str:
        """The last lines of its log."""
        return self.log.tail(LAST_LINES).decode("utf-8", "replace").strip()

    def _start(self) -> Child:
        reading, writing = log_pipe()
        try:
            child = self.processes.spawn(
                self.spec.argv,
                environment=self.spec.environment,
                place=self.spec.place,
                stdout=writing,
                stderr=writing,
            )
        except ConfigError as error:
            os.close(reading)
            raise Unavailable(f"{self.spec.name}: {error}", hint=error.hint) from error
        finally:
            os.close(writing)
        self._said_all = trio.Event()
        self.logs.start_soon(self._pump, reading, self._said_all)
        return child

    async def _pump(self, reading: int, said_all: trio.Event) -> None:
        await self.log.pump(reading)
        said_all.set()

    async def _poll(self, child: Child) -> None:
        """Until this very process is ready."""
        path = self.spec.ready_path
        if self.spec.overlaps:
            path += f"?process={child.pid}"
        while True:
            with contextlib.suppress(MeshError), trio.move_on_after(2.0):
                status, _ = await fetch.request(self.spec.ready, "GET", path, head_only=True)
                if status == 200:
                    return
            await trio.sleep(POLL_SECONDS)

    async def _await_ready(self, child: Child, task_status: trio.TaskStatus[None]) -> None:
        await self._poll(child)
        if child.code is None:
            self._become("ready")
            if not self._was_ready:
                self._was_ready = True
                task_status.started()

    def _become(self, state: str) -> None:
        if self.state != state:
            self.state = state
            self._tell()
            self.notify()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def signal(self, number: int) -> None:
        """Signal the program. Raises Unavailable when it does not run just now."""
        if self.child is None or self.child.code is not None:
            raise Unavailable(f"{self.spec.name} does not run at the moment")
        self.child.signal_leader(number)

    async def restart(self) -> None:
        """SIGTERM, and wait until the next life is ready; where lives overlap, the other way
        round, so that nothing is ever without one. Raises Unavailable.
        """
        child = self.child
        if self.spec.overlaps and self.state == "ready":
            self._wants_next.set()
            await self.changed.wait()
            if self.child is child and child is not None and child.code is None:
                raise Unavailable(
                    f"the next {self.spec.name} did not become ready",
                    hint="its log says why; the one before goes on",
                )
        else:
            self.signal(signal.SIGTERM)
            if child is not None:
                await child.wait()
        while self.state != "ready" or self.child is child:
            await self.changed.wait()


async def _see_off(child: Child) -> None:
    """Let a predecessor finish what it has; it keeps its own deadline, and we another."""
    try:
        with trio.move_on_after(DRAIN_SECONDS):
            await child.wait()
    finally:
        with trio.CancelScope(shield=True):
            await child.stop(STOP_SECONDS)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all daemons of a lab have in common."""

    run: Path
    cluster: Path
    domain: str
    trust_domain: str
    base: Mapping[str, str]
    replace: Mapping[str, tuple[str, ...]]
    extra: Mapping[str, Mapping[str, str]]
    python: str

    def controller(self, place: Place, net: int) -> DaemonSpec:
        """istiod."""
        variables = {
            "CLUSTER_DIR": str(self.cluster),
            "CLUSTER_ID": CLUSTER_ID,
            "TRUST_DOMAIN": self.trust_domain,
            "CLUSTER_DOMAIN": self.domain,
            "ROOT_NAMESPACE": "istio-system",
            "POD_NAME": "istiod",
            "POD_NAMESPACE": "istio-system",
            "CA_TRUSTED_NODE_ACCOUNTS": TRUSTED_PROXY,
            "TOKEN_AUDIENCES": "istio-ca",
            "TOKEN_ISSUER_KEYS": str(self.run / "istiod" / "token-keys.json"),
            "CA_DIR": str(self.run / "istiod" / "ca"),
            "XDS_PORT": str(XDS_PORT),
            "MONITORING_PORT": str(CONTROLLER_MONITORING_PORT),
            # Waypoints are pods as any other, run by what runs the lab.
            "WAYPOINT_COMMAND": f"{shlex.quote(self.python)} -m waypoint",
        }
        ready = fetch.Target("127.0.0.1", CONTROLLER_MONITORING_PORT, net)
        return self._spec("istiod", "istiod_lite", "", variables, place, (ready, "/ready"))

    def agent(self, node: str, index: int, place: Place, net: int) -> DaemonSpec:
        """netconfig on a node."""
        variables = {
            "NODE_NAME": node,
            "CLUSTER_DIR": str(self.cluster),
            "NETNS_DIR": str(self.run / "netns"),
            "ZTUNNEL_UDS_ADDRESS": str(self.zds_path(node)),
            "CNI_AGENT_RUN_DIR": str(self.cni_path(node).parent),
            "SYSTEM_NAMESPACE": "istio-system",
            "EXCLUDE_NAMESPACES": "kube-system",
            "AMBIENT_DNS_CAPTURE": "true",
            "AMBIENT_IPV6": "true",
            "HOST_PROBE_ADDRESSES": ",".join(addresses.gateway_ips(index)),
            "HEALTH_PORT": str(AGENT_HEALTH_PORT),
        }
        ready = fetch.Target("127.0.0.1", AGENT_HEALTH_PORT, net)
        # The node agent is ready to serve the proxy long before it has one.
        return self._spec("netconfig", "netconfig", node, variables, place, (ready, "/healthz"))

    def proxy(self, node: str, index: int, place: Place, net: int) -> DaemonSpec:
        """ztunnel on a node."""
        controller = f"https://{CONTROLLER_NAME}:{XDS_PORT}"
        variables = {
            "NODE_NAME": node,
            "XDS_ADDRESS": controller,
            "CA_ADDRESS": controller,
            "NETWORK": "",
            "CLUSTER_ID": CLUSTER_ID,
            "ISTIO_META_CLUSTER_ID": CLUSTER_ID,
            "CLUSTER_DOMAIN": self.domain,
            "TRUST_DOMAIN": self.trust_domain,
            "INPOD_UDS": str(self.zds_path(node)),
            "POD_NAME": f"ztunnel-{node}",
            "POD_NAMESPACE": "istio-system",
            "SERVICE_ACCOUNT": "ztunnel",
            "INSTANCE_IP": addresses.fabric_ips(index)[0],
            "ISTIO_META_DNS_CAPTURE": "true",
            "TERMINATION_GRACE_PERIOD_SECONDS": "10",
        }
        ready = fetch.Target("127.0.0.1", PROXY_READINESS_PORT, net)
        checked = (ready, "/healthz/ready")
        return self._spec("ztunnel", "ztunnel", node, variables, place, checked)

    def node_directory(self, node: str) -> Path:
        """A node's own files; the node proxy's working directory."""
        return self.run / "nodes" / node

    def zds_path(self, node: str) -> Path:
        """The socket between node agent and node proxy."""
        return self.node_directory(node) / "ztunnel.sock"

    def cni_path(self, node: str) -> Path:
        """The socket on which the node agent is told of new pods."""
        return self.node_directory(node) / "cni" / "pluginevent.sock"

    def _spec(
        self,
        kind: str,
        module: str,
        node: str,
        variables: Mapping[str, str],
        place: Place,
        ready: tuple[fetch.Target, str],
    ) -> DaemonSpec:
        name = f"{kind}@{node}" if node else kind
        replaced = self.replace.get(name) or self.replace.get(kind)
        argv = replaced or (self.python, "-m", module)
        extra = {**self.extra.get(kind, {}), **(self.extra.get(name, {}) if node else {})}
        environment = {**self.base, **variables, **extra}
        # Another program need not know how to be there twice.
        overlaps = kind == "ztunnel" and not replaced
        return DaemonSpec(name, argv, environment, place, *ready, overlaps=overlaps)
