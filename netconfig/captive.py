"""One pod in the agent's care: a task that takes it into the mesh, out of it, or lets it go.

Enrol:    ZDS Add acknowledged -> rules and routing -> verified -> annotation `enabled`.
          Without a proxy, or when it refuses: annotation `pending`, and again with back-off.
          Nothing is ever redirected to a port on which nobody listens.
Drain:    annotation away -> drain ruleset -> no proxied connection left, or the deadline ->
          rules and routing away -> ZDS Del -> descriptor closed. Enrolling anew on the way
          is possible at any point.
Withdraw: the pod is gone: ZDS Del, descriptor closed, at once. Never kept alive by us.

The task takes one step after the other and is never interrupted inside one; between them it
looks at what is wanted now. It owns the descriptor of the pod's network namespace.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, TypeVarTuple

import trio

from mesh import netns
from mesh.cluster.api import Cluster, NotFound
from mesh.cluster.objects import REDIRECTION, Pod, text_of
from mesh.errors import MeshError, Unavailable
from mesh.retry import Backoff, Random
from mesh.runtime import lifecycle, log
from netconfig import kernel
from netconfig.handoff import HandOff
from netconfig.plan import Drain, Enrol, Intent, Recognised, Target, Withdraw
from netconfig.pods import NamespaceFinder, NodePods, open_namespace
from netconfig.ruleset import Capture

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

ENABLED, PENDING = "enabled", "pending"
RETRY_BASE_SECONDS, RETRY_CAP_SECONDS = 0.005, 5.0
# A pod without a namespace is starting: its next event, or the CNI plugin, wakes us.
NO_NAMESPACE_SECONDS = 1.0
DRAIN_POLL_SECONDS, DRAIN_POLL_CAP_SECONDS = 0.25, 5.0
# Routing is not part of the rules' generation, so it is looked at now and then.
FULL_CHECK_SECONDS = 60.0

# How a pod stands: found captured at the start, or where this agent has brought it.
NEW, RECOGNISED, CAPTURED, DRAINING = "new", "recognised", "captured", "draining"

_log = log.get("enrolment")


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations in seconds, by the settings of the same names."""

    drain: float = 3600.0
    drain_settle: float = 2.0
    drift: float = 10.0


