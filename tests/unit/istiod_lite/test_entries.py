"""ServiceEntry and WorkloadEntry as the mesh knows them."""

from __future__ import annotations

import pytest

from istiod_lite import entries
from mesh.cluster.entries import parse_service_entry, parse_workload_entry
from mesh.errors import ConfigError
from mesh.model.service import AppProtocol, HealthPolicy, Mode
from mesh.model.workload import TunnelProtocol, WorkloadStatus
from tests.support.gateways import Held, obj, pod, service

VERSION = "networking.istio.io/v1"
PORT = {"number": 443, "name": "tls", "protocol": "TLS", "targetPort": 8443}


def service_entry(name: str = "out", created: str = "", **spec):
    spec = {"hosts": ["api.example"], "ports": [PORT], **spec}
    metadata = {"creationTimestamp": created} if created else {}
    return obj("ServiceEntry", name, "shop", VERSION, metadata=metadata, spec=spec)


def workload_entry(name: str = "vm", app: str = "vm", **spec):
    spec = {"address": "192.0.2.7", "labels": {"app": app}, **spec}
    return obj("WorkloadEntry", name, "shop", VERSION, spec=spec)


def uid(kind: str, name: str) -> str:
    return f"Kubernetes/networking.istio.io/{kind}/shop/{name}"


KEY = "shop/api.example"


def test_a_host_is_a_service():
    held = Held(service_entry(addresses=["198.51.100.1", "198.51.100.0/28"]))
    found = held.index.addresses[KEY]
    assert [str(each) for each in found.addresses] == ["/198.51.100.1"]
    assert [each.prefix for each in found.cidr_addresses] == ["198.51.100.0/28"]
    assert found.ports[443].app_protocol is AppProtocol.TLS
    assert (found.load_balancing.mode, found.load_balancing.health_policy) == (
        Mode.PASSTHROUGH, HealthPolicy.ALLOW_ALL,
    )  # fmt: skip
    assert not found.canonical
    held.delete("ServiceEntry", "out")
    assert held.index.addresses == {}


def test_endpoints_that_are_listed():
    endpoint = {"address": "192.0.2.1", "ports": {"tls": 9443}, "locality": "eu/a/1", "weight": 3}
    held = Held(service_entry(resolution="STATIC", endpoints=[endpoint]))
    found = held.index.addresses[f"{uid('ServiceEntry', 'out')}/192.0.2.1"]
    assert found.services == {KEY: {443: 9443}}
    assert (found.locality.zone, found.capacity, found.addresses) == ("a", 3, ("192.0.2.1",))
    assert found.tunnel_protocol is TunnelProtocol.NONE


def test_a_name_that_dns_resolves_is_its_own_endpoint():
    held = Held(service_entry(resolution="DNS"))
    found = held.index.addresses[f"{uid('ServiceEntry', 'out')}/api.example"]
    assert (found.hostname, found.addresses) == ("api.example", ())
    assert found.services == {KEY: {443: 8443}}


def test_a_selector_takes_pods_and_entries():
    held = Held(pod("a", app="vm"), workload_entry(ports={"tls": 1443}), service("web", app="vm"))
    held.put(service_entry(resolution="STATIC", workloadSelector={"labels": {"app": "vm"}}))
    assert held.workload("a").services[KEY] == {443: 8443}
    vm = held.index.addresses[uid("WorkloadEntry", "vm")]
    assert vm.services == {KEY: {443: 1443}, "shop/web.shop.svc.cluster.local": {80: 8080}}
    assert vm.status is WorkloadStatus.HEALTHY
    held.delete("ServiceEntry", "out")
    assert KEY not in held.workload("a").services
    assert KEY not in held.index.addresses[uid("WorkloadEntry", "vm")].services


def test_the_oldest_speaks_for_a_host():
    old = service_entry("z", "2026-01-01T00:00:00Z", addresses=["198.51.100.1"])
    new = service_entry("a", "2026-02-01T00:00:00Z")
    for order in ([old, new], [new, old]):
        held = Held(*order)
        assert held.index.addresses[KEY].name == "z"
        held.delete("ServiceEntry", "z")
        assert held.index.addresses[KEY].name == "a"
        held.delete("ServiceEntry", "a")
        assert held.index.addresses == {}


def test_a_kubernetes_service_keeps_its_name():
    held = Held(service_entry(hosts=["web.shop.svc.cluster.local", "b.example"]), service())
    assert held.service().canonical
    held.delete("ServiceEntry", "out")
    assert held.service().canonical
    assert "shop/b.example" not in held.index.addresses
    entry = parse_service_entry(service_entry(hosts=["web.shop.svc.cluster.local"]))
    assert entries.hosts_of(held.index.mesh, entry, []) == []


@pytest.mark.parametrize(
    "spec",
    [
        {"hosts": []},
        {"hosts": ["*.example"]},
        {"hosts": ["a b"]},
        {"addresses": ["198.51.100"]},
        {"resolution": "MAGIC"},
        {"resolution": "STATIC", "endpoints": [{"address": "a.example"}]},
        {"endpoints": [{"address": "192.0.2.1"}], "workloadSelector": {"labels": {}}},
        {"endpoints": [{}]},
        {"ports": [{"number": 0}]},
    ],
)
def test_service_entries_that_are_refused(spec):
    with pytest.raises(ConfigError):
        parse_service_entry(service_entry(**spec))


@pytest.mark.parametrize(
    "spec",
    [
        {"address": ""}, {"ports": {"a": 0}}, {"weight": -1}, {"address": "127.0.0.2"},
        {"address": "::1"}, {"address": "::ffff:127.0.0.1"}, {"address": "0.0.0.0"},
        {"address": "ff02::1"},
    ],
)  # fmt: skip
def test_workload_entries_that_are_refused(spec):
    with pytest.raises(ConfigError):
        parse_workload_entry(workload_entry(**spec))
