"""The node proxy as one tree of nurseries. Read this first.

    main
    ├─ readiness, metrics, admin       15021, 15020, 15000 in our own namespace
    ├─ reactor, access log, metrics' upkeep
    ├─ certificates                    SecretManager: fetch and renew
    ├─ connections                     judged again when policy changes
    ├─ xDS                             fills the Store
    └─ pods                            after the first xDS sync: ZDS, then per pod
       └─ PodProxy                     15001, 15006, 15008, 15053 inside the pod
          └─ one task per connection

Cancelling a branch cuts what hangs on it. SIGTERM drains: we accept no more, tunnels say
GOAWAY, connections may finish until the deadline. The pods' listeners stay open meanwhile, and
after us, because the node agent has duplicates: our successor goes on accepting from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import trio

from mesh import __version__, compiled
from mesh.hbone.held import HeldBytes
from mesh.http.receive_windows import WindowBudget
from mesh.model.store import Changed, Store
from mesh.reactor import Reactor
from mesh.runtime import lifecycle, log, memory, metrics
from mesh.runtime.admin import Readiness, metrics_app, readiness_app
from mesh.runtime.lifecycle import Shutdown
from mesh.runtime.tcp_metrics import TcpMetrics
from mesh.runtime.tracing import Tracer, open_tracer
from mesh.runtime.tracing.attributes import resource
from mesh.secrets import SecretManager, fetch_certificate
from mesh.xds.client import TYPES, NodeInfo, run_xds
from mesh.xds.endpoint import Endpoint, parse_address
from ztunnel.admin import make_admin, serve_pages
from ztunnel.config import ZtunnelConfig
from ztunnel.connections import Connections, Judges
from ztunnel.dns import read_resolv_conf
from ztunnel.dns_plan import Names
from ztunnel.monitoring import Gauges
from ztunnel.node import Node
from ztunnel.pods import Pods
from ztunnel.prefetch import NodeIdentities
from ztunnel.record import Journal
from ztunnel.spans import end_span

_log = log.get("app")

# What stalled readers may hold: all that was granted, and the first windows of a thousand tunnels.
_HELD_PER_WINDOW_BUDGET = 4


async def main(config: ZtunnelConfig, shutdown: Shutdown) -> None:
    """Run until asked to stop, then drain. Raises ConfigError, KernelError.

    If cancelled: every connection is cut.
    """
    lifecycle.raise_file_limit()
    _log.info("starting", version=__version__, compiled=compiled.in_use)
    xds, authority = _endpoints(config)
    registry = metrics.new_registry("ztunnel", __version__)
    tracer = open_tracer(config, "ztunnel", _described(config), registry)
    tcp_metrics = TcpMetrics(registry)
    access = log.AccessLog()
    readiness = Readiness()
    synced = readiness.task("state manager")
    with Reactor(_report_bug) as reactor:
        journal = Journal(access, tcp_metrics, end_span)
        node = _node(config, reactor, authority, journal, registry, tracer)
        pods = Pods(node, metrics.WorkloadManagerMetrics(registry), readiness)
        gauges = Gauges(registry, node.secrets, access, pods.pools)
        async with trio.open_nursery() as nursery:
            start = nursery.start_soon
            pages = (
                (config.readiness_address, readiness_app(readiness)),
                (config.stats_address, metrics_app(registry, gauges.count)),
                (config.admin_address, make_admin(node, pods, shutdown)),
            )
            doors = trio.CancelScope()
            await nursery.start(serve_pages, pages, doors, nursery)
            start(reactor.run)
            start(access.run)
            start(metrics.expire_idle, tcp_metrics, node.dns_metrics)
            start(metrics.watch_loop_lag, registry)
            start(memory.keep_small)
            if tracer is not None:
                start(tracer.run)
            start(node.secrets.run)
            start(node.connections.run)
            has_state = trio.Event()
            start(_run_xds, node, xds, metrics.XdsMetrics(registry), has_state)
            start(_run_pods, pods, has_state, synced.done)
            await shutdown.wait()
            _log.info("draining", connections=len(node.connections), seconds=config.drain_seconds)
            # Whoever asks from now on means our successor.
            doors.cancel()
            await pods.drain(config.drain_seconds)
            nursery.cancel_scope.cancel()


def _described(config: ZtunnelConfig) -> dict[str, str]:
    return resource(
        version=__version__,
        pod=config.pod_name,
        namespace=config.pod_namespace,
        node=config.node_name,
        cluster=config.cluster_id,
    )


def _endpoints(config: ZtunnelConfig) -> tuple[Endpoint, Endpoint]:
    """xDS and the certificate authority."""
    xds_host, xds_port = parse_address(config.xds_address, "XDS_ADDRESS")
    ca_host, ca_port = parse_address(config.ca_address, "CA_ADDRESS")
    token, cluster = config.auth_token, config.cluster_id
    return (
        Endpoint(xds_host, xds_port, config.xds_root_ca, token, cluster),
        Endpoint(ca_host, ca_port, config.ca_root_ca, token, cluster),
    )


def _node(
    config: ZtunnelConfig,
    reactor: Reactor,
    authority: Endpoint,
    journal: Journal,
    registry: Any,
    tracer: Tracer | None,
) -> Node:
    store = Store()
    judges = Judges(store)
    ttl = int(config.secret_ttl_seconds)
    return Node(
        config=config,
        store=store,
        reactor=reactor,
        secrets=SecretManager(lambda each: fetch_certificate(authority.open, each, ttl)),
        judges=judges,
        connections=Connections(store, judges, journal),
        dns_metrics=metrics.DnsMetrics(registry),
        names=Names(config.cluster_domain, config.preferred_namespace),
        dns_servers=read_resolv_conf(config.resolv_conf) if config.dns_capture else (),
        tracer=tracer,
        windows=WindowBudget(config.window_budget_bytes),
        held=HeldBytes(_HELD_PER_WINDOW_BUDGET * config.window_budget_bytes),
    )


async def _run_xds(
    node: Node, endpoint: Endpoint, observer: metrics.XdsMetrics, has_state: trio.Event
) -> None:
    """Keep the Store filled; what a change concerns is told to whom it concerns."""
    identities = NodeIdentities(node.config.node_name)

    def changed(change: Changed) -> None:
        needs = identities.changed(change.workloads, node.store)
        for identity in needs.fetch:
            node.secrets.prefetch(identity)
        for identity in needs.drop:
            node.secrets.forget(identity)
            node.contexts.forget(identity)
        node.connections.changed(change)
        node.watch.notify()

    waiting = set(TYPES)

    def ready(type_url: str) -> None:
        waiting.discard(type_url)
        if not waiting:
            has_state.set()

    config = node.config
    await run_xds(
        endpoint.open,
        NodeInfo(
            pod_name=config.pod_name,
            namespace=config.pod_namespace,
            node_name=config.node_name,
            addresses=tuple(config.instance_ip.split(",")),
            cluster_domain=config.cluster_domain,
            metadata=_metadata(config),
        ),
        node.store,
        on_change=changed,
        on_ready=ready,
        observer=observer,
        report=_report_xds,
        rng=node.rng,
    )


def _report_xds(event: str, fields: Mapping[str, object]) -> None:
    failed = fields.get("error") or fields.get("reasons")
    (_log.warning if failed else _log.info)(event, **fields)


def _metadata(config: ZtunnelConfig) -> dict[str, str]:
    """What the controller may want to know besides the standard fields."""
    facts = {"CLUSTER_ID": config.cluster_id, "NETWORK": config.network}
    return {name: value for name, value in facts.items() if value}


async def _run_pods(pods: Pods, has_state: trio.Event, synced: Any) -> None:
    """Pods are served only once policy is known: before that nothing could be judged."""
    await has_state.wait()
    _log.info("xds_synced")
    synced()
    await pods.run()


def _report_bug(error: Exception, where: object) -> None:
    lifecycle.report_bug(f"reactor: {type(where).__name__}", error)


def run() -> int:
    """The daemon; its exit code."""
    return lifecycle.start(
        "ztunnel", ZtunnelConfig, main, grace_seconds=lambda config: config.drain_seconds + 1.0
    )
