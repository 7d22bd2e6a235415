"""What the control plane currently says, as versioned resources; and what changed. Pure.

A snapshot is immutable. Its resources carry the exact bytes that go on the wire and a
version that is a 64-bit hash of them, so a restarted controller gives equal resources
equal versions and reconnecting clients are sent only what really differs. Resources that
did not change are shared with the previous snapshot, bytes and all.

On-demand clients ask by other keys than resource names; `find` resolves a uid, an
address, a service's name or VIP to resources, with what a caller needs along with them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

from google.protobuf.any_pb2 import Any as AnyMessage

from mesh.errors import ConfigError
from mesh.model.authorization import Authorization
from mesh.model.l7_policy import TrafficConfig
from mesh.model.service import Service
from mesh.model.workload import GatewayAddress, NamespacedHostname, Workload
from mesh.proto.discovery_pb2 import DeltaDiscoveryResponse
from mesh.proto.discovery_pb2 import Resource as ResourceMessage
from mesh.xds.traffic import MAX_BYTES, traffic_to_proto
from mesh.xds.translate import (
    ADDRESS_TYPE,
    AUTHORIZATION_TYPE,
    TRAFFIC_TYPE,
    Resource,
    encode,
    resource_name,
)

# The order in which a client is told: a policy may name workloads, never the reverse.
TYPES = (ADDRESS_TYPE, AUTHORIZATION_TYPE, TRAFFIC_TYPE)
Told = Resource
_MAX_PARTS = 8


@dataclass(frozen=True, slots=True)
class VersionedResource:
    """One resource as it is sent."""

    name: str
    version: str
    model: Told
    message: ResourceMessage = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Delta:
    """Names whose resource is new or different, and names that are gone; one type."""

    changed: frozenset[str]
    removed: frozenset[str]

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed)


@dataclass(frozen=True, slots=True)
class Encoded:
    """An answer that many clients are given, by the names that it tells of.

    `body` is a serialized `DeltaDiscoveryResponse` without what differs from client to client.
    """

    names: frozenset[str]
    body: bytes = field(repr=False)


@dataclass(frozen=True)
class Snapshot:
    """Resources by type and name. `faults` are resources that could not be encoded."""

    resources: Mapping[str, Mapping[str, VersionedResource]] = field(
        default_factory=lambda: {type_url: {} for type_url in TYPES}
    )
    faults: tuple[ConfigError, ...] = ()

    def of(self, type_url: str) -> Mapping[str, VersionedResource]:
        """The resources of one type; empty for a type that we do not serve."""
        return self.resources.get(type_url, {})

    def find(self, key: str) -> frozenset[str]:
        """The names of Address resources that answer an on-demand key; empty if unknown.

        Keys in this order: uid, `network/address` of a workload, `namespace/hostname`,
        `network/address` of a service. A service brings its endpoints, everything brings
        the waypoints it refers to.
        """
        return self._index.find(key)

    def of_waypoint(self, gateway: str) -> frozenset[str]:
        """The names of the TrafficConfigs of one waypoint, `namespace/name`: nobody else's."""
        return self._by_waypoint.get(gateway, frozenset())

    def whole(self, type_url: str) -> Encoded:
        """All resources of a type as one response, made when first asked for."""
        found = self._wholes.get(type_url)
        if found is None:
            entries = self.of(type_url)
            found = _encode(type_url, entries.values(), (), frozenset(entries))
            self._wholes[type_url] = found
        return found

    def part(
        self, type_url: str, updated: Sequence[VersionedResource], removed: Sequence[str]
    ) -> Encoded:
        """Some of a type as one response. After a change most clients are told the same: of what
        was asked for last, a few answers are kept.
        """
        key = (type_url, frozenset(each.name for each in updated), tuple(removed))
        found = self._parts.get(key)
        if found is None:
            found = _encode(type_url, updated, removed, key[1].union(removed))
            if len(self._parts) >= _MAX_PARTS:
                del self._parts[next(iter(self._parts))]
            self._parts[key] = found
        return found

    def versions(self, type_url: str) -> Mapping[str, str]:
        """Name to version of all resources of a type, made when first asked for."""
        found = self._versions.get(type_url)
        if found is None:
            found = {name: each.version for name, each in self.of(type_url).items()}
            self._versions[type_url] = found
        return found

    @cached_property
    def _wholes(self) -> dict[str, Encoded]:
        return {}

    @cached_property
    def _parts(self) -> dict[tuple[str, frozenset[str], tuple[str, ...]], Encoded]:
        return {}

    @cached_property
    def _versions(self) -> dict[str, Mapping[str, str]]:
        return {}

    @cached_property
    def _by_waypoint(self) -> Mapping[str, frozenset[str]]:
        found: dict[str, set[str]] = {}
        for name, entry in self.of(TRAFFIC_TYPE).items():
            if isinstance(entry.model, TrafficConfig):
                found.setdefault(entry.model.gateway, set()).add(name)
        return {gateway: frozenset(names) for gateway, names in found.items()}

    def on_node(self, node: str) -> frozenset[str]:
        """The uids of the workloads of one node."""
        return frozenset(self._index.nodes.get(node, ())) if node else frozenset()

    @cached_property
    def _index(self) -> _AddressIndex:
        return _AddressIndex(entry.model for entry in self.of(ADDRESS_TYPE).values())


