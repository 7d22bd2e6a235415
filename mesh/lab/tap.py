"""A tap on the wire between the nodes: counts packets by flow, and keeps payload to search in.

An AF_PACKET socket in the fabric's namespace. A frame is counted once, where it enters the
bridge. Only headers of IPv4 and IPv6 with TCP, UDP and ICMP are read.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections import Counter
from dataclasses import dataclass

import trio

from mesh import netns

ETH_P_ALL = 3
PACKET_OUTGOING = 4
SO_RCVBUFFORCE = 33
MAX_PAYLOAD = 4 << 20
MAX_FLOWS = 10_000
_PROTOCOLS = {1: "icmp", 58: "icmp", 6: "tcp", 17: "udp"}


@dataclass(frozen=True, slots=True)
class FlowKey:
    """One direction of a conversation; `port` is the lower of the two."""

    family: str
    protocol: str
    source: str
    destination: str
    port: int


def parse_frame(frame: bytes) -> tuple[FlowKey, bytes] | None:
    """The flow of an Ethernet frame and what it carries; None for what is not IP."""
    kind, packet = frame[12:14], frame[14:]
    if kind == b"\x08\x00" and len(packet) >= 20:
        family, protocol = "IPv4", packet[9]
        source, destination = packet[12:16], packet[16:20]
        body = packet[(packet[0] & 15) * 4 : int.from_bytes(packet[2:4], "big") or None]
    elif kind == b"\x86\xdd" and len(packet) >= 40:
        family, protocol = "IPv6", packet[6]
        source, destination = packet[8:24], packet[24:40]
        body = packet[40 : 40 + int.from_bytes(packet[4:6], "big") or None]
    else:
        return None
    name = _PROTOCOLS.get(protocol, str(protocol))
    port, payload = 0, body
    if name in ("tcp", "udp") and len(body) >= 8:
        port = min(int.from_bytes(body[0:2], "big"), int.from_bytes(body[2:4], "big"))
        payload = body[8:]
        if name == "tcp":
            payload = body[(body[12] >> 4) * 4 :] if len(body) >= 20 else b""
    key = FlowKey(
        family,
        name,
        str(ipaddress.ip_address(source)),
        str(ipaddress.ip_address(destination)),
        port,
    )
    return key, payload


class Tap:
    """Counts from the moment it is made until `close`."""

    def __init__(self, fabric: int) -> None:
        with netns.inside(fabric):
            self._socket = socket.socket(
                socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(ETH_P_ALL)
            )
        self._socket.setblocking(False)
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        self._packets: Counter[FlowKey] = Counter()
        self._bytes: Counter[FlowKey] = Counter()
        self._payload = bytearray()
        self._is_truncated = False

    async def run(self) -> None:
        """Count until `close`."""
        while True:
            self.drain()
            try:
                await trio.lowlevel.wait_readable(self._socket)
            except (trio.ClosedResourceError, ValueError, OSError):
                return

    def drain(self) -> None:
        """Take in every packet that the kernel has ready."""
        while True:
            try:
                frame, address = self._socket.recvfrom(1 << 17)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                return
            # What leaves by a port came in by another, and the bridge itself sends nothing.
            if address[2] != PACKET_OUTGOING and address[0].startswith(("node", "control")):
                self._count(frame)

    def _count(self, frame: bytes) -> None:
        found = parse_frame(frame)
        if found is None:
            return
        key, payload = found
        if key not in self._packets and len(self._packets) >= MAX_FLOWS:
            self._is_truncated = True
            return
        self._packets[key] += 1
        self._bytes[key] += len(frame)
        room = MAX_PAYLOAD - len(self._payload)
        if len(payload) > room:
            self._is_truncated = True
        self._payload += payload[: max(room, 0)]

    def report(self, needles: list[bytes]) -> dict[str, object]:
        """Counters, and whether each of `needles` was among the payload."""
        self.drain()
        return {
            "flows": [
                {
                    "family": key.family,
                    "protocol": key.protocol,
                    "source": key.source,
                    "destination": key.destination,
                    "port": key.port,
                    "packets": packets,
                    "bytes": self._bytes[key],
                }
                for key, packets in self._packets.most_common()
            ],
            "seen": [needle in self._payload for needle in needles],
            "truncated": self._is_truncated,
        }

    def close(self) -> None:
        """Stop counting."""
        with contextlib.suppress(RuntimeError):
            trio.lowlevel.notify_closing(self._socket)
        self._socket.close()
