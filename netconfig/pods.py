"""This node's pods and the namespaces they are in, as the cluster tells them, and where each
pod's network namespace is found.

`NodePods` follows a watch and keeps the last good view of every object; what cannot be read
is logged and changes nothing. A `NamespaceFinder` turns a pod into a descriptor: here by a
directory in which it is mounted under the pod's uid, in `netconfig.processes` by a process of
the pod.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import trio

from mesh import netns
from mesh.cluster.api import Cluster, Deleted, Event, Fault, Put, Ref, Synced
from mesh.cluster.objects import Namespace, Pod, parse_namespace, parse_pod
from mesh.errors import ConfigError, KernelError, Unavailable
from mesh.runtime import log

#: What is watched.
KINDS = ("Pod", "Namespace")

_log = log.get("pods")
_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class NamespaceFinder(Protocol):
    """Finds the network namespace of a running pod."""

    def open(self, pod: Pod) -> int | None:
        """A new descriptor, the caller's to close; None while there is none.

        Raises KernelError.
        """
        ...


class MountedNamespaces:
    """Network namespaces bind-mounted as `<directory>/<pod uid>`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self, pod: Pod) -> int | None:
        """See `NamespaceFinder.open`."""
        if not _UID.fullmatch(pod.uid):
            return None
        return open_namespace(self._directory / pod.uid)


def open_namespace(path: Path) -> int | None:
    """A descriptor of the namespace at `path`; None if nothing, or nothing yet, is there.

    Raises KernelError when it cannot be opened.
    """
    try:
        # Non-blocking, lest a pipe put there hold us up.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise KernelError(
            f"network namespace {path}: {exc.strerror}", errno=exc.errno or 0, command="open"
        ) from exc
    if netns.is_network_namespace(fd):
        return fd
    # The empty file is there a moment before the namespace is mounted over it, and after.
    os.close(fd)
    return None


class NodePods:
    """The pods of one node and all namespaces, kept up to date by `follow`."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._pods: dict[Ref, Pod] = {}
        self.namespaces: dict[str, Namespace] = {}

    def all(self) -> list[Pod]:
        """Every pod of this node."""
        return list(self._pods.values())

    def get(self, ref: Ref) -> Pod | None:
        """The pod of that name on this node."""
        return self._pods.get(ref)

    def remember(self, pod: Pod) -> None:
        """Take in a pod that was read outside the watch, which may lag behind."""
        if pod.node == self._node:
            self._pods[pod.ref] = pod

    async def follow(
        self,
        cluster: Cluster,
        on_change: Callable[[frozenset[Ref]], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Watch until cancelled; started when everything that exists has been told.

        `on_change` is called after each burst of changes, with what changed. Raises
        ConfigError when the cluster cannot be read at all, Unavailable when it stops telling.
        """
        is_synced = False
        async with cluster.watch(KINDS) as events:
            async for first in events:
                burst = [first]
                while True:
                    try:
                        burst.append(events.receive_nowait())
                    except (trio.WouldBlock, trio.EndOfChannel):
                        break
                for event in burst:
                    self.apply(event)
                    if isinstance(event, Synced):
                        is_synced = True
                        task_status.started()
                if is_synced:
                    on_change(frozenset(_refs(burst)))
        raise Unavailable("the cluster stopped telling of changes")

    def apply(self, event: Event) -> None:
        """Take one event in. Never raises for what an object holds."""
        match event:
            case Put(ref=ref, object=obj):
                try:
                    if ref.kind == "Namespace":
                        self.namespaces[ref.name] = parse_namespace(obj)
                    else:
                        self._put_pod(parse_pod(obj))
                except ConfigError as exc:
                    _log.warning("object_rejected", object=str(ref), error=str(exc))
            case Deleted(ref=ref):
                if ref.kind == "Namespace":
                    self.namespaces.pop(ref.name, None)
                else:
                    self._pods.pop(ref, None)
            case Fault(error=error, repaired=repaired):
                _log.warning("cluster_fault", error=str(error), repaired=repaired)

    def _put_pod(self, pod: Pod) -> None:
        if pod.node == self._node:
            self._pods[pod.ref] = pod
        else:
            self._pods.pop(pod.ref, None)


def _refs(events: Iterable[Event]) -> Iterator[Ref]:
    for event in events:
        if isinstance(event, Put | Deleted):
            yield event.ref