def in_order(entries: Iterable[VersionedResource]) -> list[VersionedResource]:
    """As clients are told: workloads before the services that they are behind."""
    return sorted(entries, key=lambda entry: (isinstance(entry.model, Service), entry.name))


def _encode(
    type_url: str,
    entries: Iterable[VersionedResource],
    removed: Sequence[str],
    names: frozenset[str],
) -> Encoded:
    response = DeltaDiscoveryResponse(
        type_url=type_url,
        resources=[each.message for each in in_order(entries)],
        removed_resources=removed,
    )
    return Encoded(names, response.SerializeToString())


def advance(
    previous: Snapshot,
    addresses: Mapping[str, Workload | Service],
    policies: Mapping[str, Authorization],
    traffic: Mapping[str, TrafficConfig],
    touched: Mapping[str, Set[str]],
) -> tuple[Snapshot, dict[str, Delta]]:
    """As `build` and `diff`, when of addresses and policies only `touched` can differ, by type.

    What could not be encoded is looked at again, whoever touched it: then all is.
    """
    if previous.faults:
        new = build(addresses, policies, previous, traffic)
        return new, diff(previous, new)
    faults: list[ConfigError] = []
    resources = dict(previous.resources)
    deltas: dict[str, Delta] = {}
    everything: dict[str, Mapping[str, Told]] = {
        ADDRESS_TYPE: addresses,
        AUTHORIZATION_TYPE: policies,
        TRAFFIC_TYPE: traffic,
    }
    for type_url, models in everything.items():
        before = previous.of(type_url)
        # Of waypoints' configurations there are few, and nobody counts what touches them.
        names = before.keys() | models.keys() if type_url == TRAFFIC_TYPE else touched[type_url]
        chosen = {name: models[name] for name in names if name in models}
        found = dict(_versioned(type_url, chosen, previous, faults))
        changed = frozenset(
            name
            for name, entry in found.items()
            if name not in before or before[name].version != entry.version
        )
        removed = frozenset(name for name in names if name in before and name not in found)
        if any(before.get(name) is not entry for name, entry in found.items()) or removed:
            now = {**before, **found}
            for name in removed:
                del now[name]
            resources[type_url] = now
        if delta := Delta(changed, removed):
            deltas[type_url] = delta
    return Snapshot(resources, tuple(faults)), deltas


def build(
    addresses: Mapping[str, Workload | Service],
    policies: Mapping[str, Authorization],
    previous: Snapshot | None = None,
    traffic: Mapping[str, TrafficConfig] | None = None,
) -> Snapshot:
    """A snapshot of these models, keyed by resource name.

    A model that cannot be encoded, or that is not called what its key says, is left out and
    told in `faults`: one bad object must not silence the others.
    """
    faults: list[ConfigError] = []
    before = previous if previous is not None else Snapshot()
    resources = {
        ADDRESS_TYPE: dict(_versioned(ADDRESS_TYPE, addresses, before, faults)),
        AUTHORIZATION_TYPE: dict(_versioned(AUTHORIZATION_TYPE, policies, before, faults)),
        TRAFFIC_TYPE: dict(_versioned(TRAFFIC_TYPE, traffic or {}, before, faults)),
    }
    return Snapshot(resources, tuple(faults))


def restored(models: Mapping[str, Mapping[str, tuple[Told, bytes]]]) -> Snapshot:
    """The snapshot that these models and their bytes, by type and name, once were."""
    resources = {
        type_url: {
            name: _entry(type_url, name, model, data)
            for name, (model, data) in models.get(type_url, {}).items()
        }
        for type_url in TYPES
    }
    return Snapshot(resources)


def diff(old: Snapshot, new: Snapshot) -> dict[str, Delta]:
    """What changed from `old` to `new`, by type; a type without change is left out."""
    deltas = {}
    for type_url in TYPES:
        before, after = old.of(type_url), new.of(type_url)
        changed = frozenset(
            name
            for name, entry in after.items()
            if name not in before or before[name].version != entry.version
        )
        if delta := Delta(changed, frozenset(before.keys() - after.keys())):
            deltas[type_url] = delta
    return deltas


