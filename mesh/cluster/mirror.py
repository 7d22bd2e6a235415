"""What is known of one kind of object, and what a list or a change makes of it. Pure.

A reflector lists everything, then watches from the list's version on. `Mirror` turns both
into the events of the `Cluster` protocol: what is told twice is told once (by
`resourceVersion`), and what a new list no longer has is `Deleted`, so that nothing outlives
a watch that missed its end. Only versions are kept, not objects.

After the Kubernetes API concepts: "Efficient detection of changes", "Watch bookmarks".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mesh.cluster.api import Deleted, Fault, Object, Put, Ref, ref_of
from mesh.errors import ConfigError, Unavailable


class ApiFailure(Unavailable):
    """A call to the API server failed: `code` is its HTTP status, 0 when there was no answer.

    `retry_after_seconds` is what the server asked for, 0 for nothing.
    """

    def __init__(
        self, message: str, *, code: int = 0, hint: str = "", retry_after_seconds: float = 0.0
    ) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind as the API server serves it: `plural` is its name in paths."""

    kind: str
    group: str
    version: str
    plural: str
    is_namespaced: bool

    @property
    def api_version(self) -> str:
        """As objects name it."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def name(self) -> str:
        """As RBAC and kubectl name it: `pods`, `gateways.gateway.networking.k8s.io`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(self, namespace: str = "", name: str = "", part: str = "") -> str:
        """The path of one object (or of all, without a name), or of its sub-resource `part`."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        where = f"/namespaces/{namespace}" if self.is_namespaced and namespace else ""
        tail = "".join(f"/{each}" for each in (name, part) if each)
        return f"{root}{where}/{self.plural}{tail}"


class Mirror:
    """The objects of one resource, by version. See the module."""

    def __init__(self) -> None:
        self._versions: dict[Ref, str] = {}
        self._unseen: dict[Ref, str] = {}
        self._faults: dict[str, Fault] = {}

    def __len__(self) -> int:
        return len(self._versions)

    def begin_list(self) -> None:
        """A list begins (or begins anew)."""
        self._unseen = dict(self._versions)

    def take_page(self, resource: Resource, items: Iterable[Any]) -> list[Put | Fault]:
        """What the items of one page of a list tell that was not known."""
        events: list[Put | Fault] = []
        for item in items:
            if isinstance(item, dict):
                # The items of a list leave out what the list itself says.
                item.setdefault("apiVersion", resource.api_version)
                item.setdefault("kind", resource.kind.partition(".")[0])
            events += self._put(item)
        return events

    def end_list(self) -> list[Deleted]:
        """What was known and is in no page."""
        gone = sorted(self._unseen)
        self._unseen = {}
        for ref in gone:
            del self._versions[ref]
        return [Deleted(ref) for ref in gone]

    def take_change(self, kind: str, obj: Object) -> list[Put | Deleted | Fault]:
        """What one change tells: `kind` is ADDED, MODIFIED or DELETED."""
        if kind != "DELETED":
            return list(self._put(obj))
        try:
            ref = ref_of(obj)
        except ConfigError:
            return []
        return [Deleted(ref)] if self._versions.pop(ref, None) is not None else []

    def _put(self, obj: Any) -> list[Put | Fault]:
        try:
            ref = ref_of(obj)
        except ConfigError as exc:
            fault = Fault(exc)
            is_news = str(exc) not in self._faults
            self._faults[str(exc)] = fault
            return [fault] if is_news else []
        version = version_of(obj)
        self._unseen.pop(ref, None)
        if version and self._versions.get(ref) == version:
            return []
        self._versions[ref] = version
        # Nobody here reads who owns which field, and it is the half of many objects.
        obj["metadata"].pop("managedFields", None)
        return [Put(ref, obj)]


def version_of(obj: Any) -> str:
    """The `metadata.resourceVersion` of an object or of a list; empty for none."""
    metadata = obj.get("metadata") if isinstance(obj, Mapping) else None
    version = metadata.get("resourceVersion") if isinstance(metadata, Mapping) else None
    return version if isinstance(version, str) else ""


def failure_of_status(status: Any) -> ApiFailure:
    """The failure that a watch's ERROR event carries as a `Status`."""
    if not isinstance(status, Mapping):
        return ApiFailure("the watch ended with an error that says nothing", code=500)
    code = status.get("code")
    message = str(status.get("message") or status.get("reason") or "no reason given")[:400]
    return ApiFailure(message, code=code if isinstance(code, int) else 500)