class Surroundings(Protocol):
    """What a captive needs of the agent."""

    cluster: Cluster
    pods: NodePods
    finder: NamespaceFinder
    handoff: HandOff
    timing: Timing
    rng: Random

    async def in_thread(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Run kernel work in a worker thread."""
        ...

    def repaired(self) -> None:
        """Rules had been tampered with."""
        ...


class NoNamespace(Unavailable):
    """The pod has no network namespace yet, or any more."""


class Captive:
    """How one pod stands, what is wanted of it, and its descriptor."""

    def __init__(self, pod: Pod, wanted: Intent, around: Surroundings) -> None:
        self.pod = pod
        self.wanted = wanted
        self.state = NEW
        self.failure = ""
        self._around = around
        self._fd: int | None = None
        self._applied: Capture | None = None
        self._generation = -1
        self._offered: Path | None = None
        self._given: Path | None = None
        self._captured = trio.Event()
        self._again = trio.Event()
        self._is_over = False
        self._located_at = self._checked_at = self._fully_checked_at = float("-inf")
        self._backoff = Backoff(around.rng, RETRY_BASE_SECONDS, RETRY_CAP_SECONDS)

    # -- from outside: never waits -----------------------------------------------------

    def adopt(self, fd: int | None, *, has_rules: bool, is_enabled: bool) -> None:
        """Begin with what an agent before us left; `fd` is ours from here on."""
        self._fd = fd
        if not has_rules and (fd is not None or not is_enabled):
            return
        # With rules but not announced, it was half-way in or half-way out.
        self.state = RECOGNISED if is_enabled else DRAINING
        # Its listeners and connections are the proxy's: the next snapshot must name it.
        unknown = Target(self.pod.uid, self.pod.ref, self.pod.service_account, Capture())
        self._around.handoff.register(unknown, fd)

    def want(self, intent: Intent) -> None:
        """From now on, this."""
        self.wanted = intent
        self._backoff.reset()
        self.look_again()

    def offer(self, namespace: Path) -> trio.Event:
        """The pod's namespace is at this path; the event is set once it is captured there."""
        self._offered = namespace
        self._captured = trio.Event()
        self.look_again()
        return self._captured

    def look_again(self) -> None:
        """Something changed: do not wait for the next attempt."""
        self._again.set()

    def describe(self) -> dict[str, object]:
        """For people."""
        applied = self._applied
        return {
            "uid": self.pod.uid,
            "pod": f"{self.pod.namespace}/{self.pod.name}",
            "state": self.state,
            "wanted": type(self.wanted).__name__,
            "failure": self.failure,
            "dnsCapture": applied.dns if applied else None,
            "ipv6": applied.ipv6 if applied else None,
            "inbound": applied.inbound if applied else None,
        }

    def close(self) -> None:
        """Close the descriptor, after the hand-off has forgotten it."""
        self._around.handoff.forget(self.pod.uid)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    # -- the task ----------------------------------------------------------------------

    async def run(self) -> None:
        """Bring about what is wanted, until the pod is no longer in our care.

        If cancelled: the pod stays as it is, and so does the proxy's part.
        """
        while True:
            self._again = trio.Event()
            wanted = self.wanted
            delay = self._around.timing.drift
            try:
                await lifecycle.supervise("enrolment", self._step, wanted)
            except MeshError as exc:
                delay = await self._fail(wanted, exc)
            else:
                self.failure = ""
                self._backoff.reset()
            if self.wanted is wanted:
                if self._is_over:
                    return
                with trio.move_on_after(delay):
                    await self._again.wait()

    async def _step(self, wanted: Intent) -> None:
        self._is_over = False
        match wanted:
            case Enrol(target=target):
                await self._enrol(target)
            case Drain():
                await self._drain(wanted)
            case Withdraw():
                await self._forget("pod_withdrawn")
            case Recognised():
                return

    async def _fail(self, wanted: Intent, exc: MeshError) -> float:
        """Record a failed attempt; how long to wait for the next, in seconds."""
        if str(exc) != self.failure:
            level = _log.info if isinstance(exc, NoNamespace) else _log.warning
            level(
                "attempt_failed",
                pod=str(self.pod.ref),
                wanted=type(wanted).__name__,
                error=str(exc),
                hint=exc.hint,
            )
        self.failure = str(exc)
        if isinstance(exc, NoNamespace):
            return min(self._backoff.next(), NO_NAMESPACE_SECONDS)
        if isinstance(wanted, Enrol) and self.state == NEW:
            await self._try("annotation_failed", self._annotate(PENDING))
        return self._backoff.next()

    async def _try(self, event: str, work: Awaitable[None]) -> None:
        try:
            await work
        except MeshError as exc:
            _log.warning(event, pod=str(self.pod.ref), error=str(exc))

    # -- into the mesh -----------------------------------------------------------------

    async def _enrol(self, target: Target) -> None:
        fd = await self._locate(target)
        if self.state == CAPTURED and self._applied == target.capture:
            await self._check(fd, target)
            await self._keep_announced()
            self._captured.set()
            return
        around, started, was = self._around, trio.current_time(), self.state
        if was in (CAPTURED, RECOGNISED):
            around.handoff.register(target, fd)
        else:
            error = await around.handoff.add(target, fd)
            if error:
                raise Unavailable(f"the node proxy refused the pod: {error}")
        await around.in_thread(kernel.capture_pod, fd, target.capture)
        self._note_check(fd, full=True)
        # Announced last: from here on peers send through the tunnel.
        await self._annotate(ENABLED)
        self._applied, self.state = target.capture, CAPTURED
        self._captured.set()
        milliseconds = round((trio.current_time() - started) * 1000, 1)
        _log.info("pod_captured", pod=str(self.pod.ref), was=was, milliseconds=milliseconds)

    async def _locate(self, target: Target) -> int:
        """The pod's namespace as it is now. Raises NoNamespace, KernelError."""
        offered, self._offered = self._offered, None
        self._given = offered or self._given
        is_due = trio.current_time() - self._located_at >= self._around.timing.drift
        if self._fd is not None and offered is None and not is_due:
            return self._fd
        if self._given is not None:
            found = open_namespace(self._given)
        else:
            found = self._around.finder.open(self.pod)
        if self._fd is not None and found is not None and _is_same(found, self._fd):
            os.close(found)
            self._located_at = trio.current_time()
            return self._fd
        if self._fd is not None:
            # Its sandbox is gone, with everything that was in it.
            _log.info("namespace_lost", pod=str(self.pod.ref), replaced=found is not None)
            self.close()
            if found is None:
                await self._around.handoff.delete(target.uid)
        self._fd, self.state, self._applied = found, NEW, None
        if found is None:
            raise NoNamespace("the pod has no network namespace")
        self._located_at = trio.current_time()
        return found

    async def _check(self, fd: int, target: Target) -> None:
        """Repair rules that somebody changed; costs next to nothing while nobody did."""
        now = trio.current_time()
        if now - self._checked_at < self._around.timing.drift:
            return
        full = now - self._fully_checked_at >= FULL_CHECK_SECONDS
        generation = kernel.generation(fd)
        if generation.number != self._generation or full:
            if not await self._around.in_thread(kernel.is_intact, fd, target.capture):
                self._around.repaired()
                _log.warning(
                    "rules_repaired",
                    pod=str(self.pod.ref),
                    changed_by=generation.program,
                    pid=generation.pid,
                )
                await self._around.in_thread(kernel.capture_pod, fd, target.capture)
            if generation.number != self._generation:
                foreign = await self._around.in_thread(kernel.foreign_nat_chains, fd)
                if foreign:
                    _log.warning("foreign_nat_chains", pod=str(self.pod.ref), chains=foreign)
        self._note_check(fd, full=full)

    def _note_check(self, fd: int, *, full: bool) -> None:
        self._generation = kernel.generation(fd).number
        self._checked_at = trio.current_time()
        if full:
            self._fully_checked_at = self._checked_at

    # -- out of the mesh ---------------------------------------------------------------

    async def _drain(self, wanted: Drain) -> None:
        """Let the pod go; returns early when something else is wanted."""
        fd, around = self._fd, self._around
        if self.state == NEW:
            around.handoff.forget(self.pod.uid)  # or a proxy that comes now would begin it
        await self._annotate(None)
        if fd is not None:
            if self.state != NEW:
                await around.in_thread(kernel.drain_pod, fd, self._applied or Capture())
                self.state, self._applied = DRAINING, None
                _log.info("pod_draining", pod=str(self.pod.ref))
                if not await self._wait_idle(wanted, fd):
                    return
            await around.in_thread(kernel.release_pod, fd)
        await self._forget("pod_released")

    async def _wait_idle(self, wanted: Drain, fd: int) -> bool:
        """Wait until the proxy carries nothing of the pod; False if that is not wanted now."""
        timing, around = self._around.timing, self._around
        started = trio.current_time()
        own = await around.in_thread(kernel.addresses, fd)
        delay = DRAIN_POLL_SECONDS
        while True:
            self._again = trio.Event()
            if self.wanted is not wanted:
                return False
            elapsed = trio.current_time() - started
            if elapsed >= timing.drain_settle:
                left = await around.in_thread(kernel.proxied_connections, fd, own)
                if not left:
                    return True
                if elapsed >= timing.drain:
                    _log.warning("drain_cut_short", pod=str(self.pod.ref), connections=left)
                    return True
            with trio.move_on_after(delay):
                await self._again.wait()
            delay = min(delay * 1.2, DRAIN_POLL_CAP_SECONDS)

    async def _forget(self, event: str) -> None:
        await self._around.handoff.delete(self.pod.uid)
        self.close()
        self.state, self._applied, self._is_over = NEW, None, True
        _log.info(event, pod=str(self.pod.ref))

    # -- the annotation ----------------------------------------------------------------

    async def _keep_announced(self) -> None:
        """Write the annotation again when the pod was written anew without it."""
        seen = self._around.pods.get(self.pod.ref)
        if seen is not None and seen.annotations.get(REDIRECTION) != ENABLED:
            await self._annotate(ENABLED)

    async def _annotate(self, value: str | None) -> None:
        """Say in the pod's annotation how it stands; nothing if that pod is gone.

        Raises ConfigError, Unavailable.
        """
        cluster, ref = self._around.cluster, self.pod.ref
        now = await cluster.get(ref)
        # Of the same name there may be another pod by now.
        if now is None or text_of(now, "metadata", "uid") != self.pod.uid:
            return
        if (text_of(now, "metadata", "annotations", REDIRECTION) or None) == value:
            return
        try:
            await cluster.patch(ref, {"metadata": {"annotations": {REDIRECTION: value}}})
        except NotFound:
            return


def _is_same(one: int, other: int) -> bool:
    return netns.identity(one) == netns.identity(other)
