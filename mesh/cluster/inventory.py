"""A set of objects, typed, by kind: what checks and derivations look things up in. Pure.

`put` reads one object and keeps its view; an object that cannot be read leaves the view it
had before, so that a mistake never takes away what worked, and is told by raising.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias, TypeVar, cast

from mesh.cluster.api import Object, Ref, Source, located
from mesh.cluster.entries import parse_service_entry, parse_workload_entry
from mesh.cluster.gateways import (
    parse_gateway,
    parse_gateway_class,
    parse_mesh,
    parse_reference_grant,
)
from mesh.cluster.l7_policies import (
    parse_rate_limit_policy,
    parse_redaction_policy,
    parse_request_authentication,
)
from mesh.cluster.mesh_config import parse_config_map
from mesh.cluster.network_policies import parse_network_policy
from mesh.cluster.objects import (
    Metadata,
    parse_endpoint_slice,
    parse_namespace,
    parse_node,
    parse_pod,
    parse_service,
    parse_service_account,
)
from mesh.cluster.policies import parse_authorization_policy, parse_peer_authentication
from mesh.cluster.routes import (
    parse_grpc_route,
    parse_http_route,
    parse_tcp_route,
    parse_tls_route,
)
from mesh.cluster.traffic_policies import parse_backend_traffic_policy, parse_destination_rule
from mesh.errors import ConfigError

M = TypeVar("M", bound=Metadata)
Parser: TypeAlias = Callable[[Object], Metadata]

PARSERS: Mapping[str, Parser] = {
    "Namespace": parse_namespace,
    "Node": parse_node,
    "Pod": parse_pod,
    "ConfigMap": parse_config_map,
    "Service": parse_service,
    "ServiceAccount": parse_service_account,
    "EndpointSlice": parse_endpoint_slice,
    "ServiceEntry": parse_service_entry,
    "WorkloadEntry": parse_workload_entry,
    "NetworkPolicy": parse_network_policy,
    "DestinationRule": parse_destination_rule,
    "XBackendTrafficPolicy": parse_backend_traffic_policy,
    "AuthorizationPolicy": parse_authorization_policy,
    "PeerAuthentication": parse_peer_authentication,
    "RequestAuthentication": parse_request_authentication,
    "RateLimitPolicy": parse_rate_limit_policy,
    "RedactionPolicy": parse_redaction_policy,
    "Gateway": parse_gateway,
    "GatewayClass": parse_gateway_class,
    "ReferenceGrant": parse_reference_grant,
    "XMesh": parse_mesh,
    "HTTPRoute": parse_http_route,
    "GRPCRoute": parse_grpc_route,
    "TCPRoute": parse_tcp_route,
    "TLSRoute": parse_tls_route,
}


class Inventory:
    """Typed objects by name, and where each is written."""

    def __init__(self) -> None:
        self._views: dict[str, dict[str, dict[str, Metadata]]] = {}
        self._sources: dict[Ref, Source] = {}

    def put(self, ref: Ref, obj: Object, source: Source | None = None) -> Metadata | None:
        """Keep an object; its view, or None for a kind that nobody looks at here.

        Raises ConfigError with file, line and field if it cannot be read.
        """
        parse = PARSERS.get(ref.kind)
        if parse is None:
            return None
        if source is not None:
            self._sources[ref] = source
        try:
            view = parse(obj)
        except ConfigError as exc:
            raise located(exc, source) from exc
        self._views.setdefault(ref.kind, {}).setdefault(ref.namespace, {})[ref.name] = view
        return view

    def delete(self, ref: Ref) -> Metadata | None:
        """Forget an object; the view it had."""
        self._sources.pop(ref, None)
        return self._views.get(ref.kind, {}).get(ref.namespace, {}).pop(ref.name, None)

    def view(self, ref: Ref) -> Metadata | None:
        """One object by its name."""
        return self._views.get(ref.kind, {}).get(ref.namespace, {}).get(ref.name)

    def get(self, kind: type[M], namespace: str, name: str) -> M | None:
        """One object by the class of its view."""
        return cast("M | None", self._views.get(kind.__name__, {}).get(namespace, {}).get(name))

    def all(self, kind: type[M]) -> Iterator[M]:
        """Every object of a kind."""
        for views in self._views.get(kind.__name__, {}).values():
            yield from cast("Mapping[str, M]", views).values()

    def within(self, kind: type[M], namespace: str) -> Iterator[M]:
        """Every object of a kind in a namespace."""
        views = self._views.get(kind.__name__, {}).get(namespace, {})
        yield from cast("Mapping[str, M]", views).values()

    def source(self, ref: Ref) -> Source | None:
        """Where an object is written."""
        return self._sources.get(ref)
