"""15053 capture, carried out: queries of one pod answered from the Store or forwarded.

Listens on the pod's loopback only, over UDP and TCP. What the Store does not know goes, byte
for byte but with an id of our own, to the servers of this node's resolv.conf, from inside
the pod with marked sockets, so that it is neither captured again nor seen from another
address. An answer must come from where we asked and repeat our question. A query
without an answer gets SERVFAIL; so does one too many, for their number is bounded.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import trio

from mesh.errors import ConfigError, KernelError, RemoteProtocolError, Unavailable
from mesh.model.workload import Workload
from mesh.runtime import lifecycle
from mesh.runtime.metrics import UNKNOWN, DnsLabels
from mesh.sockets import PROXY_MARK, SO_MARK, SocketAddress, open_socket
from ztunnel import dns_plan
from ztunnel.dial import dial
from ztunnel.dns_plan import Question
from ztunnel.node import Node

DNS_SERVER_PORT = 53
MAX_SERVERS = 3
MAX_IN_FLIGHT = 256
MAX_TCP_CLIENTS = 64
TCP_IDLE_SECONDS = 5.0
ATTEMPT_SECONDS = 2.5
MAX_MESSAGE = 65535
_PER_TURN = 32
_MAX_RESOLV_CONF = 64 << 10

Protocol = Literal["udp", "tcp"]


def read_resolv_conf(path: str) -> tuple[SocketAddress, ...]:
    """The servers named in a resolv.conf, at most three. Raises ConfigError."""
    try:
        with Path(path).open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MAX_RESOLV_CONF)
    except OSError as exc:
        raise ConfigError(f"cannot be read: {exc.strerror}", file=path) from exc
    servers = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            with contextlib.suppress(OSError):
                family = socket.AF_INET6 if ":" in words[1] else socket.AF_INET
                ip = words[1].partition("%")[0]
                servers.append(
                    SocketAddress(
                        socket.inet_ntop(family, socket.inet_pton(family, ip)), DNS_SERVER_PORT
                    )
                )
    return tuple(servers[:MAX_SERVERS])


class Forwarder:
    """Asks the upstream servers from inside one pod (`namespace` is lent)."""

    def __init__(
        self, servers: Sequence[SocketAddress], namespace: int | None, rng: random.Random
    ) -> None:
        self._servers = servers
        self._namespace = namespace
        self._rng = rng

    async def exchange(self, query: bytes, question: Question, protocol: Protocol) -> bytes:
        """The first server's answer to `query`, under the query's own id.

        Raises Unavailable when none answers. If cancelled: its socket is closed.
        """
        ask = self._ask_udp if protocol == "udp" else self._ask_tcp
        failure = "no DNS server is configured"
        for server in self._servers:
            number = self._rng.getrandbits(16).to_bytes(2, "big")
            try:
                with trio.fail_after(ATTEMPT_SECONDS):
                    answer = await ask(server, number + query[2:], question)
                return query[:2] + answer[2:]
            except trio.TooSlowError:
                failure = f"{server} did not answer"
            except (OSError, KernelError, Unavailable, RemoteProtocolError) as exc:
                failure = f"{server}: {exc}"
        raise Unavailable(f"DNS {question.name}: {failure}")

    async def resolve(self, hostname: str, *, wants_v6: bool) -> list[str]:
        """Addresses of a hostname, the wanted family if there are any, else the other.

        Raises Unavailable when there are none. If cancelled: sockets are closed.
        """
        for kind in ("AAAA", "A") if wants_v6 else ("A", "AAAA"):
            query = dns_plan.encode_query(hostname, kind, self._rng.getrandbits(16))
            answer = await self.exchange(query, dns_plan.parse_question(query), "udp")
            addresses = dns_plan.read_addresses(answer)
            if addresses:
                return addresses
        raise Unavailable(f"{hostname} has no address")

    async def _ask_udp(self, server: SocketAddress, query: bytes, question: Question) -> bytes:
        family = socket.AF_INET6 if ":" in server.ip else socket.AF_INET
        with open_socket(family, socket.SOCK_DGRAM, namespace=self._namespace) as sock:
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, PROXY_MARK)
            sock.connect(tuple(server))
            sock.send(query)
            while True:
                await trio.lowlevel.wait_readable(sock)
                with contextlib.suppress(BlockingIOError):
                    answer = sock.recv(MAX_MESSAGE)
                    # Anything else was made up by somebody who guessed our port.
                    if dns_plan.is_answer_to(answer, query, question):
                        return answer

    async def _ask_tcp(self, server: SocketAddress, query: bytes, question: Question) -> bytes:
        if self._namespace is None:
            raise Unavailable("DNS over TCP needs a pod")
        sock = trio.socket.from_stdlib_socket(await dial(self._namespace, server))
        async with trio.SocketStream(sock) as stream:
            await stream.send_all(struct.pack("!H", len(query)) + query)
            answer = await _read_message(stream)
        if answer is None or not dns_plan.is_answer_to(answer, query, question):
            raise RemoteProtocolError("the DNS answer is not to our question")
        return answer


async def _read_message(stream: trio.SocketStream) -> bytes | None:
    """One length-prefixed message, None at the end. Raises RemoteProtocolError."""
    head = await _read_exactly(stream, 2)
    if not head:
        return None
    size = int.from_bytes(head, "big")
    message = await _read_exactly(stream, size)
    if len(head) < 2 or len(message) < size:
        raise RemoteProtocolError("a DNS message over TCP was cut short")
    return message


async def _read_exactly(stream: trio.SocketStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        try:
            chunk = await stream.receive_some(size - len(data))
        except trio.BrokenResourceError:
            break
        if not chunk:
            break
        data += chunk
    return bytes(data)


class DnsProxy:
    """Serves one pod. `find_workload` gives the pod as the controller knows it, or None."""

    def __init__(
        self, node: Node, forwarder: Forwarder, find_workload: Callable[[], Workload | None]
    ) -> None:
        self._node = node
        self._forwarder = forwarder
        self._find_workload = find_workload
        self._in_flight = 0
        self._tcp_clients = 0

    @property
    def is_busy(self) -> bool:
        """Whether somebody waits for an answer, or may ask on an open connection."""
        return bool(self._in_flight or self._tcp_clients)

    async def serve_udp(self, sock: socket.socket, nursery: trio.Nursery) -> None:
        """Answer datagrams of `sock` for ever; forwarded ones in tasks of `nursery`."""
        while True:
            await trio.lowlevel.wait_readable(sock)
            for _ in range(_PER_TURN):
                try:
                    query, asker = sock.recvfrom(dns_plan.MAX_UDP_BYTES)
                except BlockingIOError:
                    break
                except OSError:
                    continue  # an earlier answer met a closed port
                planned = self._plan(query, "udp")
                if isinstance(planned, Question):
                    nursery.start_soon(
                        lifecycle.guard, "dns", self._forward_udp, sock, query, planned, asker
                    )
                elif planned is not None:
                    _send_to(sock, planned, asker)

    async def serve_tcp(self, stream: trio.SocketStream) -> None:
        """Answer the messages of one connection, one after the other."""
        if self._tcp_clients >= MAX_TCP_CLIENTS:
            return
        self._tcp_clients += 1
        try:
            while True:
                query = None
                with trio.move_on_after(TCP_IDLE_SECONDS):
                    query = await _read_message(stream)
                if query is None:
                    return
                answer = self._plan(query, "tcp")
                if isinstance(answer, Question):
                    answer = await self._forward(query, answer, "tcp")
                if answer is None:
                    return
                with trio.move_on_after(TCP_IDLE_SECONDS) as sending:
                    await stream.send_all(struct.pack("!H", len(answer)) + answer)
                if sending.cancelled_caught:
                    return
        except (RemoteProtocolError, trio.BrokenResourceError):
            return
        finally:
            self._tcp_clients -= 1

    def _plan(self, query: bytes, protocol: Protocol) -> bytes | Question | None:
        """The answer, or the question to forward, or None when nothing can be said."""
        try:
            question = dns_plan.parse_question(query)
        except RemoteProtocolError:
            return dns_plan.encode_format_error(query)
        workload = self._find_workload()
        self._node.dns_metrics.request(dns_labels(question.type_name, protocol, workload))
        if question.opcode != dns_plan.OPCODE_QUERY:
            return dns_plan.encode_failure(question, dns_plan.NOTIMP)
        if workload is None:
            return dns_plan.encode_failure(question, dns_plan.SERVFAIL)
        node = self._node
        answer = dns_plan.plan_answer(question, workload, node.store, node.names, node.rng)
        if answer is not None:
            limit = question.udp_bytes if protocol == "udp" else MAX_MESSAGE
            return dns_plan.encode_answer(question, answer, limit=limit)
        if self._in_flight >= MAX_IN_FLIGHT:
            return dns_plan.encode_failure(question, dns_plan.SERVFAIL)
        # Counted here, before the task runs, so that a burst cannot outrun the bound.
        self._in_flight += 1
        return question

    async def _forward_udp(
        self, sock: socket.socket, query: bytes, question: Question, asker: tuple[Any, ...]
    ) -> None:
        _send_to(sock, await self._forward(query, question, "udp"), asker)

    async def _forward(self, query: bytes, question: Question, protocol: Protocol) -> bytes:
        started = trio.current_time()
        failed = False
        try:
            return await self._forwarder.exchange(query, question, protocol)
        except Unavailable:
            failed = True
            return dns_plan.encode_failure(question, dns_plan.SERVFAIL)
        finally:
            self._in_flight -= 1
            labels = dns_labels(question.type_name, protocol, self._find_workload())
            self._node.dns_metrics.upstream(labels, trio.current_time() - started, failed=failed)


def dns_labels(kind: str, protocol: Protocol, workload: Workload | None) -> DnsLabels:
    """The labels of a question for records of `kind` that `workload` asked."""
    return DnsLabels(
        kind,
        protocol,
        (workload.canonical_name if workload else "") or UNKNOWN,
        (workload.canonical_revision if workload else "") or UNKNOWN,
    )


def _send_to(sock: socket.socket, data: bytes, asker: tuple[Any, ...]) -> None:
    # UDP: what cannot be sent now is lost, and asked again.
    with contextlib.suppress(OSError):
        sock.sendto(data, asker)
