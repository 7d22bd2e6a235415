"""What a person meant by SRC and DST."""

from __future__ import annotations

import pytest

from mesh.cli.meant import (
    Meant,
    choose_port,
    find_service,
    find_workload,
    parse,
    service_of_host,
)
from mesh.cli.output import NotFound
from mesh.errors import ConfigError

DUMPS = {
    "node1": {
        "workloads": [
            {
                "uid": "u1",
                "name": "web-7d9-a",
                "namespace": "shop",
                "workloadName": "web",
                "workloadIps": ["10.0.0.1"],
            },
            {
                "uid": "u0",
                "name": "agent",
                "namespace": "kube-system",
                "workloadIps": ["172.18.0.1"],
                "networkMode": "HostNetwork",
            },
        ],
        "services": [
            {
                "name": "web",
                "namespace": "shop",
                "hostname": "web.shop.svc.cluster.local",
                "ports": {"80": 8080},
            },
            {"name": "two", "namespace": "shop", "hostname": "two.x", "ports": {"1": 1, "2": 2}},
        ],
    },
    "node2": {
        "workloads": [
            {"uid": "u2", "name": "web", "namespace": "shop", "workloadIps": ["fd00::1"]},
        ]
    },
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pod/web-7d9.shop", Meant("pod", "web-7d9", "shop")),
        ("pod/a.b.shop:80", Meant("pod", "a.b", "shop", 80)),
        ("pod/web", Meant("pod", "web", "default")),
        ("shop/web:8080", Meant("pod", "web", "shop", 8080)),
        ("svc/web.shop", Meant("service", "web", "shop")),
        ("service/web.shop:80", Meant("service", "web", "shop", 80)),
        ("10.0.0.1", Meant("ip", "10.0.0.1")),
        ("10.0.0.1:443", Meant("ip", "10.0.0.1", port=443)),
        ("fd00::1", Meant("ip", "fd00::1")),
        ("[fd00:0::1]:80", Meant("ip", "fd00::1", port=80)),
        ("[fd00::1]", Meant("ip", "fd00::1")),
        ("Web.shop.svc.:80", Meant("host", "web.shop.svc", port=80)),
    ],
)
def test_forms(text: str, expected: Meant) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "shop/", "/web", "shop/web:", "web:0", "web:65536", "web:x", "a b", "svc/.shop"]
)
def test_what_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


def test_finding_workloads() -> None:
    assert find_workload(DUMPS, parse("shop/web"))["uid"] == "u2"  # a pod's own name first
    assert find_workload(DUMPS, parse("shop/web-7d9-a"))["uid"] == "u1"
    assert find_workload(DUMPS, parse("fd00::1"))["uid"] == "u2"
    owned = {"node1": DUMPS["node1"]}
    assert find_workload(owned, parse("shop/web"))["uid"] == "u1"
    with pytest.raises(NotFound) as caught:
        find_workload(DUMPS, parse("shop/cart"))
    assert caught.value.hint == "in shop: web, web-7d9-a"
    # A node's address is that of every pod on it, so of none.
    with pytest.raises(NotFound):
        find_workload(DUMPS, parse("172.18.0.1"))
    with pytest.raises(ConfigError):
        find_workload(DUMPS, parse("svc/web.shop"))


def test_finding_services_and_ports() -> None:
    web = find_service(DUMPS, parse("svc/web.shop"))
    assert choose_port(parse("svc/web.shop"), web) == 80
    assert choose_port(parse("svc/web.shop:81"), web) == 81
    two = find_service(DUMPS, parse("svc/two.shop"))
    with pytest.raises(ConfigError) as caught:
        choose_port(parse("svc/two.shop"), two)
    assert caught.value.hint == "its ports are 1, 2"
    with pytest.raises(NotFound) as missing:
        find_service(DUMPS, parse("svc/cart.shop"))
    assert missing.value.hint == "in shop: two, web"
    assert service_of_host(DUMPS, "web.shop") == web
    assert service_of_host(DUMPS, "elsewhere") is None
