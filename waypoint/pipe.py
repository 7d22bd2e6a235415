"""Bytes between a tunnel and an endpoint that nobody looks into: opaque TCP, TLS, server-first.

Half-close is kept, a cut on one side becomes a cut on the other. TLSRoute (by server name) and
TCPRoute choose the backend.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from mesh.errors import MeshError, Refusal
from waypoint.detect import server_name
from waypoint.filters.chain import Request
from waypoint.judge_connection import judge_connection
from waypoint.traffic import Traffic
from waypoint.transport import Transport

if TYPE_CHECKING:
    from waypoint.inbound import Inbound

_MAX_HELLO = 16 << 10


class _End:
    """One side of a pipe: what it reads goes to the other."""

    def __init__(self, pipe: _Pipe, transport: Transport) -> None:
        self.pipe = pipe
        self.transport = transport
        self.other: _End | None = None
        self.early = bytearray()
        self.has_ended = False
        self.count = 0

    def on_data(self, data: memoryview) -> None:
        self.count += len(data)
        other = self.other
        if other is None:
            self.early += data
            self.transport.pause()
            return
        other.transport.write(data)
        if other.transport.is_blocked:
            self.transport.pause()

    def on_end(self) -> None:
        self.has_ended = True
        if self.other is not None:
            self.other.transport.shut()
            if self.other.has_ended:
                self.pipe.finish("-", "")

    def on_lost(self, reason: str) -> None:
        self.pipe.finish("DC" if self is self.pipe.down else "UC", reason)

    def on_writable(self) -> None:
        if self.other is not None:
            self.other.transport.unpause()


class _Pipe:
    """A connection carried through."""

    def __init__(self, inbound: Inbound, transport: Transport) -> None:
        self.inbound = inbound
        self.down = _End(self, transport)
        self.up: _End | None = None
        self.is_done = False
        self.started = inbound.proxy.now()
        self._judged_by: Traffic | None = None
        inbound.pipes.add(self)

    def join(self, transport: Transport) -> _End:
        self.up = _End(self, transport)
        self.up.other, self.down.other = self.down, self.up
        return self.up

    def finish(self, flag: str, reason: str) -> None:
        if self.is_done:
            return
        self.is_done = True
        self.inbound.pipes.discard(self)
        for end in (self.down, self.up):
            if end is None:
                continue
            if reason:
                end.transport.abort()
            else:
                end.transport.close()
        sent = self.up.count if self.up is not None else 0
        self.inbound.proxy.journal.connection(
            self.inbound, flag, reason, self.down.count, sent, self.started
        )

    def rejudge(self) -> None:
        """Policy may have changed since: what would be refused now is cut."""
        traffic = self.inbound.traffic()
        if not self.is_done and traffic is not self._judged_by:
            refusal = self._judge(traffic)
            if refusal is not None:
                self.finish(refusal.flag, f"policy changed: {refusal.reason}")

    def _judge(self, traffic: Traffic) -> Refusal | None:
        self._judged_by = traffic
        protocol = self.inbound.target.protocol
        return judge_connection(traffic.filters, self._facts(), protocol)

    def _facts(self) -> Request:
        """What policy may know of a connection."""
        inbound = self.inbound
        return Request(
            method=b"", scheme=b"", authority=b"", path=b"", source=inbound.source,
            source_ip=inbound.source_ip, remote_ip=inbound.source_ip,
            destination_ip=inbound.destination_ip, destination_port=inbound.port,
            service=inbound.service_key, now=self.started,
        )  # fmt: skip

    async def run(self, first: bytes) -> None:
        """Choose, dial, join."""
        inbound = self.inbound
        proxy = inbound.proxy
        traffic = inbound.traffic()
        refusal = self._judge(traffic)
        if refusal is not None:
            self.finish(refusal.flag, refusal.reason)
            return
        name = server_name(first) or "" if first else ""
        backend = traffic.routes.plan_connection(
            inbound.port, inbound.source_namespace, name, inbound.rng
        )
        if backend is None:
            self.finish("NR", "no route takes this connection")
            return
        endpoint = proxy.upstreams.choose(backend.service, backend.port, inbound)
        if isinstance(endpoint, Refusal):
            self.finish(endpoint.flag, endpoint.reason)
            return
        try:
            transport = await proxy.dialler.dial(endpoint.candidate)
        except MeshError as exc:
            self.finish("UF", str(exc))
            return
        finally:
            endpoint.active -= 1
        if self.is_done:
            transport.abort()
            return
        up = self.join(transport)
        transport.start(up)
        early = bytes(self.down.early)
        if first:
            transport.write(first)
        if early:
            transport.write(early)
        if self.down.has_ended:
            transport.shut()
        if not transport.is_blocked:
            self.down.transport.unpause()


def serve_opaque(inbound: Inbound, transport: Transport, first: bytes) -> None:
    """Carry a connection; `first` was read of it already."""
    pipe = _Pipe(inbound, transport)
    pipe.down.count = len(first)
    if hasattr(transport, "codec"):
        transport.codec = pipe.down
    else:
        transport.start(pipe.down)
    inbound.proxy.start(functools.partial(pipe.run, first))
