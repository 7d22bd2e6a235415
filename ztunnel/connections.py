"""Every open connection of this node: tracked, recorded, listed, and judged again.

A connection is admitted by a Permit and lives in one fiber. When a policy, or the
workload it ends at, changes, its facts are judged anew; what is no longer permitted is cut
("closed due to policy change") and both ends see a reset. A connection whose own
workload got another identity is cut in both directions: it was opened in another's name.

`carrying` is around one connection's work and writes its record, exactly once, whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import TypeAlias

import trio

from mesh import fiber
from mesh.authz import Compiler, ConnectionContext, Judge, Permit
from mesh.errors import MeshError, Refusal
from mesh.fiber import Cut, Fiber
from mesh.hbone.relay import RelayResult
from mesh.model.store import Changed, Store
from mesh.model.workload import Workload
from mesh.runtime import lifecycle, log
from ztunnel.record import Ending, Journal, Record

PROGRESS_SECONDS = 5.0
LIMIT_STEP_SECONDS = 0.25
_BREATH = 100

_log = log.get("connections")

Limits: TypeAlias = "dict[Tracked, tuple[float, Callable[[], Refusal]]]"
"""When the connections that may not take long are late, and what is said then."""


class Tracked:
    """One connection. `context` is what policy judged, None for outbound ones, whose
    destination judges. `cut` says why it was cut.
    """

    __slots__ = (
        "context",
        "cut",
        "identity",
        "limits",
        "pod_uid",
        "record",
        "work",
        "workload_uid",
    )

    def __init__(
        self,
        record: Record,
        pod_uid: str,
        workload: Workload,
        limits: Limits,
        context: ConnectionContext | None = None,
    ) -> None:
        self.record = record
        self.pod_uid = pod_uid
        self.workload_uid = workload.uid
        self.identity = workload.identity
        self.context = context
        self.work: Fiber | trio.CancelScope | None = None
        self.cut: Refusal | None = None
        self.limits = limits

    def limit(self, seconds: float, late: Callable[[], Refusal]) -> None:
        """What happens next must be over in `seconds`, give or take LIMIT_STEP_SECONDS, or the
        connection ends as `late()` says.

        One task looks after all limits: a timer each would cost more than what it guards.
        """
        self.limits[self] = (trio.current_time() + seconds, late)

    def unlimit(self) -> None:
        """It was over in time."""
        self.limits.pop(self, None)

    def end(self, refusal: Refusal) -> None:
        """Cut it now. The first reason stays."""
        if self.cut is None:
            self.cut = refusal
            if self.work is not None:
                self.work.cancel()


class Judges:
    """The judge of each local workload, compiled when first asked after a change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._compiler = Compiler()
        self._version = store.policies_version
        self._judges: dict[str, tuple[Workload, Judge, Judge | None]] = {}

    def evaluate(self, workload: Workload, context: ConnectionContext) -> Permit | Refusal:
        """Judge a connection to `workload`; what a dry-run policy would refuse is logged."""
        verdict, would = self.consider(workload, context)
        if would is not None:
            _log.info(
                "dry_run_refusal",
                policy=would.policy,
                reason=would.reason,
                src_identity=str(context.source_identity or ""),
                src_ip=context.source_ip,
                dst_workload=workload.uid,
            )
        return verdict

    def consider(
        self, workload: Workload, context: ConnectionContext
    ) -> tuple[Permit | Refusal, Refusal | None]:
        """The verdict, and what dry-run policies would refuse of what is permitted."""
        _, judge, rehearsal = self._judge(workload)
        verdict = judge.evaluate(context)
        if rehearsal is None or isinstance(verdict, Refusal):
            return verdict, None
        would = rehearsal.evaluate(context)
        return verdict, would if isinstance(would, Refusal) else None

    def rehearses(self, workload: Workload) -> bool:
        """Whether dry-run policies have something to say about each connection to `workload`."""
        return self._judge(workload)[2] is not None

    def forget(self, workload_uid: str) -> None:
        """The workload is no longer served here."""
        self._judges.pop(workload_uid, None)

    def _judge(self, workload: Workload) -> tuple[Workload, Judge, Judge | None]:
        if self._version != self._store.policies_version:
            self._version = self._store.policies_version
            self._judges.clear()
            self._compiler.retain(frozenset(each.key for each in self._store.policies()))
        known = self._judges.get(workload.uid)
        if known is None or known[0] is not workload:
            policies = self._store.policies_for(workload)
            rehearsal = None
            if any(each.dry_run for each in policies):
                rehearsal = self._compiler.judge(policies, enforce_dry_run=True)
            known = (workload, self._compiler.judge(policies), rehearsal)
            self._judges[workload.uid] = known
        return known


