"""DECIDES: the answer to a captured DNS query, from the Store, or that it is forwarded.

Only A and AAAA of names the mesh knows are answered; everything else goes upstream
untouched. A name is tried as asked, as Kubernetes would complete it, and both again
without each search domain; each exactly, then by wildcard. A name that the mesh knows but
that has no address of the family gets an empty answer, as DNS wants it (RFC 2308, NODATA).

The question is read strictly and by hand, because it is hostile input and most of it is
only passed on; answers are written by dnslib. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from dnslib import AAAA, CNAME, EDNS0, QTYPE, RCODE, RR, A, DNSHeader, DNSLabel, DNSRecord
from dnslib import DNSQuestion as LibraryQuestion
from dnslib.dns import DNSError

from mesh.errors import RemoteProtocolError
from mesh.model.service import HealthPolicy, IpFamilies, Service
from mesh.model.store import Store
from mesh.model.workload import Workload, WorkloadStatus

TYPE_A = 1
TYPE_AAAA = 28
TYPE_OPT = 41
CLASS_IN = 1
OPCODE_QUERY = 0
TTL_SECONDS = 30
MAX_UDP_BYTES = 4096
MIN_UDP_BYTES = 512
MAX_NAME_BYTES = 255
MAX_ANSWERS = 256
HEADER_BYTES = 12

NOERROR = 0
FORMERR = 1
SERVFAIL = 2
NOTIMP = 4

_HEADER = struct.Struct("!HHHHHH")
_QUESTION = struct.Struct("!HH")
# What dnslib is known to let through for malformed input.
_LIBRARY_ERRORS = (DNSError, ValueError, LookupError, TypeError, struct.error)
# A record whose owner is a compression pointer.
_A_BYTES = 16
_AAAA_BYTES = 28
_OPT = struct.Struct("!BHH")


class Random(Protocol):
    """The part of `random.Random` that spreads answers."""

    def shuffle(self, x: list[str]) -> None:
        """Reorder in place."""
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """One query: `labels` as asked (case kept), `name` lower-case without the last dot.

    `end` is the offset behind the question; `udp_bytes` what the asker can take over UDP,
    `has_edns` whether it sent an OPT record.
    """

    id: int
    labels: tuple[bytes, ...]
    name: str
    type: int
    class_: int
    opcode: int
    wants_recursion: bool
    end: int
    udp_bytes: int = MIN_UDP_BYTES
    has_edns: bool = False

    @property
    def type_name(self) -> str:
        """For metrics: one of a fixed set."""
        return str(QTYPE.get(self.type, "OTHER")) if self.type in QTYPE.forward else "OTHER"


@dataclass(frozen=True, slots=True)
class Answer:
    """Addresses to answer with; `alias` is the name they hang on, when not the one asked."""

    addresses: tuple[str, ...]
    alias: str = ""


def parse_question(data: bytes) -> Question:
    """Read the header and the only question of a query. Raises RemoteProtocolError."""
    if len(data) < HEADER_BYTES:
        raise RemoteProtocolError("a DNS message is shorter than its header")
    number, flags, questions, answers, authorities, additionals = _HEADER.unpack_from(data)
    if flags & 0x8000:
        raise RemoteProtocolError("a DNS answer came where a question belongs")
    opcode = flags >> 11 & 0xF
    if questions != 1:
        raise RemoteProtocolError(f"a DNS query has {questions} questions")
    labels, offset = _parse_name(data, HEADER_BYTES)
    if offset + _QUESTION.size > len(data):
        raise RemoteProtocolError("a DNS question is cut short")
    kind, class_ = _QUESTION.unpack_from(data, offset)
    offset += _QUESTION.size
    udp_bytes, has_edns = MIN_UDP_BYTES, False
    if not answers and not authorities and additionals and len(data) >= offset + _OPT.size:
        root, additional, size = _OPT.unpack_from(data, offset)
        if root == 0 and additional == TYPE_OPT:
            has_edns = True
            udp_bytes = min(max(size, MIN_UDP_BYTES), MAX_UDP_BYTES)
    name = b".".join(labels).decode("ascii", "replace").lower()
    return Question(
        id=number,
        labels=labels,
        name=name,
        type=kind,
        class_=class_,
        opcode=opcode,
        wants_recursion=bool(flags & 0x0100),
        end=offset,
        udp_bytes=udp_bytes,
        has_edns=has_edns,
    )


def _parse_name(data: bytes, offset: int) -> tuple[tuple[bytes, ...], int]:
    labels: list[bytes] = []
    size = 0
    while True:
        if offset >= len(data):
            raise RemoteProtocolError("a DNS name is cut short")
        length = data[offset]
        offset += 1
        if length == 0:
            return tuple(labels), offset
        size += length + 1
        # Above 63 are compression pointers, which a question has nothing to point to with.
        if length > 63 or size > MAX_NAME_BYTES or offset + length > len(data):
            raise RemoteProtocolError("a DNS name is malformed")
        labels.append(bytes(data[offset : offset + length]))
        offset += length


@dataclass(frozen=True, slots=True)
class Names:
    """How names of the mesh are completed and ranked: settings, not state."""

    cluster_domain: str = "cluster.local"
    preferred_namespace: str = ""

    def search_domains(self, namespace: str) -> tuple[str, str, str]:
        """What a pod of `namespace` has in its resolv.conf."""
        domain = self.cluster_domain
        return f"{namespace}.svc.{domain}", f"svc.{domain}", domain

    def candidates(self, name: str, namespace: str) -> Iterator[tuple[str, str]]:
        """(name to look up, what was asked without its search domain or ""), best first."""
        for completed in self._completions(name, namespace):
            yield completed, ""
        for domain in self.search_domains(namespace):
            stripped = name.removesuffix(f".{domain}")
            if stripped != name and stripped:
                for completed in self._completions(stripped, namespace):
                    yield completed, stripped

    def _completions(self, name: str, namespace: str) -> Iterator[str]:
        domain = self.cluster_domain
        yield name
        match name.count(".") + 1:
            case 1:
                yield f"{name}.{namespace}.svc.{domain}"
            case 2:
                yield f"{name}.svc.{domain}"
                yield f"{name}.{namespace}.svc.{domain}"
            case 3:
                if name.endswith(".svc"):
                    yield f"{name}.{domain}"
                yield f"{name}.svc.{domain}"
            case 4 if name.endswith(".svc"):
                yield f"{name}.{domain}"

    def is_kubernetes(self, service: Service) -> bool:
        """Whether a service without addresses is a headless one, not just a name."""
        return service.hostname.lower().endswith(f".svc.{self.cluster_domain}")


def plan_answer(
    question: Question, source: Workload, store: Store, names: Names, rng: Random
) -> Answer | None:
    """The answer for a pod (`source`), or None when the query is to be forwarded."""
    if question.type not in (TYPE_A, TYPE_AAAA) or question.class_ != CLASS_IN:
        return None
    if not question.name:
        return None
    for candidate, stripped in names.candidates(question.name, source.namespace):
        for name in _with_wildcards(candidate):
            addresses = _addresses(name, source, store, names)
            if addresses is None:
                continue
            wants_v6 = question.type == TYPE_AAAA
            family = [each for each in addresses if (":" in each) == wants_v6]
            rng.shuffle(family)
            alias = "" if name.startswith("*.") else stripped
            return Answer(tuple(family[:MAX_ANSWERS]), alias)
    return None


def _with_wildcards(name: str) -> Iterator[str]:
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield f"*.{name}"


def _addresses(name: str, source: Workload, store: Store, names: Names) -> list[str] | None:
    """The addresses of a name on the source's network, or None when the mesh has no such name."""
    service = store.service_by_hostname(name, source.namespace, names.preferred_namespace)
    if service is not None:
        if service.addresses:
            return [each.address for each in service.addresses if each.network == source.network]
        if names.is_kubernetes(service):
            return _endpoint_addresses(service, source, store)
    workload = store.workload_by_hostname(name)
    if workload is not None and workload.addresses and workload.network == source.network:
        return list(workload.addresses)
    return None


