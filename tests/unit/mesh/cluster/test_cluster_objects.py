"""Typed views of core objects, and the fields that impossible values are blamed on."""

from __future__ import annotations

import pytest

from mesh.cluster.api import Ref
from mesh.cluster.objects import (
    ContainerPort,
    Owner,
    ServicePort,
    SliceEndpoint,
    parse_endpoint_slice,
    parse_namespace,
    parse_node,
    parse_pod,
    parse_service,
    parse_service_account,
    text_of,
)
from mesh.errors import ConfigError


def pod(spec: object = None, status: object = None, **metadata: object) -> dict:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "namespace": "shop", **metadata},
        "spec": spec or {},
        "status": status or {},
    }


def service(**spec: object) -> dict:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "s", "namespace": "shop"},
        "spec": spec,
    }


def test_a_whole_pod():
    found = parse_pod(
        pod(
            {
                "nodeName": "n1",
                "serviceAccountName": "web",
                "hostname": "h",
                "subdomain": "d",
                "initContainers": [
                    {"ports": [{"containerPort": 1}]},
                    {"restartPolicy": "Always", "ports": [{"containerPort": 2}]},
                ],
                "containers": [
                    {"ports": [{"containerPort": 80, "name": "http"}]},
                    {"ports": [{"containerPort": 53, "name": "dns", "protocol": "UDP"}]},
                ],
            },
            {
                "phase": "Running",
                "podIP": "10.0.0.1",
                "podIPs": [{"ip": "10.0.0.1"}, {"ip": "FD00::1"}],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
            uid="u1",
            labels={"app": "web"},
            annotations={"ambient.istio.io/redirection": "enabled"},
            deletionTimestamp="2024-01-01T00:00:00Z",
            ownerReferences=[
                {"kind": "Other", "name": "o"},
                {
                    "apiVersion": "apps/v1",
                    "kind": "ReplicaSet",
                    "name": "web-1",
                    "controller": True,
                },
            ],
        )
    )
    assert found.ref == Ref("Pod", "shop", "p")
    assert (found.name, found.namespace, found.uid) == ("p", "shop", "u1")
    assert found.addresses == ("10.0.0.1", "fd00::1")
    assert (found.node, found.service_account) == ("n1", "web")
    assert (found.hostname, found.subdomain) == ("h", "d")
    assert found.ports == (
        ContainerPort(2),
        ContainerPort(80, "http"),
        ContainerPort(53, "dns", "UDP"),
    )
    assert found.owner == Owner("ReplicaSet", "web-1", "apps/v1")
    assert found.is_ready
    assert found.is_captured
    assert found.is_terminating
    assert not found.is_terminal


def test_a_pod_that_has_only_a_name():
    found = parse_pod({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}})
    assert found.ref == Ref("Pod", "default", "p")
    assert (found.service_account, found.phase, found.addresses) == ("default", "Pending", ())
    assert not found.is_ready
    assert not found.is_captured


@pytest.mark.parametrize("status", [{"podIP": "10.0.0.9"}, {"podIPs": [{"ip": "10.0.0.9"}]}])
def test_one_address(status):
    assert parse_pod(pod(status=status)).addresses == ("10.0.0.9",)


@pytest.mark.parametrize(
    ("obj", "says"),
    [
        (pod(status={"podIPs": [{"ip": "x"}]}), 'status.podIPs[0].ip: not an IP address: "x"'),
        (pod(status={"phase": "Great"}), 'status.phase: unknown value "Great"'),
        (
            pod({"containers": [{"ports": [{"containerPort": "80"}]}]}),
            'spec.containers[0].ports[0].containerPort: not a port: "80"',
        ),
        (
            pod({"containers": [{"ports": [{"containerPort": 80, "protocol": "tcp"}]}]}),
            'spec.containers[0].ports[0].protocol: unknown value "tcp"',
        ),
        (pod({"hostNetwork": "yes"}), 'spec.hostNetwork: expected true or false, not "yes"'),
        (pod(labels={"a": 1}), "metadata.labels.a: expected text, not 1"),
        (pod(labels={"a.b/c": 1}), 'metadata.labels["a.b/c"]: expected text, not 1'),
        (pod("x"), 'spec: expected a mapping, not "x"'),
    ],
)
def test_impossible_pods(obj, says):
    with pytest.raises(ConfigError) as caught:
        parse_pod(obj)
    assert str(caught.value) == says