class Connections:
    """The open connections. `run` judges again and reports progress; keep it going."""

    def __init__(self, store: Store, judges: Judges, journal: Journal) -> None:
        self._store = store
        self._judges = judges
        self._journal = journal
        self._open: dict[Tracked, None] = {}
        self._limits: Limits = {}
        self._policies_changed = False
        self._changed_workloads: set[str] = set()
        self._wake = trio.Event()
        self._changed: trio.Event | None = None

    def __iter__(self) -> Iterator[Tracked]:
        return iter(tuple(self._open))

    def __len__(self) -> int:
        return len(self._open)

    def track(self, record: Record, pod_uid: str, workload: Workload) -> Tracked:
        """An outbound connection in the name of `workload`."""
        return self._add(Tracked(record, pod_uid, workload, self._limits))

    def admit(
        self,
        permit: Permit,
        record: Record,
        pod_uid: str,
        workload: Workload,
        context: ConnectionContext,
    ) -> Tracked:
        """An inbound connection to `workload`; nobody gets in without a Permit."""
        record.policy, record.rule = permit.policy, permit.rule
        return self._add(Tracked(record, pod_uid, workload, self._limits, context))

    def opened(self, tracked: Tracked, counters: Callable[[], tuple[int, int]]) -> None:
        """Bytes flow from now on; `counters` gives them as (into the tunnel, out of it)."""
        record = tracked.record
        record.counters = counters
        if record.span is not None:
            record.span.event("established", trio.current_time())
        self._journal.opened(record)

    def carrying(self, tracked: Tracked) -> Carrying:
        """`with carrying(tracked) as work: work.result = await ...`, in a fiber or in a task: does
        what is to be done when that ends, however it does, and writes the record.
        """
        return Carrying(self, tracked)

    def refused(self, record: Record, refusal: Refusal) -> None:
        """Write the record of a connection that was never admitted."""
        record.policy, record.rule = refusal.policy, refusal.rule
        ending = Ending(refusal.flag, refusal.reason, refusal.hint)
        self._journal.finished(record, ending, trio.current_time())

    def failed(self, record: Record, error: MeshError) -> None:
        """Write the record of a connection that failed before a decision was possible."""
        ending = Ending(error.flag, str(error), error.hint)
        self._journal.finished(record, ending, trio.current_time())

    def changed(self, changed: Changed) -> None:
        """The Store changed: judge again what that concerns, soon."""
        if changed.policies:
            self._policies_changed = True
        self._changed_workloads |= changed.workloads
        if self._policies_changed or self._changed_workloads:
            self._wake.set()

    async def run(self) -> None:
        """Judge again after changes, and report bytes now and then, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report)
            nursery.start_soon(self._enforce_limits)
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                await self._rejudge()

    async def wait_empty(self, pod_uid: str | None = None) -> None:
        """Until no connection (of a pod) is open. If cancelled: nothing is changed."""
        while any(pod_uid in (None, each.pod_uid) for each in self._open):
            if self._changed is None:
                self._changed = trio.Event()
            await self._changed.wait()

    async def _rejudge(self) -> None:
        everybody, self._policies_changed = self._policies_changed, False
        workloads, self._changed_workloads = self._changed_workloads, set()
        for count, tracked in enumerate(tuple(self._open)):
            if everybody or tracked.workload_uid in workloads:
                await lifecycle.guard("rejudge", self._rejudge_one, tracked)
            if count % _BREATH == _BREATH - 1:
                await trio.lowlevel.checkpoint()

    async def _rejudge_one(self, tracked: Tracked) -> None:
        workload = self._store.workload_by_uid(tracked.workload_uid)
        # A workload that the controller dropped is on its way out; the node agent ends it.
        if workload is None:
            return
        if workload.identity != tracked.identity:
            reason = f"closed due to policy change: the workload is now {workload.identity}"
            tracked.end(Refusal("IDENTITY_ERROR", reason))
        elif tracked.context is not None:
            verdict = self._judges.evaluate(workload, tracked.context)
            if isinstance(verdict, Refusal):
                reason = f"closed due to policy change: {verdict.reason}"
                tracked.end(replace(verdict, reason=reason))

    async def _report(self) -> None:
        while True:
            await trio.sleep(PROGRESS_SECONDS)
            for tracked in tuple(self._open):
                self._journal.progress(tracked.record)

    async def _enforce_limits(self) -> None:
        while True:
            await trio.sleep(LIMIT_STEP_SECONDS)
            if self._limits:
                now = trio.current_time()
                late = [each for each, (deadline, _) in self._limits.items() if deadline <= now]
                for tracked in late:
                    _, refusal = self._limits.pop(tracked)
                    tracked.end(refusal())

    def _add(self, tracked: Tracked) -> Tracked:
        self._open[tracked] = None
        return tracked

    def finish(self, tracked: Tracked, ending: Ending) -> None:
        """For `Carrying`: it is over."""
        del self._open[tracked]
        tracked.unlimit()
        record = tracked.record
        if record.counters is not None and not (ending.bytes_to_tunnel or ending.bytes_from_tunnel):
            to_tunnel, from_tunnel = record.counters()
            ending = Ending(ending.flag, ending.error, ending.hint, to_tunnel, from_tunnel)
        self._journal.finished(record, ending, trio.current_time())
        if self._changed is not None:
            self._changed.set()
            self._changed = None


class Carrying:
    """The work of one connection. Set `result` when it has ended by itself.

    A MeshError of the work ends in the record. If cancelled: the record says that this proxy
    stopped; when the connection itself was cut, it says why, and the work is just over.
    """

    __slots__ = ("_connections", "_scope", "_tracked", "result")

    def __init__(self, connections: Connections, tracked: Tracked) -> None:
        self._connections = connections
        self._tracked = tracked
        self._scope: trio.CancelScope | None = None
        self.result: RelayResult | None = None

    def __enter__(self) -> Carrying:
        self._tracked.work = fiber.current()
        if self._tracked.work is None:
            self._tracked.work = self._scope = trio.CancelScope()
            self._scope.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        tracked, result = self._tracked, self.result
        if isinstance(error, MeshError):
            ending = Ending(error.flag, str(error), error.hint)
            kind = error = trace = None
            is_over = True
        elif result is None or error is not None:
            ending = _cut_short(tracked)
            is_over = isinstance(error, Cut) and tracked.cut is not None
        else:
            ending = Ending(
                "-", result.error or "", "", result.bytes_to_tunnel, result.bytes_from_tunnel
            )
            is_over = False
        self._connections.finish(tracked, ending)
        if self._scope is None:
            return is_over
        return bool(self._scope.__exit__(kind, error, trace)) or is_over


def _cut_short(tracked: Tracked) -> Ending:
    """How a connection ended whose work was cancelled."""
    cause = tracked.cut
    if cause is None:
        return Ending(error="closed because this proxy stopped serving the pod")
    if cause.policy:
        tracked.record.policy, tracked.record.rule = cause.policy, cause.rule
    return Ending(cause.flag, cause.reason, cause.hint)
