"""The door to a cluster: what may be watched, read and written, whoever keeps the objects.

An object is the plain dict that Kubernetes writes as JSON. Two things stand behind this
protocol: the Kubernetes API, and `mesh.cluster.directory`, a directory of ordinary YAML.
Controller, node agent and command line see no difference.

A watch gives every object as `Put`, then `Synced` once, then changes as they happen.
A `Fault` tells of something that cannot be read; whatever was read of it before stays in
force (nothing is `Deleted` because of a `Fault`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import trio

from mesh.cluster.fields import split_path
from mesh.errors import ConfigError, Unavailable

#: One Kubernetes object as JSON.
Object: TypeAlias = dict[str, Any]

#: Where the lab notes which line of which file an object came from: `file:line`.
SOURCE_ANNOTATION = "ambit.dev/source"

_CLUSTER_SCOPED = frozenset(
    {
        "Namespace",
        "Node",
        "PersistentVolume",
        "StorageClass",
        "IngressClass",
        "GatewayClass",
        "XMesh",
        "PriorityClass",
        "RuntimeClass",
        "CSIDriver",
        "CSINode",
        "ClusterRole",
        "ClusterRoleBinding",
        "CustomResourceDefinition",
        "APIService",
        "MutatingWebhookConfiguration",
        "ValidatingWebhookConfiguration",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
    }
)

# Kinds that more than one API group uses: the plain name means this group, any other group's
# kind is called `Kind.group`, so that a Knative Service is never taken for a core one.
_GROUP_OF = {
    "Service": "",
    "Pod": "",
    "Namespace": "",
    "Node": "",
    "ServiceAccount": "",
    "ConfigMap": "",
    "EndpointSlice": "discovery.k8s.io",
    "Deployment": "apps",
    "DaemonSet": "apps",
    "ReplicaSet": "apps",
    "StatefulSet": "apps",
    "Secret": "",
    "Event": "",
    "Lease": "coordination.k8s.io",
    "NetworkPolicy": "networking.k8s.io",
    "PodDisruptionBudget": "policy",
    "Role": "rbac.authorization.k8s.io",
    "RoleBinding": "rbac.authorization.k8s.io",
    "ClusterRole": "rbac.authorization.k8s.io",
    "ClusterRoleBinding": "rbac.authorization.k8s.io",
    "CustomResourceDefinition": "apiextensions.k8s.io",
    "AuthorizationPolicy": "security.istio.io",
    "PeerAuthentication": "security.istio.io",
    "RequestAuthentication": "security.istio.io",
    "ServiceEntry": "networking.istio.io",
    "WorkloadEntry": "networking.istio.io",
    "DestinationRule": "networking.istio.io",
    "XBackendTrafficPolicy": "gateway.networking.x-k8s.io",
    "XMesh": "gateway.networking.x-k8s.io",
    "Gateway": "gateway.networking.k8s.io",
    "GatewayClass": "gateway.networking.k8s.io",
    "HTTPRoute": "gateway.networking.k8s.io",
    "GRPCRoute": "gateway.networking.k8s.io",
    "TCPRoute": "gateway.networking.k8s.io",
    "TLSRoute": "gateway.networking.k8s.io",
    "ReferenceGrant": "gateway.networking.k8s.io",
    "RateLimitPolicy": "ambit.dev",
    "RedactionPolicy": "ambit.dev",
}

_KIND = re.compile(r"[A-Za-z][A-Za-z0-9]{0,62}")
_API_VERSION = re.compile(r"(?:[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?/)?[a-z0-9]{1,63}")
# As a path segment this can neither be empty, nor hidden, nor climb. No underscore, as in
# Kubernetes: names that controllers make up for themselves have one and cannot be taken.
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.:-]{0,251}[A-Za-z0-9])?")
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


class NotFound(Unavailable):
    """The object that should be changed does not exist (any more)."""

    retryable = False


class Conflict(Unavailable):
    """The object exists already, or has changed since it was read: read it again."""

    retryable = True


@dataclass(frozen=True, slots=True, order=True)
class Ref:
    """The name of an object; `namespace` is empty for cluster-scoped kinds."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        where = f"{self.namespace}/" if self.namespace else ""
        return f"{self.kind} {where}{self.name}"


@dataclass(frozen=True, slots=True)
class Marks:
    """Positions (1-based) of one value and of what is inside it, as a YAML parser saw them.

    `block_indent` is how far the lines of a literal block stand in, -1 for any other value.
    """

    line: int
    column: int
    children: Mapping[str, Marks] | Sequence[Marks] = ()
    block_indent: int = -1

    def find(self, path: Sequence[str | int]) -> Marks:
        """The marks of a field, or of its closest ancestor that is written down."""
        here = self
        for step in path:
            children = here.children
            if isinstance(children, Mapping) and step in children:
                here = children[str(step)]
            elif isinstance(step, int) and isinstance(children, Sequence) and step < len(children):
                here = children[step]
            else:
                break
        return here


@dataclass(frozen=True, slots=True)
class Source:
    """Where an object is written; `line` and `column` are 1-based, 0 if not known."""

    file: str
    line: int = 0
    column: int = 0
    marks: Marks | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        numbers = [str(each) for each in (self.line, self.column) if each]
        return ":".join([self.file, *numbers])

    def at(self, path: str) -> Source:
        """The position of a field (`spec.ports[0].port`), as closely as it is known."""
        if self.marks is None:
            return self
        marks = self.marks.find(split_path(path))
        return Source(self.file, marks.line, marks.column)