def version_of(serialised: bytes) -> str:
    """The version of a serialised resource: 64 bits in hexadecimal."""
    return blake2b(serialised, digest_size=8).hexdigest()


def _versioned(
    type_url: str,
    models: Mapping[str, Told],
    previous: Snapshot,
    faults: list[ConfigError],
) -> Iterator[tuple[str, VersionedResource]]:
    known = previous.of(type_url)
    for name, model in models.items():
        before = known.get(name)
        if before is not None and (before.model is model or before.model == model):
            yield name, before
            continue
        try:
            data = _encoded(name, model)
        except ConfigError as exc:
            faults.append(exc)
            continue
        yield name, _entry(type_url, name, model, data)


def _entry(type_url: str, name: str, model: Told, data: bytes) -> VersionedResource:
    version = version_of(data)
    message = ResourceMessage(
        name=name, version=version, resource=AnyMessage(type_url=type_url, value=data)
    )
    return VersionedResource(name, version, model, message)


def _encoded(name: str, model: Told) -> bytes:
    called = model.key if isinstance(model, TrafficConfig) else resource_name(model)
    if called != name:
        raise ConfigError(f"resource {name!r} calls itself {called!r}")
    if not isinstance(model, TrafficConfig):
        return encode(model)
    message = traffic_to_proto(model)
    if len(message.model) > MAX_BYTES:
        raise ConfigError(f"{name}: {len(message.model)} bytes are too much for a waypoint")
    return message.SerializeToString(deterministic=True)


class _AddressIndex:
    """Who is where; built only when a client asks on demand."""

    def __init__(self, models: Iterable[Told]) -> None:
        self.nodes: dict[str, set[str]] = {}
        self._workloads: dict[str, Workload] = {}
        self._services: dict[str, Service] = {}
        self._workload_addresses: dict[str, set[str]] = {}
        self._service_addresses: dict[str, set[str]] = {}
        self._endpoints: dict[str, set[str]] = {}
        for model in models:
            match model:
                case Workload():
                    self._add_workload(model)
                case Service():
                    self._add_service(model)

    def find(self, key: str) -> frozenset[str]:
        names: set[str] = set()
        if key in self._workloads:
            self._collect(key, names)
        elif uids := self._workload_addresses.get(_canonical(key)):
            for uid in uids:
                self._collect(uid, names)
        elif key in self._services:
            self._collect(key, names)
        else:
            for service in self._service_addresses.get(_canonical(key), ()):
                self._collect(service, names)
        return frozenset(names)

    def _add_workload(self, workload: Workload) -> None:
        self._workloads[workload.uid] = workload
        self.nodes.setdefault(workload.node, set()).add(workload.uid)
        for address in workload.addresses:
            key = f"{workload.network}/{address}"
            self._workload_addresses.setdefault(key, set()).add(workload.uid)
        for service in workload.services:
            self._endpoints.setdefault(service, set()).add(workload.uid)

    def _add_service(self, service: Service) -> None:
        name = str(service.key)
        self._services[name] = service
        for address in service.addresses:
            self._service_addresses.setdefault(str(address), set()).add(name)
        for cidr in service.cidr_addresses:
            key = f"{cidr.network}/{cidr.prefix}"
            self._service_addresses.setdefault(key, set()).add(name)

    def _collect(self, name: str, names: set[str]) -> None:
        """Add a resource and, transitively, endpoints and waypoints, each once."""
        pending = [name]
        while pending:
            current = pending.pop()
            if current in names:
                continue
            names.add(current)
            gateways: list[GatewayAddress | None] = []
            if (workload := self._workloads.get(current)) is not None:
                gateways = [workload.waypoint, workload.network_gateway]
            elif (service := self._services.get(current)) is not None:
                pending.extend(self._endpoints.get(current, ()))
                gateways = [service.waypoint]
                gateways += [weighted.destination for weighted in service.weighted_waypoints]
            for gateway in gateways:
                if gateway is not None:
                    pending.extend(self._gateway(gateway))

    def _gateway(self, gateway: GatewayAddress) -> Iterable[str]:
        key = str(gateway.destination)
        if isinstance(gateway.destination, NamespacedHostname):
            return [key] if key in self._services else []
        return self._workload_addresses.get(key) or self._service_addresses.get(key) or []


def _canonical(key: str) -> str:
    """`network/address` with the address in canonical text; other keys unchanged."""
    network, _, address = key.partition("/")
    try:
        return f"{network}/{ipaddress.ip_address(address)}"
    except ValueError:
        return key
