"""Which pods this proxy serves: ZDS messages in, commands out (sans-IO).

The node agent names every captured pod when a session begins (Add, or Keep for a pod whose
namespace it does not know), ends that with SnapshotSent, and afterwards tells of changes.
What a snapshot does not name is stopped. A pod that is already served in the same
namespace is left alone; one that could not be started is tried again every few seconds,
and holds readiness until it runs. Proxies outlive a lost session.

Descriptors: a namespace descriptor that arrives with Add is owned by this machine's entry
until it is named in StopProxy or CloseDescriptor; the shell closes it then.
A message that breaks the order of a session ends the session, not the process: the next
session brings a whole snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NewType, TypeAlias, assert_never

from mesh.zds import Add, Del, Keep, Message, SnapshotSent

RETRY_SECONDS = 5.0

NamespaceId = NewType("NamespaceId", tuple[int, int])
"""Device and inode: equal for two descriptors of the same network namespace."""


@dataclass(frozen=True, slots=True)
class Pod:
    """What the node agent says of a pod; the controller's workload must agree with it."""

    uid: str
    name: str
    namespace: str
    service_account: str


@dataclass(frozen=True, slots=True)
class StartProxy:
    """Open the pod's listeners; answer with `started` or `failed`. `fd` is lent."""

    pod: Pod
    fd: int


@dataclass(frozen=True, slots=True)
class StopProxy:
    """Stop serving the pod at once, if it runs, then close `fd`."""

    uid: str
    fd: int


@dataclass(frozen=True, slots=True)
class CloseDescriptor:
    """Close a descriptor that is not needed."""

    fd: int


@dataclass(frozen=True, slots=True)
class Ack:
    """Answer the message; `error` is empty when all is well."""

    error: str = ""


@dataclass(frozen=True, slots=True)
class EndSession:
    """The agent broke the protocol: connect anew."""

    reason: str


Command: TypeAlias = StartProxy | StopProxy | CloseDescriptor | Ack | EndSession


@dataclass(slots=True)
class _Entry:
    pod: Pod
    fd: int
    namespace: NamespaceId
    is_up: bool = False
    retry_at: float | None = None
    error: str = ""


class Workloads:
    """The state of all sessions together. Call `connected` when a session begins."""

    def __init__(self, retry_seconds: float = RETRY_SECONDS) -> None:
        self._retry_seconds = retry_seconds
        self._entries: dict[str, _Entry] = {}
        self._named: set[str] | None = None
        self._is_synced = False
        # The uid whose start answers the message in flight, as opposed to a retry.
        self._answering: str | None = None

    @property
    def is_ready(self) -> bool:
        """A snapshot is complete in this session and every pod in it is served."""
        return self._is_synced and all(each.is_up for each in self._entries.values())

    def states(self) -> Iterator[tuple[Pod, str, str]]:
        """(pod, `Up` or `Pending`, latest error) of each pod, for listings."""
        for entry in self._entries.values():
            yield entry.pod, "Up" if entry.is_up else "Pending", entry.error

    def connected(self) -> None:
        """A session begins; a snapshot follows."""
        self._named = set()
        self._is_synced = False
        self._answering = None

    def disconnected(self) -> None:
        """The session ended; what runs goes on."""
        self._named = None
        self._is_synced = False
        self._answering = None

    def receive(self, message: Message, namespace: NamespaceId | None = None) -> list[Command]:
        """Handle one message; with Add, `namespace` is that of its descriptor."""
        match message:
            case Add():
                return self._add(message, namespace)
            case Keep():
                if self._named is None:
                    return _broken("Keep after the snapshot")
                self._named.add(message.uid)
                return [Ack()]
            case Del():
                # An unknown uid is no mistake: the agent may repeat itself.
                return [*self._stop(message.uid), Ack()]
            case SnapshotSent():
                return self._snapshot_sent()
            case _:
                assert_never(message)

    def started(self, uid: str) -> list[Command]:
        """The proxy of `uid` runs."""
        entry = self._entries[uid]
        entry.is_up, entry.retry_at, entry.error = True, None, ""
        return self._answer(uid, "")

    def failed(self, uid: str, error: str, now: float) -> list[Command]:
        """The proxy of `uid` could not be started; it will be tried again."""
        entry = self._entries[uid]
        entry.is_up, entry.retry_at, entry.error = False, now + self._retry_seconds, error
        return self._answer(uid, error)

    def next_deadline(self) -> float | None:
        """When `receive_timeout` wants to be called, if at all."""
        return min(
            (each.retry_at for each in self._entries.values() if each.retry_at is not None),
            default=None,
        )

    def receive_timeout(self, now: float) -> list[Command]:
        """Try again what is due."""
        commands: list[Command] = []
        for entry in self._entries.values():
            if entry.retry_at is not None and entry.retry_at <= now:
                entry.retry_at = None
                commands.append(StartProxy(entry.pod, entry.fd))
        return commands

    def release(self) -> list[int]:
        """Forget everything; the descriptors are the caller's to close."""
        fds = [each.fd for each in self._entries.values()]
        self._entries.clear()
        return fds

    def _add(self, message: Add, namespace: NamespaceId | None) -> list[Command]:
        if len(message.fds) != 1 or namespace is None:
            return [*map(CloseDescriptor, message.fds), *_broken("Add without a namespace")]
        fd = message.fds[0]
        pod = Pod(message.uid, message.name, message.namespace, message.service_account)
        if self._named is not None:
            self._named.add(pod.uid)
        before = self._entries.get(pod.uid)
        if before is not None and (before.namespace, before.pod) == (namespace, pod):
            if before.is_up:
                return [CloseDescriptor(fd), Ack()]
            # Known but not running: the agent asks again, so try again now.
            before.retry_at = None
            self._answering = pod.uid
            return [CloseDescriptor(fd), StartProxy(pod, before.fd)]
        stopping = self._stop(pod.uid)
        self._entries[pod.uid] = _Entry(pod, fd, namespace)
        self._answering = pod.uid
        return [*stopping, StartProxy(pod, fd)]

    def _stop(self, uid: str) -> list[Command]:
        entry = self._entries.pop(uid, None)
        return [StopProxy(uid, entry.fd)] if entry is not None else []

    def _snapshot_sent(self) -> list[Command]:
        if self._named is None:
            return _broken("second SnapshotSent in one session")
        commands: list[Command] = []
        for uid in [each for each in self._entries if each not in self._named]:
            commands += self._stop(uid)
        self._named = None
        self._is_synced = True
        return [*commands, Ack()]

    def _answer(self, uid: str, error: str) -> list[Command]:
        if self._answering != uid:
            return []
        self._answering = None
        return [Ack(error)]


def _broken(reason: str) -> list[Command]:
    return [Ack(reason), EndSession(reason)]
