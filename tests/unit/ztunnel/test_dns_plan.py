"""DNS answers: which names are ours, in which order they are tried, and the bytes."""

from __future__ import annotations

import random
import struct

import pytest
from dnslib import EDNS0, QTYPE, RCODE, RR, A, DNSHeader, DNSQuestion, DNSRecord

from mesh.errors import RemoteProtocolError
from mesh.model.service import IpFamilies, Service, Visibility
from mesh.model.store import Store
from mesh.model.workload import NamespacedHostname, NetworkAddress, Workload, WorkloadStatus
from ztunnel.dns_plan import (
    NOTIMP,
    Answer,
    Names,
    Question,
    encode_answer,
    encode_failure,
    encode_format_error,
    parse_question,
    plan_answer,
    read_addresses,
)

NAMES = Names()
CLIENT = Workload("Kubernetes//Pod/shop/curl", "curl", "shop", ("10.0.0.1",))


def service(hostname: str, *vips: str, namespace: str = "shop", **fields: object) -> Service:
    addresses = tuple(NetworkAddress("", vip) for vip in vips)
    return Service(hostname.split(".")[0], namespace, hostname, addresses, **fields)  # type: ignore[arg-type]


HEADLESS = "db.shop.svc.cluster.local"


def endpoint(name: str, *ips: str, **fields: object) -> Workload:
    services = {f"shop/{HEADLESS}": {5432: 5432}}
    return Workload(f"c//Pod/shop/{name}", name, "shop", ips, services=services, **fields)  # type: ignore[arg-type]


def mesh() -> Store:
    store = Store()
    store.apply_addresses(
        [
            service("web.shop.svc.cluster.local", "10.96.0.1", "fd00:10:96::1"),
            service("api.bank.svc.cluster.local", "10.96.0.2", namespace="bank"),
            service(
                "secret.bank.svc.cluster.local",
                "10.96.0.3",
                namespace="bank",
                visibility=Visibility.NAMESPACE,
            ),
            service("*.wild.example", "240.0.0.1"),
            service("exact.wild.example", "240.0.0.2"),
            service("www.example.com", "240.0.0.3"),
            service("novip.example.com"),
            service(HEADLESS),
            endpoint("db-0", "10.0.0.5", "fd00::5"),
            endpoint("db-1", "10.0.0.6"),
            endpoint("db-2", "10.0.0.7", status=WorkloadStatus.UNHEALTHY),
            Workload("c/we", "vm", "shop", ("10.0.9.9",), hostname="vm.example"),
        ],
        [],
    )
    return store


STORE = mesh()


def ask(name: str, kind: str = "A") -> Question:
    return parse_question(bytes(DNSRecord.question(name, kind).pack()))


def answer(name: str, kind: str = "A", client: Workload = CLIENT) -> tuple[set[str], str] | None:
    found = plan_answer(ask(name, kind), client, STORE, NAMES, random.Random(1))
    return (set(found.addresses), found.alias) if found else None


@pytest.mark.parametrize(
    ("name", "addresses", "alias"),
    [
        ("web.shop.svc.cluster.local.", {"10.96.0.1"}, ""),
        ("WEB.Shop.svc.cluster.LOCAL", {"10.96.0.1"}, ""),
        ("web", {"10.96.0.1"}, ""),
        ("web.shop", {"10.96.0.1"}, ""),
        ("web.shop.svc", {"10.96.0.1"}, ""),
        ("api.bank", {"10.96.0.2"}, ""),
        ("api.bank.svc", {"10.96.0.2"}, ""),
        # What a resolver with ndots:5 asks first.
        ("api.bank.shop.svc.cluster.local", {"10.96.0.2"}, "api.bank"),
        ("api.bank.svc.cluster.local.svc.cluster.local", {"10.96.0.2"}, None),
        ("www.example.com", {"240.0.0.3"}, ""),
        ("www.example.com.shop.svc.cluster.local", {"240.0.0.3"}, "www.example.com"),
        ("www.example.com.cluster.local", {"240.0.0.3"}, "www.example.com"),
        ("exact.wild.example", {"240.0.0.2"}, ""),
        ("any.wild.example", {"240.0.0.1"}, ""),
        ("a.b.wild.example", {"240.0.0.1"}, ""),
        ("any.wild.example.shop.svc.cluster.local", {"240.0.0.1"}, ""),
        (HEADLESS, {"10.0.0.5", "10.0.0.6"}, ""),
        ("db", {"10.0.0.5", "10.0.0.6"}, ""),
        ("vm.example", {"10.0.9.9"}, ""),
    ],
)
def test_names_of_the_mesh(name: str, addresses: set[str], alias: str | None) -> None:
    found = answer(name)
    assert found is not None
    assert found[0] == addresses
    if alias is not None:
        assert found[1] == alias


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("example.org", "A"),
        ("wild.example", "A"),
        ("db-0.db.shop.svc.cluster.local", "A"),
        ("novip.example.com", "A"),
        ("secret.bank.svc.cluster.local", "A"),
        ("web.shop.svc.cluster.local", "SRV"),
        ("web.shop.svc.cluster.local", "HTTPS"),
        ("1.0.96.10.in-addr.arpa", "PTR"),
        ("api", "A"),
        (".", "A"),
        ("web.bank", "A"),
    ],
)
def test_forwarded(name: str, kind: str) -> None:
    assert answer(name, kind) is None


