"""CONNECT heads of HBONE, sans-IO: authority, baggage, forwarded, traceparent.

A head is a list of HTTP/2 header pairs (bytes); the HTTP/2 block coding is not here
(`mesh.http.hpack_table`). Plain CONNECT only: no `:scheme`, no `:path`, no `:protocol`
(RFC 9113 section 8.5). Everything a peer wrote is bounded before it is kept.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from mypy_extensions import mypyc_attr

from mesh.errors import LocalProtocolError, RemoteProtocolError

Pair = tuple[bytes, bytes]

MAX_AUTHORITY: Final = 300
MAX_BAGGAGE: Final = 8192
MAX_BAGGAGE_VALUE: Final = 512
MAX_EXTRA_HEADERS: Final = 32

_HOSTNAME = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,62})(?:\.[A-Za-z0-9_-]{1,63})*"
)
_PORT = re.compile(r"[0-9]{1,5}")
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_FORWARDED_PART = re.compile(r'\s*([A-Za-z]+)=(?:"([^"\\]*)"|([^\s";,]*))\s*')
_USUAL_FORWARDED = re.compile(r'for="([^"\\,;]*)"(?:;host=([^\s";,]*))?')
_WORKLOAD_KINDS: Final = ("deployment", "cronjob", "pod", "job")
_KNOWN: Final = frozenset({b"baggage", b"forwarded", b"traceparent"})
_AS_OURS: Final = (b":method", b":authority", b"baggage", b"forwarded", b"traceparent")
_REQUEST_FIELDS: Final = frozenset({b":method", b":scheme", b":authority", b":path"})
_NOT_TOLD: Final = [""]
CONNECTION_KEY: Final = "ambit.connection.id="
_LAST_MEMBER: Final = f",{CONNECTION_KEY}"
_CONNECTION_ID = re.compile(r"[0-9A-Za-z-]{1,64}")
_REMEMBERED_BAGGAGE: Final = 1024
_FEW_HEADERS: Final = 4


@mypyc_attr(native_class=False)
class Malformed(RemoteProtocolError):
    """A request that RFC 9113 (sections 8.3 and 8.5) forbids: a stream error, and no answer."""


@dataclass(frozen=True, slots=True)
class Authority:
    """Where a CONNECT leads: a canonical IP or a lower-case hostname, and a port."""

    host: str
    port: int
    is_ip: bool

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Baggage:
    """What one workload tells of itself; empty text means not told."""

    cluster: str = ""
    namespace: str = ""
    workload_type: str = ""
    workload_name: str = ""
    service_name: str = ""
    service_version: str = ""
    region: str = ""
    zone: str = ""


@dataclass(frozen=True, slots=True)
class Forwarded:
    """`for` (an `ip:port`) and `host` (the service asked for) of the `forwarded` header."""

    for_address: str = ""
    host: str = ""


@dataclass(frozen=True, slots=True)
class ConnectHead:
    """A CONNECT request.

    `authority` is text as on the wire (`parse_authority` reads it); `extra` are further
    headers, lower-case names, in order. `connection_id` names the connection at every hop, for
    logs only; it travels in the baggage, as a member that others ignore.
    """

    authority: str
    baggage: Baggage | None = None
    forwarded: Forwarded | None = None
    traceparent: str = ""
    extra: tuple[tuple[str, str], ...] = ()
    connection_id: str = ""

    def header(self, name: str) -> str:
        """The first value of an extra header, or empty text."""
        return next((value for key, value in self.extra if key == name), "")


@dataclass(frozen=True, slots=True)
class ConnectResponse:
    """The answer to a CONNECT; anything but status 200 is a refusal."""

    status: int
    baggage: Baggage | None = None
    extra: tuple[tuple[str, str], ...] = ()


@functools.lru_cache(maxsize=1024)
def parse_authority(text: str) -> Authority:
    """Read `IP:port`, `[v6]:port` or `hostname:port`.

    The port is mandatory and not 0. Raises RemoteProtocolError (400).
    """
    host, _, port_text = text.rpartition(":")
    if len(text) > MAX_AUTHORITY or not _PORT.fullmatch(port_text):
        raise RemoteProtocolError(f"not an authority: {text[:80]!r}")
    port = int(port_text)
    if not 0 < port < 65536:
        raise RemoteProtocolError(f"no such port: {text[:80]!r}")
    bracketed = host[:1] == "[" and host[-1:] == "]"
    try:
        address = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        # All digits and dots can only be meant as an address: `10.0.0.256` is no name.
        if bracketed or not _HOSTNAME.fullmatch(host) or not re.search("[A-Za-z_-]", host):
            raise RemoteProtocolError(f"not an authority: {text[:80]!r}") from None
        return Authority(host.lower(), port, is_ip=False)
    if isinstance(address, ipaddress.IPv6Address):
        if not bracketed or address.scope_id is not None:
            raise RemoteProtocolError(f"not an authority: {text[:80]!r}")
        return Authority(str(address.ipv4_mapped or address), port, is_ip=True)
    if bracketed:
        raise RemoteProtocolError(f"not an authority: {text[:80]!r}")
    return Authority(str(address), port, is_ip=True)


@functools.lru_cache(maxsize=1024)
def encode_baggage(baggage: Baggage) -> str:
    """Members in Istio's order, empty ones omitted; text that would break the list, too."""
    kind = baggage.workload_type if baggage.workload_type in _WORKLOAD_KINDS else "pod"
    members = (
        ("k8s.cluster.name", baggage.cluster),
        ("k8s.namespace.name", baggage.namespace),
        (f"k8s.{kind}.name", baggage.workload_name),
        ("service.name", baggage.service_name),
        ("service.version", baggage.service_version),
        ("cloud.region", baggage.region),
        ("cloud.availability_zone", baggage.zone),
    )
    return ",".join(f"{key}={value}" for key, value in members if value and _is_plain(value))


