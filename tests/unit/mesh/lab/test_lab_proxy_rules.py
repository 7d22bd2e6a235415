"""The ruleset that plays kube-proxy; nft itself judges it in the lab tests."""

from __future__ import annotations

from dataclasses import replace

from mesh.lab.proxy_rules import ruleset
from mesh.lab.services import Endpoint, ServicePlan

WEB = ServicePlan(
    "shop",
    "web",
    ("IPv4", "IPv6"),
    ("10.96.1.1", "fd00:10:96::101"),
    (("http", "TCP", 80, 8080), ("dns", "UDP", 53, 5353)),
)
READY = Endpoint(("shop", "a"), ("10.244.1.10", "fd00:10:244:1::a"), {80: 8080, 53: 5353}, True)
UNREADY = Endpoint(("shop", "b"), ("10.244.2.10",), {80: 8080, 53: 5353}, False)


def test_every_cluster_ip_and_port_has_its_ready_endpoints() -> None:
    text = ruleset([(WEB, (READY, UNREADY))])
    assert (
        "ip daddr . meta l4proto . th dport vmap { 10.96.1.1 . tcp . 80 : goto service0, "
        "10.96.1.1 . udp . 53 : goto service1 }" in text
    )
    assert "ip6 daddr . meta l4proto . th dport vmap { fd00:10:96::101 . tcp . 80" in text
    assert "meta l4proto tcp dnat ip to 10.244.1.10:8080" in text
    assert "meta l4proto udp dnat ip6 to [fd00:10:244:1::a]:5353" in text
    assert "10.244.2.10" not in text


def test_a_local_service_has_the_endpoints_of_the_node_only() -> None:
    there = replace(READY, ips=("10.244.2.11",), node="node2")
    here = replace(READY, node="node1")
    text = ruleset([(replace(WEB, is_local=True), (here, there))], "node1")
    assert "10.244.1.10" in text
    assert "10.244.2.11" not in text
    assert "10.244.2.11" in ruleset([(WEB, (here, there))], "node1")


def test_only_a_pod_that_meets_itself_is_masqueraded() -> None:
    text = ruleset([(WEB, (READY,))])
    assert "ip saddr 10.244.1.10 meta mark set meta mark | 0x4000" in text
    assert text.count("masquerade") == 1
    assert "meta mark & 0x4000 == 0x4000 masquerade" in text


def test_without_ready_endpoints_nothing_is_translated_and_all_is_refused() -> None:
    text = ruleset([(WEB, (UNREADY,))])
    assert "dnat" not in text
    assert "vmap" not in text
    assert "ip daddr 10.96.0.0/16 meta l4proto tcp reject with tcp reset" in text


def test_it_is_one_transaction_that_replaces_the_table() -> None:
    lines = ruleset([]).splitlines()
    assert lines[:3] == [
        "table inet ambit-services",
        "delete table inet ambit-services",
        "table inet ambit-services {",
    ]
