from __future__ import annotations

from dataclasses import asdict, fields

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from mesh.runtime import metrics
from mesh.runtime.metrics import DnsLabels
from mesh.runtime.tcp_metrics import TcpLabels, TcpMetrics, tcp_directions


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def samples(registry: CollectorRegistry) -> dict[str, dict[tuple[str, ...], float]]:
    """name -> {values of the labels that are not `unknown`: value}, as a scraper reads it."""
    body, _ = metrics.render(registry)
    order = ["request_query_type", "request_protocol", *(one.name for one in fields(TcpLabels))]
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            key = tuple(
                value
                for name, value in sorted(
                    sample.labels.items(),
                    key=lambda item: order.index(item[0]) if item[0] in order else len(order),
                )
                if value != "unknown"
            )
            found.setdefault(sample.name, {})[key] = sample.value
    return found


LABELS = TcpLabels(
    reporter="source",
    source_workload="web",
    destination_service="shop.default.svc.cluster.local",
    connection_security_policy="mutual_tls",
)
KEY = ("tcp", "source", "web", "shop.default.svc.cluster.local", "-", "mutual_tls")


def test_names_and_values_of_a_connection() -> None:
    registry = CollectorRegistry()
    tcp = TcpMetrics(registry)
    tcp.opened(LABELS)
    tcp.bytes(LABELS, sent=5, received=7)
    assert samples(registry)["istio_tcp_sockets_open"] == {("source",): 1.0}
    tcp.closed(LABELS)
    found = samples(registry)
    assert found["istio_tcp_connections_opened_total"] == {KEY: 1.0}
    assert found["istio_tcp_connections_closed_total"] == {KEY: 1.0}
    assert found["istio_tcp_connections_failed_total"] == {KEY: 0.0}
    assert found["istio_tcp_sent_bytes_total"] == {KEY: 5.0}
    assert found["istio_tcp_received_bytes_total"] == {KEY: 7.0}
    assert found["istio_tcp_sockets_open"] == {("source",): 0.0}
    assert not [name for name in found if name.endswith("_created")]


def test_what_was_counted_is_told_once_however_often_it_is_read() -> None:
    registry = CollectorRegistry()
    tcp = TcpMetrics(registry)
    labels = TcpLabels(reporter="source")
    tcp.opened(labels)
    tcp.bytes(labels, 3, 4)
    name = "istio_tcp_received_bytes_total"
    values = [registry.get_sample_value(name, asdict(labels)) for _ in range(3)]
    tcp.bytes(labels, 0, 5)
    assert values == [4, 4, 4]
    assert registry.get_sample_value(name, asdict(labels)) == 9
    assert registry.get_sample_value("istio_tcp_sockets_open", {"reporter": "source"}) == 1


def test_label_names_are_istios() -> None:
    registry = CollectorRegistry()
    TcpMetrics(registry).failed(TcpLabels(reporter="destination", response_flags="DENY"))
    body, content_type = metrics.render(registry)
    assert content_type.startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    labels = families["istio_tcp_connections_failed"].samples[0].labels
    both = "workload canonical_service canonical_revision workload_namespace"
    both += " principal app version cluster region zone"
    peers = {f"{side}_{what}" for side in ("source", "destination") for what in both.split()}
    assert set(labels) == peers | {
        "reporter",
        "destination_service",
        "destination_service_namespace",
        "destination_service_name",
        "request_protocol",
        "response_flags",
        "connection_security_policy",
    }
    assert labels["source_app"] == "unknown"
    assert labels["response_flags"] == "DENY"


def test_empty_label_is_shown_as_unknown() -> None:
    registry = CollectorRegistry()
    TcpMetrics(registry).failed(TcpLabels(reporter="source", source_app=""))
    assert b'source_app="unknown"' in metrics.render(registry)[0]


@pytest.mark.parametrize(
    ("reporter", "expected"),
    [
        # A request of 10 bytes answered by 900: at the source the request enters the tunnel,
        # at the destination the answer does.
        ("source", tcp_directions("source", to_tunnel=10, from_tunnel=900)),
        ("destination", tcp_directions("destination", to_tunnel=900, from_tunnel=10)),
    ],
)
def test_both_reporters_agree_on_directions(reporter: str, expected: tuple[int, int]) -> None:
    assert expected == (900, 10)


def test_hostile_label_values_are_escaped() -> None:
    registry = CollectorRegistry()
    nasty = 'a"}\n# HELP evil\nevil 1\\'
    TcpMetrics(registry).failed(TcpLabels(reporter="source", source_workload=nasty))
    found = samples(registry)
    assert "evil" not in found
    assert (nasty in next(iter(found["istio_tcp_connections_failed_total"]))) is True


def test_idle_series_expire_and_return() -> None:
    registry, clock = CollectorRegistry(), Clock()
    tcp = TcpMetrics(registry, idle_seconds=60.0, clock=clock)
    tcp.failed(LABELS)
    clock.now += 59
    assert tcp.expire() == 0
    clock.now += 2
    assert tcp.expire() == 1
    found = samples(registry)
    assert "istio_tcp_connections_failed_total" not in found
    assert found["ambit_metrics_expired_total"] == {(): 1.0}
    tcp.failed(LABELS)
    assert samples(registry)["istio_tcp_connections_failed_total"] == {KEY: 1.0}