def parse_baggage(headers: Iterable[str]) -> Baggage:
    """Read one or more `baggage` headers: the last of equal keys wins, nothing is trimmed or
    decoded, unknown and oversized members are skipped.
    """
    texts = tuple(headers)
    if sum(map(len, texts)) <= _REMEMBERED_BAGGAGE:
        return _parse_known_baggage(texts)
    return _parse_baggage(texts)


def _parse_baggage(headers: Iterable[str]) -> Baggage:
    fields: dict[str, str] = {}
    budget = MAX_BAGGAGE
    for header in headers:
        budget -= len(header)
        if budget < 0:
            break
        for member in header.split(","):
            key, found, value = member.partition("=")
            if found and len(value) <= MAX_BAGGAGE_VALUE:
                fields[key] = value
    workload_type = workload_name = ""
    for key, value in fields.items():
        kind = key[4:-5]
        if kind in _WORKLOAD_KINDS and key == f"k8s.{kind}.name":
            workload_type, workload_name = kind, value
    return Baggage(
        cluster=fields.get("k8s.cluster.name", ""),
        namespace=fields.get("k8s.namespace.name", ""),
        workload_type=workload_type,
        workload_name=workload_name,
        service_name=fields.get("service.name", ""),
        service_version=fields.get("service.version", ""),
        region=fields.get("cloud.region", ""),
        zone=fields.get("cloud.availability_zone", ""),
    )


# A peer says the same of itself with every tunnel.
_parse_known_baggage = functools.lru_cache(maxsize=512)(_parse_baggage)


def take_connection_id(headers: Iterable[str]) -> tuple[str, list[str]]:
    """The connection id in `baggage` headers, empty if none can be read, and the headers
    without it: what is left is the same for every connection of a peer, and cached.
    """
    found = ""
    rest = []
    for header in headers:
        before, _, value = header.rpartition(_LAST_MEMBER)
        if before and CONNECTION_KEY not in before and _CONNECTION_ID.fullmatch(value):
            found = value  # as we write it ourselves
            rest.append(before)
            continue
        at = header.find(CONNECTION_KEY)
        if at < 0 or (at and header[at - 1] != ","):
            rest.append(header)
            continue
        end = header.find(",", at)
        if end < 0:
            value, left = header[at + len(CONNECTION_KEY) :], header[: max(at - 1, 0)]
        else:
            value, left = header[at + len(CONNECTION_KEY) : end], header[:at] + header[end + 1 :]
        found = value if _CONNECTION_ID.fullmatch(value) else ""
        if left:
            rest.append(left)
    return found, rest


def encode_forwarded(forwarded: Forwarded) -> str:
    """`for="ip:port"` and, when there is one, `;host=<hostname>`."""
    text = f'for="{forwarded.for_address}"'
    return f"{text};host={forwarded.host}" if forwarded.host else text


def parse_forwarded(text: str) -> Forwarded | None:
    """The first element of a `forwarded` header; None when it cannot be read."""
    usual = _USUAL_FORWARDED.fullmatch(text)
    if usual is not None:
        return Forwarded(usual[1], usual[2].lower() if usual[2] else "")
    fields: dict[str, str] = {}
    for part in text.split(",", 1)[0].split(";"):
        match = _FORWARDED_PART.fullmatch(part)
        if match is None:
            return None
        fields[match[1].lower()] = match[2] if match[2] is not None else match[3]
    return Forwarded(fields.get("for", ""), fields.get("host", "").lower())


def traceparent_of(trace_id: str, parent: int) -> str:
    """A W3C `traceparent`, not sampled, of a trace's id (32 hex digits) and a 64-bit number."""
    return f"00-{trace_id}-{parent:016x}-00"


def traceparent(random_bytes: bytes, *, is_sampled: bool = False) -> str:
    """A W3C `traceparent` from 24 bytes: the trace's id and the parent's."""
    if len(random_bytes) != 24:
        raise LocalProtocolError("a traceparent needs 24 random bytes")
    flags = "01" if is_sampled else "00"
    return f"00-{random_bytes[:16].hex()}-{random_bytes[16:].hex()}-{flags}"


