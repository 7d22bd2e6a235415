"""Which pods this proxy serves: ZDS messages in, commands out (sans-IO).

The node agent names every captured pod when a session begins (Add, or Keep for a pod whose
namespace it does not know), ends that with SnapshotSent, and afterwards tells of changes.
What a snapshot does not name is stopped. A pod that is already served in the same
namespace is left alone; one that could not be started is tried again every few seconds,
and holds readiness until it runs. Proxies outlive a lost session.

Descriptors: a namespace descriptor that arrives with Add is owned by this machine's entry
until it is named in StopProxy or CloseDescriptor; the shell closes it then. Listeners that came
with it are the entry's until the proxy runs, which then has duplicates of its own.
A message that breaks the order of a session ends the session, not the process: the next
session brings a whole snapshot.

Draining: the pods that run stay as they are, no other is taken, so that the agent gives a new
pod to our successor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NewType, TypeAlias, assert_never

from mesh.zds import Add, Del, Keep, Message, SnapshotSent

RETRY_SECONDS = 5.0
DRAINING = "this proxy is draining"

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
    """Open the pod's listeners, but for those that are here already; answer with `started` or
    `failed`. All descriptors are lent.
    """

    pod: Pod
    fd: int
    listeners: Mapping[int, int] = field(default_factory=dict)
    is_kept: bool = False
    """Whether the agent keeps the listeners, so that none of another proxy is beside them."""


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
    """Answer the message; `error` is empty when all is well. The listeners of the pod
    `listeners_of`, if any, go with it.
    """

    error: str = ""
    listeners_of: str | None = None


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
    listeners: Mapping[int, int] = field(default_factory=dict)
    keeps: bool = False
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
        self._is_draining = False

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

    def drain(self) -> None:
        """Take no pod from now on."""
        self._is_draining = True

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
        handed, entry.listeners = entry.listeners, {}
        return [*map(CloseDescriptor, handed.values()), *self._answer(uid, "")]

    def failed(self, uid: str, error: str, now: float) -> list[Command]:
        """The proxy of `uid` could not be started; it will be tried again."""
        entry = self._entries[uid]
        entry.is_up, entry.retry_at, entry.error = False, now + self._retry_seconds, error
        return self._answer(uid, error)

    def next_deadline(self) -> float | None:
        """When `receive_timeout` wants to be called, if at all."""
        return min(
            (
                each.retry_at
                for each in self._entries.values()
                if each.retry_at is not None and not self._is_draining
            ),
            default=None,
        )

    def receive_timeout(self, now: float) -> list[Command]:
        """Try again what is due."""
        commands: list[Command] = []
        if self._is_draining:
            return commands
        for entry in self._entries.values():
            if entry.retry_at is not None and entry.retry_at <= now:
                entry.retry_at = None
                commands.append(_start(entry))
        return commands

    def release(self) -> list[int]:
        """Forget everything; the descriptors are the caller's to close."""
        fds = []
        for entry in self._entries.values():
            fds += [entry.fd, *entry.listeners.values()]
        self._entries.clear()
        return fds

    def _add(self, message: Add, namespace: NamespaceId | None) -> list[Command]:
        if len(message.fds) != 1 + len(message.listeners or ()) or namespace is None:
            return [*map(CloseDescriptor, message.fds), *_broken("Add without a namespace")]
        fd, listeners = message.fds[0], message.listener_fds()
        pod = Pod(message.uid, message.name, message.namespace, message.service_account)
        if self._named is not None:
            self._named.add(pod.uid)
        before = self._entries.get(pod.uid)
        known = before is not None and (before.namespace, before.pod) == (namespace, pod)
        if before is not None and known and before.is_up:
            # What the agent has may be of an earlier proxy: it gets what is listened on.
            kept = pod.uid if message.keeps_listeners and not self._is_draining else None
            return [*map(CloseDescriptor, message.fds), Ack(listeners_of=kept)]
        if self._is_draining:
            return [*map(CloseDescriptor, message.fds), Ack(DRAINING)]
        self._answering = pod.uid
        if before is not None and known:
            # Known but not running: the agent asks again, so try again now.
            closing = [*before.listeners.values(), fd]
            before.retry_at, before.listeners = None, listeners
            before.keeps = message.keeps_listeners
            return [*map(CloseDescriptor, closing), _start(before)]
        stopping = self._stop(pod.uid)
        entry = _Entry(pod, fd, namespace, listeners, message.keeps_listeners)
        self._entries[pod.uid] = entry
        return [*stopping, _start(entry)]

    def _stop(self, uid: str) -> list[Command]:
        entry = self._entries.pop(uid, None)
        if entry is None:
            return []
        return [StopProxy(uid, entry.fd), *map(CloseDescriptor, entry.listeners.values())]

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
        keeps = not error and self._entries[uid].keeps
        return [Ack(error, listeners_of=uid if keeps else None)]


def _start(entry: _Entry) -> StartProxy:
    return StartProxy(entry.pod, entry.fd, entry.listeners, is_kept=entry.keeps)


def _broken(reason: str) -> list[Command]:
    return [Ack(reason), EndSession(reason)]
