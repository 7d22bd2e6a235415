"""A pod's network namespace, found by its processes: what a Kubernetes node offers.

Container runtimes mount namespaces under names of their own, but every process of a pod is
in a cgroup that the kubelet named after the pod's uid. A tenant may make cgroups *below* its
own and name them as it likes, so only the first such name in a path counts. Processes of the
node's own network are passed over.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from mesh.cluster.objects import Pod
from mesh.errors import KernelError
from netconfig.pods import NamespaceFinder, open_namespace

_MAX_CGROUP_BYTES = 16 << 10
# kubepods/burstable/pod<uid>/... or kubepods-burstable-pod<uid, dashes as underscores>.slice/...
# pod<uid>, or with systemd kubepods-burstable-pod<uid, dashes as underscores>.slice
_POD = re.compile(
    r"(?:[a-z-]+-)?pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})(?:\.slice)?"
)


class ProcessNamespaces:
    """A `NamespaceFinder` that looks through `proc`, which must be the node's own."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc

    def open(self, pod: Pod) -> int | None:
        """See `NamespaceFinder.open`."""
        try:
            numbers = [name for name in os.listdir(self._proc) if name.isdecimal()]
        except OSError as exc:
            raise KernelError(f"{self._proc}: {exc.strerror}", errno=exc.errno or 0) from exc
        # The youngest last: a pod's first process is its sandbox, which lives as long as the pod.
        for number in sorted(numbers, key=int):
            process = self._proc / number
            if self._uid_of(process) != pod.uid:
                continue
            try:
                fd = open_namespace(process / "ns" / "net")
            except KernelError:
                continue  # it has just ended, or is a zombie
            if fd is None:
                continue
            # Another process may have got the number meanwhile.
            if self._uid_of(process) == pod.uid and not self._is_the_nodes(fd):
                return fd
            os.close(fd)
        return None

    def _uid_of(self, process: Path) -> str:
        try:
            with (process / "cgroup").open("rb") as file:
                return pod_uid(file.read(_MAX_CGROUP_BYTES).decode("utf-8", "replace"))
        except OSError:
            return ""

    def _is_the_nodes(self, fd: int) -> bool:
        try:
            own = os.stat(self._proc / "self" / "ns" / "net")
        except OSError:
            return True
        found = os.fstat(fd)
        return (own.st_dev, own.st_ino) == (found.st_dev, found.st_ino)


class FirstOf:
    """Asks one finder after the other."""

    def __init__(self, finders: Sequence[NamespaceFinder]) -> None:
        self._finders = tuple(finders)

    def open(self, pod: Pod) -> int | None:
        """See `NamespaceFinder.open`."""
        for finder in self._finders:
            fd = finder.open(pod)
            if fd is not None:
                return fd
        return None


def pod_uid(cgroups: str) -> str:
    """The uid of the pod that a process with this /proc/PID/cgroup is of; empty for none."""
    for line in cgroups.splitlines():
        is_of_kubelet = False
        for segment in line.split(":", 2)[-1].split("/"):
            is_of_kubelet = is_of_kubelet or "kubepods" in segment
            found = _POD.fullmatch(segment) if is_of_kubelet else None
            if found:
                return found[1].replace("_", "-")
    return ""
