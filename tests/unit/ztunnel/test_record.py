"""The access-log line and the labels of one connection, and that it is told exactly once."""

from __future__ import annotations

from mesh.hbone.head import Baggage
from mesh.identity import SpiffeId
from mesh.model.service import Service
from mesh.model.workload import Locality, Workload
from mesh.runtime.tcp_metrics import TcpLabels
from ztunnel.record import Ending, Journal, Record, access_fields, baggage_of

CURL = SpiffeId("cluster.local", "shop", "curl")
WORKLOAD = Workload(
    "u",
    "curl-7d9",
    "shop",
    ("10.0.0.1",),
    workload_name="curl",
    canonical_name="curl",
    canonical_revision="v1",
    locality=Locality("r", "z"),
)
WEB = Service("web", "shop", "web.shop.svc.cluster.local")


class Metrics:
    """Remembers what was counted."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, TcpLabels, tuple[int, ...]]] = []

    def opened(self, labels: TcpLabels) -> None:
        self.calls.append(("opened", labels, ()))

    def closed(self, labels: TcpLabels) -> None:
        self.calls.append(("closed", labels, ()))

    def failed(self, labels: TcpLabels) -> None:
        self.calls.append(("failed", labels, ()))

    def bytes(self, labels: TcpLabels, sent: int, received: int) -> None:
        self.calls.append(("bytes", labels, (sent, received)))


class Access:
    def __init__(self) -> None:
        self.lines: list[dict[str, object]] = []

    def record(self, fields: dict[str, object]) -> None:
        self.lines.append(fields)


def outbound() -> Record:
    return Record(
        "ab" * 16,
        "outbound",
        10.0,
        source_address="10.0.0.1:4000",
        destination_address="10.0.0.2:15008",
        hbone_address="10.0.0.2:8080",
        source=WORKLOAD,
        source_identity=CURL,
        service=WEB,
        is_mutual_tls=True,
    )


def test_the_line_of_a_complete_connection() -> None:
    record = outbound()
    record.is_open = True
    fields = access_fields(record, Ending(bytes_to_tunnel=3, bytes_from_tunnel=9), 10.0123)
    assert fields == {
        "level": "info",
        "message": "connection complete",
        "id": "ab" * 16,
        "connection.id": "ab" * 16,
        "direction": "outbound",
        "src.addr": "10.0.0.1:4000",
        "src.workload": "curl-7d9",
        "src.namespace": "shop",
        "src.identity": "spiffe://cluster.local/ns/shop/sa/curl",
        "src.cluster": "Kubernetes",
        "dst.addr": "10.0.0.2:15008",
        "dst.hbone_addr": "10.0.0.2:8080",
        "dst.service": "web.shop.svc.cluster.local",
        "bytes_sent": 3,
        "bytes_recv": 9,
        "duration": "12ms",
        "response_flags": "-",
    }


def test_the_line_of_a_refusal() -> None:
    record = Record(
        "x", "inbound", 0.0, source_identity=CURL, policy="shop/p", rule=0, connection_id="c7"
    )
    fields = access_fields(record, Ending("DENY", "no", "look there"), 0.0)
    assert (fields["level"], fields["message"]) == ("error", "connection failed")
    assert (fields["policy"], fields["error"], fields["hint"]) == ("shop/p", "no", "look there")
    assert (fields["id"], fields["connection.id"], fields["rule"]) == ("x", "c7", 0)
    # Without a workload the proven identity still tells the namespace.
    assert fields["src.namespace"] == "shop"


def test_labels() -> None:
    labels = outbound().labels
    assert labels.reporter == "source"
    assert (labels.source_workload, labels.source_canonical_service) == ("curl", "curl")
    assert labels.source_principal == "spiffe://cluster.local/ns/shop/sa/curl"
    assert (labels.source_region, labels.source_zone) == ("r", "z")
    assert labels.destination_service == WEB.hostname
    assert labels.destination_workload == "unknown"
    assert labels.connection_security_policy == "mutual_tls"


def test_baggage_fills_in_for_a_peer_that_is_not_known_but_never_its_namespace() -> None:
    told = Baggage(cluster="c2", namespace="liar", workload_name="w", service_name="s")
    record = Record("x", "inbound", 0.0, source_identity=CURL, peer_baggage=told)
    labels = record.labels
    assert (labels.source_workload, labels.source_workload_namespace) == ("w", "shop")
    assert (labels.reporter, labels.source_cluster) == ("destination", "c2")


def test_baggage_of_a_workload() -> None:
    assert baggage_of(WORKLOAD) == Baggage(
        cluster="Kubernetes",
        namespace="shop",
        workload_type="pod",
        workload_name="curl",
        service_name="curl",
        service_version="v1",
        region="r",
        zone="z",
    )


def test_bytes_are_reported_once_and_by_application_direction() -> None:
    access, metrics = Access(), Metrics()
    journal = Journal(access, metrics)
    record = outbound()
    count = [(10, 1)]
    record.counters = lambda: count[0]
    journal.progress(record)
    assert metrics.calls == []
    journal.opened(record)
    journal.progress(record)
    journal.progress(record)
    journal.finished(record, Ending(bytes_to_tunnel=30, bytes_from_tunnel=5), 11.0)
    journal.finished(record, Ending("CONNECT", "again"), 12.0)
    journal.progress(record)
    assert [(name, values) for name, _, values in metrics.calls] == [
        ("opened", ()),
        ("bytes", (1, 10)),
        ("bytes", (4, 20)),
        ("closed", ()),
    ]
    assert len(access.lines) == 1


def test_inbound_bytes_are_the_other_way_round() -> None:
    metrics = Metrics()
    journal = Journal(Access(), metrics)
    record = Record("x", "inbound", 0.0)
    journal.opened(record)
    journal.finished(record, Ending(bytes_to_tunnel=30, bytes_from_tunnel=5), 1.0)
    assert ("bytes", (30, 5)) in [(name, values) for name, _, values in metrics.calls]


def test_what_never_opened_is_a_failure_with_its_flag() -> None:
    access, metrics = Access(), Metrics()
    Journal(access, metrics).finished(outbound(), Ending("DENY", "no"), 11.0)
    assert [(name, labels.response_flags) for name, labels, _ in metrics.calls] == [
        ("failed", "DENY")
    ]
    assert access.lines[0]["response_flags"] == "DENY"
