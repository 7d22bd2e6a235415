"""Conditions and status fragments, and how they go into a live object's status. Pure.

`merged` touches what is ours and nothing else: foreign conditions and other controllers' entries
stay, `lastTransitionTime` moves only when a condition's status flips, and a status that is right
already is not written again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mesh.cluster.api import Object, Ref
from mesh.cluster.gateways import GATEWAY_GROUP, WAYPOINT_CONTROLLER
from mesh.cluster.routes import ParentRef

State = Literal["True", "False", "Unknown"]

WAYPOINT_BOUND = "istio.io/WaypointBound"
WAYPOINT_REQUIRED = "ambit.dev/WaypointRequired"
ZTUNNEL_ACCEPTED = "ZtunnelAccepted"
WAYPOINT_ACCEPTED = "WaypointAccepted"
#: Whether what we made for a Gateway is as we made it; said only while it is not.
IN_SYNC = "ambit.dev/ObjectsInSync"
#: Conditions that we write at the top of a status, and may take away.
OURS = frozenset(
    {
        "Accepted",
        "Programmed",
        "ResolvedRefs",
        IN_SYNC,
        WAYPOINT_BOUND,
        WAYPOINT_REQUIRED,
        ZTUNNEL_ACCEPTED,
        WAYPOINT_ACCEPTED,
    }
)
MAX_MESSAGE = 4096
MAX_ANCESTORS = 16


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition, without what depends on when it is written."""

    type: str
    status: State
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class ParentStatus:
    """What is said of a route at one parent."""

    parent: ParentRef
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class AncestorStatus:
    """What is said of a policy at one of its targets: a Service of its own namespace."""

    target: Ref
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class ListenerStatus:
    """What is said of one listener."""

    name: str
    attached_routes: int
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Fragment:
    """Our part of one object's status. `parents` None: it is no route; `ancestors` None: it is no
    policy of the Gateway API.
    """

    conditions: tuple[Condition, ...] = ()
    parents: tuple[ParentStatus, ...] | None = None
    listeners: tuple[ListenerStatus, ...] = ()
    addresses: tuple[tuple[str, str], ...] = ()
    ancestors: tuple[AncestorStatus, ...] | None = None
    features: tuple[str, ...] = ()
    #: Host and address of a ServiceEntry.
    assigned: tuple[tuple[str, str], ...] = ()


def merged(live: Object, fragment: Fragment, now: str) -> dict[str, Any] | None:
    """The patch of `status` that puts a fragment into a live object; None if it is there.

    `now` is RFC 3339.
    """
    status = live.get("status")
    status = status if isinstance(status, dict) else {}
    metadata = live.get("metadata")
    generation = metadata.get("generation") if isinstance(metadata, dict) else None
    new: dict[str, Any] = {}
    if fragment.parents is not None:
        new["parents"] = _parents(status.get("parents"), fragment.parents, generation, now)
    elif fragment.ancestors is not None:
        new["ancestors"] = _ancestors(status.get("ancestors"), fragment.ancestors, generation, now)
    else:
        old = _list(status.get("conditions"))
        # Of services only names with our domains are ours: others have an Accepted, too.
        is_service = live.get("kind") in ("Service", "ServiceEntry")
        ours = {each for each in OURS if not is_service or "/" in each}
        foreign = [each for each in old if each.get("type") not in ours]
        new["conditions"] = foreign + _conditions(old, fragment.conditions, generation, now)
    if fragment.addresses:
        new["addresses"] = [{"type": kind, "value": value} for kind, value in fragment.addresses]
    if fragment.assigned:
        new["addresses"] = [{"host": host, "value": value} for host, value in fragment.assigned]
    if fragment.features:
        new["supportedFeatures"] = [{"name": each} for each in fragment.features]
    if fragment.listeners:
        before = {each.get("name"): each for each in _list(status.get("listeners"))}
        new["listeners"] = [
            {
                "name": each.name,
                "supportedKinds": [],
                "attachedRoutes": each.attached_routes,
                "conditions": _conditions(
                    _list(before.get(each.name, {}).get("conditions")),
                    each.conditions,
                    generation,
                    now,
                ),
            }
            for each in fragment.listeners
        ]
    changed = {key: value for key, value in new.items() if status.get(key, []) != value}
    return changed or None


def _list(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _conditions(
    old: Iterable[Mapping[str, Any]],
    wanted: Iterable[Condition],
    generation: Any,
    now: str,
) -> list[dict[str, Any]]:
    before = {each.get("type"): each for each in old}
    found = []
    for each in wanted:
        known = before.get(each.type, {})
        is_same = known.get("status") == each.status and known.get("lastTransitionTime")
        condition = {
            "type": each.type,
            "status": each.status,
            "reason": each.reason,
            "message": each.message[:MAX_MESSAGE],
            "lastTransitionTime": known["lastTransitionTime"] if is_same else now,
        }
        if isinstance(generation, int):
            condition["observedGeneration"] = generation
        found.append(condition)
    return found


def _parents(
    old: Any, wanted: Iterable[ParentStatus], generation: Any, now: str
) -> list[dict[str, Any]]:
    entries = _list(old)
    found = _foreign(entries)
    for each in wanted:
        ref = _parent_ref(each.parent)
        found.append(_entry("parentRef", ref, entries, each.conditions, generation, now))
    return found


def _ancestors(
    old: Any, wanted: Iterable[AncestorStatus], generation: Any, now: str
) -> list[dict[str, Any]]:
    entries = _list(old)
    found = _foreign(entries)
    for each in wanted:
        ref = {"group": "", "kind": each.target.kind, "name": each.target.name}
        if len(found) < MAX_ANCESTORS:
            found.append(_entry("ancestorRef", ref, entries, each.conditions, generation, now))
    return found


def _foreign(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in entries if each.get("controllerName") != WAYPOINT_CONTROLLER]


def _entry(
    key: str,
    ref: dict[str, Any],
    entries: list[dict[str, Any]],
    conditions: Iterable[Condition],
    generation: Any,
    now: str,
) -> dict[str, Any]:
    """Our entry for `ref`; conditions that stay keep their time."""
    mine = (
        entry
        for entry in entries
        if entry.get(key) == ref and entry.get("controllerName") == WAYPOINT_CONTROLLER
    )
    known = _list(next(mine, {}).get("conditions"))
    return {
        key: ref,
        "controllerName": WAYPOINT_CONTROLLER,
        "conditions": _conditions(known, conditions, generation, now),
    }


def _parent_ref(parent: ParentRef) -> dict[str, Any]:
    ref: dict[str, Any] = {
        "group": parent.group,
        "kind": parent.kind,
        "namespace": parent.namespace,
        "name": parent.name,
    }
    if parent.group != GATEWAY_GROUP and parent.port:
        ref["port"] = parent.port
    if parent.section:
        ref["sectionName"] = parent.section
    return ref