@dataclass(frozen=True, slots=True)
class Put:
    """An object exists, or has changed."""

    ref: Ref
    object: Object
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class Deleted:
    """An object is gone."""

    ref: Ref


@dataclass(frozen=True, slots=True)
class Synced:
    """Everything that existed when the watch began has been told. Comes once."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something cannot be read. What was good before is still in force.

    The same error comes again with `repaired=True` when it no longer holds.
    """

    error: ConfigError
    repaired: bool = False


Event: TypeAlias = Put | Deleted | Synced | Fault


class Cluster(Protocol):
    """A keeper of Kubernetes objects."""

    def watch(
        self, kinds: Sequence[str]
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Event]]:
        """Watch objects of these kinds (none named: all). Leaving the context stops it.

        Raises ConfigError on entry if the keeper cannot be read at all.
        """
        ...

    async def get(self, ref: Ref) -> Object | None:
        """The object as it is now."""
        ...

    async def apply(self, object: Object) -> None:  # noqa: A002
        """Create the object or replace it whole. Raises ConfigError, Unavailable."""
        ...

    async def patch(self, ref: Ref, merge_patch: Mapping[str, Any]) -> None:
        """Apply a JSON merge patch (RFC 7386) atomically.

        Raises NotFound, ConfigError, Unavailable. Patches never lose one another.
        """
        ...

    async def delete(self, ref: Ref) -> None:
        """Remove the object; one that does not exist is no error. Raises ConfigError."""
        ...


@runtime_checkable
class VersionedCluster(Protocol):
    """What only an API server has beside `Cluster`: writes that never overwrite another's."""

    async def get(self, ref: Ref) -> Object | None:
        """See `Cluster.get`."""
        ...

    async def create(self, object: Object) -> Object:  # noqa: A002
        """Create, and return what became of it. Raises Conflict if it exists."""
        ...

    async def replace(self, object: Object) -> Object:  # noqa: A002
        """Replace it whole. Raises Conflict unless it has the `resourceVersion` that it names."""
        ...


def ref_of(obj: Any) -> Ref:
    """Name an object. Raises ConfigError with the field if it is none.

    A namespaced object that names no namespace is in `default`, as kubectl has it.
    """
    if not isinstance(obj, Mapping):
        raise ConfigError("not a Kubernetes object: expected a mapping")
    for key in ("apiVersion", "kind"):
        if not isinstance(obj.get(key), str) or not obj[key]:
            raise ConfigError("missing", field=key)
    if not _API_VERSION.fullmatch(obj["apiVersion"]):
        raise ConfigError(f"not an API version: {obj['apiVersion'][:80]!r}", field="apiVersion")
    if not _KIND.fullmatch(obj["kind"]):
        raise ConfigError(f"not a kind: {obj['kind'][:80]!r}", field="kind")
    metadata = obj.get("metadata")
    if not isinstance(metadata, Mapping):
        raise ConfigError("missing", field="metadata")
    name = metadata.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problem = "missing" if name is None else f"not a name: {str(name)[:80]!r}"
        raise ConfigError(problem, field="metadata.name")
    namespace = metadata.get("namespace")
    if namespace is None or namespace == "":
        namespace = "default"
    if not isinstance(namespace, str) or not _LABEL.fullmatch(namespace):
        raise ConfigError(f"not a name: {str(namespace)[:80]!r}", field="metadata.namespace")
    group = obj["apiVersion"].rpartition("/")[0]
    kind = obj["kind"]
    if kind in ("Namespace", "Service") and not group and not _LABEL.fullmatch(name):
        raise ConfigError(
            f"not a name of a {kind}: {name[:80]!r}",
            field="metadata.name",
            hint="it is part of DNS names: at most 63 characters, and no dots",
        )
    if kind in _GROUP_OF and _GROUP_OF[kind] != group:
        kind = f"{kind}.{group}" if group else f"{kind}.core"
    return Ref(kind, "" if kind in _CLUSTER_SCOPED else namespace, name)


def group_of(kind: str) -> str:
    """The API group of a kind as a `Ref` names it. Raises ConfigError for one not known here."""
    name, dot, group = kind.partition(".")
    if dot:
        return "" if group == "core" else group
    if name not in _GROUP_OF:
        raise ConfigError(f"no API group is known for {name}", hint=f"name it: {name}.group")
    return _GROUP_OF[name]


def located(error: ConfigError, source: Source | None) -> ConfigError:
    """The same error with file, line and column of the field it speaks of.

    One that has a line already speaks of text within that field.
    """
    if source is None or error.file:
        return error
    place = source.at(error.field)
    if error.line and source.marks is not None:
        marks = source.marks.find(split_path(error.field))
        if marks.block_indent >= 0:
            column = error.column + marks.block_indent if error.column else 0
            place = Source(source.file, marks.line + error.line, column)
    return ConfigError(
        error.message,
        file=place.file,
        line=place.line,
        column=place.column,
        field=error.field,
        hint=error.hint,
    )


def merge_patch(target: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7386) applied; neither argument is changed."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def source_of(obj: Mapping[str, Any], otherwise: Source) -> Source:
    """Where the user wrote an object that the lab carried over: its source annotation."""
    metadata = obj.get("metadata")
    annotations = metadata.get("annotations") if isinstance(metadata, Mapping) else None
    text = annotations.get(SOURCE_ANNOTATION) if isinstance(annotations, Mapping) else None
    if not isinstance(text, str) or not text:
        return otherwise
    file, _, line = text.rpartition(":")
    return Source(file, int(line)) if file and line.isdecimal() and len(line) < 9 else otherwise
