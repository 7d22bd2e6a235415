"""Whatever the order of changes, the index holds what one built afresh would hold."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from istiod_lite import snapshot
from istiod_lite.index import ClusterIndex
from istiod_lite.workloads import TRAFFIC_DISTRIBUTION, Mesh
from mesh.cluster.api import Deleted, Put, ref_of
from mesh.xds.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE

NAMESPACES = st.sampled_from(["istio-system", "shop"])
APPS = st.sampled_from(["a", "b"])
NODES = st.sampled_from(["n1", "n2"])
SELECTORS = st.none() | st.just({}) | APPS.map(lambda app: {"matchLabels": {"app": app}})
MODES = st.sampled_from(["UNSET", "DISABLE", "PERMISSIVE", "STRICT"])
SECURITY = "security.istio.io/v1"
GATEWAY_API = "gateway.networking.k8s.io/v1"
USE, FROM = "istio.io/use-waypoint", "istio.io/use-waypoint-namespace"
PARTS = st.sampled_from([{}, {}, {"gateway.networking.k8s.io/gateway-name": "x"}])
TRUTH = st.sampled_from(["True", "False"])


def _object(kind: str, version: str, namespace: str, name: str, **fields) -> dict:
    metadata = {"name": name, "namespace": namespace, **fields.pop("metadata", {})}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **fields}


@st.composite
def objects(draw) -> dict:
    namespace, name = draw(NAMESPACES), draw(st.sampled_from(["x", "y"]))
    kind = draw(
        st.sampled_from(
            [
                "Pod",
                "Service",
                "Node",
                "Namespace",
                "EndpointSlice",
                "Authorization",
                "Peer",
                "Gateway",
                "Route",
                "Attached",
                "Grant",
                "ServiceEntry",
                "WorkloadEntry",
            ]
        )
    )
    use = draw(st.sampled_from([{}, {}, {USE: "x"}, {USE: "none"}, {USE: "y", FROM: "shop"}]))
    match kind:
        case "Pod":
            return _object(
                "Pod",
                "v1",
                namespace,
                name,
                metadata={"labels": {"app": draw(APPS), **use, **draw(PARTS)}},
                spec={
                    "serviceAccountName": draw(st.sampled_from(["x", "y"])),
                    "nodeName": draw(NODES),
                    "containers": [{"ports": [{"name": draw(APPS), "containerPort": 80}]}],
                },
                status={
                    "podIP": draw(st.sampled_from(["", "10.0.0.1"])),
                    "conditions": [{"type": "Ready", "status": draw(TRUTH)}],
                },
            )
        case "Service":
            selector = draw(st.none() | APPS.map(lambda app: {"app": app}))
            port = {"port": 80, "targetPort": draw(st.just(8080) | APPS)}
            spec = {"selector": selector, "ports": [port]}
            return _object("Service", "v1", namespace, name, metadata={"labels": use}, spec=spec)
        case "Node":
            zone = draw(st.sampled_from(["", "z"]))
            labels = {"topology.kubernetes.io/zone": zone}
            return _object("Node", "v1", "", draw(NODES), metadata={"labels": labels})
        case "Namespace":
            value = draw(st.sampled_from(["", "PreferClose"]))
            annotations = {TRAFFIC_DISTRIBUTION: value}
            metadata = {"annotations": annotations, "labels": use}
            return _object("Namespace", "v1", "", namespace, metadata=metadata)
        case "Gateway":
            allowed = {"namespaces": {"from": draw(st.sampled_from(["Same", "All"]))}}
            listener = {"name": "m", "port": 15008, "protocol": "HBONE", "allowedRoutes": allowed}
            spec = {"gatewayClassName": "istio-waypoint", "listeners": [listener]}
            labels = {"istio.io/waypoint-for": draw(st.sampled_from(["service", "all"]))}
            return _object(
                "Gateway", GATEWAY_API, namespace, name, metadata={"labels": labels}, spec=spec
            )
        case "Route":
            kind = draw(st.sampled_from(["HTTPRoute", "GRPCRoute"]))
            names = st.sampled_from(["x", "y"])
            parent = {"group": "", "kind": "Service", "name": draw(names)}
            parent["namespace"] = draw(NAMESPACES)
            backend = {"name": draw(names), "namespace": draw(NAMESPACES), "port": 80}
            spec = {"parentRefs": [parent], "rules": [{"backendRefs": [backend]}]}
            return _object(kind, GATEWAY_API, namespace, name, spec=spec)
        case "Grant":
            source = {"group": GATEWAY_API.split("/")[0], "kind": "HTTPRoute"}
            source["namespace"] = draw(NAMESPACES)
            spec = {"from": [source], "to": [{"group": "", "kind": "Service"}]}
            return _object("ReferenceGrant", GATEWAY_API, namespace, name, spec=spec)
        case "ServiceEntry":
            hosts = draw(st.sampled_from([["h"], ["h", "i"], ["x.shop.svc.cluster.local"]]))
            spec = {"hosts": hosts, "ports": [{"number": 80, "name": "p"}]}
            spec["resolution"] = draw(st.sampled_from(["NONE", "DNS"]))
            if draw(st.booleans()):
                spec["workloadSelector"] = {"labels": {"app": draw(APPS)}}
            elif draw(st.booleans()):
                spec |= {"resolution": "STATIC", "endpoints": [{"address": "10.5.0.1"}]}
            return _object(
                kind,
                "networking.istio.io/v1",
                namespace,
                name,
                metadata={"labels": use},
                spec=spec,
            )
        case "WorkloadEntry":
            spec = {"address": "10.5.0.2", "labels": {"app": draw(APPS)}, "ports": {"p": 81}}
            return _object(kind, "networking.istio.io/v1", namespace, name, spec=spec)
        case "Attached":
            kinds = st.sampled_from(["Service", "Gateway", "HTTPRoute", "GatewayClass"])
            target = {"kind": draw(kinds), "name": draw(st.sampled_from(["x", "istio-waypoint"]))}
            if target["kind"] != "Service":
                target["group"] = GATEWAY_API.split("/")[0]
            rules = [{"limit": {"requests": 1, "window": "1s"}}]
            spec = {"targetRefs": [target], "rules": rules}
            if draw(st.booleans()):
                return _object(
                    "AuthorizationPolicy", SECURITY, namespace, name, spec={"targetRefs": [target]}
                )
            return _object("RateLimitPolicy", "ambit.dev/v1alpha1", namespace, name, spec=spec)
        case "EndpointSlice":
            labels = {"kubernetes.io/service-name": draw(st.sampled_from(["x", "y"]))}
            ips = draw(st.sets(st.sampled_from(["10.1.0.1", "10.1.0.2"])))
            return _object(
                "EndpointSlice",
                "discovery.k8s.io/v1",
                namespace,
                name,
                metadata={"labels": labels},
                ports=[{"port": 1}],
                endpoints=[{"addresses": [ip], "nodeName": draw(NODES)} for ip in sorted(ips)],
            )
        case "Authorization":
            spec = {"selector": draw(SELECTORS), "rules": draw(st.sampled_from([[], [{}]]))}
            return _object("AuthorizationPolicy", SECURITY, namespace, name, spec=spec)
        case _:
            spec = {"selector": draw(SELECTORS), "mtls": {"mode": draw(MODES)}}
            if spec["selector"]:
                spec["portLevelMtls"] = {"80": {"mode": draw(MODES)}}
            return _object("PeerAuthentication", SECURITY, namespace, name, spec=spec)


def advanced(index: ClusterIndex, before: snapshot.Snapshot) -> snapshot.Snapshot:
    """The next publication, which is as if everything had been looked at."""
    configs = index.traffic.configs
    addresses, policies = index.take_touched()
    touched = {ADDRESS_TYPE: addresses, AUTHORIZATION_TYPE: policies}
    new, deltas = snapshot.advance(before, index.addresses, index.policies, configs, touched)
    whole = snapshot.build(index.addresses, index.policies, before, configs)
    assert new == whole
    assert deltas == snapshot.diff(before, whole)
    return new


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(objects(), st.booleans(), st.booleans()), max_size=40))
def test_incremental_is_from_scratch(steps):
    index = ClusterIndex(Mesh())
    alive: dict = {}
    published = snapshot.Snapshot()
    for obj, is_deleted, settles in steps:
        ref = ref_of(obj)
        if is_deleted:
            index.receive(Deleted(ref))
            alive.pop(ref, None)
        else:
            index.receive(Put(ref, obj))
            alive[ref] = obj
        if settles:
            index.settle()
            published = advanced(index, published)
    index.settle()
    published = advanced(index, published)
    afresh = ClusterIndex(Mesh())
    for ref, obj in alive.items():
        afresh.receive(Put(ref, obj))
    afresh.settle()
    assert index.addresses == afresh.addresses
    assert index.policies == afresh.policies
    assert index.traffic.configs == afresh.traffic.configs
    assert index.traffic.bindings == afresh.traffic.bindings
    assert index.traffic.outcomes == afresh.traffic.outcomes
    for node in ("n1", "n2"):
        assert {pod.ref for pod in index.pods_on_node(node)} == {
            pod.ref for pod in afresh.pods_on_node(node)
        }
    # Every policy that a workload names exists.
    for each in index.addresses.values():
        assert set(getattr(each, "authorization_policies", ())) <= index.policies.keys()
