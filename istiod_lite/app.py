"""The controller as one tree of nurseries. Read this first.

    app.serve
    ├─ last_known_good.follow  what an earlier process knew, where the source is silent, until
    │  └─ publisher.follow     the watch -> index -> snapshot -> ads.publish
    ├─ last_known_good.keep    what is published -> a file
    ├─ seat.follow_keys        the public keys of tokens, for when nobody can be asked
    ├─ seat.write              on one replica only:
    │  ├─ root_certificate.run ConfigMap istio-ca-root-cert in every namespace
    │  ├─ waypoint_writer.run  ServiceAccount, Service, Deployment of each waypoint Gateway
    │  └─ status_writer.run    conditions of Gateways, routes, Services, policies
    ├─ serve_grpc              15012: xDS and certificates, over TLS
    └─ monitoring              15014: /ready, /metrics, /debug

It is ready when everything that the cluster had is published, the root certificate is out
and 15012 is open; or when what was last known is served instead. SIGTERM: streams end with
UNAVAILABLE (clients reconnect elsewhere, or later, with the versions they hold), calls get a
few seconds, then the process ends.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

import trio

import mesh
from istiod_lite import providers
from istiod_lite.ads import AdsService
from istiod_lite.authority import Authority
from istiod_lite.certificates import CertificateService
from istiod_lite.config import IstiodConfig
from istiod_lite.debug import DebugPages
from istiod_lite.index import KINDS, ClusterIndex
from istiod_lite.last_known_good import LastKnownGood
from istiod_lite.monitoring import Counts
from istiod_lite.publisher import Publisher
from istiod_lite.root_certificate import RootCertificate
from istiod_lite.seat import Seat
from istiod_lite.status_writer import StatusWriter
from istiod_lite.waypoint_writer import FIELD_MANAGER, WaypointWriter
from mesh import sockets
from mesh.cluster.api import Cluster
from mesh.cluster.open import open_cluster
from mesh.cluster.validate import Finding
from mesh.errors import MeshError
from mesh.grpc.server import serve_grpc
from mesh.runtime import lifecycle, log, memory, metrics
from mesh.runtime.admin import AdminApp, Readiness
from mesh.secrets import CREATE_CERTIFICATE
from mesh.tls.context import control_plane_server
from mesh.xds.client import DELTA_AGGREGATED_RESOURCES

# How long the end may take to save the state once more.
_LAST_SAVE_SECONDS = 2.0
_log = log.get("istiod")


async def run(config: IstiodConfig, shutdown: lifecycle.Shutdown) -> None:
    """The whole daemon, until it has drained. Raises ConfigError, KernelError."""
    cluster = open_cluster(
        config.cluster(),
        kinds=KINDS,
        **providers.scope(config.root_namespace),
        manager=FIELD_MANAGER,
        report=lambda event, fields: _log.info(event, **fields),
    )
    await serve(config, cluster, shutdown)
    _log.info("stopped")


async def serve(config: IstiodConfig, cluster: Cluster, shutdown: lifecycle.Shutdown) -> None:
    """Serve on `cluster` until `shutdown` is requested and the calls are over.

    If cancelled: everything is closed at once.
    """
    seat = Seat(config, cluster, _now)
    authority = await seat.authority()
    registry = metrics.new_registry("istiod", mesh.__version__)
    index = ClusterIndex(config.mesh())
    authenticator = seat.authenticator(lambda: state)
    ads = AdsService(authenticator, on_answer=lambda: status.look())
    state = LastKnownGood(
        config.saved_state(),
        index,
        ads,
        registry,
        _now,
        wait_seconds=config.state_wait_seconds,
        max_age_seconds=config.state_max_age_seconds,
    )
    waypoints = WaypointWriter(config.waypoints(), on_contest=lambda: status.look())
    status = StatusWriter(index, ads, _now, lambda: waypoints.contested)
    root = RootCertificate(authority.root_pem, config.root_namespace, index.namespaces)

    def on_push() -> None:
        root.look()
        status.look()
        state.look()

    def findings() -> list[Finding]:
        return [*state.findings(), *publisher.findings()]

    publisher = Publisher(index, ads, registry, on_push=on_push)
    counts = Counts(registry, index, ads, findings)
    readiness = Readiness()
    tasks = {name: readiness.task(name) for name in ("cluster", "root certificate", "xds")}

    async with trio.open_nursery() as nursery:
        app = AdminApp("monitoring")
        app.route("/ready", readiness.respond)
        app.route("/metrics", counts.respond)
        DebugPages(cluster, index, ads, findings, lambda: state.saved_at).add_to(app)
        if config.monitoring_port:
            listener = sockets.open_listener(config.monitoring_port, host=config.monitoring_host)
            await nursery.start(app.serve, [listener])
            nursery.start_soon(metrics.watch_loop_lag, registry)
        published = tasks["root certificate"].done
        follow = partial(publisher.follow, cluster)
        await nursery.start(state.follow, follow, published)
        tasks["cluster"].done()
        memory.settle_objects()
        nursery.start_soon(state.keep)
        nursery.start_soon(seat.follow_keys, state)

        async def write() -> None:
            await state.synced.wait()  # what is only remembered is nothing to write by
            writing = partial(_write, cluster, root, waypoints, status, published)
            await seat.write(writing, published)

        nursery.start_soon(write)
        certificates = CertificateService(
            authority,
            authenticator,
            state,
            trusted_accounts=config.ca_trusted_node_accounts,
            clock=_now,
        )
        async with trio.open_nursery() as calls:
            await calls.start(_serve_calls, config, authority, ads, certificates, shutdown)
            tasks["xds"].done()
            _log.info("started", port=config.xds_port, resources=len(index.addresses))
        with trio.move_on_after(_LAST_SAVE_SECONDS):
            await state.save()
        nursery.cancel_scope.cancel()


async def _write(
    cluster: Cluster,
    root: RootCertificate,
    waypoints: WaypointWriter,
    status: StatusWriter,
    published: Callable[[], None],
) -> None:
    """What one controller of all writes, for ever."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(root.run, cluster, published)
        nursery.start_soon(waypoints.run, cluster)
        nursery.start_soon(status.run, cluster)


async def _serve_calls(
    config: IstiodConfig,
    authority: Authority,
    ads: AdsService,
    certificates: CertificateService,
    shutdown: lifecycle.Shutdown,
    *,
    task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED,
) -> None:
    names = config.serving_names()
    context = control_plane_server(*authority.serving_certificate(names, _now()))
    await serve_grpc(
        sockets.open_listener(config.xds_port, host=config.xds_host),
        context,
        {DELTA_AGGREGATED_RESOURCES: ads.delta, CREATE_CERTIFICATE: certificates.create},
        drain=shutdown.requested,
        grace_seconds=max(0.0, config.drain_seconds - 1.0),
        supervise=lifecycle.supervise,
        on_failure=_on_failure,
        task_status=task_status,
    )


def _on_failure(peer: sockets.SocketAddress, error: MeshError) -> None:
    _log.info("connection_failed", peer=str(peer), error=str(error))


def _now() -> float:
    return datetime.now(UTC).timestamp()
