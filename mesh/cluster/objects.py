"""Typed, frozen views of the core Kubernetes objects that the mesh looks at.

`parse_*` take the plain dict and raise ConfigError with the field's path when a value is
impossible. Unknown fields of core kinds are ignored: Kubernetes grows them. Our policies'
kinds are in `mesh.cluster.policies`, where unknown fields are refused.

Addresses come out in canonical text, labels and annotations as plain mappings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from mesh.cluster.api import Object, Ref, ref_of
from mesh.cluster.fields import Reader

POD_PHASES = ("Pending", "Running", "Succeeded", "Failed", "Unknown")
SERVICE_TYPES = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
PROTOCOLS = ("TCP", "UDP", "SCTP")
REDIRECTION = "ambient.istio.io/redirection"

_PORT_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What every object has. `created` is the creation time as written (RFC 3339)."""

    ref: Ref
    uid: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    is_terminating: bool = False

    @property
    def name(self) -> str:
        """The object's name."""
        return self.ref.name

    @property
    def namespace(self) -> str:
        """The object's namespace, empty if it has none."""
        return self.ref.namespace


class _Common(TypedDict):
    ref: Ref
    uid: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    created: str
    is_terminating: bool


def read_metadata(obj: Object) -> _Common:
    """The keyword arguments of `Metadata`. Raises ConfigError."""
    ref = ref_of(obj)
    metadata = Reader(obj).get("metadata")
    return {
        "ref": ref,
        "uid": metadata.get("uid").text(),
        "labels": metadata.get("labels").labels(),
        "annotations": metadata.get("annotations").labels(),
        "created": metadata.get("creationTimestamp").text(),
        "is_terminating": bool(metadata.get("deletionTimestamp").text()),
    }


@dataclass(frozen=True, slots=True)
class Owner:
    """The controlling owner of an object."""

    kind: str
    name: str
    api_version: str = ""


@dataclass(frozen=True, slots=True)
class ContainerPort:
    """A port that a container declares."""

    number: int
    name: str = ""
    protocol: str = "TCP"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod(Metadata):
    """A pod and its status. `addresses` is empty until it has one."""

    node: str = ""
    service_account: str = "default"
    host_network: bool = False
    hostname: str = ""
    subdomain: str = ""
    phase: str = "Pending"
    is_ready: bool = False
    addresses: tuple[str, ...] = ()
    ports: tuple[ContainerPort, ...] = ()
    owner: Owner | None = None

    @property
    def is_terminal(self) -> bool:
        """Whether it has finished and will not run again."""
        return self.phase in ("Succeeded", "Failed")

    @property
    def is_captured(self) -> bool:
        """Whether the node agent says that its traffic goes through the tunnel."""
        return self.annotations.get(REDIRECTION) == "enabled"


