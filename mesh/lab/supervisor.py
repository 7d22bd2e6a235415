"""The lab's process: API server, scheduler, kubelet and DNS of the lab, as one tree of tasks.

    user's YAML ─ live.UserFiles ─► live directory ◄─ istiod_lite, netconfig, `ambit enroll`
                                        │ replan
                        topology.plan ──┴─► diff ─► PodRunner per pod ─► ready?
                                                            │ reroute
                                  routing.Routing ──────────┴─► nftables per node, DNS zone

`mesh.lab.__main__` runs it as PID 1 of the lab's namespaces.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import trio

from mesh.cluster.api import Ref
from mesh.errors import ConfigError, MeshError
from mesh.lab import dns, topology, workloads
from mesh.lab.ambient import READY_SECONDS, ROOT_CERTIFICATE, Ambient, program_path
from mesh.lab.checks import Checks
from mesh.lab.doorway import Doorway
from mesh.lab.kernel import Kernel
from mesh.lab.kubelet import Host, PodRunner
from mesh.lab.launch import LabSettings
from mesh.lab.live import Live, UserFiles
from mesh.lab.merge import merge_patch_for
from mesh.lab.pod_files import wall_clock
from mesh.lab.routing import Routing
from mesh.lab.services import Key, ServicePlan
from mesh.lab.state import DOMAIN, LabState, Speaker
from mesh.lab.topology import Plan, PodPlan

GATHER_SECONDS = 0.02
ROLL_SECONDS = 60.0
DOWN_SECONDS = 3.0
UNROUTE_SECONDS = 2.0
PROPAGATION_SECONDS = 0.25
_PLANNED_KINDS = (*workloads.KINDS, "Service", "Node", *workloads.NOT_RUN)


class Supervisor:
    """One running lab. `state` is what it knows."""

    def __init__(
        self,
        settings: LabSettings,
        run: Path,
        hide: str,
        environ: Mapping[str, str],
        door: socket.socket | None = None,
    ) -> None:
        speaker = Speaker(run / "logs" / "lab.log")
        live = Live(run / "cluster", self._on_live_change, self._ask_replan)
        self.state = LabState(settings, run, hide, speaker, live, Kernel())
        self._environ = environ
        self._doorway = Doorway(door) if door is not None else None
        self._ambient = Ambient(self.state, environ)
        self._deleted: set[str] = set()
        self._said_faults: set[str] = set()
        self._host: Host | None = None
        self._pods: trio.Nursery | None = None
        self._look_again: Callable[[], None] = lambda: None

    # The tree of tasks.

    async def run(
        self,
        serve: Callable[[Supervisor], Awaitable[None]],
        on_ready: Callable[[], None],
    ) -> None:
        """Bring the lab up and keep it until `state.end`.

        `serve` answers the command line. Raises MeshError when the lab cannot come up.
        """
        async with trio.open_nursery() as base:
            await base.start(self.state.processes.reap)
            # Logs outlive services: what a program says at its end is read to the end.
            async with trio.open_nursery() as logs:
                async with trio.open_nursery() as services:
                    services.start_soon(self._until_end, services.cancel_scope)
                    services.start_soon(serve, self)
                    try:
                        await self._come_up(services, logs)
                        self.state.phase = "ready"
                        self.state.notify()
                        on_ready()
                        await self._ambient.refresh_tokens()
                    finally:
                        self._hurry()
                logs.cancel_scope.cancel()
            base.cancel_scope.cancel()

    async def _until_end(self, scope: trio.CancelScope) -> None:
        await self.state.end.wait()
        await self._go_down()
        scope.cancel()

    async def _come_up(self, services: trio.Nursery, logs: trio.Nursery) -> None:
        state = self.state
        await state.live.ensure_defaults()
        await services.start(state.live.watch)
        files = UserFiles(state.settings.directory, state.live, state.speaker.complain)
        state.file_faults = lambda: files.faults
        self._look_again = lambda: files.edited.set()
        await services.start(files.follow)
        if files.faults and not files.puts:
            raise ConfigError(
                "nothing to run: none of its files can be used",
                file=str(state.settings.directory),
                hint="mend what is named above",
            )
        checks = Checks(state, files)
        state.findings = lambda: checks.found
        state.kernel.add_control_plane()
        # The nodes first, without any pod: what runs on them is the first plan's change.
        state.plan = Plan(nodes=self._make_plan().nodes)
        for node in state.plan.nodes:
            net = state.kernel.add_node(node)
            await services.start(dns.serve_names, net, lambda: state.zone)
            if self._doorway is not None and state.settings.outside is not None:
                port = state.settings.outside[1]
                services.start_soon(self._doorway.serve, net, port, node.ips[0])
        self._host = self._make_host(logs)
        await self._ambient.write_objects()
        self._pods = await services.start(_open_nursery)
        # Pods are prepared while the daemons start; those to be captured wait for their agent.
        state.ask_replan()
        services.start_soon(self._planning)
        services.start_soon(Routing(state).run)
        if state.settings.mesh:
            await self._ambient.start(services, logs)
        # The controller has long read all there is; the proxies came up after it.
        await checks.look(waits=(0.0,))
        services.start_soon(checks.run)
        with trio.move_on_after(READY_SECONDS) as waiting:
            await state.wait_settled()
        if waiting.cancelled_caught:
            self._tell_unready()

    def _tell_unready(self) -> None:
        said = f"not ready after {READY_SECONDS:.0f} s:"
        late = [
            *self.state.unready(),
            *(each for each in self.state.runners.values() if each.flaps),
        ]
        if not late:
            self.state.speaker.say(f"{said} the daemons\nhint: ambit lab status, ambit lab logs")
        for runner in late:
            name = f"{runner.pod.namespace}/{runner.pod.name}"
            why = runner.summary()["message"] or runner.failure or runner.phase.lower()
            self.state.speaker.say(f"{said} {name}: {why}\nhint: ambit lab logs {name}")

    async def _go_down(self) -> None:
        """Give programs a moment to end; the end of this process ends the rest."""
        self.state.phase = "stopping"
        self.state.notify()
        self._hurry()
        if self._pods is None:
            return
        self._pods.cancel_scope.cancel()
        with trio.move_on_after(DOWN_SECONDS + 1):
            for runner in [*self.state.runners.values(), *self.state.stopping]:
                await runner.ended.wait()

    def _hurry(self) -> None:
        """From now on pods end fast, and leave the tidying to the end of the namespaces."""
        if self._host is not None:
            self._host.most_grace = DOWN_SECONDS
            self._host.is_ending = True

    # Plans.

    def _on_live_change(self, ref: Ref) -> None:
        state = self.state
        if ref.kind in ("ConfigMap", "Secret"):
            for runner in state.runners.values():
                if runner.pod.namespace == ref.namespace:
                    runner.files.refresh()
            if ref == ROOT_CERTIFICATE:
                self._ambient.write_root_certificate()
        elif ref.kind in _PLANNED_KINDS:
            state.ask_replan()
        elif ref.kind in ("Namespace", "EndpointSlice"):
            state.ask_reroute()
        if ref.kind in ("Namespace", "Gateway"):
            self._look_again()
        state.notify()

    def _ask_replan(self) -> None:
        self.state.ask_replan()

    def _make_plan(self) -> Plan:
        state = self.state
        return topology.plan(
            [*state.live.of_kind(*_PLANNED_KINDS), *state.live.pods.values()],
            state.plan,
            node_count=state.settings.nodes,
            busy=frozenset(runner.pod.ips[0] for runner in state.stopping),
            deleted=frozenset(self._deleted),
            sources=state.live.sources,
        )

    async def _planning(self) -> None:
        """Make a new plan after every change, and carry it out. Never returns."""
        state = self.state
        while True:
            await state.replan.wait()
            await trio.sleep(GATHER_SECONDS)
            state.replan = trio.Event()
            old, state.plan = state.plan, self._make_plan()
            for fault in state.plan.faults:
                if str(fault) not in self._said_faults:
                    state.speaker.complain(fault)
            self._said_faults = {str(fault) for fault in state.plan.faults}
            self._deleted -= {pod.uid for pod in old.pods.values()}
            await self._carry_out(topology.diff(old, state.plan))
            state.is_planned = not state.replan.is_set()
            state.ask_reroute()

    async def _carry_out(self, changes: topology.Changes) -> None:
        state = self.state
        assert self._pods is not None  # noqa: S101 - opened before the first plan
        for service in state.plan.services.values():
            await self._complete_service(service)
        for pod in changes.relabel:
            await self._relabel(pod)
        leaving: dict[Key, PodRunner] = {}
        for stop in changes.stop:
            runner = state.runners.get(stop.pod.key)
            if runner is None or runner.pod.uid != stop.pod.uid:
                continue
            if stop.after:
                self._pods.start_soon(self._stop_after, runner, stop.after)
            else:
                leaving[stop.pod.key] = runner
                self._let_go(runner)
        for pod in changes.start:
            await self._ensure_surroundings(pod)
            self._pods.start_soon(self._run_pod, pod, leaving.get(pod.key))

    async def _complete_service(self, service: ServicePlan) -> None:
        """Write into the live Service what the API server would fill in."""
        live = self.state.live.find("Service", *service.key)
        spec = (live or {}).get("spec") or {}
        patch = {k: v for k, v in service.spec_patch().items() if spec.get(k) != v}
        if live is not None and patch:
            with contextlib.suppress(MeshError):
                await self.state.live.patch(Ref("Service", *service.key), {"spec": patch})

    async def _relabel(self, pod: PodPlan) -> None:
        runner = self.state.runners.get(pod.key)
        ref = Ref("Pod", *pod.key)
        live = self.state.live.objects.get(ref)
        if runner is None or live is None:
            return
        before = runner.pod.object["metadata"]
        patch = merge_patch_for(before, pod.object["metadata"], live["metadata"])
        runner.pod = runner.files.pod = pod
        runner.files.refresh()
        if patch:
            with contextlib.suppress(MeshError):
                await self.state.live.patch(ref, {"metadata": patch})

    async def _ensure_surroundings(self, pod: PodPlan) -> None:
        why = f"made for pod {pod.namespace}/{pod.name}"
        live, account = self.state.live, pod.spec.service_account
        with contextlib.suppress(MeshError):
            await live.ensure_namespace(pod.namespace, why)
            await live.ensure_service_account(pod.namespace, account, why)

    # Pods.

    def _let_go(self, runner: PodRunner) -> None:
        self.state.stopping.add(runner)
        if self.state.runners.get(runner.pod.key) is runner:
            del self.state.runners[runner.pod.key]
        runner.stop()

    async def _stop_after(self, runner: PodRunner, after: tuple[Key, ...]) -> None:
        """End a pod of an old revision, once the new ones serve or had their chance."""
        state = self.state

        def is_served(key: Key) -> bool:
            new = state.runners.get(key)
            return key not in state.plan.pods or (new is not None and new.is_ready)

        with trio.move_on_after(ROLL_SECONDS):
            while not all(is_served(key) for key in after):
                await state.changed.wait()
        self._let_go(runner)

    async def _run_pod(self, pod: PodPlan, before: PodRunner | None) -> None:
        state = self.state
        if before is not None:
            await before.ended.wait()
        planned = state.plan.pods.get(pod.key)
        if planned is None or planned.uid != pod.uid:
            return  # a later plan has dropped it again
        assert self._host is not None  # noqa: S101 - made before the first plan
        runner = PodRunner(planned, state.plan.node(pod.node), self._host)
        state.runners[pod.key] = runner
        try:
            await runner.run()
        finally:
            state.stopping.discard(runner)
            if not self._host.is_ending:
                with trio.CancelScope(shield=True), contextlib.suppress(MeshError):
                    if state.live.uid_of("Pod", *pod.key) == pod.uid:
                        await state.live.delete(Ref("Pod", *pod.key))
            state.ask_reroute()

    async def delete_pod(self, ref: Ref) -> None:
        """Delete a pod: one with an owner is replaced, another is gone."""
        runner = self.state.runners.get((ref.namespace, ref.name))
        if runner is not None:
            self._deleted.add(runner.pod.uid)
        if ref in self.state.live.pods:
            await self.state.live.withdraw(ref)
        self.state.ask_replan()

    def _make_host(self, logs: trio.Nursery) -> Host:
        state = self.state
        return Host(
            processes=state.processes,
            kernel=state.kernel,
            run=state.run_directory,
            hide=state.hide,
            domain=DOMAIN,
            path=program_path(self._environ),
            logs=logs,
            objects=state.live.lookup,
            publish=self._publish,
            capture=self._ambient.capture,
            unrouted=self._unrouted,
            token=self._ambient.pod_token,
        )

    async def _unrouted(self) -> None:
        """Let Services, and the mesh's proxies, hear that a pod is going."""
        with trio.move_on_after(UNROUTE_SECONDS):
            if self.state.settings.mesh:
                await trio.sleep(PROPAGATION_SECONDS)
            while not self.state.is_routed:
                await self.state.changed.wait()

    async def _publish(self, runner: PodRunner) -> None:
        """Write a pod's live object as its runner sees it."""
        if self._host is None or self._host.is_ending:
            return
        try:
            await self._write_pod(runner)
        except MeshError as error:
            self.state.speaker.say(f"pod {runner.pod.namespace}/{runner.pod.name}: {error}")
        self.state.ask_reroute()

    async def _write_pod(self, runner: PodRunner) -> None:
        live = self.state.live
        ref = Ref("Pod", *runner.pod.key)
        status = runner.status()
        written = await live.cluster.get(ref)
        if written is None or written["metadata"].get("uid") != runner.pod.uid:
            if not runner.is_terminating:
                told = {key: value for key, value in status.items() if value is not None}
                await live.create({**runner.pod.object, "status": told})
            return
        patch: dict[str, Any] = {"status": status}
        if runner.is_terminating and "deletionTimestamp" not in written["metadata"]:
            patch["metadata"] = {"deletionTimestamp": wall_clock()}
        await live.patch(ref, patch)


async def _open_nursery(
    *, task_status: trio.TaskStatus[trio.Nursery] = trio.TASK_STATUS_IGNORED
) -> None:
    """A nursery with a cancel scope of its own, held open until it is cancelled."""
    async with trio.open_nursery() as nursery:
        task_status.started(nursery)
        await trio.sleep_forever()