def test_visibility_is_the_clients() -> None:
    banker = Workload("x", "x", "bank", ("10.0.0.2",))
    assert answer("secret", client=banker) == ({"10.96.0.3"}, "")


def test_families() -> None:
    assert answer("web", "AAAA") == ({"fd00:10:96::1"}, "")
    assert answer(HEADLESS, "AAAA") == ({"fd00::5"}, "")
    # Known, but not in this family: an empty answer, not a forwarded question.
    assert answer("api.bank", "AAAA") == (set(), "")


@pytest.mark.parametrize(
    ("families", "kind", "expected"),
    [
        (IpFamilies.IPV4_ONLY, "A", {"10.0.0.5", "10.0.0.6"}),
        (IpFamilies.IPV4_ONLY, "AAAA", set()),
        (IpFamilies.IPV6_ONLY, "A", set()),
        (IpFamilies.IPV6_ONLY, "AAAA", {"fd00::5"}),
        (IpFamilies.DUAL, "AAAA", {"fd00::5"}),
    ],
)
def test_a_headless_service_offers_its_families_only(
    families: IpFamilies, kind: str, expected: set[str]
) -> None:
    # Its pods have both addresses, but who wrote it may listen on one only.
    store = mesh()
    store.apply_addresses([service(HEADLESS, ip_families=families)], [])
    found = plan_answer(ask(HEADLESS, kind), CLIENT, store, NAMES, random.Random(1))
    assert found is not None
    assert set(found.addresses) == expected


def test_vips_of_other_networks_are_not_given_out() -> None:
    abroad = Workload("x", "x", "shop", network="n2")
    assert answer("web", client=abroad) == (set(), "")


def test_preferred_namespace() -> None:
    store = Store()
    hosts = [
        service("dup.example", f"240.0.1.{index}", namespace=each)
        for index, each in enumerate(("a", "b"))
    ]
    store.apply_addresses(hosts, [])
    found = plan_answer(
        ask("dup.example"), CLIENT, store, Names(preferred_namespace="b"), random.Random(1)
    )
    assert found is not None
    assert found.addresses == ("240.0.1.1",)


# -- bytes


def test_an_answer_reads_back() -> None:
    question = ask("WeB.shop")
    record = DNSRecord.parse(
        encode_answer(question, Answer(("10.0.0.1", "10.0.0.2")), limit=question.udp_bytes)
    )
    assert (record.header.id, record.header.aa, record.header.ra) == (question.id, 1, 1)
    assert (record.header.rcode, record.header.rd, record.header.tc) == (0, 1, 0)
    assert str(record.q.qname) == "WeB.shop."
    assert [(str(each.rname), each.ttl, str(each.rdata)) for each in record.rr] == [
        ("WeB.shop.", 30, "10.0.0.1"),
        ("WeB.shop.", 30, "10.0.0.2"),
    ]


def test_an_alias_is_a_cname() -> None:
    question = ask("www.example.com.cluster.local", "AAAA")
    record = DNSRecord.parse(
        encode_answer(question, Answer(("fd00::1",), "www.example.com"), limit=512)
    )
    assert [(QTYPE[each.rtype], str(each.rname), str(each.rdata)) for each in record.rr] == [
        ("CNAME", "www.example.com.cluster.local.", "www.example.com."),
        ("AAAA", "www.example.com.", "fd00::1"),
    ]


