"""The live directory: what the user's files ask for, merged with what everybody made of it.

It is the API server of the lab. Files are applied to it by a three-way merge, so that what was
set live (labels by `enroll`, cluster IPs, status) survives a file's next edit. A Pod written in
a file is not applied but only remembered here: its live object is the kubelet's to write, with
node, addresses and status.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from mesh.cluster.api import (
    SOURCE_ANNOTATION,
    Deleted,
    Event,
    Fault,
    Object,
    Put,
    Ref,
    Source,
    located,
    merge_patch,
    ref_of,
)
from mesh.cluster.directory import DirectoryCluster
from mesh.errors import ConfigError, MeshError
from mesh.lab.merge import merge_patch_for, service_patch_for
from mesh.lab.pod_files import wall_clock
from mesh.lab.services import ClusterIps, plan_service

SYSTEM_NAMESPACE = "istio-system"
DEFAULT_NAMESPACES = ("default", "kube-system", SYSTEM_NAMESPACE)
MANAGED_LABEL = "ambit.dev/lab"
_NOT_COUNTED = frozenset({"apiVersion", "kind", "metadata", "status"})
_UIDS = uuid.UUID("0d5c7a3e-52a7-5d0b-9c0a-7d7b0a3c9a52")


class Live:
    """The live objects, in memory and on disk.

    `changed` is called after every change of one, `pods_changed` when a file's Pods changed.
    """

    def __init__(
        self, path: Path, changed: Callable[[Ref], None], pods_changed: Callable[[], None]
    ) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.cluster = DirectoryCluster(path, writable=True)
        self.objects: dict[Ref, Object] = {}
        self.pods: dict[Ref, Object] = {}
        self.sources: dict[Ref, Source] = {}
        self.notes: set[str] = set()
        self._changed = changed
        self._pods_changed = pods_changed
        self._applied: dict[Ref, Object] = {}
        self._holders: dict[str, Ref] = {}

    async def watch(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow what others write to the directory. Never returns."""
        async with self.cluster.watch(()) as events:
            async for event in events:
                match event:
                    case Put(ref=ref, object=obj):
                        if self.objects.get(ref) != obj:
                            # Events may lag behind our own writes; the file is the truth.
                            current = await self.cluster.get(ref)
                            if current is not None:
                                self._put(ref, current)
                    case Deleted(ref=ref):
                        if ref in self.objects and await self.cluster.get(ref) is None:
                            self._drop(ref)
                    case Fault():
                        pass  # somebody writes the directory past us; nothing of ours is lost
                    case _:
                        task_status.started()

    def of_kind(self, *kinds: str) -> list[Object]:
        """Live objects of some kinds."""
        return [obj for ref, obj in self.objects.items() if ref.kind in kinds]

    def find(self, kind: str, namespace: str, name: str) -> Object | None:
        """A live object."""
        return self.objects.get(Ref(kind, namespace, name))

    def lookup(self, namespace: str) -> Callable[[str, str], Mapping[str, Any] | None]:
        """For one namespace: (kind, name) -> object."""

        def find(kind: str, name: str) -> Mapping[str, Any] | None:
            return self.find(kind, namespace, name)

        return find

    async def apply(self, obj: Object, source: Source | None = None) -> None:
        """Apply an object as a file (or `apply`) says it. Raises ConfigError, Unavailable."""
        ref = ref_of(obj)
        wanted = _prepared(obj, ref, source)
        if source is not None:
            self.sources[ref] = source
        last = self._applied.get(ref)
        live = self.objects.get(ref)
        merge = service_patch_for if ref.kind == "Service" else merge_patch_for
        patch = merge(last, wanted, live) if live is not None else {}
        if ref.kind == "Service":
            self._admit(ref, merge_patch(live, patch) if live is not None else wanted, source)
        self._applied[ref] = wanted
        if ref.kind == "Pod":
            before = self.pods.get(ref)
            if before != wanted:
                self.pods[ref] = wanted
                self._pods_changed()
            return
        if live is None:
            await self.create(wanted)
        elif patch:
            await self.patch(ref, patch)
        if ref.kind == "Namespace":
            self._forget_notes(f"namespace {ref.name} ")
            await self.ensure_service_account(ref.name, "default")

    async def withdraw(self, ref: Ref) -> None:
        """A file no longer has the object."""
        self._applied.pop(ref, None)
        self.sources.pop(ref, None)
        if ref.kind == "Pod":
            if self.pods.pop(ref, None) is not None:
                self._pods_changed()
            return
        if ref.kind == "Namespace" and ref.name in DEFAULT_NAMESPACES:
            return
        await self.delete(ref)
        if ref.kind == "Namespace" and any(each.namespace == ref.name for each in self._applied):
            await self.ensure_namespace(ref.name, "made for the objects that are in it")

    def _admit(self, ref: Ref, obj: Object, source: Source | None) -> None:
        """Refuse a Service as the API server would, before anybody sees it. Raises ConfigError."""
        holders = {
            ip: (holder.namespace, holder.name)
            for ip in _cluster_ips(obj)
            if (holder := self._holders.get(ip, ref)) != ref
        }
        try:
            plan_service(obj, None, ClusterIps(holders))
        except ConfigError as error:
            raise located(error, source) from error

    def _forget_notes(self, start: str) -> None:
        self.notes -= {note for note in self.notes if note.startswith(start)}

    async def create(self, obj: Object) -> None:
        """Write a new object, with uid and time of creation."""
        ref = ref_of(obj)
        made = copy.deepcopy(obj)
        metadata = made["metadata"]
        metadata.setdefault("uid", str(uuid.uuid5(_UIDS, str(ref))))
        metadata.setdefault("creationTimestamp", wall_clock())
        metadata["generation"] = 1
        await self.cluster.apply(made)
        self._put(ref, made)

    async def patch(self, ref: Ref, patch: Mapping[str, Any]) -> Object:
        """Apply a merge patch; the object after it, of a new generation if more than its metadata
        and status changed. Raises NotFound, ConfigError.
        """
        live = self.objects.get(ref)
        if live is not None and patch.keys() - _NOT_COUNTED:
            generation = live["metadata"].get("generation", 0) + 1
            patch = merge_patch(patch, {"metadata": {"generation": generation}})
        await self.cluster.patch(ref, patch)
        current = await self.cluster.get(ref)
        if current is None:
            current = merge_patch(self.objects.get(ref, {}), patch)
        self._put(ref, current)
        return current

    async def delete(self, ref: Ref) -> None:
        """Remove an object; gone already is fine."""
        await self.cluster.delete(ref)
        self._drop(ref)

    async def ensure_namespace(self, name: str, why: str = "") -> None:
        """Make a namespace that something needs and nobody wrote."""
        if self.find("Namespace", "", name) is None:
            await self.create(
                {
                    "apiVersion": "v1",
                    "kind": "Namespace",
                    "metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}},
                }
            )
            if why:
                self.notes.add(f"namespace {name} is not written anywhere; {why}")
        await self.ensure_service_account(name, "default")

    async def ensure_service_account(self, namespace: str, name: str, why: str = "") -> None:
        """Make a service account that something needs and nobody wrote."""
        if self.find("ServiceAccount", namespace, name) is None:
            await self.create(
                {
                    "apiVersion": "v1",
                    "kind": "ServiceAccount",
                    "metadata": {"name": name, "namespace": namespace},
                }
            )
            if why:
                self.notes.add(f"ServiceAccount {namespace}/{name} is not written anywhere; {why}")

    async def ensure_defaults(self) -> None:
        """What every cluster has."""
        for name in DEFAULT_NAMESPACES:
            await self.ensure_namespace(name)

    def uid_of(self, kind: str, namespace: str, name: str) -> str:
        """A live object's uid, "" when there is none."""
        found = self.find(kind, namespace, name)
        return str(found["metadata"].get("uid", "")) if found else ""

    def _put(self, ref: Ref, obj: Object) -> None:
        if self.objects.get(ref) != obj:
            self._release(ref)
            self.objects[ref] = obj
            if ref.kind == "Service":
                self._holders |= dict.fromkeys(_cluster_ips(obj), ref)
            self._changed(ref)

    def _drop(self, ref: Ref) -> None:
        if ref in self.objects:
            self._release(ref)
            del self.objects[ref]
            self._changed(ref)

    def _release(self, ref: Ref) -> None:
        """Give up the cluster IPs that a live Service holds."""
        if ref.kind == "Service":
            for ip in _cluster_ips(self.objects.get(ref, {})):
                if self._holders.get(ip) == ref:
                    del self._holders[ip]