def test_series_of_an_open_connection_does_not_expire() -> None:
    registry, clock = CollectorRegistry(), Clock()
    tcp = TcpMetrics(registry, idle_seconds=60.0, clock=clock)
    tcp.opened(LABELS)
    clock.now += 3600
    assert tcp.expire() == 0
    tcp.closed(LABELS)
    assert samples(registry)["istio_tcp_connections_opened_total"] == {KEY: 1.0}
    clock.now += 61
    assert tcp.expire() == 1


def test_too_many_label_sets_fold_into_one() -> None:
    registry, clock = CollectorRegistry(), Clock()
    tcp = TcpMetrics(registry, max_label_sets=3, idle_seconds=60.0, clock=clock)
    for index in range(10):
        tcp.failed(TcpLabels(reporter="source", source_workload=f"w{index}"))
    found = samples(registry)
    series = found["istio_tcp_connections_failed_total"]
    assert sum(series.values()) == 10.0
    assert [value for key, value in series.items() if "overflow" in key] == [7.0]
    assert len(series) == 4
    assert found["ambit_metrics_overflow_total"] == {(): 7.0}
    clock.now += 61
    tcp.failed(TcpLabels(reporter="source", source_workload="later"))
    assert ("tcp", "source", "later", "-") in samples(registry)[
        "istio_tcp_connections_failed_total"
    ]


def test_connection_that_opened_in_overflow_closes_there() -> None:
    registry, clock = CollectorRegistry(), Clock()
    tcp = TcpMetrics(registry, max_label_sets=1, idle_seconds=60.0, clock=clock)
    tcp.opened(LABELS)
    other = TcpLabels(reporter="source", source_workload="other")
    tcp.opened(other)
    tcp.closed(LABELS)
    tcp.closed(other)
    assert samples(registry)["istio_tcp_sockets_open"] == {("source",): 0.0}


def test_registry_tells_build_and_process() -> None:
    found = samples(metrics.new_registry("ztunnel", "1.2.3"))
    assert found["istio_build"] == {("ztunnel", "1.2.3"): 1.0}
    assert found["process_open_fds"][()] > 2
    assert found["process_max_fds"][()] > found["process_open_fds"][()]


def test_xds_and_dns_and_workload_manager() -> None:
    registry = CollectorRegistry()
    xds = metrics.XdsMetrics(registry)
    xds.message("type.googleapis.com/istio.workload.Address", 120)
    xds.rejected("type.googleapis.com/istio.workload.Address")
    xds.terminated("Reconnect")
    dns = metrics.DnsMetrics(registry)
    question = DnsLabels("A", "udp", source_canonical_service="web")
    dns.request(question)
    dns.upstream(question, 0.02, failed=True)
    manager = metrics.WorkloadManagerMetrics(registry)
    manager.active.set(2)
    manager.started.inc()
    found = samples(registry)
    url = ("type.googleapis.com/istio.workload.Address",)
    assert found["istio_xds_message_total"] == {url: 1.0}
    assert found["istio_xds_message_bytes_total"] == {url: 120.0}
    assert found["istio_xds_connection_terminations_total"] == {("Reconnect",): 1.0}
    assert found["istio_dns_requests_total"] == {("A", "udp", "web"): 1.0}
    assert found["istio_dns_upstream_failures_total"] == {("A", "udp", "web"): 1.0}
    seconds = found["istio_dns_upstream_request_duration_seconds_bucket"]
    assert seconds["A", "udp", "web", "0.01"] == 0.0
    assert seconds["A", "udp", "web", "0.1"] == 1.0
    assert found["workload_manager_active_proxy_count"] == {(): 2.0}
    assert found["workload_manager_proxies_started_total"] == {(): 1.0}


def test_openmetrics_when_asked() -> None:
    body, content_type = metrics.render(CollectorRegistry(), "application/openmetrics-text")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_dns_label_sets_are_capped_and_expire() -> None:
    registry, clock = CollectorRegistry(), Clock()
    dns = metrics.DnsMetrics(registry, max_label_sets=2, idle_seconds=60.0, clock=clock)
    for number in range(5):
        dns.request(DnsLabels("A", "udp", source_canonical_service=f"s{number}"))
    dns.upstream(DnsLabels("A", "udp", source_canonical_service="s0"), 0.1)
    found = samples(registry)["istio_dns_requests_total"]
    assert found["A", "udp", "overflow", "overflow"] == 3.0
    assert len(found) == 3
    clock.now += 61
    assert dns.expire() == 3
    assert "istio_dns_requests_total" not in samples(registry)
    assert "istio_dns_upstream_requests_total" not in samples(registry)


def test_a_server_cannot_invent_labels_without_end() -> None:
    registry = CollectorRegistry()
    xds = metrics.XdsMetrics(registry)
    for number in range(100):
        xds.message(f"type/{number}", 1)
        xds.rejected(f"type/{number}")
    found = samples(registry)
    assert len(found["istio_xds_message_total"]) == metrics.MAX_URLS + 1
    assert found["ambit_xds_rejected_total"]["overflow",] == 100 - metrics.MAX_URLS


def test_the_age_of_the_configuration_and_the_connection() -> None:
    registry = CollectorRegistry()
    xds = metrics.XdsMetrics(registry)
    assert samples(registry)["ambit_xds_connected"] == {(): 0.0}
    xds.connected()
    assert samples(registry)["ambit_xds_connected"] == {(): 1.0}
    before = samples(registry)["ambit_xds_age_seconds"][()]
    assert samples(registry)["ambit_xds_age_seconds"][()] >= before
    xds.terminated("Complete")
    assert samples(registry)["ambit_xds_connected"] == {(): 0.0}