@pytest.mark.parametrize("kind", ["A", "AAAA"])
@pytest.mark.parametrize("limit", [512, 1232, 4096])
def test_an_answer_keeps_to_the_limit(kind: str, limit: int) -> None:
    question = ask("web.shop.svc.cluster.local.cluster.local", kind)
    ip = "10.0.0.{}" if kind == "A" else "fd00::{}"
    addresses = tuple(ip.format(i) for i in range(250))
    data = encode_answer(question, Answer(addresses, "web.shop.svc.cluster.local"), limit=limit)
    record = DNSRecord.parse(data)
    assert len(data) <= limit
    assert len(data) > limit - 80 or not record.header.tc
    assert record.header.tc == (len(record.rr) - 1 < len(addresses))


def test_edns_is_answered_and_raises_the_limit() -> None:
    query = DNSRecord.question("web.shop")
    assert parse_question(bytes(query.pack())).udp_bytes == 512
    query.add_ar(EDNS0(udp_len=1232))
    question = parse_question(bytes(query.pack()))
    assert (question.udp_bytes, question.has_edns) == (1232, True)
    record = DNSRecord.parse(encode_answer(question, Answer(()), limit=1232))
    assert [QTYPE[each.rtype] for each in record.ar] == ["OPT"]
    greedy = DNSRecord.question("web.shop")
    greedy.add_ar(EDNS0(udp_len=65535))
    assert parse_question(bytes(greedy.pack())).udp_bytes == 4096


def test_failure_keeps_the_question() -> None:
    record = DNSRecord.parse(encode_failure(ask("x.example"), NOTIMP))
    assert (record.header.rcode, str(record.q.qname), record.rr) == (
        RCODE.NOTIMP,
        "x.example.",
        [],
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 11,
        bytes(DNSRecord(DNSHeader(qr=1), q=DNSQuestion("x")).pack()),
        bytes(DNSRecord(DNSHeader()).pack()),
        bytes(DNSRecord(DNSHeader(), questions=[DNSQuestion("x"), DNSQuestion("y")]).pack()),
        struct.pack("!HHHHHH", 1, 0, 1, 0, 0, 0) + b"\x3fabc",
        struct.pack("!HHHHHH", 1, 0, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1",
        struct.pack("!HHHHHH", 1, 0, 1, 0, 0, 0) + b"\x01x" * 200 + b"\0\0\1\0\1",
        struct.pack("!HHHHHH", 1, 0, 1, 0, 0, 0) + b"\x01x\0\0",
    ],
)
def test_malformed_queries(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_question(data)


def test_format_error_answers_queries_only() -> None:
    broken = struct.pack("!HHHHHH", 77, 0, 2, 0, 0, 0)
    reply = encode_format_error(broken)
    assert reply is not None
    record = DNSRecord.parse(reply)
    assert (record.header.id, record.header.rcode, record.header.qr) == (77, RCODE.FORMERR, 1)
    assert encode_format_error(struct.pack("!HHHHHH", 77, 0x8000, 2, 0, 0, 0)) is None
    assert encode_format_error(b"short") is None


def test_names_that_are_no_text_are_forwarded() -> None:
    raw = struct.pack("!HHHHHH", 1, 0, 1, 0, 0, 0) + b"\x03\xff\xfe.\0\0\1\0\1"
    assert plan_answer(parse_question(raw), CLIENT, STORE, NAMES, random.Random(1)) is None


def test_type_names_are_bounded() -> None:
    assert ask("x", "TXT").type_name == "TXT"
    raw = struct.pack("!HHHHHH", 1, 0, 1, 0, 0, 0) + b"\x01x\0\xff\x00\0\1"
    assert parse_question(raw).type_name == "OTHER"


def test_read_addresses() -> None:
    record = DNSRecord.question("x")
    record.add_answer(RR("x", QTYPE.A, rdata=A("1.2.3.4")))
    assert read_addresses(bytes(record.pack())) == ["1.2.3.4"]
    with pytest.raises(RemoteProtocolError):
        read_addresses(b"\0\1")


def test_search_domains_and_completions() -> None:
    assert NAMES.search_domains("shop") == (
        "shop.svc.cluster.local",
        "svc.cluster.local",
        "cluster.local",
    )
    assert [name for name, _ in NAMES.candidates("a.b.c", "shop")] == [
        "a.b.c",
        "a.b.c.svc.cluster.local",
    ]
    assert [name for name, _ in NAMES.candidates("a.b.c.svc", "shop")] == [
        "a.b.c.svc",
        "a.b.c.svc.cluster.local",
    ]
    assert NamespacedHostname("shop", HEADLESS) == service(HEADLESS).key