@dataclass(frozen=True, slots=True)
class ServicePort:
    """A port of a Service; `target` is a number or the name of a container's port."""

    number: int
    target: int | str
    name: str = ""
    protocol: str = "TCP"
    app_protocol: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service(Metadata):
    """A Kubernetes Service. `cluster_ips` is empty when it is headless or external; `conditions`
    are the types of those in its status.
    """

    type: str = "ClusterIP"
    cluster_ips: tuple[str, ...] = ()
    is_headless: bool = False
    external_name: str = ""
    ports: tuple[ServicePort, ...] = ()
    selector: Mapping[str, str] = field(default_factory=dict)
    ip_families: tuple[str, ...] = ()
    publish_not_ready_addresses: bool = False
    internal_traffic_policy: str = "Cluster"
    traffic_distribution: str = ""
    conditions: tuple[str, ...] = ()

    def selects(self, labels: Mapping[str, str]) -> bool:
        """Whether a pod of these labels (same namespace) is behind it; no selector, no pod."""
        return bool(self.selector) and is_selected(self.selector, labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace(Metadata):
    """A namespace; its labels are what matters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node(Metadata):
    """A node, its addresses and labels."""

    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceAccount(Metadata):
    """A service account; only its name matters."""


@dataclass(frozen=True, slots=True)
class SliceEndpoint:
    """One endpoint of a slice. `target` is the object behind it, usually a pod."""

    addresses: tuple[str, ...]
    is_ready: bool = True
    is_terminating: bool = False
    node: str = ""
    zone: str = ""
    hostname: str = ""
    target: Ref | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSlice(Metadata):
    """Endpoints written down rather than selected. `ports` maps port name to number."""

    service: str = ""
    address_type: str = "IPv4"
    endpoints: tuple[SliceEndpoint, ...] = ()
    ports: Mapping[str, int] = field(default_factory=dict)


def is_selected(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether labels carry every pair of a matchLabels selector; an empty one selects all."""
    return all(labels.get(key) == value for key, value in selector.items())


def parse_pod(obj: Object) -> Pod:
    """Read a Pod. Raises ConfigError naming the field."""
    top = Reader(obj)
    spec, status = top.get("spec"), top.get("status")
    addresses = [each.get("ip").address() for each in status.get("podIPs").items()]
    if not addresses and status.get("podIP").text():
        addresses = [status.get("podIP").address()]
    owner = None
    for each in top.at("metadata", "ownerReferences").items():
        if each.get("controller").boolean():
            owner = Owner(
                each.get("kind").name(), each.get("name").name(), each.get("apiVersion").text()
            )
            break
    ready = any(
        each.get("type").text() == "Ready" and each.get("status").text() == "True"
        for each in status.get("conditions").items()
    )
    return Pod(
        **read_metadata(obj),
        node=spec.get("nodeName").text(),
        service_account=spec.get("serviceAccountName").text() or "default",
        host_network=spec.get("hostNetwork").boolean(),
        hostname=spec.get("hostname").text(),
        subdomain=spec.get("subdomain").text(),
        phase=status.get("phase").choice(POD_PHASES, "Pending"),
        is_ready=ready,
        addresses=tuple(dict.fromkeys(addresses)),
        ports=_container_ports(spec),
        owner=owner,
    )


def _container_ports(spec: Reader) -> tuple[ContainerPort, ...]:
    # An init container that restarts is a sidecar and may serve; others have ended.
    containers = [
        each
        for each in spec.get("initContainers").items()
        if each.get("restartPolicy").text() == "Always"
    ]
    containers += spec.get("containers").items()
    return tuple(
        ContainerPort(
            each.get("containerPort").port(),
            each.get("name").text(),
            each.get("protocol").choice(PROTOCOLS, "TCP"),
        )
        for container in containers
        for each in container.get("ports").items()
    )


def parse_service(obj: Object) -> Service:
    """Read a Service. Raises ConfigError naming the field."""
    spec = Reader(obj).get("spec")
    kind = spec.get("type").choice(SERVICE_TYPES, "ClusterIP")
    written = [(each.text(), each) for each in spec.get("clusterIPs").items()]
    if not written and spec.get("clusterIP").text():
        written = [(spec.get("clusterIP").text(), spec.get("clusterIP"))]
    is_headless = any(text == "None" for text, _ in written)
    addresses = tuple(each.address() for text, each in written if text and text != "None")
    if is_headless and addresses:
        spec.get("clusterIPs").fail('"None" beside an address')
    ports = tuple(_service_port(each) for each in spec.get("ports").items())
    _refuse_repeated(spec.get("ports"), ports)
    return Service(
        **read_metadata(obj),
        type=kind,
        cluster_ips=() if kind == "ExternalName" else addresses,
        is_headless=is_headless,
        external_name=spec.get("externalName").text(),
        ports=ports,
        selector=spec.get("selector").labels(),
        ip_families=tuple(each.choice(("IPv4", "IPv6")) for each in spec.get("ipFamilies").items()),
        publish_not_ready_addresses=spec.get("publishNotReadyAddresses").boolean(),
        internal_traffic_policy=spec.get("internalTrafficPolicy").choice(
            ("Cluster", "Local"), "Cluster"
        ),
        traffic_distribution=spec.get("trafficDistribution").text(),
        conditions=tuple(
            each.get("type").text() for each in Reader(obj).at("status", "conditions").items()
        ),
    )


def _service_port(port: Reader) -> ServicePort:
    number = port.get("port").port()
    target = port.get("targetPort")
    resolved: int | str = number
    if isinstance(target.value, str):
        resolved = target.value
        if not _PORT_NAME.fullmatch(resolved) or resolved.isdecimal():
            target.fail(f"not the name of a port: {resolved[:80]!r}", hint="a number has no quotes")
    elif target.exists:
        resolved = target.port()
    return ServicePort(
        number,
        resolved,
        port.get("name").text(),
        port.get("protocol").choice(PROTOCOLS, "TCP"),
        port.get("appProtocol").text(),
    )


def _refuse_repeated(where: Reader, ports: tuple[ServicePort, ...]) -> None:
    seen: set[tuple[str, int]] = set()
    names: set[str] = set()
    for each, port in zip(where.items(), ports, strict=True):
        if (port.protocol, port.number) in seen:
            each.get("port").fail(f"port {port.number}/{port.protocol} is listed twice")
        if len(ports) > 1 and not port.name:
            each.get("name").fail("missing: each of several ports needs a name")
        if port.name in names:
            each.get("name").fail(f'port name "{port.name}" is used twice')
        seen.add((port.protocol, port.number))
        names.add(port.name)


def parse_namespace(obj: Object) -> Namespace:
    """Read a Namespace. Raises ConfigError naming the field."""
    return Namespace(**read_metadata(obj))


def parse_node(obj: Object) -> Node:
    """Read a Node. Raises ConfigError naming the field."""
    addresses = tuple(
        each.get("address").address()
        for each in Reader(obj).at("status", "addresses").items()
        if each.get("type").text() == "InternalIP"
    )
    return Node(**read_metadata(obj), addresses=addresses)


def parse_service_account(obj: Object) -> ServiceAccount:
    """Read a ServiceAccount. Raises ConfigError naming the field."""
    return ServiceAccount(**read_metadata(obj))


def parse_endpoint_slice(obj: Object) -> EndpointSlice:
    """Read an EndpointSlice. Raises ConfigError naming the field."""
    top = Reader(obj)
    common = read_metadata(obj)
    address_type = top.get("addressType").choice(("IPv4", "IPv6", "FQDN"), "IPv4")
    ports = {
        each.get("name").text(): each.get("port").port()
        for each in top.get("ports").items()
        if each.get("protocol").choice(PROTOCOLS, "TCP") == "TCP" and each.get("port").exists
    }
    return EndpointSlice(
        **common,
        service=common["labels"].get("kubernetes.io/service-name", ""),
        address_type=address_type,
        endpoints=tuple(
            _slice_endpoint(each, address_type, common["ref"].namespace)
            for each in top.get("endpoints").items()
        ),
        ports=ports,
    )


def _slice_endpoint(endpoint: Reader, address_type: str, namespace: str) -> SliceEndpoint:
    conditions, target = endpoint.get("conditions"), endpoint.get("targetRef")
    addresses = endpoint.get("addresses")
    ref = None
    if target.exists:
        home = target.get("namespace").text() or namespace
        ref = Ref(target.get("kind").text(), home, target.get("name").text())
    return SliceEndpoint(
        addresses=tuple(
            each.name() if address_type == "FQDN" else each.address() for each in addresses.items()
        ),
        # Absent means ready: the API says to treat unknown so.
        is_ready=conditions.get("ready").boolean(default=True),
        is_terminating=conditions.get("terminating").boolean(),
        node=endpoint.get("nodeName").text(),
        zone=endpoint.get("zone").text(),
        hostname=endpoint.get("hostname").text(),
        target=ref,
    )


def text_of(obj: Object, *path: str) -> str:
    """A text deep in an object, or empty; for those who only want to look."""
    value: Any = obj
    for step in path:
        value = value.get(step) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else ""
