"""Everything in the agent's care: turns the plan's actions into one task per pod.

`recognise` comes first: pods that an agent before us captured are known by the rules in them
and stay captured without a gap. `netconfig.captive` is what happens to one pod.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import trio

from mesh.cluster.api import Cluster, Ref
from mesh.cluster.objects import REDIRECTION, Pod
from mesh.errors import KernelError, Unavailable
from mesh.retry import Random
from mesh.runtime import lifecycle, log
from netconfig import kernel
from netconfig.captive import ENABLED, Captive, Timing
from netconfig.handoff import HandOff
from netconfig.plan import Action, Enrol, Intent, Recognised
from netconfig.pods import NamespaceFinder, NodePods

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# A commit waits for the kernel, not for the processor: 16 at a time are ten times as fast.
KERNEL_THREADS = 16

_log = log.get("enrolment")


class Enrolments:
    """All pods in the agent's care. `run` must be running while it is used."""

    def __init__(
        self,
        cluster: Cluster,
        pods: NodePods,
        finder: NamespaceFinder,
        handoff: HandOff,
        timing: Timing,
    ) -> None:
        self.cluster = cluster
        self.pods = pods
        self.finder = finder
        self.handoff = handoff
        self.timing = timing
        self.rng: Random = random.Random()  # noqa: S311 - it spreads retries
        self.repairs = 0
        self._threads = trio.CapacityLimiter(KERNEL_THREADS)
        self._captives: dict[str, Captive] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the pods' tasks. Never returns. If cancelled: every pod stays as it is."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    async def recognise(self) -> None:
        """Find the pods that were captured, or being drained, before this process began."""
        async with trio.open_nursery() as nursery:
            for pod in self.pods.all():
                if not pod.host_network and not pod.is_terminal:
                    nursery.start_soon(self._recognise, pod)

    async def _recognise(self, pod: Pod) -> None:
        fd: int | None = None
        try:
            fd = self.finder.open(pod)
            has_rules = fd is not None and (await self.in_thread(kernel.rules_hash, fd)) is not None
            if has_rules or REDIRECTION in pod.annotations:
                captive = self._take(pod, Recognised(pod.uid, pod.ref))
                is_enabled = pod.annotations.get(REDIRECTION) == ENABLED
                captive.adopt(fd, has_rules=has_rules, is_enabled=is_enabled)
                fd = None
        except KernelError as exc:
            _log.warning("pod_not_inspected", pod=str(pod.ref), error=str(exc))
        finally:
            if fd is not None:
                os.close(fd)

    def intents(self) -> dict[str, Intent]:
        """What is being done about each pod, for `plan.reconcile`."""
        return {uid: captive.wanted for uid, captive in self._captives.items()}

    def apply(self, actions: Sequence[Action]) -> None:
        """Begin what is to be done."""
        for action in actions:
            captive = self._captives.get(action.uid)
            if captive is not None:
                captive.want(action)
                continue
            pod = self.pods.get(action.ref)
            if pod is not None and pod.uid == action.uid:
                self._take(pod, action)

    def look_again(self, refs: Iterable[Ref]) -> None:
        """These pods changed: whatever waits for a change of them tries at once."""
        changed = frozenset(refs)
        for captive in self._captives.values():
            if captive.pod.ref in changed:
                captive.look_again()

    def retry_all(self) -> None:
        """A node proxy is there: whatever waits for one tries at once."""
        for captive in self._captives.values():
            captive.look_again()

    def states(self) -> list[str]:
        """How each pod stands, for metrics."""
        return [captive.state for captive in self._captives.values()]

    def describe(self) -> list[dict[str, object]]:
        """Every pod in our care, for people."""
        return [captive.describe() for captive in self._captives.values()]

    async def capture(self, action: Enrol, pod: Pod, namespace: Path, seconds: float) -> None:
        """Capture a pod that is just being started, in the namespace at this path, and wait.

        Raises Unavailable with the reason when it is not captured within `seconds`. If
        cancelled: the attempt goes on.
        """
        captive = self._captives.get(action.uid) or self._take(pod, action)
        captured = captive.offer(namespace)
        if captive.wanted != action:
            captive.want(action)
        with trio.move_on_after(seconds):
            await captured.wait()
        if not captured.is_set():
            reason = captive.failure or "it takes too long"
            raise Unavailable(f"{action.ref} is not captured after {seconds:g} s: {reason}")

    def repaired(self) -> None:
        """Count a repair, for metrics."""
        self.repairs += 1

    async def in_thread(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Run kernel work in one of a few threads. If cancelled: waits for it to end."""
        return await trio.to_thread.run_sync(work, *arguments, limiter=self._threads)

    def _take(self, pod: Pod, intent: Intent) -> Captive:
        if self._nursery is None:
            raise Unavailable("the node agent is starting")
        captive = self._captives[pod.uid] = Captive(pod, intent, self)
        self._nursery.start_soon(self._run_captive, captive)
        return captive

    async def _run_captive(self, captive: Captive) -> None:
        try:
            await lifecycle.guard("enrolment", captive.run)
        finally:
            captive.close()
            if self._captives.get(captive.pod.uid) is captive:
                del self._captives[captive.pod.uid]
