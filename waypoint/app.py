"""The waypoint as one tree of nurseries. Read this first.

    main
    ├─ readiness, metrics, admin       15021, 15020, 15000
    ├─ reactor, timers, access log, upkeep
    ├─ certificate                     SecretManager: our own, fetched and renewed
    ├─ xDS                             fills the TrafficStore
    └─ tunnels                         15008, after the first xDS sync
       └─ one task per connection and per tunnel; a request has none unless it waits

SIGTERM drains: not ready any more, no new connections, tunnels say GOAWAY, HTTP connections end
with their current response; what is left at the deadline is cut.
"""

from __future__ import annotations

import functools
import json
import random
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import trio

from mesh import __version__, compiled
from mesh.errors import ConfigError, KernelError
from mesh.model.store import Changed
from mesh.reactor import Reactor
from mesh.runtime import lifecycle, log, metrics
from mesh.runtime.admin import (
    AdminApp,
    Readiness,
    Request,
    Response,
    admin_app,
    metrics_app,
    readiness_app,
)
from mesh.runtime.http_metrics import HttpMetrics
from mesh.runtime.lifecycle import Shutdown
from mesh.runtime.tracing import open_tracer
from mesh.runtime.tracing.attributes import resource
from mesh.secrets import SecretManager, fetch_certificate
from mesh.sockets import open_listener
from mesh.xds.client import NodeInfo, run_xds
from mesh.xds.endpoint import Endpoint, parse_address
from mesh.xds.translate import ADDRESS_TYPE, TRAFFIC_TYPE
from waypoint.assemble import Assembly
from waypoint.config import WaypointConfig
from waypoint.counters import Counters
from waypoint.explain import Explainer
from waypoint.filters.rate_limit.stores import Stores
from waypoint.filters.redact.audit import open_audit
from waypoint.filters.redact.keys import key_reader
from waypoint.inbound import Inbounds
from waypoint.proxy import Proxy
from waypoint.record import Journal
from waypoint.traffic import TrafficStore

# Services before what is done for them.
TYPES = (ADDRESS_TYPE, TRAFFIC_TYPE)
_log = log.get("app")


async def main(config: WaypointConfig, shutdown: Shutdown) -> None:
    """Run until asked to stop, then drain. Raises ConfigError, KernelError.

    If cancelled: every connection is cut.
    """
    _log.info("starting", version=__version__, compiled=compiled.in_use)
    lifecycle.raise_file_limit()
    xds, authority = _endpoints(config)
    registry = metrics.new_registry("waypoint", __version__)
    tracer = open_tracer(config, "waypoint", _described(config), registry)
    access = log.AccessLog()
    readiness = Readiness()
    certified = readiness.task("certificate")
    synced = readiness.task("state manager")
    ttl = int(config.secret_ttl_seconds)
    secrets = SecretManager(
        lambda each: fetch_certificate(authority.open, each, ttl, impersonate=False)
    )
    keys = key_reader(config.redaction_keys)
    stores = Stores(config.rate_limit_credentials, registry)
    rng = random.Random()  # noqa: S311 - draws faults, guards nothing
    assembly = Assembly(
        _now, rng, read_key=keys, stores=stores, domain=config.cluster_domain
    )  # fmt: skip
    store = TrafficStore(config.gateway, assembly.make_filters, assembly.make_route_filter)
    with Reactor(_report_bug) as reactor:
        async with trio.open_nursery() as nursery:
            audit = open_audit(config)
            journal = Journal(access, HttpMetrics(registry), audit)
            counters = Counters(registry)
            proxy = Proxy(config, store, reactor, secrets, journal, counters, nursery, tracer)
            inbounds = Inbounds(proxy)
            proxy.on_change = inbounds.rejudge
            start = nursery.start_soon
            pages = (
                (config.readiness_address, readiness_app(readiness)),
                (config.stats_address, metrics_app(registry)),
                (config.admin_address, _admin(proxy, inbounds, shutdown)),
            )
            await nursery.start(_serve_pages, pages, nursery)
            for task in (reactor.run, proxy.timers.run, access.run, secrets.run):
                start(task)
            if tracer is not None:
                start(tracer.run)
            if audit is not None:
                start(audit.run)
            start(metrics.watch_loop_lag, registry)
            start(stores.run)
            start(proxy.upstreams.sweep, config.idle_seconds)
            start(inbounds.watch)
            has_state = trio.Event()
            start(_run_xds, proxy, xds, metrics.XdsMetrics(registry), has_state)
            doors = trio.CancelScope()
            start(
                _run_tunnels,
                proxy,
                inbounds,
                doors,
                nursery,
                has_state,
                certified.done,
                synced.done,
            )
            try:
                await shutdown.wait()
                _log.info("draining", tunnels=inbounds.tunnel_count, seconds=config.drain_seconds)
                proxy.is_draining = True
                doors.cancel()
                inbounds.drain()
                with trio.move_on_after(config.drain_seconds):
                    await inbounds.wait_drained()
                proxy.upstreams.close()
                await proxy.dialler.pool.drain(0.2)
                nursery.cancel_scope.cancel()
            finally:
                proxy.dialler.close()


def _described(config: WaypointConfig) -> dict[str, str]:
    return resource(
        version=__version__,
        pod=config.pod_name,
        namespace=config.pod_namespace,
        node=config.node_name,
        cluster=config.cluster_id,
        **{"ambit.gateway": config.gateway},
    )