def test_a_whole_service():
    found = parse_service(
        service(
            clusterIP="10.96.0.1",
            clusterIPs=["10.96.0.1", "fd00::1"],
            ipFamilies=["IPv4", "IPv6"],
            selector={"app": "web"},
            publishNotReadyAddresses=True,
            internalTrafficPolicy="Local",
            trafficDistribution="PreferClose",
            ports=[
                {"name": "http", "port": 80, "targetPort": "web", "appProtocol": "http2"},
                {"name": "raw", "port": 81},
                {"name": "dns", "port": 80, "protocol": "UDP", "targetPort": 5353},
            ],
        )
    )
    assert found.cluster_ips == ("10.96.0.1", "fd00::1")
    assert found.ports == (
        ServicePort(80, "web", "http", "TCP", "http2"),
        ServicePort(81, 81, "raw"),
        ServicePort(80, 5353, "dns", "UDP"),
    )
    assert found.ip_families == ("IPv4", "IPv6")
    assert found.publish_not_ready_addresses
    assert found.internal_traffic_policy == "Local"
    assert found.traffic_distribution == "PreferClose"
    assert not found.is_headless


@pytest.mark.parametrize(
    ("spec", "addresses", "headless"),
    [
        ({}, (), False),
        ({"clusterIP": "None"}, (), True),
        ({"clusterIPs": ["None"]}, (), True),
        ({"clusterIP": "10.96.0.2"}, ("10.96.0.2",), False),
        ({"type": "ExternalName", "externalName": "x.y", "clusterIP": "10.96.0.2"}, (), False),
    ],
)
def test_cluster_ips(spec, addresses, headless):
    found = parse_service(service(**spec))
    assert (found.cluster_ips, found.is_headless) == (addresses, headless)


def test_what_a_service_selects():
    selecting = parse_service(service(selector={"a": "1", "b": "2"}))
    assert selecting.selects({"a": "1", "b": "2", "c": "3"})
    assert not selecting.selects({"a": "1"})
    assert not parse_service(service()).selects({"a": "1"})


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"ports": [{"port": 0}]}, "spec.ports[0].port: not a port: 0"),
        ({"ports": [{}]}, "spec.ports[0].port: not a port: None"),
        (
            {"ports": [{"port": 80, "targetPort": "8080"}]},
            "spec.ports[0].targetPort: not the name of a port: '8080'",
        ),
        (
            {"ports": [{"port": 80, "targetPort": 70000}]},
            "spec.ports[0].targetPort: not a port: 70000",
        ),
        (
            {"ports": [{"port": 80}, {"port": 81}]},
            "spec.ports[0].name: missing: each of several ports needs a name",
        ),
        (
            {"ports": [{"port": 80, "name": "a"}, {"port": 80, "name": "b"}]},
            "spec.ports[1].port: port 80/TCP is listed twice",
        ),
        (
            {"ports": [{"port": 80, "name": "a"}, {"port": 81, "name": "a"}]},
            'spec.ports[1].name: port name "a" is used twice',
        ),
        ({"clusterIP": "10.96.0"}, 'spec.clusterIP: not an IP address: "10.96.0"'),
        ({"clusterIPs": ["None", "10.96.0.1"]}, 'spec.clusterIPs: "None" beside an address'),
        ({"ipFamilies": ["ipv4"]}, 'spec.ipFamilies[0]: unknown value "ipv4"'),
        (
            {"internalTrafficPolicy": "local"},
            'spec.internalTrafficPolicy: unknown value "local"',
        ),
        ({"selector": ["a"]}, "spec.selector: expected a mapping, not a list"),
    ],
)
def test_impossible_services(spec, says):
    with pytest.raises(ConfigError) as caught:
        parse_service(service(**spec))
    assert str(caught.value) == says


def test_an_endpoint_slice():
    found = parse_endpoint_slice(
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": "s-1",
                "namespace": "shop",
                "labels": {"kubernetes.io/service-name": "s"},
            },
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080}, {"name": "u", "port": 1, "protocol": "UDP"}],
            "endpoints": [
                {"addresses": ["10.1.0.1"], "nodeName": "n1", "zone": "z"},
                {
                    "addresses": ["10.1.0.2"],
                    "conditions": {"ready": False, "terminating": True},
                    "targetRef": {"kind": "Pod", "name": "p"},
                },
            ],
        }
    )
    assert (found.service, found.ports) == ("s", {"http": 8080})
    assert found.endpoints == (
        SliceEndpoint(("10.1.0.1",), node="n1", zone="z"),
        SliceEndpoint(
            ("10.1.0.2",), is_ready=False, is_terminating=True, target=Ref("Pod", "shop", "p")
        ),
    )


def test_the_small_ones():
    node = parse_node(
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": "n1", "labels": {"zone": "a"}},
            "status": {
                "addresses": [
                    {"type": "Hostname", "address": "n1"},
                    {"type": "InternalIP", "address": "172.18.0.1"},
                ]
            },
        }
    )
    assert (node.ref, node.addresses) == (Ref("Node", "", "n1"), ("172.18.0.1",))
    raw = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": None}}
    assert parse_namespace(raw).labels == {}
    raw = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "web"}}
    assert parse_service_account(raw).ref == Ref("ServiceAccount", "default", "web")


def test_text_of():
    assert text_of({"a": {"b": "c"}}, "a", "b") == "c"
    assert text_of({"a": {"b": 1}}, "a", "b") == ""
    assert text_of({"a": 1}, "a", "b") == ""
