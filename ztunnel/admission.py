"""Who is let in: what is decided about the tunnels of one connection, once for each that is alike.

Everything that plan and policy look at is the same for all tunnels of a connection that ask for
one authority, until the Store changes: so the decision is kept for that long, and asked for every
tunnel. Refusals are decided anew, and so is what a dry-run policy would like to say something
about each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mesh.authz import ConnectionContext, Permit
from mesh.errors import Refusal, RemoteProtocolError
from mesh.hbone.head import parse_authority
from mesh.identity import SpiffeId
from mesh.model.store import Store
from mesh.model.workload import Workload
from ztunnel.plan import InboundConnection, InboundPlan, plan_inbound

MAX_REMEMBERED = 256
_STATUS_BAD_REQUEST = 400


class Judging(Protocol):
    """Who knows the policy of each local workload: `ztunnel.connections.Judges`."""

    def evaluate(self, workload: Workload, context: ConnectionContext) -> Permit | Refusal:
        """Judge a connection to `workload`."""
        ...

    def rehearses(self, workload: Workload) -> bool:
        """Whether dry-run policies have something to say about each connection to `workload`."""
        ...


@dataclass(frozen=True, slots=True)
class Admitted:
    """A tunnel that may be served: by which workload, how, and who said so."""

    workload: Workload
    plan: InboundPlan
    permit: Permit


@dataclass(frozen=True, slots=True)
class Rejected:
    """A tunnel that may not. The workload and the plan are None if it did not come that far."""

    refusal: Refusal
    workload: Workload | None = None
    plan: InboundPlan | None = None


class Admissions:
    """The decisions about one connection, which `arrived` so and was accepted as `own`."""

    def __init__(
        self, arrived: InboundConnection, own: SpiffeId, store: Store, judges: Judging
    ) -> None:
        self._arrived = arrived
        self._own = own
        self._store = store
        self._judges = judges
        self._version = -1
        self._known: dict[tuple[str, str], Admitted] = {}
        self.source, self.destination = str(arrived.source), str(arrived.destination)
        """The connection's two ends, as text."""

    def decide(self, workload: Workload | None, authority: str, host: str) -> Admitted | Rejected:
        """About a tunnel to `authority`, for which `host` was asked for (or empty), at the pod
        that is `workload` by the Store of this moment.
        """
        if self._version != self._store.version:
            self._version = self._store.version
            self._known.clear()
        known = self._known.get((authority, host))
        if known is not None and known.workload is workload:
            return known
        decided = self._decide(workload, authority, host)
        if isinstance(decided, Admitted) and not self._judges.rehearses(decided.workload):
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
            self._known[authority, host] = decided
        return decided

    def _decide(self, workload: Workload | None, authority: str, host: str) -> Admitted | Rejected:
        if workload is None:
            return Rejected(Refusal("CONNECT", "this pod's workload is unknown by now"))
        if workload.identity != self._own:
            reason = f"this pod was {self._own} when the tunnel was opened"
            return Rejected(Refusal("IDENTITY_ERROR", reason))
        try:
            wanted = parse_authority(authority)
        except RemoteProtocolError as exc:
            refusal = Refusal("CONNECT", str(exc), http_status=_STATUS_BAD_REQUEST)
            return Rejected(refusal, workload)
        plan = plan_inbound(self._arrived, wanted, workload, self._store, host)
        if isinstance(plan, Refusal):
            return Rejected(plan, workload)
        verdict = self._judges.evaluate(workload, plan.context)
        if isinstance(verdict, Refusal):
            return Rejected(verdict, workload, plan)
        return Admitted(workload, plan, verdict)
