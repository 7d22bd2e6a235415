"""Delta ADS as a machine: what one client has, wants, and must be sent next. Sans-IO.

`ClientState` keeps, per type, the versions the client has and the names that may differ.
At most one response per type is in flight; what changes meanwhile only marks names, and
marks are bounded by what the client holds plus what exists. A client that stops reading
costs no growing memory, and when it acknowledges it gets the newest state, not the history.

A NACK is remembered and reported; nothing is sent again before the resource changes,
because the client would refuse it again. Wildcard clients get everything; on-demand
clients get what their keys resolve to, and each key is answered, in `removed_resources`
when it is unknown or is not the name of a resource (clients wait for the key itself).
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from istiod_lite.held_versions import HeldVersions
from istiod_lite.snapshot import TYPES, Delta, Snapshot
from mesh.errors import RemoteProtocolError
from mesh.grpc.codec import Serialized
from mesh.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node
from mesh.xds.translate import ADDRESS_TYPE, TRAFFIC_TYPE

MAX_TYPES = 8
MAX_KEYS = 100_000
MAX_NAME_LENGTH = 2048
MAX_NACK_TEXT = 4096
_WILDCARD = "*"
_CONTROL_PLANE = "ambit"


@dataclass(frozen=True, slots=True)
class ClientNode:
    """Who a client says it is. Claims, until compared with its token."""

    id: str
    proxy_type: str
    address: str
    pod: str
    namespace: str
    node_name: str
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TypeStatus:
    """One client's standing with one type, for listings. `versions` is name to version."""

    is_wildcard: bool
    versions: Mapping[str, str]
    pending: int
    in_flight: str
    acked: str
    nacks: int
    last_nack: str
    refused: int = 0


