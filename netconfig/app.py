"""The node agent as one tree of nurseries. Read this first.

    app.serve
    ├─ enrolments.run        one task per pod in our care (captive.run)
    ├─ pods.follow           the watch -> plan.reconcile -> enrolments.apply
    ├─ handoff.serve         node proxies, over ZDS
    ├─ cni                   the CNI plugin, over HTTP on a unix socket
    └─ health, metrics       8000 and 15014

Order of the start: the watch has told everything -> pods captured earlier are recognised ->
the plan is carried out, proxies get their snapshot, the plugin is answered. Ending it changes
nothing in any pod: what is captured stays captured, by rules and a proxy that live on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import trio
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

import mesh
from mesh import sockets
from mesh.cluster.api import Cluster, Ref
from mesh.cluster.open import open_cluster
from mesh.runtime import lifecycle, log, metrics
from mesh.runtime.admin import (
    AdminApp,
    Readiness,
    Request,
    Response,
    metrics_app,
    open_unix_listener,
)
from netconfig import nft
from netconfig.captive import CAPTURED, DRAINING, NEW, RECOGNISED, Timing
from netconfig.cni import PluginServer
from netconfig.config import NetconfigConfig
from netconfig.enrolment import Enrolments
from netconfig.handoff import HandOff
from netconfig.plan import reconcile
from netconfig.pods import KINDS, MountedNamespaces, NodePods
from netconfig.processes import FirstOf, ProcessNamespaces

_log = log.get("netconfig")


async def run(config: NetconfigConfig, shutdown: lifecycle.Shutdown) -> None:
    """The whole daemon, until it is asked to end. Raises ConfigError, KernelError."""
    lifecycle.raise_file_limit()
    nft.check_library()
    cluster = open_cluster(
        config.cluster(),
        kinds=KINDS,
        selectors={"Pod": f"spec.nodeName={config.node_name}"},
        manager="ambit-netconfig",
        report=lambda event, fields: _log.info(event, **fields),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, config, cluster)
        await shutdown.wait()
        nursery.cancel_scope.cancel()
    _log.info("stopped")


async def serve(config: NetconfigConfig, cluster: Cluster) -> None:
    """Serve this node on `cluster`. Never returns. If cancelled: pods stay as they are."""
    selection = config.selection()
    pods = NodePods(config.node_name)
    handoff = HandOff(on_connected=lambda: enrolments.retry_all())
    timing = Timing(config.drain_seconds, config.drain_settle_seconds, config.drift_seconds)
    finder = FirstOf([MountedNamespaces(config.netns_dir), ProcessNamespaces()])
    enrolments = Enrolments(cluster, pods, finder, handoff, timing)
    plugin = PluginServer(cluster, pods, enrolments, selection, config.cni_deadline_seconds)
    readiness = Readiness()
    is_recognised = False

    def on_change(changed: frozenset[Ref]) -> None:
        if is_recognised:
            actions = reconcile(pods.all(), pods.namespaces, enrolments.intents(), selection)
            enrolments.apply(actions)
            enrolments.look_again(changed)

    started = readiness.task("cluster")
    async with trio.open_nursery() as nursery:
        await _serve_health(nursery, config, readiness, enrolments, handoff)
        await nursery.start(enrolments.run)
        # The socket first: a proxy may connect while we learn what to tell it.
        await nursery.start(handoff.serve, config.ztunnel_uds_address)
        await nursery.start(pods.follow, cluster, on_change)
        await enrolments.recognise()
        is_recognised = True
        on_change(frozenset())
        handoff.begin()
        nursery.start_soon(plugin.app().serve, [open_unix_listener(config.plugin_socket)])
        started.done()
        _log.info("started", node=config.node_name, pods=len(pods.all()))


async def _serve_health(
    nursery: trio.Nursery,
    config: NetconfigConfig,
    readiness: Readiness,
    enrolments: Enrolments,
    handoff: HandOff,
) -> None:
    async def alive(_request: Request) -> Response:
        return Response.text("ok")

    async def debug(_request: Request) -> Response:
        return Response.json({"proxies": handoff.connected, "pods": enrolments.describe()})

    health = AdminApp("health")
    health.route("/healthz", alive)
    health.route("/readyz", readiness.respond)
    health.route("/debug/pods", debug)
    registry = metrics.new_registry("netconfig", mesh.__version__)
    registry.register(_Pods(enrolments, handoff))
    for app, port in (
        (health, config.health_port),
        (metrics_app(registry), config.monitoring_port),
    ):
        if port:
            nursery.start_soon(app.serve, [sockets.open_listener(port)])


class _Pods(Collector):
    """Counts, taken when they are asked for."""

    def __init__(self, enrolments: Enrolments, handoff: HandOff) -> None:
        self._enrolments = enrolments
        self._handoff = handoff

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        pods = GaugeMetricFamily(
            "ambit_netconfig_pods", "Pods in the node agent's care", labels=["state"]
        )
        count = Counter(self._enrolments.states())
        for state in (NEW, RECOGNISED, CAPTURED, DRAINING):
            pods.add_metric([state], count[state])
        yield pods
        yield GaugeMetricFamily(
            "ambit_netconfig_proxies", "Node proxies connected", self._handoff.connected
        )
        yield CounterMetricFamily(
            "ambit_netconfig_repairs", "Rules found changed and repaired", self._enrolments.repairs
        )
