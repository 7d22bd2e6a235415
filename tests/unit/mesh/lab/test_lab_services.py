"""Cluster IPs, address families and endpoints, as the API server would have it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from mesh.cluster.fields import Reader
from mesh.cluster.objects import parse_endpoint_slice
from mesh.errors import ConfigError
from mesh.lab.podspec import PodSpec, parse_pod_spec
from mesh.lab.services import (
    Backend,
    ClusterIps,
    Endpoint,
    ServicePlan,
    endpoints_of,
    plan_service,
    written_endpoints,
)

NOBODY = ClusterIps({})


def service(name: str = "web", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}], **spec},
    }


def made(**spec: Any) -> ServicePlan:
    return plan_service(service(**spec), None, NOBODY)[0]


@pytest.mark.parametrize(
    ("spec", "families", "ips"),
    [
        ({}, ("IPv4",), ("10.96.1.1",)),
        ({"ipFamilies": ["IPv6"]}, ("IPv6",), ("fd00:10:96::101",)),
        (
            {"ipFamilyPolicy": "PreferDualStack"},
            ("IPv4", "IPv6"),
            ("10.96.1.1", "fd00:10:96::101"),
        ),
        (
            {"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]},
            ("IPv6", "IPv4"),
            ("fd00:10:96::101", "10.96.1.1"),
        ),
        (
            {"ipFamilies": ["IPv4", "IPv6"]},
            ("IPv4", "IPv6"),
            ("10.96.1.1", "fd00:10:96::101"),
        ),
        ({"clusterIP": "10.96.0.99"}, ("IPv4",), ("10.96.0.99",)),
        ({"clusterIP": "fd00:10:96::99"}, ("IPv6",), ("fd00:10:96::99",)),
        (
            {"clusterIP": "10.96.0.99", "ipFamilyPolicy": "PreferDualStack"},
            ("IPv4", "IPv6"),
            ("10.96.0.99", "fd00:10:96::63"),
        ),
        ({"clusterIP": "None"}, ("IPv4",), ()),
        ({"clusterIP": "None", "selector": None}, ("IPv4", "IPv6"), ()),
    ],
)
def test_families_and_addresses(
    spec: dict[str, Any], families: tuple[str, ...], ips: tuple[str, ...]
) -> None:
    plan = made(**spec)
    assert (plan.families, plan.cluster_ips) == (families, ips)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4", "IPv6"]}, "spec.ipFamilyPolicy"),
        ({"ipFamilies": ["IPv4", "IPv4"]}, "spec.ipFamilies"),
        ({"ipFamilies": ["IPv6"], "clusterIP": "10.96.0.99"}, "spec.ipFamilies"),
        ({"clusterIP": "10.97.0.1"}, "spec.clusterIP"),
        ({"clusterIP": "10.96.0.10"}, "spec.clusterIP"),
        ({"ports": []}, "spec.ports"),
        ({"type": "ExternalName"}, "spec.externalName"),
    ],
)
def test_refusals_name_the_field(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(**spec)
    assert caught.value.field == field


def test_addresses_stay_and_are_not_shared() -> None:
    first, held = plan_service(service("a"), None, NOBODY)
    second, held = plan_service(service("b"), None, held)
    assert (first.cluster_ips, second.cluster_ips) == (("10.96.1.1",), ("10.96.1.2",))
    again, _ = plan_service(service("a", ipFamilyPolicy="PreferDualStack"), first, held)
    assert again.cluster_ips == ("10.96.1.1", "fd00:10:96::101")
    with pytest.raises(ConfigError, match="belongs to Service shop/a"):
        plan_service(service("c", clusterIP="10.96.1.1"), None, held)


def test_the_live_spec_gets_what_the_api_server_fills_in() -> None:
    assert made(ipFamilies=["IPv6"]).spec_patch() == {
        "clusterIP": "fd00:10:96::101",
        "clusterIPs": ["fd00:10:96::101"],
        "ipFamilies": ["IPv6"],
        "ipFamilyPolicy": "SingleStack",
    }
    assert made(clusterIP="None").spec_patch()["clusterIPs"] == ["None"]


def pod_spec(text: str) -> PodSpec:
    return parse_pod_spec(Reader(yaml.safe_load(text)))


WEB = pod_spec("""
hostname: zero
subdomain: web
containers:
  - {name: a, command: [a], ports: [{name: http, containerPort: 8080}]}
  - {name: b, command: [b], ports: [{name: echo, containerPort: 9000}]}
""")


def backend(name: str, **changes: Any) -> Backend:
    standard: dict[str, Any] = {
        "namespace": "shop",
        "name": name,
        "labels": {"app": "web", "version": "v1"},
        "ips": ("10.244.1.10", "fd00:10:244:1::a"),
        "spec": WEB,
        "is_ready": True,
    }
    return Backend(**{**standard, **changes})


def test_endpoints_have_the_services_families_and_the_pods_ports() -> None:
    plan = made(
        ports=[
            {"name": "http", "port": 80, "targetPort": "http"},
            {"name": "echo", "port": 9000, "targetPort": "echo"},
            {"name": "none", "port": 1, "targetPort": "absent"},
        ]
    )
    assert endpoints_of(plan, [backend("web-0")]) == (
        Endpoint(("shop", "web-0"), ("10.244.1.10",), {80: 8080, 9000: 9000}, True, "zero", "web"),
    )
    six = made(ipFamilies=["IPv6"])
    assert [e.ips for e in endpoints_of(six, [backend("web-0")])] == [("fd00:10:244:1::a",)]


def test_endpoints_are_the_selected_pods_of_the_namespace() -> None:
    pods = [
        backend("b"),
        backend("a", is_ready=False),
        backend("other", labels={"app": "other"}),
        backend("foreign", namespace="else"),
        backend("leaving", is_terminating=True),
    ]
    found = endpoints_of(made(), pods)
    assert [(endpoint.pod[1], endpoint.is_ready) for endpoint in found] == [
        ("a", False),
        ("b", True),
    ]
    published = endpoints_of(made(publishNotReadyAddresses=True), pods)
    assert [endpoint.is_ready for endpoint in published] == [True, True]
    assert endpoints_of(made(selector=None), pods) == ()


def test_endpoints_that_a_slice_writes_down() -> None:
    plan = plan_service(
        service(ports=[{"name": "a", "port": 80}, {"name": "b", "port": 81}]), None, NOBODY
    )[0]
    written = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "by-hand",
            "namespace": "shop",
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "a", "port": 8080}],
        "endpoints": [
            {"addresses": ["192.0.2.1"], "hostname": "one", "nodeName": "node1"},
            {"addresses": ["192.0.2.2"], "conditions": {"ready": False}},
            {"addresses": ["192.0.2.3"], "conditions": {"ready": True, "terminating": True}},
        ],
    }
    found = written_endpoints(plan, [parse_endpoint_slice(written)])
    assert [(e.ips, e.is_ready) for e in found] == [
        (("192.0.2.1",), True),
        (("192.0.2.2",), False),
        (("192.0.2.3",), False),
    ]
    assert found[0] == Endpoint(
        ("shop", "by-hand"), ("192.0.2.1",), {80: 8080}, True, "one", "web", "node1"
    )
    other = {**written, "metadata": {**written["metadata"], "labels": {}}}  # type: ignore[dict-item]
    assert written_endpoints(plan, [parse_endpoint_slice(other)]) == ()
    six = {**written, "addressType": "IPv6", "endpoints": [{"addresses": ["2001:db8::1"]}]}
    assert written_endpoints(plan, [parse_endpoint_slice(six)]) == ()