class Holding(enum.Enum):
    """How far one resource is with one client."""

    HELD = "held"
    PENDING = "pending"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Share:
    """Of `total` proxies `held` have acknowledged something; `refusal` is what one said."""

    held: int
    total: int
    refusal: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether there are proxies, and all of them have it."""
        return 0 < self.total == self.held


@dataclass(slots=True)
class _Subscription:
    is_wildcard: bool
    # What the client has, as far as we know: claimed at first, then as sent.
    sent: HeldVersions
    dirty: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    unanswered: set[str] = field(default_factory=set)
    is_first: bool = True
    in_flight: str = ""
    # Names in the response that is in flight, and those of refused ones with their versions.
    unconfirmed: frozenset[str] = frozenset()
    refused: dict[str, str] = field(default_factory=dict)
    acked: str = ""
    nacks: int = 0
    last_nack: str = ""


class ClientState:
    """One stream. `snapshot` is None until the controller knows the cluster: nothing is
    answered before, because an early empty answer would read as "everything is gone".

    `account` is the caller's `namespace/service-account`, by its token: a waypoint is told the
    TrafficConfigs of the Gateway of that name, and nobody any other. None sees all: for tests.
    """

    def __init__(self, snapshot: Snapshot | None = None, account: str | None = None) -> None:
        self._account = account
        self.node: ClientNode | None = None
        self._snapshot = snapshot
        self._types: dict[str, _Subscription] = {}
        self._nonce = 0

    def receive(self, request: DeltaDiscoveryRequest) -> None:
        """A request: subscription, ACK or NACK. Raises RemoteProtocolError."""
        if self.node is None:
            self.node = parse_node(request.node)
        subscription = self._types.get(request.type_url)
        if subscription is None:
            self._open(request)
            return
        if request.response_nonce and request.response_nonce == subscription.in_flight:
            subscription.in_flight = ""
            if subscription.refused:
                for name in subscription.unconfirmed:
                    subscription.refused.pop(name, None)
            if request.HasField("error_detail"):
                subscription.nacks += 1
                subscription.last_nack = request.error_detail.message[:MAX_NACK_TEXT]
                sent = subscription.sent
                for name in subscription.unconfirmed:
                    if (version := sent.get(name)) is not None:
                        subscription.refused[name] = version
            else:
                subscription.acked = request.response_nonce
            subscription.unconfirmed = frozenset()
        if request.resource_names_subscribe or request.resource_names_unsubscribe:
            self._change(subscription, request)
            self._mark_all(request.type_url, subscription)

    def offer(self, snapshot: Snapshot, deltas: Mapping[str, Delta]) -> None:
        """A new snapshot and how it differs from the one offered before."""
        is_first = self._snapshot is None
        self._snapshot = snapshot
        for type_url, subscription in self._types.items():
            if is_first or not subscription.is_wildcard:
                self._mark_all(type_url, subscription)
            elif (delta := deltas.get(type_url)) is not None:
                subscription.dirty |= delta.changed & self._visible(type_url, snapshot)
                for name in delta.removed:
                    # A resource that came and went unseen needs no word at all.
                    if name in subscription.sent:
                        subscription.dirty.add(name)
                    else:
                        subscription.dirty.discard(name)

    def responses(self) -> list[DeltaDiscoveryResponse]:
        """As `answers`, all of them as messages."""
        return [DeltaDiscoveryResponse.FromString(b"".join(each.parts)) for each in self.answers()]

    def answers(self) -> list[Serialized]:
        """What to send now; calling it commits to sending it, in this order."""
        if self._snapshot is None:
            return []
        known = [type_url for type_url in TYPES if type_url in self._types]
        others = [type_url for type_url in self._types if type_url not in TYPES]
        found = (self._respond(type_url, self._snapshot) for type_url in known + others)
        return [response for response in found if response is not None]

    @property
    def has_news(self) -> bool:
        """Whether `answers` may have something to send; most acknowledgements ask for nothing."""
        return any(
            not each.in_flight and bool(each.dirty or each.unanswered or each.is_first)
            for each in self._types.values()
        )

    def holds(self, type_url: str, name: str) -> Holding | None:
        """Whether the client has the resource as it is now; None if it did not ask for the type."""
        subscription = self._types.get(type_url)
        if subscription is None or self._snapshot is None:
            return None
        current = self._snapshot.of(type_url).get(name)
        version = current.version if current is not None else None
        if version is not None and subscription.refused.get(name) == version:
            return Holding.REFUSED
        is_held = subscription.sent.get(name) == version and name not in subscription.unconfirmed
        return Holding.HELD if is_held else Holding.PENDING

    def refusal(self, type_url: str) -> str:
        """What the client said when it refused something last."""
        subscription = self._types.get(type_url)
        return subscription.last_nack if subscription is not None else ""

    def status(self) -> dict[str, TypeStatus]:
        """The standing of each type, for listings."""
        return {
            type_url: TypeStatus(
                is_wildcard=subscription.is_wildcard,
                versions=subscription.sent.as_dict(),
                pending=len(subscription.dirty),
                in_flight=subscription.in_flight,
                acked=subscription.acked,
                nacks=subscription.nacks,
                last_nack=subscription.last_nack,
                refused=len(subscription.refused),
            )
            for type_url, subscription in self._types.items()
        }

    def _open(self, request: DeltaDiscoveryRequest) -> None:
        if len(self._types) >= MAX_TYPES:
            raise RemoteProtocolError(f"more than {MAX_TYPES} resource types on one stream")
        is_wildcard = not request.resource_names_subscribe
        held = HeldVersions(request.initial_resource_versions)
        subscription = _Subscription(is_wildcard, held)
        self._change(subscription, request)
        self._types[request.type_url] = subscription
        self._mark_all(request.type_url, subscription)

    def _change(self, subscription: _Subscription, request: DeltaDiscoveryRequest) -> None:
        for name in request.resource_names_subscribe:
            if name == _WILDCARD:
                subscription.is_wildcard = True
                continue
            if len(name) > MAX_NAME_LENGTH or len(subscription.keys) >= MAX_KEYS:
                raise RemoteProtocolError("too many or too long resource names subscribed")
            subscription.keys.add(name)
            subscription.unanswered.add(name)
        for name in request.resource_names_unsubscribe:
            if name == _WILDCARD:
                subscription.is_wildcard = False
            subscription.keys.discard(name)
            subscription.unanswered.discard(name)

    def _visible(self, type_url: str, snapshot: Snapshot) -> Set[str]:
        """The names of the resources that this client may be told."""
        if type_url == TRAFFIC_TYPE and self._account is not None:
            return snapshot.of_waypoint(self._account)
        return snapshot.of(type_url).keys()

    def _wanted(self, type_url: str, subscription: _Subscription, snapshot: Snapshot) -> Set[str]:
        if subscription.is_wildcard:
            return self._visible(type_url, snapshot)
        if type_url != ADDRESS_TYPE:
            return subscription.keys & self._visible(type_url, snapshot)
        wanted: set[str] = set()
        for key in subscription.keys:
            wanted |= snapshot.find(key)
        if self.node is not None:
            wanted |= snapshot.on_node(self.node.node_name)
        return wanted

    def _mark_all(self, type_url: str, subscription: _Subscription) -> None:
        """Recompute the marks of one type from scratch."""
        if self._snapshot is None:
            return
        sent = subscription.sent
        if sent and self._takes_all(type_url, subscription):
            versions = self._snapshot.versions(type_url)
            sent.share(versions)
            subscription.dirty = sent.differing(versions)
            return
        current = self._snapshot.of(type_url)
        wanted = self._wanted(type_url, subscription, self._snapshot)
        if not sent:
            subscription.dirty = set(wanted)
            return
        subscription.dirty = {name for name in wanted if sent.get(name) != current[name].version}
        subscription.dirty.update(name for name in sent if name not in wanted)

    def _respond(self, type_url: str, snapshot: Snapshot) -> Serialized | None:
        subscription = self._types[type_url]
        if subscription.in_flight:
            return None
        if self._wants_whole(type_url, subscription, snapshot):
            return self._respond_whole(type_url, subscription, snapshot)
        current = snapshot.of(type_url)
        wanted = self._wanted(type_url, subscription, snapshot)
        asked = subscription.unanswered & self._visible(type_url, snapshot)
        updated = [
            current[name]
            for name in subscription.dirty | asked
            if name in wanted
            and (name in asked or subscription.sent.get(name) != current[name].version)
        ]
        # A resource that an on-demand client no longer needs is removed there too: nobody
        # would tell the client when it changes.
        gone = {
            name for name in subscription.dirty if name not in wanted and name in subscription.sent
        }
        removed = sorted(gone | (subscription.unanswered - asked))
        subscription.dirty.clear()
        subscription.unanswered.clear()
        if not updated and not removed and not subscription.is_first:
            return None
        for entry in updated:
            subscription.sent.put(entry.name, entry.version)
        for name in removed:
            subscription.sent.drop(name)
            subscription.refused.pop(name, None)
        if subscription.sent.is_far and self._takes_all(type_url, subscription):
            subscription.sent.share(snapshot.versions(type_url))
        part = snapshot.part(type_url, updated, removed)
        own = self._begin(subscription, part.names)
        return Serialized((own.SerializeToString(), part.body))

    def _begin(self, subscription: _Subscription, names: frozenset[str]) -> DeltaDiscoveryResponse:
        """A response that tells of `names`, with what is this client's alone."""
        self._nonce += 1
        subscription.is_first = False
        subscription.in_flight = f"{self._nonce:x}"
        subscription.unconfirmed = names
        response = DeltaDiscoveryResponse(nonce=subscription.in_flight)
        response.control_plane.identifier = _CONTROL_PLANE
        return response

    def _wants_whole(self, type_url: str, subscription: _Subscription, snapshot: Snapshot) -> bool:
        """Whether the client is to be told everything, as all are who have nothing yet."""
        return (
            self._takes_all(type_url, subscription)
            and not subscription.sent
            and not subscription.unanswered
            and bool(snapshot.of(type_url))
        )

    def _takes_all(self, type_url: str, subscription: _Subscription) -> bool:
        """Whether everything of the type is for this client, as it is for others."""
        return subscription.is_wildcard and (type_url != TRAFFIC_TYPE or self._account is None)

    def _respond_whole(
        self, type_url: str, subscription: _Subscription, snapshot: Snapshot
    ) -> Serialized:
        whole = snapshot.whole(type_url)
        subscription.dirty = set()
        subscription.sent.take(snapshot.versions(type_url))
        own = self._begin(subscription, whole.names)
        return Serialized((own.SerializeToString(), whole.body))


def parse_node(node: Node) -> ClientNode:
    """Read `type~ip~pod.namespace~domain`. Raises RemoteProtocolError.

    The first valid address wins, as in Istio; string metadata only, other kinds are skipped.
    """
    parts = node.id.split("~")
    if not node.id or len(parts) != 4:
        raise RemoteProtocolError(f"node id {node.id[:200]!r} is not type~address~pod.ns~domain")
    proxy_type, address, name, _ = parts
    try:
        ipaddress.ip_address(address)
    except ValueError as exc:
        raise RemoteProtocolError(f"node id {node.id[:200]!r} holds no IP address") from exc
    metadata = {
        key: value.string_value
        for key, value in node.metadata.fields.items()
        if value.WhichOneof("kind") == "string_value"
    }
    pod, _, namespace = name.rpartition(".")
    return ClientNode(
        id=node.id,
        proxy_type=proxy_type,
        address=address,
        pod=pod,
        namespace=metadata.get("NAMESPACE", namespace),
        node_name=metadata.get("NODE_NAME", ""),
        metadata=metadata,
    )