def _endpoint_addresses(service: Service, source: Workload, store: Store) -> list[str]:
    any_health = service.load_balancing.health_policy is HealthPolicy.ALLOW_ALL
    return [
        ip
        for endpoint in store.endpoints(service.key)
        if endpoint.workload.network == source.network
        and (any_health or endpoint.workload.status is WorkloadStatus.HEALTHY)
        for ip in endpoint.workload.addresses
        if _is_offered(service.ip_families, ip)
    ]


def _is_offered(families: IpFamilies, ip: str) -> bool:
    """Whether a service offers this address: its pods may listen on the other family or not."""
    match families:
        case IpFamilies.IPV4_ONLY:
            return ":" not in ip
        case IpFamilies.IPV6_ONLY:
            return ":" in ip
        case _:
            return True


def encode_answer(question: Question, answer: Answer, *, limit: int) -> bytes:
    """The response in at most `limit` bytes; what does not fit is left out and TC is set."""
    response = _response(question, NOERROR)
    response.header.aa = 1
    asked = DNSLabel(question.labels)
    owner = DNSLabel(answer.alias) if answer.alias else asked
    if answer.alias:
        response.add_answer(RR(asked, QTYPE.CNAME, ttl=TTL_SECONDS, rdata=CNAME(answer.alias)))
    is_v6 = question.type == TYPE_AAAA
    base: bytes = response.pack()
    # The first record may carry its owner's name in full, the others a pointer to it.
    room = (limit - len(base) - len(owner)) // (_AAAA_BYTES if is_v6 else _A_BYTES)
    fitting = answer.addresses[: max(room, 0)]
    for address in fitting:
        if is_v6:
            record = RR(owner, QTYPE.AAAA, ttl=TTL_SECONDS, rdata=AAAA(address))
        else:
            record = RR(owner, QTYPE.A, ttl=TTL_SECONDS, rdata=A(address))
        response.add_answer(record)
    response.header.tc = int(len(fitting) < len(answer.addresses))
    encoded: bytes = response.pack()
    return encoded


