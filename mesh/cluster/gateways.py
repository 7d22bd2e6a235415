"""Typed, frozen views of Gateway, GatewayClass and ReferenceGrant, as a mesh looks at them.

Gateway API objects pass an API server's schema before they come here, or a plain directory
where nobody checked them; so what decides about access (`allowedRoutes`, grants) is read
strictly, and what CRD defaulting would fill in is filled in here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.cluster.api import Object, Ref
from mesh.cluster.fields import Reader
from mesh.cluster.objects import Metadata, Namespace, read_metadata

GATEWAY_GROUP = "gateway.networking.k8s.io"
WAYPOINT_CLASS = "istio-waypoint"
WAYPOINT_CONTROLLER = "istio.io/mesh-controller"
HBONE_PORT = 15008
USE_WAYPOINT = "istio.io/use-waypoint"
USE_WAYPOINT_NAMESPACE = "istio.io/use-waypoint-namespace"
WAYPOINT_FOR = "istio.io/waypoint-for"
GATEWAY_NAME = "gateway.networking.k8s.io/gateway-name"
MANAGED = "gateway.istio.io/managed"
_OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One of `matchExpressions`."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def admits(self, labels: Mapping[str, str]) -> bool:
        """Whether labels satisfy it."""
        value = labels.get(self.key)
        match self.operator:
            case "In":
                return value in self.values
            case "NotIn":
                return value not in self.values
            case "Exists":
                return value is not None
            case _:
                return value is None


@dataclass(frozen=True, slots=True)
class Listener:
    """A listener; `namespaces` is Same, All or Selector, and then `selector` says which."""

    name: str
    port: int
    protocol: str
    namespaces: str = "Same"
    selector: tuple[Requirement, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway(Metadata):
    """A Gateway; `addresses` are those of its status: once told, a waypoint stays referred to."""

    class_name: str
    listeners: tuple[Listener, ...] = ()
    addresses: tuple[str, ...] = ()

    @property
    def is_waypoint(self) -> bool:
        """Whether it is of the class that this mesh makes waypoints of."""
        return self.class_name == WAYPOINT_CLASS


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayClass(Metadata):
    """A GatewayClass; its labels and annotations are defaults for its Gateways."""

    controller: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class XMesh(Metadata):
    """A mesh, as the Gateway API knows it (experimental)."""

    controller: str = ""


@dataclass(frozen=True, slots=True)
class GrantSource:
    """Who may refer."""

    group: str
    kind: str
    namespace: str


@dataclass(frozen=True, slots=True)
class GrantTarget:
    """To what one may refer; no name is every object of the kind."""

    group: str
    kind: str
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceGrant(Metadata):
    """Leave to refer to objects of its namespace from another."""

    sources: tuple[GrantSource, ...] = ()
    targets: tuple[GrantTarget, ...] = ()

    def admits(self, source: GrantSource, target: GrantTarget) -> bool:
        """Whether `source` may refer to `target`, which is in this grant's namespace."""
        kind = GrantTarget(target.group, target.kind)
        return source in self.sources and (target in self.targets or kind in self.targets)


def parse_gateway(obj: Object) -> Gateway:
    """Read a Gateway. Raises ConfigError naming the field."""
    top = Reader(obj)
    spec = top.get("spec")
    return Gateway(
        **read_metadata(obj),
        class_name=spec.get("gatewayClassName").name(),
        listeners=tuple(_listener(each) for each in spec.get("listeners").items()),
        addresses=tuple(each.get("value").text() for each in top.at("status", "addresses").items()),
    )


def _listener(listener: Reader) -> Listener:
    allowed = listener.at("allowedRoutes", "namespaces")
    allowed.only("from", "selector")
    namespaces = allowed.get("from").choice(("Same", "All", "Selector", "None"), "Same")
    selector = read_requirements(allowed.get("selector"))
    if namespaces == "Selector" and not allowed.get("selector").exists:
        allowed.get("selector").fail("missing: `from: Selector` asks for one")
    return Listener(
        name=listener.get("name").name(),
        port=listener.get("port").port(),
        protocol=listener.get("protocol").name(),
        namespaces=namespaces,
        selector=selector,
    )


def read_requirements(selector: Reader) -> tuple[Requirement, ...]:
    """A label selector, all of whose requirements must be met. Raises ConfigError."""
    selector.only("matchLabels", "matchExpressions")
    found = [
        Requirement(key, "In", (value,))
        for key, value in selector.get("matchLabels").labels().items()
    ]
    for each in selector.get("matchExpressions").items():
        each.only("key", "operator", "values")
        values = tuple(value.text() for value in each.get("values").items())
        operator = each.get("operator").choice(_OPERATORS)
        if (operator in ("In", "NotIn")) != bool(values):
            each.get("values").fail(f"{operator} goes {'with' if not values else 'without'} values")
        found.append(Requirement(each.get("key").name(), operator, values))
    return tuple(found)


def parse_gateway_class(obj: Object) -> GatewayClass:
    """Read a GatewayClass. Raises ConfigError naming the field."""
    return GatewayClass(
        **read_metadata(obj), controller=Reader(obj).at("spec", "controllerName").text()
    )


def parse_mesh(obj: Object) -> XMesh:
    """Read an XMesh. Raises ConfigError naming the field."""
    return XMesh(**read_metadata(obj), controller=Reader(obj).at("spec", "controllerName").text())


def parse_reference_grant(obj: Object) -> ReferenceGrant:
    """Read a ReferenceGrant. Raises ConfigError naming the field."""
    spec = Reader(obj).get("spec").only("from", "to")
    sources = []
    for each in spec.get("from").items():
        each.only("group", "kind", "namespace")
        kind, namespace = each.get("kind").name(), each.get("namespace").name()
        sources.append(GrantSource(each.get("group").text(), kind, namespace))
    targets = []
    for each in spec.get("to").items():
        each.only("group", "kind", "name")
        kind, name = each.get("kind").name(), each.get("name").text()
        targets.append(GrantTarget(each.get("group").text(), kind, name))
    return ReferenceGrant(**read_metadata(obj), sources=tuple(sources), targets=tuple(targets))


def named_gateway(view: Metadata, namespace: Namespace | None) -> Ref | None:
    """The Gateway that an object is to go through by labels, its own or its namespace's."""
    if is_waypoint_part(view):
        return None
    for labels in (view.labels, namespace.labels if namespace else {}):
        name = labels.get(USE_WAYPOINT)
        if name:
            home = labels.get(USE_WAYPOINT_NAMESPACE) or view.namespace
            return None if name == "none" else Ref("Gateway", home, name)
    return None


def is_waypoint_part(view: Metadata) -> bool:
    """Whether an object belongs to a waypoint (or another Gateway)."""
    return GATEWAY_NAME in view.labels or MANAGED in view.labels