def _endpoints(config: WaypointConfig) -> tuple[Endpoint, Endpoint]:
    """xDS and the certificate authority."""
    xds_host, xds_port = parse_address(config.xds_address, "XDS_ADDRESS")
    ca_host, ca_port = parse_address(config.ca_address, "CA_ADDRESS")
    token, cluster = config.auth_token, config.cluster_id
    return (
        Endpoint(xds_host, xds_port, config.xds_root_ca, token, cluster),
        Endpoint(ca_host, ca_port, config.ca_root_ca, token, cluster),
    )


async def _run_xds(
    proxy: Proxy, endpoint: Endpoint, observer: metrics.XdsMetrics, has_state: trio.Event
) -> None:
    """Keep the Store filled."""
    waiting = set(TYPES)

    def changed(_change: Changed) -> None:
        proxy.changed()

    def ready(type_url: str) -> None:
        waiting.discard(type_url)
        if not waiting:
            has_state.set()

    config = proxy.config
    facts = {"CLUSTER_ID": config.cluster_id, "NETWORK": config.network, "GATEWAY": config.gateway}
    await run_xds(
        endpoint.open,
        NodeInfo(
            pod_name=config.pod_name,
            namespace=config.pod_namespace,
            node_name=config.node_name,
            addresses=tuple(config.instance_ip.split(",")),
            proxy_type="waypoint",
            cluster_domain=config.cluster_domain,
            metadata={name: value for name, value in facts.items() if value},
        ),
        proxy.store,
        on_change=changed,
        on_ready=ready,
        observer=observer,
        report=_report_xds,
        rng=proxy.rng,
        types=TYPES,
    )


def _report_xds(event: str, fields: Mapping[str, object]) -> None:
    failed = fields.get("error") or fields.get("reasons")
    (_log.warning if failed else _log.info)(event, **fields)


async def _run_tunnels(
    proxy: Proxy,
    inbounds: Inbounds,
    doors: trio.CancelScope,
    connections: trio.Nursery,
    has_state: trio.Event,
    certified: Any,
    synced: Any,
) -> None:
    """Tunnels are accepted only once policy is known: before that nothing could be judged."""
    with doors:
        await has_state.wait()
        _log.info("xds_synced")
        synced()
        await proxy.secrets.get(proxy.identity)
        certified()
        listener = _listen(proxy.config.hbone_address)[0]
        with listener:
            while True:
                await trio.lowlevel.wait_readable(listener)
                try:
                    sock, _ = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue
                except OSError as exc:
                    _log.warning("accept_failed", error=exc.strerror)
                    await trio.sleep(0.05)
                    continue
                sock.setblocking(False)
                connections.start_soon(lifecycle.guard, "tunnels", inbounds.serve, sock)


async def _serve_pages(
    pages: Sequence[tuple[str, AdminApp]],
    connections: trio.Nursery,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    async with trio.open_nursery() as nursery:
        for address, app in pages:
            serve = functools.partial(app.serve, _listen(address), connections=connections)
            await nursery.start(serve)
        task_status.started()


def _listen(address: str) -> list[socket.socket]:
    """Listeners for `host:port`; `localhost` is both loopback addresses."""
    host, found, port = address.rpartition(":")
    if not found or not port.isdigit():
        raise ConfigError(f"not an address: {address!r}", hint="give host:port")
    if host != "localhost":
        return [open_listener(int(port), host=host.strip("[]") or "::", shares_port=True)]
    listeners = [open_listener(int(port), host="127.0.0.1", shares_port=True)]
    if socket.has_ipv6:
        try:
            listeners.append(open_listener(int(port), host="::1", shares_port=True))
        except KernelError:
            _log.info("no_ipv6_loopback", address=address)
    return listeners


def _admin(proxy: Proxy, inbounds: Inbounds, shutdown: Shutdown) -> AdminApp:
    app = admin_app("waypoint", shutdown)

    async def config_dump(_: Request) -> Response:
        store = proxy.traffic
        body = {
            "version": __version__,
            "gateway": proxy.config.gateway,
            "identity": str(proxy.identity),
            "traffic": {
                each.key: {
                    "routes": [route.key for route in each.routes],
                    "authorizations": [f"{p.namespace}/{p.name}" for p in each.authorizations],
                    "rateLimits": [f"{p.namespace}/{p.name}" for p in each.rate_limits],
                    "redactions": [f"{p.namespace}/{p.name}" for p in each.redactions],
                }
                for each in store.configs()
            },
            "services": sorted(str(each.key) for each in store.services()),
            "workloads": sorted(each.uid for each in store.workloads()),
        }
        return Response(200, "application/json", json.dumps(body, indent=2).encode())

    app.route("/config_dump", config_dump)
    Explainer(proxy, inbounds.own).add_to(app)
    return app


def _report_bug(error: Exception, where: object) -> None:
    lifecycle.report_bug(f"reactor: {type(where).__name__}", error)


def _now() -> float:
    return datetime.now(UTC).timestamp()


def run() -> int:
    """The daemon, until it ends; its exit code."""
    return lifecycle.start(
        "waypoint", WaypointConfig, main, grace_seconds=lambda config: config.drain_seconds + 1.0
    )
