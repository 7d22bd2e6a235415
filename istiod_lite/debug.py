"""What the controller shows of itself: who is connected and in step, what it says, what it found.

/debug/versionz    this controller's version; `lastKnownGoodOf` while its source is silent
/debug/syncz       each client, and per type what it was sent, acknowledged and refused
/debug/workloadz   the workloads, services and policies that are told, as values
/debug/trafficz    what each waypoint is told for each service
/debug/findings    what is wrong or odd, object by object; checks of the whole set included

They tell what the whole cluster is made of, so only callers from a loopback address are
answered: in a pod, whom the API server lets forward a port to it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any

import trio

from istiod_lite.ads import AdsService, ClientStatus
from istiod_lite.index import KINDS, ClusterIndex
from mesh import __version__
from mesh.cluster.api import Cluster, Object, Put, Source, Synced, VersionedCluster
from mesh.cluster.validate import Finding, check
from mesh.model.authorization import Authorization
from mesh.model.service import Service
from mesh.model.workload import NamespacedHostname, NetworkAddress, Workload
from mesh.runtime.admin import AdminApp, Request, Response
from mesh.xds.translate import TRAFFIC_TYPE

# How long a listing of the whole cluster may take.
_READ_SECONDS = 20.0


class DebugPages:
    """Handlers of the pages above."""

    def __init__(
        self,
        cluster: Cluster,
        index: ClusterIndex,
        ads: AdsService,
        findings: Callable[[], list[Finding]],
        saved_at: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._saved_at = saved_at
        self._cluster = cluster
        self._index = index
        self._ads = ads
        self._findings = findings

    def add_to(self, app: AdminApp) -> None:
        """Route them."""
        app.route("/debug/versionz", self.versionz, is_local=True)
        app.route("/debug/syncz", self.syncz, is_local=True)
        app.route("/debug/workloadz", self.workloadz, is_local=True)
        app.route("/debug/trafficz", self.trafficz, is_local=True)
        app.route("/debug/findings", self.findings, is_local=True)

    async def versionz(self, _request: Request) -> Response:
        """Which program this is; and since when the source is silent, if it is."""
        saved_at = self._saved_at()
        stale = {"lastKnownGoodOf": saved_at} if saved_at is not None else {}
        return Response.json({"version": __version__, **stale})

    async def syncz(self, _request: Request) -> Response:
        """The clients."""
        now = trio.current_time()
        return Response.json([_client(each, now) for each in self._ads.clients()])

    async def workloadz(self, _request: Request) -> Response:
        """What is told, as of the last publication."""
        current = self._ads.snapshot
        models = [
            entry.model
            for resources in (current.resources.values() if current is not None else ())
            for entry in resources.values()
        ]
        return Response.json(
            {
                "workloads": [plain(each) for each in models if isinstance(each, Workload)],
                "services": [plain(each) for each in models if isinstance(each, Service)],
                "policies": [plain(each) for each in models if isinstance(each, Authorization)],
            }
        )

    async def trafficz(self, _request: Request) -> Response:
        """What waypoints are told, as of the last publication."""
        current = self._ads.snapshot
        entries = current.of(TRAFFIC_TYPE).values() if current is not None else ()
        return Response.json([plain(each.model) for each in entries])

    async def findings(self, _request: Request) -> Response:
        """What was found while translating, and by looking at all objects together."""
        found = self._findings()
        said = {(each.ref, each.field, each.message) for each in found}
        objects: list[tuple[Object, Source | None]] = []
        # Without all of them, what only is not read yet would seem to be missing.
        with trio.move_on_after(_READ_SECONDS):
            objects = await _read_all(self._cluster)
        checked = await trio.to_thread.run_sync(check, objects, self._index.mesh.root_namespace)
        # An error of one object is in the first list already, in the words of its consequence.
        rejected = {each.ref for each in found}
        found += [
            each
            for each in checked
            if each.ref not in rejected and (each.ref, each.field, each.message) not in said
        ]
        return Response.json([_finding(each) for each in found])


async def _read_all(cluster: Cluster) -> list[tuple[Object, Source | None]]:
    objects: list[tuple[Object, Source | None]] = []
    # An API server is asked for what the checks look at; a directory is read whole anyway.
    kinds = (*KINDS, "ServiceAccount") if isinstance(cluster, VersionedCluster) else ()
    async with cluster.watch(kinds) as events:
        while not isinstance(event := await events.receive(), Synced):
            if isinstance(event, Put):
                objects.append((event.object, event.source))
    return objects


def _client(status: ClientStatus, now: float) -> dict[str, Any]:
    node = status.node
    return {
        "node": node.id if node else "",
        "nodeName": node.node_name if node else "",
        "peer": status.peer,
        "account": status.account,
        "proxyType": node.proxy_type if node else "",
        "version": _version(node.metadata) if node else "",
        "connectedSeconds": round(now - status.connected_at, 3),
        "answeredSeconds": round(now - status.answered_at, 3),
        "types": {
            type_url.rpartition("/")[2]: {
                "wildcard": each.is_wildcard,
                "resources": len(each.versions),
                "pending": each.pending,
                "inFlight": each.in_flight,
                "acked": each.acked,
                "nacks": each.nacks,
                "lastNack": each.last_nack,
                "refused": each.refused,
                "inSync": not each.pending and not each.in_flight and not each.refused,
            }
            for type_url, each in status.types.items()
        },
    }


def _version(metadata: Mapping[str, str]) -> str:
    return metadata.get("AMBIT_VERSION") or metadata.get("ISTIO_VERSION", "")


def _finding(finding: Finding) -> dict[str, Any]:
    place = finding.source.at(finding.field) if finding.source else None
    return {
        "severity": finding.severity.value,
        "object": str(finding.ref) if finding.ref else "",
        "field": finding.field,
        "message": finding.message,
        "hint": finding.hint,
        "source": str(place) if place else "",
    }


def plain(value: Any) -> Any:
    """A model as JSON: field by field in camel case, what is empty left out."""
    match value:
        case NamespacedHostname() | NetworkAddress():
            return str(value)
        case enum.Enum():
            return value.name
        case Mapping():
            return {str(key): plain(each) for key, each in value.items()}
        case tuple():
            return [plain(each) for each in value]
        case str() | int() | float() | None:
            return value
    fields = ((each.name, getattr(value, each.name)) for each in dataclasses.fields(value))
    return {_camel(name): plain(each) for name, each in fields if each not in ("", None, (), {})}


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(each.capitalize() for each in rest)
