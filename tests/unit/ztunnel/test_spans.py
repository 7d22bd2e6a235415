"""What a connection's span says."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from mesh.hbone.head import Baggage
from mesh.identity import SpiffeId
from mesh.model.service import Service
from mesh.model.workload import Workload
from mesh.runtime.tracing import Span, Tracer, TracingSettings
from ztunnel.record import Ending, Record
from ztunnel.spans import attributes, end_span, note_accepted, note_acquired, note_dialled

CURL = SpiffeId("cluster.local", "shop", "curl")
SOURCE = Workload("u", "curl-7d9", "shop", ("10.0.0.1",), workload_name="curl", node="n1")


class Sink:
    async def export(self, spans: object) -> None:
        raise AssertionError

    def close(self) -> None:
        raise AssertionError


def span() -> Span:
    tracer = Tracer(TracingSettings(), Sink(), CollectorRegistry())
    return Span(tracer, "ztunnel outbound", "client", "1" * 32, "2" * 16, "", 10.0, 5_000_000_000)


@dataclass
class Connection:
    settled_at: float
    dial_seconds: float = 0.25
    handshake_seconds: float = 0.5


def record() -> Record:
    return Record(
        "1" * 32,
        "outbound",
        10.0,
        source_address="10.0.0.1:4000",
        destination_address="[fd00::2]:15008",
        original_destination="10.96.0.1:80",
        hbone_address="[fd00::2]:8080",
        protocol="HBONE",
        source=SOURCE,
        source_identity=CURL,
        service=Service("web", "shop", "web.shop.svc.cluster.local"),
        is_mutual_tls=True,
    )


def test_an_outbound_connection() -> None:
    found = attributes(record(), Ending("-", "", "", 3, 9))
    assert found["source.address"] == "10.0.0.1"
    assert (found["destination.address"], found["destination.port"]) == ("fd00::2", 15008)
    assert found["istio.source_workload"] == "curl"
    assert found["istio.source_principal"] == str(CURL)
    assert found["istio.destination_service"] == "web.shop.svc.cluster.local"
    assert (found["istio.tcp_received_bytes"], found["istio.tcp_sent_bytes"]) == (3, 9)
    assert found["connection_security_policy"] == "mutual_tls"
    assert found["ambit.connection.id"] == "1" * 32
    assert "istio.destination_workload" not in found
    assert "ambit.policy.rule" not in found


def test_bytes_are_the_same_at_both_ends() -> None:
    inbound = Record("x", "inbound", 0.0, policy="shop/p", rule=0)
    inbound.peer_baggage = Baggage(workload_name="curl")
    found = attributes(inbound, Ending("DENY", "no", "", 9, 3))
    assert (found["istio.tcp_received_bytes"], found["istio.tcp_sent_bytes"]) == (3, 9)
    assert (found["ambit.policy"], found["ambit.policy.rule"]) == ("shop/p", 0)
    assert (found["response_flags"], found["istio.source_workload"]) == ("DENY", "curl")


def test_where_the_time_went() -> None:
    fresh = span()
    note_acquired(fresh, Connection(settled_at=11.0), 10.0, 11.0)
    assert fresh.attributes == {
        "ambit.pool.wait_seconds": 1.0,
        "ambit.pool.reused": False,
        "ambit.dial_seconds": 0.25,
        "ambit.handshake_seconds": 0.5,
    }
    assert fresh.events == [("pool.acquired", 6_000_000_000, {})]
    reused = span()
    note_acquired(reused, Connection(settled_at=3.0), 10.0, 10.0)
    assert reused.attributes == {"ambit.pool.wait_seconds": 0.0, "ambit.pool.reused": True}
    first, second, accepted = span(), span(), Connection(settled_at=9.0)
    note_accepted(first, accepted)
    note_accepted(second, accepted)
    assert (first.attributes, second.attributes) == ({"ambit.handshake_seconds": 0.5}, {})
    plain = span()
    note_dialled(plain, 10.0, 10.5)
    assert plain.attributes == {"ambit.dial_seconds": 0.5}


def test_the_end() -> None:
    over = span()
    end_span(over, record(), Ending("CONNECT", "nobody"), 12.0)
    assert (over.end_ns, over.error) == (7_000_000_000, "nobody")
    assert over.traceparent == f"00-{'1' * 32}-{'2' * 16}-01"
