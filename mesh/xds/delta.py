"""The delta-ADS client as a machine: subscribe, receive, ACK or NACK, resume.

Sans-IO. The shell sends what `start` and `receive` return, in order, and applies the
`Apply` commands to its store. State outlives a stream: `start` on the next one tells the
server which versions are still held, so that only differences come back.

A response with an unusable resource is refused whole (NACK), but its usable resources are
applied all the same, and of the unusable ones the previous version stays. A type is ready
when its first response was accepted without a fault; an empty one counts.

Types are opened in the order given, wildcard unless named in `on_demand`: then nothing is
sent unasked and `subscribe` adds single keys. A key is answered when a response carries it
as a resource or as removed (a controller that knows the key under another name lists it
there).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mesh.errors import ConfigError
from mesh.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node
from mesh.xds.translate import DECODERS, Resource, resource_name

# google.rpc.Code.INVALID_ARGUMENT, what a NACK's error_detail carries.
INVALID_ARGUMENT = 3
MAX_NACK_REASONS = 20
_WILDCARD = "*"


@dataclass(frozen=True, slots=True)
class Send:
    """Send this request on the stream."""

    request: DeltaDiscoveryRequest


@dataclass(frozen=True, slots=True)
class Apply:
    """Bring these resources, then these removals, into the store."""

    type_url: str
    updated: tuple[Resource, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A NACK is being sent; `reasons` are `name: reason`."""

    type_url: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """The first response of this type has been accepted."""

    type_url: str


Command = Send | Apply | Rejected | Ready


@dataclass(slots=True)
class _TypeState:
    decode: Callable[[bytes], Resource]
    is_wildcard: bool
    versions: dict[str, str] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    is_ready: bool = False
    is_open: bool = False


class DeltaClient:
    """One client of one control plane, across any number of streams."""

    def __init__(
        self,
        node: Node,
        types: Sequence[str],
        *,
        decoders: Mapping[str, Callable[[bytes], Resource]] = DECODERS,
        on_demand: frozenset[str] = frozenset(),
    ) -> None:
        self._node = node
        self._types = {
            type_url: _TypeState(decoders[type_url], type_url not in on_demand)
            for type_url in types
        }

    def start(self) -> list[Command]:
        """A new stream: the first request of each type, with the versions held."""
        commands: list[Command] = []
        for type_url, state in self._types.items():
            state.is_open = True
            request = DeltaDiscoveryRequest(
                node=self._node,
                type_url=type_url,
                initial_resource_versions=state.versions,
            )
            if not state.is_wildcard:
                request.resource_names_subscribe.extend([_WILDCARD, *sorted(state.keys)])
                request.resource_names_unsubscribe.append(_WILDCARD)
            commands.append(Send(request))
        return commands

    def stop(self) -> None:
        """The stream has ended; what is held stays held."""
        for state in self._types.values():
            state.is_open = False

    def subscribe(self, type_url: str, keys: Iterable[str]) -> list[Command]:
        """Ask for single keys of an on-demand type; remembered for the next stream too."""
        state = self._types[type_url]
        new = sorted(set(keys) - state.keys)
        state.keys.update(new)
        if not new or state.is_wildcard or not state.is_open:
            return []
        return [Send(DeltaDiscoveryRequest(type_url=type_url, resource_names_subscribe=new))]

    def receive(self, response: DeltaDiscoveryResponse) -> list[Command]:
        """One response: what to apply, and the ACK or NACK to send, in this order."""
        state = self._types.get(response.type_url)
        if state is None:
            return self._reject(response, [f"type {response.type_url!r} was not asked for"])
        updated: dict[str, Resource] = {}
        reasons: list[str] = []
        for entry in response.resources:
            try:
                resource = state.decode(entry.resource.value)
                if resource_name(resource) != entry.name:
                    # Removals and references go by name, they would miss this resource.
                    raise ConfigError(f"the resource calls itself {resource_name(resource)!r}")
            except ConfigError as exc:
                reasons.append(f"{entry.name}: {exc}")
                continue
            updated[entry.name] = resource
            state.versions[entry.name] = entry.version
        for name in response.removed_resources:
            state.versions.pop(name, None)
        commands: list[Command] = [
            Apply(response.type_url, tuple(updated.values()), tuple(response.removed_resources))
        ]
        if reasons:
            return commands + self._reject(response, reasons)
        ack = DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
        commands.append(Send(ack))
        if not state.is_ready:
            state.is_ready = True
            commands.append(Ready(response.type_url))
        return commands

    def versions(self, type_url: str) -> Mapping[str, str]:
        """Names held and their versions, as the next stream will tell them."""
        return dict(self._types[type_url].versions)

    def _reject(self, response: DeltaDiscoveryResponse, reasons: list[str]) -> list[Command]:
        shown = [reason[:500] for reason in reasons[:MAX_NACK_REASONS]]
        if len(reasons) > len(shown):
            shown.append(f"and {len(reasons) - len(shown)} more")
        nack = DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
        nack.error_detail.code = INVALID_ARGUMENT
        nack.error_detail.message = "; ".join(shown)
        return [Rejected(response.type_url, tuple(shown)), Send(nack)]
