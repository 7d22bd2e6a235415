"""The cluster's DNS server: one zone, answered on the cluster DNS address inside every node.

It answers as CoreDNS does for `cluster.local`. A lab has no upstream, so every other name does
not exist; refusing it would make a mistyped Service name look like a temporary failure.
Packets are parsed by dnslib; what it cannot parse is dropped.
"""

from __future__ import annotations

import errno
import random
import socket
import struct
from collections.abc import Callable

import dnslib
import trio

from mesh import netns
from mesh.errors import KernelError
from mesh.lab import addresses
from mesh.lab.names import Records, Zone

TTL = 5
UDP_BYTES = 512
MAX_UDP_BYTES = 4096
MAX_QUERY = 4096
TCP_SECONDS = 10.0
MAX_TCP = 128
_TYPES = {"A": 1, "AAAA": 28, "SRV": 33, "CNAME": 5, "SOA": 6, "ANY": 255}


def answer(query: bytes, zone: Zone, *, limit: int | None) -> bytes | None:
    """The answer to a query; None when it is not one. `limit`: bytes the transport carries."""
    try:
        asked = dnslib.DNSRecord.parse(query)
    except (dnslib.DNSError, ValueError, IndexError, struct.error, UnicodeError):
        return None
    if asked.header.qr or len(asked.questions) != 1:
        return None
    reply = asked.reply(ra=0, aa=1)
    name, kind = str(asked.q.qname), asked.q.qtype
    if not zone.covers(name):
        reply.header.aa = 0
        reply.header.rcode = dnslib.RCODE.NXDOMAIN
        return bytes(reply.pack())
    records = zone.find(name)
    if records is None:
        reply.header.rcode = dnslib.RCODE.NXDOMAIN
    else:
        _add(reply, name, kind, records, zone)
    if not reply.rr:
        reply.add_auth(_authority(zone))
    room = _room(asked, limit)
    packed = bytes(reply.pack())
    if room is not None and len(packed) > room:
        packed = bytes(reply.truncate().pack())
    return packed


def _room(asked: dnslib.DNSRecord, limit: int | None) -> int | None:
    """How many bytes the asker can take over UDP; None over TCP."""
    if limit is None:
        return None
    for record in asked.ar:
        if record.rtype == dnslib.QTYPE.OPT:
            return max(UDP_BYTES, min(int(record.rclass), limit))
    return UDP_BYTES


def _add(reply: dnslib.DNSRecord, name: str, kind: int, records: Records, zone: Zone) -> None:
    if records.alias:
        reply.add_answer(
            dnslib.RR(name, _TYPES["CNAME"], ttl=TTL, rdata=dnslib.CNAME(records.alias))
        )
        target = zone.find(records.alias) if zone.covers(records.alias) else None
        if target is not None and not target.alias:
            _add(reply, records.alias, kind, target, zone)
        return
    # The order is changed each time, so that clients spread over a headless Service's pods.
    ips = list(records.ips)
    random.shuffle(ips)
    for ip in ips:
        is_six = addresses.family_of(ip) == "IPv6"
        if kind in (_TYPES["AAAA" if is_six else "A"], _TYPES["ANY"]):
            data = dnslib.AAAA(ip) if is_six else dnslib.A(ip)
            reply.add_answer(
                dnslib.RR(name, _TYPES["AAAA" if is_six else "A"], ttl=TTL, rdata=data)
            )
    if kind in (_TYPES["SRV"], _TYPES["ANY"]):
        for port, target_name in records.services:
            data = dnslib.SRV(0, 100, port, target_name)
            reply.add_answer(dnslib.RR(name, _TYPES["SRV"], ttl=TTL, rdata=data))


def _authority(zone: Zone) -> dnslib.RR:
    soa = dnslib.SOA(
        f"ns.dns.{zone.domain}", f"hostmaster.{zone.domain}", (1, 7200, 1800, 86400, TTL)
    )
    return dnslib.RR(zone.domain, _TYPES["SOA"], ttl=TTL, rdata=soa)


async def serve_names(
    net: int,
    zone: Callable[[], Zone],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on the cluster DNS addresses, UDP and TCP, in the namespace `net`. Never returns.

    Raises KernelError when the addresses cannot be bound.
    """
    opened: list[socket.socket] = []
    try:
        for ip in addresses.DNS_IPS:
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                opened.append(_bind(net, ip, kind))  # noqa: PERF401 - closed below if one fails
        async with trio.open_nursery() as nursery:
            for each in opened:
                wrapped = trio.socket.from_stdlib_socket(each)
                if each.type == socket.SOCK_DGRAM:
                    nursery.start_soon(_serve_udp, wrapped, zone)
                else:
                    nursery.start_soon(_serve_tcp, wrapped, zone)
            task_status.started()
    finally:
        for each in opened:
            each.close()


def _bind(net: int, ip: str, kind: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with netns.inside(net):
        made = socket.socket(family, kind | socket.SOCK_CLOEXEC)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((ip, 53))
        if kind == socket.SOCK_STREAM:
            made.listen(64)
    except OSError as exc:
        made.close()
        raise KernelError(f"DNS at {ip}:53: {exc.strerror}", errno=exc.errno or 0) from exc
    return made


async def _serve_udp(listening: trio.socket.SocketType, zone: Callable[[], Zone]) -> None:
    while True:
        try:
            query, peer = await listening.recvfrom(MAX_QUERY)
            reply = answer(query, zone(), limit=MAX_UDP_BYTES)
            if reply is not None:
                await listening.sendto(reply, peer)
        except OSError as exc:
            # An answer that could not be delivered comes back as an error of the next call.
            if exc.errno == errno.EBADF:
                raise


async def _serve_tcp(listening: trio.socket.SocketType, zone: Callable[[], Zone]) -> None:
    limiter = trio.CapacityLimiter(MAX_TCP)
    async with trio.open_nursery() as nursery:
        while True:
            connection, _ = await listening.accept()
            nursery.start_soon(_answer_tcp, trio.SocketStream(connection), zone, limiter)


async def _answer_tcp(
    stream: trio.SocketStream, zone: Callable[[], Zone], limiter: trio.CapacityLimiter
) -> None:
    async with stream, limiter:
        with trio.move_on_after(TCP_SECONDS):
            buffer = b""
            try:
                while data := await stream.receive_some(MAX_QUERY):
                    buffer += data
                    while len(buffer) >= 2 and len(buffer) >= 2 + (size := _size(buffer)):
                        query, buffer = buffer[2 : 2 + size], buffer[2 + size :]
                        reply = answer(query, zone(), limit=None)
                        if reply is None:
                            return
                        await stream.send_all(struct.pack("!H", len(reply)) + reply)
            except trio.BrokenResourceError:
                return


def _size(buffer: bytes) -> int:
    return int.from_bytes(buffer[:2], "big")
