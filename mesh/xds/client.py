"""The xDS client's shell: connect, feed the delta machine, apply to the store, back off.

`run_xds` never returns. What the store holds outlives every connection; a new stream tells
the server the versions held and receives only differences. A node proxy keeps working on
its last state while the control plane is away.

Also here: what a node proxy says of itself (`NodeInfo`) and the metadata of its calls to
the control plane (`call_metadata`), which its certificate requests carry too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NoReturn,
    Protocol,
    assert_never,
    runtime_checkable,
)

import trio

from mesh import __version__
from mesh.errors import ConfigError, LocalProtocolError, MeshError
from mesh.grpc.client import Channel, ClientStream
from mesh.grpc.codec import Code, GrpcError, Method
from mesh.model.authorization import Authorization
from mesh.model.service import Service
from mesh.model.workload import Workload
from mesh.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node
from mesh.retry import Backoff, Random
from mesh.xds.delta import Apply, DeltaClient, Ready, Rejected, Send
from mesh.xds.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE, TRAFFIC_TYPE

if TYPE_CHECKING:
    from mesh.model.l7_policy import TrafficConfig

DELTA_AGGREGATED_RESOURCES = Method(
    path="/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
    request=DeltaDiscoveryRequest,
    response=DeltaDiscoveryResponse,
    kind="stream",
)
# Opened in this order: a policy may name workloads, never the reverse.
TYPES = (ADDRESS_TYPE, AUTHORIZATION_TYPE)
MAX_TOKEN_BYTES = 16 * 1024
_RECONNECT_SECONDS = 0.01
_BENIGN = frozenset({Code.UNKNOWN, Code.CANCELLED, Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE})
_JWT = re.compile(r"[\w-]+\.[\w-]+\.[\w-]*", re.ASCII)

ChannelFactory = Callable[[], AbstractAsyncContextManager[Channel]]
Reason = Literal["ConnectionError", "Error", "Reconnect", "Complete"]


class ResourceStore(Protocol):
    """Where resources go; the return values are handed to `on_change`. One that is also a
    `TrafficSink` can be filled with TrafficConfigs.
    """

    def apply_addresses(self, updated: Sequence[Workload | Service], removed: Sequence[str]) -> Any:
        """Insert or replace, then remove by name."""
        ...

    def apply_policies(self, updated: Sequence[Authorization], removed: Sequence[str]) -> Any:
        """Insert or replace, then remove by name."""
        ...


@runtime_checkable
class TrafficSink(Protocol):
    """Where a waypoint's own resources go."""

    def apply_traffic(self, updated: Sequence[TrafficConfig], removed: Sequence[str]) -> Any:
        """Insert or replace, then remove by name."""
        ...


