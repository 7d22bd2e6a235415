"""The cluster's DNS: which names exist and what is answered."""

from __future__ import annotations

import dnslib
import pytest

from mesh.lab.dns import answer
from mesh.lab.names import Zone, build_zone
from mesh.lab.podspec import Container, PodSpec
from mesh.lab.services import Backend, Endpoint, ServicePlan

SPEC = PodSpec((Container("a", ("a",)),))
WEB = ServicePlan(
    "shop",
    "web",
    ("IPv4", "IPv6"),
    ("10.96.1.1", "fd00:10:96::101"),
    (("http", "TCP", 80, 8080),),
)
DB = ServicePlan("shop", "db", ("IPv4",), (), (("sql", "TCP", 5432, 5432),), is_headless=True)
ALIAS = ServicePlan("shop", "far", (), (), (), external_name="web.shop.svc.cluster.local")
DB_ENDPOINTS = (
    Endpoint(("shop", "db-0"), ("10.244.1.10",), {5432: 5432}, True, "db-0", "db"),
    Endpoint(("shop", "db-1"), ("10.244.2.10",), {5432: 5432}, False, "db-1", "db"),
    Endpoint(("shop", "odd"), ("10.244.2.11",), {5432: 5432}, True),
)
PODS = [Backend("shop", "db-0", {}, ("10.244.1.10", "fd00:10:244:1::a"), SPEC, True)]


@pytest.fixture
def zone() -> Zone:
    services = [(WEB, ()), (DB, DB_ENDPOINTS), (ALIAS, ())]
    return build_zone("cluster.local", ["shop", "empty"], services, PODS)


def ask(zone: Zone, name: str, kind: str) -> tuple[str, list[str]]:
    reply = answer(bytes(dnslib.DNSRecord.question(name, kind).pack()), zone, limit=None)
    assert reply is not None
    parsed = dnslib.DNSRecord.parse(reply)
    return dnslib.RCODE[parsed.header.rcode], sorted(str(record.rdata) for record in parsed.rr)


@pytest.mark.parametrize(
    ("name", "kind", "records"),
    [
        ("web.shop.svc.cluster.local", "A", ["10.96.1.1"]),
        ("WEB.shop.svc.Cluster.Local", "AAAA", ["fd00:10:96::101"]),
        ("_http._tcp.web.shop.svc.cluster.local", "SRV", ["0 100 80 web.shop.svc.cluster.local."]),
        ("db.shop.svc.cluster.local", "A", ["10.244.1.10", "10.244.2.11"]),
        ("db.shop.svc.cluster.local", "AAAA", []),
        ("db-0.db.shop.svc.cluster.local", "A", ["10.244.1.10"]),
        ("10-244-2-11.db.shop.svc.cluster.local", "A", ["10.244.2.11"]),
        (
            "_sql._tcp.db.shop.svc.cluster.local",
            "SRV",
            [
                "0 100 5432 10-244-2-11.db.shop.svc.cluster.local.",
                "0 100 5432 db-0.db.shop.svc.cluster.local.",
            ],
        ),
        (
            "far.shop.svc.cluster.local",
            "A",
            ["10.96.1.1", "web.shop.svc.cluster.local."],
        ),
        ("10-244-1-10.shop.pod.cluster.local", "A", ["10.244.1.10"]),
        ("fd00-10-244-1--a.shop.pod.cluster.local", "AAAA", ["fd00:10:244:1::a"]),
        ("empty.svc.cluster.local", "A", []),
        ("cluster.local", "A", []),
        ("_tcp.web.shop.svc.cluster.local", "A", []),
    ],
)
def test_names_that_exist(zone: Zone, name: str, kind: str, records: list[str]) -> None:
    assert ask(zone, name, kind) == ("NOERROR", sorted(records))


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("nowhere.shop.svc.cluster.local", "NXDOMAIN"),
        ("db-1.db.shop.svc.cluster.local", "NXDOMAIN"),
        ("web.other.svc.cluster.local", "NXDOMAIN"),
        ("10-244-9-9.shop.pod.cluster.local", "NXDOMAIN"),
        ("example.com", "NXDOMAIN"),
        ("notcluster.local", "NXDOMAIN"),
    ],
)
def test_names_that_do_not(zone: Zone, name: str, code: str) -> None:
    assert ask(zone, name, "A") == (code, [])


def test_an_answer_too_long_for_udp_is_cut_and_marked() -> None:
    endpoints = tuple(
        Endpoint(("shop", f"p{n}"), (f"10.244.1.{n}",), {}, True) for n in range(10, 200)
    )
    zone = build_zone("cluster.local", [], [(DB, endpoints)], [])
    query = bytes(dnslib.DNSRecord.question("db.shop.svc.cluster.local", "A").pack())
    short = answer(query, zone, limit=4096)
    assert short is not None
    assert len(short) <= 512
    assert dnslib.DNSRecord.parse(short).header.tc == 1
    whole = answer(query, zone, limit=None)
    assert whole is not None
    assert len(dnslib.DNSRecord.parse(whole).rr) == 190


@pytest.mark.parametrize("query", [b"", b"x" * 11, b"\0" * 12, b"\xff" * 600])
def test_rubbish_gets_no_answer(zone: Zone, query: bytes) -> None:
    assert answer(query, zone, limit=512) is None


def test_an_answer_is_not_answered(zone: Zone) -> None:
    reply = answer(bytes(dnslib.DNSRecord.question("cluster.local").pack()), zone, limit=None)
    assert reply is not None
    assert answer(reply, zone, limit=None) is None