def encode_request(head: ConnectHead) -> list[Pair]:
    """The header pairs of a CONNECT."""
    pairs = [(b":method", b"CONNECT"), (b":authority", head.authority.encode("ascii"))]
    text = encode_baggage(head.baggage) if head.baggage is not None else ""
    if head.connection_id:
        text += f"{',' if text else ''}{CONNECTION_KEY}{head.connection_id}"
    if text:
        pairs.append((b"baggage", text.encode("ascii")))
    if head.forwarded is not None:
        pairs.append((b"forwarded", encode_forwarded(head.forwarded).encode("ascii")))
    if head.traceparent:
        pairs.append((b"traceparent", head.traceparent.encode("ascii")))
    pairs += [(name.encode("ascii"), value.encode("latin-1")) for name, value in head.extra]
    return pairs


def parse_request(pairs: Iterable[Pair]) -> ConnectHead:
    """Judge and read a CONNECT. Raises RemoteProtocolError (400), Malformed for what is no HTTP.

    The authority is checked here, and kept in its canonical form.
    """
    told = tuple(pairs)
    if len(told) == len(_AS_OURS):
        (first, method), (second, authority), (third, baggage), fourth, fifth = told
        if (first, second, third, fourth[0], fifth[0]) == _AS_OURS and method == b"CONNECT":
            return _read_request(
                authority.decode("latin-1"),
                [baggage.decode("latin-1")],
                fourth[1].decode("latin-1"),
                fifth[1].decode("latin-1"),
            )
    pseudo: dict[bytes, bytes] = {}
    known: dict[bytes, list[str]] = {}
    extra: list[Pair] = []
    for name, value in told:
        if name in _KNOWN:
            known.setdefault(name, []).append(value.decode("latin-1"))
        elif name[:1] == b":":
            pseudo[name] = value
        else:
            extra.append((name, value))
    asked = pseudo.get(b":method")
    if asked == b"CONNECT":
        # With :protocol it would be an extended one (RFC 8441), which we do not offer.
        if pseudo.keys() != {b":method", b":authority"}:
            raise Malformed("a CONNECT has :method and :authority and nothing else")
    elif not (asked and pseudo.get(b":scheme") and pseudo.get(b":path")):
        raise Malformed("a request has :method, :scheme and :path")
    elif pseudo.keys() - _REQUEST_FIELDS:
        raise Malformed("a request has a pseudo-header that it may not have")
    else:
        raise RemoteProtocolError("only CONNECT is served here")
    return _read_request(
        pseudo[b":authority"].decode("latin-1"),
        known.get(b"baggage", []),
        known.get(b"forwarded", _NOT_TOLD)[0],
        known.get(b"traceparent", _NOT_TOLD)[0],
        _extra(extra),
    )


def _read_request(
    authority: str,
    baggage: Sequence[str],
    forwarded: str,
    trace: str,
    extra: tuple[tuple[str, str], ...] = (),
) -> ConnectHead:
    connection_id, told = take_connection_id(baggage)
    return ConnectHead(
        _canonical(authority),
        parse_baggage(told) if baggage else None,
        parse_forwarded(forwarded) if forwarded else None,
        trace if _TRACEPARENT.fullmatch(trace) else "",
        extra,
        connection_id,
    )


@functools.lru_cache(maxsize=1024)
def _canonical(authority: str) -> str:
    return str(parse_authority(authority))


def encode_response(response: ConnectResponse) -> list[Pair]:
    """The header pairs of an answer."""
    pairs = [(b":status", str(response.status).encode())]
    if response.baggage is not None and (text := encode_baggage(response.baggage)):
        pairs.append((b"baggage", text.encode("ascii")))
    pairs += [(name.encode("ascii"), value.encode("latin-1")) for name, value in response.extra]
    return pairs


def parse_response(pairs: Iterable[Pair]) -> ConnectResponse:
    """Read an answer. Raises RemoteProtocolError."""
    told = tuple(pairs)
    if sum(len(value) for _, value in told) <= _REMEMBERED_BAGGAGE and len(told) <= _FEW_HEADERS:
        return _parse_known_response(told)
    return _parse_response(told)


def _parse_response(pairs: Iterable[Pair]) -> ConnectResponse:
    known: dict[bytes, list[str]] = {}
    extra: list[Pair] = []
    status = b""
    for name, value in pairs:
        if name == b":status":
            status = value
        elif name in _KNOWN:
            known.setdefault(name, []).append(value.decode("latin-1"))
        elif name[:1] == b":":
            raise RemoteProtocolError(f"unexpected {name[:40]!r} in a response")
        else:
            extra.append((name, value))
    if len(status) != 3 or not status.isdigit():
        raise RemoteProtocolError(f"not a status: {status[:40]!r}")
    return ConnectResponse(
        int(status),
        baggage=parse_baggage(known[b"baggage"]) if b"baggage" in known else None,
        extra=_extra(extra),
    )


def _is_plain(value: str) -> bool:
    return value.isascii() and value.isprintable() and "," not in value and " " not in value


def _extra(pairs: Iterable[Pair]) -> tuple[tuple[str, str], ...]:
    kept = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in pairs]
    return tuple(kept[:MAX_EXTRA_HEADERS])


# Many tunnels of one peer get the same answer.
_parse_known_response = functools.lru_cache(maxsize=256)(_parse_response)