def encode_failure(question: Question, code: int) -> bytes:
    """An empty response with a response code."""
    encoded: bytes = _response(question, code).pack()
    return encoded


def encode_format_error(data: bytes) -> bytes | None:
    """FORMERR for something that could not be read; None when there is nothing to answer."""
    if len(data) < HEADER_BYTES or data[2] & 0x80:
        return None
    encoded: bytes = DNSRecord(
        DNSHeader(id=_HEADER.unpack_from(data)[0], qr=1, ra=1, rcode=RCODE.FORMERR)
    ).pack()
    return encoded


def _response(question: Question, code: int) -> DNSRecord:
    header = DNSHeader(id=question.id, qr=1, ra=1, rd=int(question.wants_recursion), rcode=code)
    header.opcode = question.opcode
    response = DNSRecord(
        header, q=LibraryQuestion(DNSLabel(question.labels), question.type, question.class_)
    )
    if question.has_edns:
        response.add_ar(EDNS0(udp_len=MAX_UDP_BYTES))
    return response


def encode_query(hostname: str, kind: str, number: int) -> bytes:
    """A query of our own for `A` or `AAAA` of a hostname. Raises RemoteProtocolError when it
    is no hostname.
    """
    try:
        query = DNSRecord.question(hostname, kind)
        query.header.id = number
        encoded: bytes = query.pack()
    except _LIBRARY_ERRORS as exc:
        raise RemoteProtocolError(f"not a hostname: {hostname[:80]!r}") from exc
    return bytes(encoded)


def is_answer_to(data: bytes, query: bytes, question: Question) -> bool:
    """Whether `data` is a response to `query`: its id and its question repeated, in any case."""
    if len(data) < HEADER_BYTES or data[:2] != query[:2] or not data[2] & 0x80:
        return False
    # A failure may leave the question out (RFC 1035 allows FORMERR to).
    if data[4:6] == b"\0\0":
        return data[3] & 0xF != NOERROR
    asked = slice(HEADER_BYTES, question.end)
    return data[asked].lower() == query[asked].lower()


def read_addresses(response: bytes) -> list[str]:
    """The addresses in the answer section of an upstream's response, in order.

    Raises RemoteProtocolError when it cannot be read.
    """
    try:
        record = DNSRecord.parse(response)
    except _LIBRARY_ERRORS as exc:
        raise RemoteProtocolError("an upstream's DNS answer cannot be read") from exc
    return [str(each.rdata) for each in record.rr if each.rtype in (TYPE_A, TYPE_AAAA)]