def _cluster_ips(service: Object) -> list[str]:
    """The cluster IPs that a live Service holds."""
    spec = service.get("spec")
    if not isinstance(spec, dict):
        return []
    listed = spec.get("clusterIPs") or [spec.get("clusterIP")]
    return [ip for ip in listed if isinstance(ip, str) and ip not in ("", "None")]


def _prepared(obj: Object, ref: Ref, source: Source | None) -> Object:
    """The object as it goes into the live directory."""
    made = copy.deepcopy(obj)
    metadata = made["metadata"]
    if ref.namespace:
        metadata["namespace"] = ref.namespace
    if ref.kind == "Namespace":
        labels = metadata.get("labels")
        metadata["labels"] = {
            "kubernetes.io/metadata.name": ref.name,
            **(labels if isinstance(labels, dict) else {}),
        }
    annotations = metadata.get("annotations")
    if source is not None:
        metadata["annotations"] = {
            **(annotations if isinstance(annotations, dict) else {}),
            SOURCE_ANNOTATION: f"{source.file}:{source.line}",
        }
    # Status is what the lab found out, not what a file says.
    made.pop("status", None)
    return made


class UserFiles:
    """The user's directory, applied to the live one as it changes.

    `puts` are the objects as the files have them; `edited` is set when they changed.
    """

    def __init__(self, path: Path, live: Live, say: Callable[[ConfigError], None]) -> None:
        self._cluster = DirectoryCluster(path)
        self.puts: dict[Ref, Put] = {}
        self.edited = trio.Event()
        self._live = live
        self._say = say
        self._faults: dict[str, ConfigError] = {}
        self._refused: dict[Ref, Put] = {}

    @property
    def faults(self) -> Sequence[ConfigError]:
        """What cannot be read or applied at present."""
        return list(self._faults.values())

    async def follow(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Apply everything, then every change; started once the first is done."""
        async with self._cluster.watch(()) as events:
            # Namespaces go first, or every pod would find its own missing.
            first: list[Put] | None = []
            async for event in events:
                self._keep(event)
                match event:
                    case Put() if first is not None:
                        first.append(event)
                    case Put():
                        await self._apply(event)
                        await self._retry(event.ref)
                    case Deleted(ref=ref):
                        self._faults.pop(str(ref), None)
                        self._refused.pop(ref, None)
                        await self._guard(ref, None, self._live.withdraw(ref))
                        await self._retry(ref)
                    case Fault(error=error, repaired=repaired):
                        self._note(str(error), None if repaired else error)
                    case _:
                        for put in _in_order(first or ()):
                            await self._apply(put)
                        first = None
                        task_status.started()

    async def _apply(self, put: Put) -> None:
        doing = self._live.apply(put.object, put.source)
        if await self._guard(put.ref, put.source, doing):
            self._refused.pop(put.ref, None)
            self._faults.pop(str(put.ref), None)
        else:
            self._refused[put.ref] = put

    def _keep(self, event: Event) -> None:
        match event:
            case Put(ref=ref):
                self.puts[ref] = event
            case Deleted(ref=ref):
                self.puts.pop(ref, None)
            case _:
                return
        self.edited.set()

    async def _retry(self, changed: Ref) -> None:
        """After a change of a Service: others may have been refused on its account."""
        if changed.kind == "Service":
            for put in [*self._refused.values()]:
                if put.ref.kind == "Service" and put.ref != changed:
                    await self._apply(put)

    async def _guard(self, ref: Ref, source: Source | None, doing: Awaitable[None]) -> bool:
        """Whether `doing` went well; its error becomes a fault."""
        try:
            await doing
        except MeshError as error:
            place = source or Source(str(ref))
            fault = error
            if not isinstance(fault, ConfigError) or not fault.file:
                fault = ConfigError(
                    str(error),
                    file=place.file,
                    line=place.line,
                    column=place.column,
                    hint=error.hint,
                )
            self._note(str(ref), fault)
            return False
        return True

    def _note(self, key: str, error: ConfigError | None) -> None:
        if error is None:
            self._faults.pop(key, None)
        elif key not in self._faults or str(self._faults[key]) != str(error):
            self._faults[key] = error
            self._say(error)


def _in_order(puts: Iterable[Put]) -> list[Put]:
    ranks = {"Namespace": 0, "Node": 1, "ServiceAccount": 2, "ConfigMap": 3, "Secret": 3}
    return sorted(puts, key=lambda put: ranks.get(put.ref.kind, 9))
