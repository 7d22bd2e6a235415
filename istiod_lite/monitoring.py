"""The controller's metrics: counts that are taken when Prometheus asks.

They are taken on the event loop, where the counted things live, and written out in a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio
from prometheus_client import CollectorRegistry, Gauge

from istiod_lite.ads import AdsService
from istiod_lite.index import ClusterIndex
from mesh.cluster.validate import Finding
from mesh.model.workload import Workload
from mesh.runtime import metrics
from mesh.runtime.admin import Request, Response


class Counts:
    """Handler of `/metrics`."""

    def __init__(
        self,
        registry: CollectorRegistry,
        index: ClusterIndex,
        ads: AdsService,
        findings: Callable[[], list[Finding]],
    ) -> None:
        self._registry = registry
        self._index = index
        self._ads = ads
        self._list_findings = findings
        self._resources = Gauge(
            "ambit_istiod_resources", "Resources that are told", ["type"], registry=registry
        )
        self._clients = Gauge("pilot_xds", "Connected xDS clients", registry=registry)
        self._rejects = Gauge(
            "ambit_istiod_rejects",
            "Responses refused by the clients that are connected now",
            registry=registry,
        )
        self._findings = Gauge(
            "ambit_istiod_findings", "Objects that are wrong or odd", registry=registry
        )

    def count(self) -> None:
        """Take the counts of this moment."""
        addresses = self._index.addresses.values()
        workloads = sum(isinstance(each, Workload) for each in addresses)
        self._resources.labels("workload").set(workloads)
        self._resources.labels("service").set(len(addresses) - workloads)
        self._resources.labels("policy").set(len(self._index.policies))
        clients = self._ads.clients()
        self._clients.set(len(clients))
        self._rejects.set(sum(each.nacks for client in clients for each in client.types.values()))
        self._findings.set(len(self._list_findings()))

    async def respond(self, request: Request) -> Response:
        """The exposition."""
        self.count()
        accept = request.headers.get("accept", "")
        body, content_type = await trio.to_thread.run_sync(
            partial(metrics.render, self._registry, accept)
        )
        return Response(200, content_type, body)
