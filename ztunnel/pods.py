"""The pods of this node: sessions with the node agent, and the proxies they start and stop.

Trio shell around `ztunnel.workloads`: it dials ZDS, shows each message to the machine and
performs the commands one by one, so that an Add is acknowledged only once its listeners
are open. Descriptors are closed here, when the machine says so and the proxy is gone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from typing import assert_never

import trio

from mesh import netns
from mesh.errors import KernelError, MeshError
from mesh.hbone.pool import Pool
from mesh.retry import Backoff
from mesh.runtime import lifecycle, log
from mesh.runtime.admin import Readiness, ReadyTask
from mesh.runtime.metrics import WorkloadManagerMetrics
from mesh.zds import Add, Message, ZdsConnection, connect
from ztunnel.inpod import PodProxy
from ztunnel.node import Node
from ztunnel.workloads import (
    Ack,
    CloseDescriptor,
    Command,
    EndSession,
    NamespaceId,
    Pod,
    StartProxy,
    StopProxy,
    Workloads,
)

READY_TASK = "workload proxy manager"

_log = log.get("pods")


class Pods:
    """Serves the pods that the node agent names. Ready while a session's snapshot is complete
    and all its pods run; without a session not ready, although the proxies go on.
    """

    def __init__(self, node: Node, metrics: WorkloadManagerMetrics, readiness: Readiness) -> None:
        self._node = node
        self._metrics = metrics
        self._machine = Workloads()
        self._proxies: dict[str, PodProxy] = {}
        self._nursery: trio.Nursery
        self._kept: set[str] = set()
        """Pods whose listeners the node agent has: they may be closed here, and stay open."""
        self._is_draining = False
        self._readiness = readiness
        self._pending: ReadyTask | None = readiness.task(READY_TASK)

    def __iter__(self) -> Iterator[tuple[Pod, str, str]]:
        return self._machine.states()

    def pools(self) -> list[Pool]:
        """The tunnel pools of the pods that are served."""
        # One that was only just started has none yet.
        return [each.pool for each in self._proxies.values() if hasattr(each, "pool")]

    async def run(self) -> None:
        """Keep a session with the node agent, for ever. If cancelled: every pod is cut, and
        every descriptor closed.
        """
        backoff = Backoff(self._node.rng)
        path = self._node.config.inpod_uds
        try:
            async with trio.open_nursery() as self._nursery:
                while True:
                    try:
                        with await connect(path, takes_listeners=True) as session:
                            _log.info("zds_connected", path=path)
                            backoff.reset()
                            await self._serve(session)
                    except MeshError as exc:
                        _log.warning("zds_disconnected", path=path, error=str(exc))
                    self._machine.disconnected()
                    self._kept.clear()
                    self._tell_readiness()
                    if self._is_draining:
                        # Whoever connects last gets the new pods; that must not be us.
                        await trio.sleep_forever()
                    # Pods that failed to start are tried again while the agent is away, too.
                    await self._retry_during(backoff.next())
        finally:
            for fd in self._machine.release():
                os.close(fd)

    async def drain(self, seconds: float) -> None:
        """Let the connections of all pods finish, for at most `seconds`; take no new pod.

        Listeners that the node agent has, too, stay open without us: who connects now waits
        for our successor.
        """
        self._is_draining = True
        self._machine.drain()
        async with trio.open_nursery() as nursery:
            for uid, proxy in self._proxies.items():
                nursery.start_soon(
                    functools.partial(proxy.drain, seconds, has_successor=uid in self._kept)
                )

    async def _serve(self, session: ZdsConnection) -> None:
        self._machine.connected()
        while True:
            deadline = self._machine.next_deadline()
            message: Message | None = None
            with trio.move_on_at(float("inf") if deadline is None else deadline):
                message = await session.receive()
            if message is None:
                commands = self._machine.receive_timeout(trio.current_time())
            else:
                namespace = None
                if isinstance(message, Add):
                    namespace = NamespaceId(netns.identity(message.fds[0]))
                commands = self._machine.receive(message, namespace)
            if not await self._perform(commands, session):
                return
            self._tell_readiness()

    async def _retry_during(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            while True:
                deadline = self._machine.next_deadline()
                await trio.sleep_until(float("inf") if deadline is None else deadline)
                await self._perform(self._machine.receive_timeout(trio.current_time()), None)

    async def _perform(self, commands: Sequence[Command], session: ZdsConnection | None) -> bool:
        """Perform commands in order; False when the session is to end. Raises Unavailable."""
        goes_on = True
        for command in commands:
            match command:
                case StartProxy():
                    await self._perform(self._start(command), session)
                case StopProxy():
                    await self._stop(command)
                case CloseDescriptor():
                    os.close(command.fd)
                case Ack():
                    await self._answer(command, session)
                case EndSession():
                    _log.warning("zds_session_ended", reason=command.reason)
                    goes_on = False
                case _:
                    assert_never(command)
        self._count()
        return goes_on

    async def _answer(self, command: Ack, session: ZdsConnection | None) -> None:
        if session is None:
            return
        proxy = self._proxies.get(command.listeners_of or "")
        if proxy is None:
            await session.ack(command.error)
        else:
            await session.ack(command.error, proxy.listeners())
            self._kept.add(proxy.pod.uid)

    def _start(self, command: StartProxy) -> list[Command]:
        pod = command.pod
        proxy = PodProxy(self._node, pod, command.fd)
        try:
            proxy.open(command.listeners, shares_ports=not command.is_kept)
        except KernelError as exc:
            _log.error("pod_failed", uid=pod.uid, pod=f"{pod.namespace}/{pod.name}", error=str(exc))
            return self._machine.failed(pod.uid, str(exc), trio.current_time())
        self._proxies[pod.uid] = proxy
        self._nursery.start_soon(lifecycle.guard, "pod", proxy.run)
        self._metrics.started.inc()
        _log.info(
            "pod_started",
            uid=pod.uid,
            pod=f"{pod.namespace}/{pod.name}",
            handed_over=len(command.listeners),
        )
        return self._machine.started(pod.uid)

    async def _stop(self, command: StopProxy) -> None:
        proxy = self._proxies.pop(command.uid, None)
        self._kept.discard(command.uid)
        try:
            if proxy is not None:
                await proxy.stop()
                self._metrics.stopped.inc()
                _log.info("pod_stopped", uid=command.uid)
        finally:
            os.close(command.fd)

    def _tell_readiness(self) -> None:
        if self._machine.is_ready and self._pending is not None:
            self._pending.done()
            self._pending = None
        elif not self._machine.is_ready and self._pending is None:
            self._pending = self._readiness.task(READY_TASK)

    def _count(self) -> None:
        states = [state for _, state, _ in self._machine.states()]
        self._metrics.active.set(states.count("Up"))
        self._metrics.pending.set(states.count("Pending"))
