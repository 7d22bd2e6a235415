"""Pods, services, nodes, slices -> workloads and services, as Istio derives them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from istiod_lite.workloads import (
    TRAFFIC_DISTRIBUTION,
    Mesh,
    mesh_service,
    pod_workload,
    slice_workloads,
    workload_name,
)
from mesh.cluster.api import Ref
from mesh.cluster.objects import (
    ContainerPort,
    EndpointSlice,
    Namespace,
    Node,
    Owner,
    Pod,
    Service,
    ServicePort,
    SliceEndpoint,
)
from mesh.model import service as model
from mesh.model.workload import (
    Locality,
    NetworkAddress,
    NetworkMode,
    TunnelProtocol,
    Workload,
    WorkloadStatus,
)

MESH = Mesh()
POD = Pod(
    ref=Ref("Pod", "shop", "web-1"),
    labels={"app": "web"},
    annotations={"ambient.istio.io/redirection": "enabled"},
    node="n1",
    service_account="web",
    phase="Running",
    is_ready=True,
    addresses=("10.0.0.1", "fd00::1"),
    ports=(ContainerPort(8080, "http"), ContainerPort(5353, "dns", "UDP")),
)
WEB = Service(
    ref=Ref("Service", "shop", "web"),
    cluster_ips=("10.96.0.1", "fd00:10:96::1"),
    selector={"app": "web"},
    ports=(ServicePort(80, "http", "http"), ServicePort(81, 9090, "raw")),
    ip_families=("IPv4", "IPv6"),
)
NODE = Node(
    ref=Ref("Node", "", "n1"),
    labels={
        "topology.kubernetes.io/region": "r",
        "topology.kubernetes.io/zone": "z",
        "topology.istio.io/subzone": "s",
    },
)


def derived(pod: Pod = POD, *services: Service, node: Node | None = NODE) -> Workload:
    found = pod_workload(MESH, pod, services, node, ("shop/p",))
    assert found is not None
    return found


def test_a_whole_workload():
    assert derived(POD, WEB) == Workload(
        uid="Kubernetes//Pod/shop/web-1",
        name="web-1",
        namespace="shop",
        addresses=("10.0.0.1", "fd00::1"),
        tunnel_protocol=TunnelProtocol.HBONE,
        trust_domain="cluster.local",
        service_account="web",
        node="n1",
        canonical_name="web",
        canonical_revision="latest",
        workload_name="web-1",
        authorization_policies=("shop/p",),
        services={"shop/web.shop.svc.cluster.local": {80: 8080, 81: 9090}},
        locality=Locality("r", "z", "s"),
    )


@pytest.mark.parametrize("state", [{"phase": "Succeeded"}, {"phase": "Failed"}, {"addresses": ()}])
def test_no_workload(state):
    assert pod_workload(MESH, replace(POD, **state), (), NODE) is None


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ({}, WorkloadStatus.HEALTHY),
        ({"is_ready": False}, WorkloadStatus.UNHEALTHY),
        ({"is_terminating": True}, WorkloadStatus.UNHEALTHY),
        ({"phase": "Pending", "is_ready": False}, WorkloadStatus.UNHEALTHY),
    ],
)
def test_health(state, status):
    assert derived(replace(POD, **state)).status is status


@pytest.mark.parametrize("value", ["pending", "disabled", "Enabled", "true", ""])
def test_only_the_node_agents_word_opens_the_tunnel(value):
    pod = replace(POD, annotations={"ambient.istio.io/redirection": value})
    assert derived(pod).tunnel_protocol is TunnelProtocol.NONE
    assert derived(replace(POD, annotations={})).tunnel_protocol is TunnelProtocol.NONE


def test_host_network():
    assert derived(replace(POD, host_network=True)).network_mode is NetworkMode.HOST_NETWORK


def test_an_unknown_node_has_no_locality():
    assert derived(node=None).locality == Locality()


@pytest.mark.parametrize(
    ("services", "ports"),
    [
        ([replace(WEB, selector={"app": "other"})], None),
        ([replace(WEB, selector={})], None),
        ([replace(WEB, type="ExternalName")], None),
        ([replace(WEB, ports=(ServicePort(80, "nosuch"), ServicePort(81, 1)))], {81: 1}),
        ([replace(WEB, ports=(ServicePort(53, "dns", protocol="UDP"),))], {}),
        # The name must be that of a port of the same protocol.
        ([replace(WEB, ports=(ServicePort(53, "dns", protocol="TCP"),))], {}),
        ([replace(WEB, cluster_ips=(), is_headless=True)], {80: 8080, 81: 9090}),
    ],
)
def test_services_of_a_pod(services, ports):
    expected = {} if ports is None else {"shop/web.shop.svc.cluster.local": ports}
    assert derived(POD, *services).services == expected


@pytest.mark.parametrize(
    ("owner", "labels", "name"),
    [
        (None, {}, "web-1"),
        (Owner("ReplicaSet", "web-abc12"), {"pod-template-hash": "abc12"}, "web"),
        (Owner("ReplicaSet", "web-abc12"), {"rollouts-pod-template-hash": "abc12"}, "web"),
        (Owner("ReplicaSet", "web-abc12"), {"pod-template-hash": "other"}, "web-abc12"),
        (Owner("ReplicaSet", "web"), {}, "web"),
        (Owner("ReplicationController", "web-3"), {"deploymentconfig": "web"}, "web"),
        (Owner("ReplicationController", "web-3"), {}, "web-3"),
        (Owner("Job", "tidy-28391234"), {}, "tidy"),
        (Owner("Job", "tidy-1"), {}, "tidy-1"),
        (Owner("StatefulSet", "db"), {}, "db"),
        (Owner("StatefulSet", "db"), {"service.istio.io/workload-name": "named"}, "named"),
    ],
)
def test_workload_names(owner, labels, name):
    assert workload_name(replace(POD, owner=owner, labels=labels)) == name


@pytest.mark.parametrize(
    ("labels", "name", "revision"),
    [
        ({}, "web-1", "latest"),
        ({"app": "a", "version": "v"}, "a", "v"),
        (
            {"app": "a", "app.kubernetes.io/name": "n", "app.kubernetes.io/version": "w"},
            "n",
            "w",
        ),
        (
            {
                "app.kubernetes.io/name": "n",
                "service.istio.io/canonical-name": "c",
                "version": "v",
                "service.istio.io/canonical-revision": "r",
            },
            "c",
            "r",
        ),
    ],
)
def test_canonical_names(labels, name, revision):
    found = derived(replace(POD, labels=labels))
    assert (found.canonical_name, found.canonical_revision) == (name, revision)


def test_a_whole_service():
    assert mesh_service(MESH, WEB) == model.Service(
        name="web",
        namespace="shop",
        hostname="web.shop.svc.cluster.local",
        addresses=(NetworkAddress("", "10.96.0.1"), NetworkAddress("", "fd00:10:96::1")),
        ports={
            80: model.ServicePort(80, 0, model.AppProtocol.HTTP11),
            81: model.ServicePort(81, 9090),
        },
        ip_families=model.IpFamilies.DUAL,
        canonical=True,
    )


def test_services_that_are_none_or_have_no_address():
    assert mesh_service(MESH, replace(WEB, type="ExternalName")) is None
    headless = mesh_service(MESH, replace(WEB, cluster_ips=(), is_headless=True))
    assert headless is not None
    assert headless.addresses == ()
    assert set(headless.ports) == {80, 81}


def test_udp_ports_are_not_the_meshs():
    ports = (ServicePort(53, 5353, "tcp"), ServicePort(53, 1, "udp", "UDP"))
    found = mesh_service(MESH, replace(WEB, ports=ports))
    assert found is not None
    assert found.ports[53].target_port == 5353


FAILOVER = (model.Scope.NETWORK, model.Scope.REGION, model.Scope.ZONE)
NODE_LOCAL = model.LoadBalancing((model.Scope.NODE,), model.Mode.STRICT)


@pytest.mark.parametrize(
    ("state", "namespace", "balancing"),
    [
        ({}, {}, model.LoadBalancing()),
        ({"internal_traffic_policy": "Local"}, {}, NODE_LOCAL),
        (
            {"internal_traffic_policy": "Local", "traffic_distribution": "PreferClose"},
            {},
            NODE_LOCAL,
        ),
        (
            {"traffic_distribution": "PreferClose"},
            {},
            model.LoadBalancing(FAILOVER, model.Mode.FAILOVER),
        ),
        (
            {"traffic_distribution": "PreferSameZone"},
            {},
            model.LoadBalancing(FAILOVER, model.Mode.FAILOVER),
        ),
        (
            {"annotations": {TRAFFIC_DISTRIBUTION: "PreferSameNode"}},
            {},
            model.LoadBalancing(
                (*FAILOVER, model.Scope.SUBZONE, model.Scope.NODE), model.Mode.FAILOVER
            ),
        ),
        (
            {},
            {TRAFFIC_DISTRIBUTION: "PreferClose"},
            model.LoadBalancing(FAILOVER, model.Mode.FAILOVER),
        ),
        (
            {"annotations": {TRAFFIC_DISTRIBUTION: "Any"}},
            {TRAFFIC_DISTRIBUTION: "PreferClose"},
            model.LoadBalancing(),
        ),
        (
            {"publish_not_ready_addresses": True},
            {},
            model.LoadBalancing(health_policy=model.HealthPolicy.ALLOW_ALL),
        ),
        (
            {"publish_not_ready_addresses": True, "internal_traffic_policy": "Local"},
            {},
            replace(NODE_LOCAL, health_policy=model.HealthPolicy.ALLOW_ALL),
        ),
    ],
)
def test_load_balancing(state, namespace, balancing):
    home = Namespace(ref=Ref("Namespace", "", "shop"), annotations=namespace)
    found = mesh_service(MESH, replace(WEB, **state), home)
    assert found is not None
    assert found.load_balancing == balancing


@pytest.mark.parametrize(
    ("port", "protocol"),
    [
        (ServicePort(80, 80, "http"), model.AppProtocol.HTTP11),
        (ServicePort(80, 80, "http-web"), model.AppProtocol.HTTP11),
        (ServicePort(80, 80, "grpc-web"), model.AppProtocol.GRPC),
        (ServicePort(80, 80, "https"), model.AppProtocol.TLS),
        (ServicePort(80, 80, "HTTP2"), model.AppProtocol.HTTP2),
        (ServicePort(80, 80, "httpx"), model.AppProtocol.UNKNOWN),
        (ServicePort(80, 80), model.AppProtocol.UNKNOWN),
        (ServicePort(80, 80, "http", app_protocol="kubernetes.io/h2c"), model.AppProtocol.HTTP2),
        (ServicePort(80, 80, "http", app_protocol="example.com/x"), model.AppProtocol.UNKNOWN),
    ],
)
def test_app_protocols(port, protocol):
    found = mesh_service(MESH, replace(WEB, ports=(port,)))
    assert found is not None
    assert found.ports[80].app_protocol is protocol


@pytest.mark.parametrize(
    ("families", "found"),
    [
        ((), model.IpFamilies.AUTOMATIC),
        (("IPv4",), model.IpFamilies.IPV4_ONLY),
        (("IPv6",), model.IpFamilies.IPV6_ONLY),
        (("IPv6", "IPv4"), model.IpFamilies.DUAL),
    ],
)
def test_ip_families(families, found):
    service = mesh_service(MESH, replace(WEB, ip_families=families))
    assert service is not None
    assert service.ip_families is found


def test_endpoints_without_a_pod():
    endpoints = EndpointSlice(
        ref=Ref("EndpointSlice", "shop", "web-x"),
        service="web",
        ports={"http": 8000},
        endpoints=(
            SliceEndpoint(("10.9.0.1",), node="n1"),
            SliceEndpoint(("10.9.0.2",), is_ready=False, zone="far"),
            SliceEndpoint(("10.9.0.3",), target=Ref("Pod", "shop", "web-1")),
        ),
    )
    selectorless = replace(WEB, selector={})
    found = slice_workloads(MESH, endpoints, selectorless, {"n1": NODE}.get)
    uid = "Kubernetes/discovery.k8s.io/EndpointSlice/shop/web-x/"
    assert set(found) == {uid + "10.9.0.1", uid + "10.9.0.2"}
    first, second = found[uid + "10.9.0.1"], found[uid + "10.9.0.2"]
    assert first.network_mode is NetworkMode.HOST_NETWORK
    assert first.tunnel_protocol is TunnelProtocol.NONE
    assert first.services == {"shop/web.shop.svc.cluster.local": {80: 8000}}
    assert (first.node, first.locality) == ("n1", Locality("r", "z", "s"))
    assert (second.status, second.locality.zone) == (WorkloadStatus.UNHEALTHY, "far")
    assert slice_workloads(MESH, endpoints, None, {}.get) == {}
    external = replace(WEB, type="ExternalName")
    assert slice_workloads(MESH, endpoints, external, {}.get) == {}


def test_names_of_another_cluster():
    mesh = Mesh("c2", "td", "example.org", "net", "root")
    found = pod_workload(mesh, POD, [WEB], None)
    assert found is not None
    assert (found.uid, found.cluster_id, found.trust_domain, found.network) == (
        "c2//Pod/shop/web-1",
        "c2",
        "td",
        "net",
    )
    assert list(found.services) == ["shop/web.shop.svc.example.org"]
    service = mesh_service(mesh, WEB)
    assert service is not None
    assert service.addresses[0] == NetworkAddress("net", "10.96.0.1")
