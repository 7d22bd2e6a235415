"""Carries out what `istiod_lite.waypoints` decides: waypoints' objects in the cluster.

It follows Gateways and the objects that it made itself, so what drifts is put back at once
(until somebody else insists, see `istiod_lite.contest`), and looks at everything again from
time to time. What cannot be written now is tried again; a cluster that takes no writes is told
of once and left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from istiod_lite import waypoints
from istiod_lite.conditions import Condition
from istiod_lite.contest import Contests, owners
from istiod_lite.waypoints import Make, Mend, Remove, Step, WaypointSettings
from mesh.cluster.api import Cluster, Deleted, Event, NotFound, Put, Ref, Synced, ref_of
from mesh.cluster.gateways import Gateway, parse_gateway
from mesh.errors import ConfigError, Unavailable
from mesh.runtime import log

#: Who owns the fields that we write, in the eyes of an API server.
FIELD_MANAGER = "ambit-istiod"
CHECK_SECONDS = 30.0
GATHER_SECONDS = 0.05
_RETRY_SECONDS = 1.0

_log = log.get(__name__)


class WaypointWriter:
    """Keeps each waypoint Gateway's ServiceAccount, Service and Deployment as they should be."""

    def __init__(
        self, settings: WaypointSettings, on_contest: Callable[[], None] = lambda: None
    ) -> None:
        self._settings = settings
        self._on_contest = on_contest
        self._contests = Contests()
        self._contested: Mapping[Ref, Condition] = {}
        self._gateways: dict[Ref, Gateway] = {}
        self._live: dict[Ref, dict[str, object]] = {}
        self._unreadable: set[Ref] = set()
        self._told: set[str] = set()

    @property
    def contested(self) -> Mapping[Ref, Condition]:
        """What to say on Gateways whose objects somebody else keeps changing."""
        return self._contested

    async def run(self, cluster: Cluster) -> None:
        """Write for ever. If cancelled: what is written stays."""
        async with cluster.watch(("Gateway", *waypoints.OWNED_KINDS)) as events:
            while not isinstance(event := await events.receive(), Synced):
                self._receive(event)
            wait = 0.0
            while True:
                with trio.move_on_after(wait):
                    self._receive(await events.receive())
                    with trio.move_on_after(GATHER_SECONDS):
                        while True:
                            self._receive(await events.receive())
                wait = await self._write(cluster)

    def _receive(self, event: Event) -> None:
        match event:
            case Put(ref=Ref(kind="Gateway") as ref, object=obj):
                self._unreadable.discard(ref)
                try:
                    self._gateways[ref] = parse_gateway(obj)
                except ConfigError:
                    # Told by the index. The one before stays in force; if none was known, what
                    # was made for it before we started stays as it is.
                    self._unreadable.add(ref)
            case Put(ref=ref, object=obj):
                if waypoints.is_ours(obj):
                    self._live[ref] = obj
                else:
                    self._live.pop(ref, None)
            case Deleted(ref=ref):
                self._unreadable.discard(ref)
                self._gateways.pop(ref, None)
                self._live.pop(ref, None)
            case _:
                pass

    async def _write(self, cluster: Cluster) -> float:
        """Do what there is to do; seconds until it should be looked at again."""
        wait = CHECK_SECONDS
        steps = waypoints.plan(self._gateways.values(), self._live, self._settings)
        now = trio.current_time()
        self._contests.see((each.ref for each in steps if isinstance(each, Mend)), now)
        for step in steps:
            if isinstance(step, Remove) and self._is_doubtful(step.ref):
                continue
            if isinstance(step, Mend) and not self._contests.may_mend(step.ref, now):
                await self._name_others(cluster, step)
                continue
            try:
                await self._do(cluster, step)
            except Unavailable as exc:
                self._tell("waypoint_delayed", str(exc))
                wait = _RETRY_SECONDS
            except ConfigError as exc:
                self._tell("waypoint_not_written", str(exc))
        if not steps:
            self._told.clear()
        contested = self._contests.conditions()
        if contested != self._contested:
            self._contested = contested
            self._on_contest()
        for condition in contested.values():
            self._tell("waypoint_contested", condition.message)
        return wait

    async def _name_others(self, cluster: Cluster, step: Mend) -> None:
        """Find out, once, who it is that changes what we made."""
        if not self._contests.is_nameless(step.ref):
            return
        try:
            found = await cluster.get(step.ref)
        except (Unavailable, ConfigError):
            return  # the next look asks again
        if found is not None:
            self._contests.name_others(step.ref, owners(found, step.patch, FIELD_MANAGER))

    async def _do(self, cluster: Cluster, step: Step) -> None:
        match step:
            case Make(object=obj):
                ref = ref_of(obj)
                found = await cluster.get(ref)
                if found is None:
                    await cluster.apply(obj)
                    self._live[ref] = obj
                    _log.info("waypoint_object_made", object=str(ref))
                elif waypoints.is_ours(found):
                    self._live[ref] = found  # its event is still on the way
                elif ref.kind != "ServiceAccount":
                    raise ConfigError(f"{ref} exists already and is somebody else's")
            case Mend(ref, patch):
                try:
                    await cluster.patch(ref, patch)
                    self._contests.mended(ref, trio.current_time())
                    _log.info("waypoint_object_mended", object=str(ref), fields=sorted(patch))
                except NotFound:
                    self._live.pop(ref, None)
            case Remove(ref):
                await cluster.delete(ref)
                self._live.pop(ref, None)
                _log.info("waypoint_object_removed", object=str(ref))

    def _is_doubtful(self, ref: Ref) -> bool:
        return Ref("Gateway", ref.namespace, ref.name) in self._unreadable

    def _tell(self, event: str, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            _log.warning(event, reason=reason)