class Observer(Protocol):
    """Counts what happens, as `mesh.runtime.metrics.XdsMetrics` does."""

    def connected(self) -> None:
        """A connection is open."""
        ...

    def terminated(self, reason: Reason) -> None:
        """A connection ended, or could not be opened."""
        ...

    def message(self, url: str, size_bytes: int) -> None:
        """A response arrived."""
        ...

    def rejected(self, url: str) -> None:
        """A response was answered with NACK."""
        ...


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Who dials: the pod of a node proxy, its address and node.

    `metadata` is added to the four standard fields and our version (values: strings, or parsed
    JSON).
    """

    pod_name: str
    namespace: str
    node_name: str
    addresses: Sequence[str] = ("1.1.1.1",)
    proxy_type: str = "ztunnel"
    cluster_domain: str = "cluster.local"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def message(self) -> Node:
        """The Node of the first requests."""
        name = f"{self.pod_name}.{self.namespace}"
        domain = f"{self.namespace}.svc.{self.cluster_domain}"
        node = Node(id=f"{self.proxy_type}~{self.addresses[0]}~{name}~{domain}")
        node.metadata.update(
            {
                "NAME": self.pod_name,
                "NAMESPACE": self.namespace,
                "INSTANCE_IPS": ",".join(self.addresses),
                "NODE_NAME": self.node_name,
                "AMBIT_VERSION": __version__,
                **self.metadata,
            }
        )
        return node


def call_metadata(
    auth_token: str, cluster_id: str, extra: Mapping[str, str] | None = None
) -> Callable[[], dict[str, str]]:
    """A provider of the metadata of each call: bearer token, cluster id, `extra`.

    `auth_token` is the path of a token file, read anew for each call because tokens rotate,
    or a literal JWT. Without a file the call carries neither token nor cluster id.
    The provider raises ConfigError when the file cannot be used.
    """

    def provide() -> dict[str, str]:
        token = auth_token if _JWT.fullmatch(auth_token) else _read_token(Path(auth_token))
        fields = dict(extra or {})
        if token:
            fields["authorization"] = f"Bearer {token}"
            fields["clusterid"] = cluster_id
        return fields

    return provide


async def run_xds(
    channel_factory: ChannelFactory,
    node: NodeInfo,
    store: ResourceStore,
    *,
    on_change: Callable[[Any], None],
    on_ready: Callable[[str], None] = lambda _type_url: None,
    observer: Observer | None = None,
    report: Callable[[str, Mapping[str, object]], None] = lambda _event, _fields: None,
    rng: Random | None = None,
    types: Sequence[str] = TYPES,
) -> NoReturn:
    """Keep `store` as the control plane says, for ever: resources of `types`, opened in order.

    `on_change` gets what the store returned for each response; `on_ready` the type URL of
    each type once its first response was accepted. `report` takes an event name and fields,
    for a log. Raises only bugs: each failure is retried, a fresh connection failure after
    10 ms, doubling up to 15 s. If cancelled: the connection is closed, the store stays.
    """
    shell = _Shell(DeltaClient(node.message(), types), store, on_change, on_ready, observer, report)
    # Not for secrets: it spreads reconnects.
    backoff = Backoff(rng if rng is not None else random.Random())  # noqa: S311
    while True:
        shell.got_response = False
        failure: MeshError | None = None
        is_connected = False
        try:
            async with channel_factory() as channel:
                is_connected = True
                if observer is not None:
                    observer.connected()
                report("xds_connected", {})
                await shell.converse(channel)
        except MeshError as exc:
            failure = exc
        finally:
            shell.client.stop()
        if isinstance(failure, LocalProtocolError):
            raise failure
        if shell.got_response:
            backoff.reset()
        # An end of a stream that worked is routine: come back at once, but never spin.
        is_benign = shell.got_response and _is_benign(failure)
        delay = _RECONNECT_SECONDS if is_benign else backoff.next()
        if observer is not None:
            observer.terminated(_reason(failure, is_connected=is_connected, is_benign=is_benign))
        report(
            "xds_disconnected",
            {
                "error": str(failure) if failure is not None else "",
                "hint": failure.hint if failure is not None else "",
                "retry_seconds": round(delay, 3),
            },
        )
        await trio.sleep(delay)


class _Shell:
    """Performs the machine's commands on one stream after the other."""

    def __init__(
        self,
        client: DeltaClient,
        store: ResourceStore,
        on_change: Callable[[Any], None],
        on_ready: Callable[[str], None],
        observer: Observer | None,
        report: Callable[[str, Mapping[str, object]], None],
    ) -> None:
        self.client = client
        self.got_response = False
        self._store = store
        self._on_change = on_change
        self._on_ready = on_ready
        self._observer = observer
        self._report = report

    async def converse(self, channel: Channel) -> None:
        """One stream to its end. Raises MeshError."""
        async with channel.stream(DELTA_AGGREGATED_RESOURCES) as stream:
            for command in self.client.start():
                await self._perform(command, stream)
            async for response in stream:
                self.got_response = True
                if self._observer is not None:
                    self._observer.message(response.type_url, response.ByteSize())
                for command in self.client.receive(response):
                    await self._perform(command, stream)

    async def _perform(
        self,
        command: Send | Apply | Rejected | Ready,
        stream: ClientStream[DeltaDiscoveryRequest, DeltaDiscoveryResponse],
    ) -> None:
        match command:
            case Send(request):
                await stream.send(request)
            case Apply():
                self._apply(command)
            case Rejected(type_url, reasons):
                if self._observer is not None:
                    self._observer.rejected(type_url)
                self._report("resource_rejected", {"type": type_url, "reasons": list(reasons)})
            case Ready(type_url):
                self._on_ready(type_url)
            case _:
                assert_never(command)

    def _apply(self, command: Apply) -> None:
        if command.type_url == TRAFFIC_TYPE:
            if not isinstance(self._store, TrafficSink):
                raise LocalProtocolError("this store takes no TrafficConfig")
            configs = [
                r for r in command.updated if not isinstance(r, Workload | Service | Authorization)
            ]
            changed = self._store.apply_traffic(configs, command.removed)
        elif command.type_url == ADDRESS_TYPE:
            addresses = [r for r in command.updated if isinstance(r, Workload | Service)]
            changed = self._store.apply_addresses(addresses, command.removed)
        else:
            policies = [r for r in command.updated if isinstance(r, Authorization)]
            changed = self._store.apply_policies(policies, command.removed)
        self._on_change(changed)


def _is_benign(failure: MeshError | None) -> bool:
    return failure is None or (isinstance(failure, GrpcError) and failure.code in _BENIGN)


def _reason(failure: MeshError | None, *, is_connected: bool, is_benign: bool) -> Reason:
    if failure is None:
        return "Complete"
    if not is_connected or not isinstance(failure, GrpcError):
        return "ConnectionError"
    return "Reconnect" if is_benign else "Error"


def _read_token(path: Path) -> str:
    """The token, stripped: a newline at the end would break the header. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TOKEN_BYTES + 1)
    except FileNotFoundError:
        return ""
    except OSError as exc:
        raise ConfigError(f"the token cannot be read: {exc.strerror}", file=str(path)) from exc
    try:
        token = content.decode("ascii").strip()
    except UnicodeDecodeError as exc:
        raise ConfigError("the token is not text", file=str(path)) from exc
    if len(content) > MAX_TOKEN_BYTES or not token.isprintable() or " " in token:
        raise ConfigError("the token file does not hold one token", file=str(path))
    return token
