"""The index: what each change touches, and nothing else; mistakes change nothing."""

from __future__ import annotations

import pytest

from istiod_lite import workloads
from istiod_lite.index import ClusterIndex
from istiod_lite.workloads import Mesh
from mesh.cluster.api import Deleted, Fault, Put, Ref, Source, Synced, ref_of
from mesh.errors import ConfigError
from mesh.model.authorization import Action, PolicyScope
from mesh.model.workload import TunnelProtocol

STRICT = "istio-system/istio_converted_static_strict"


def obj(kind: str, name: str, namespace: str = "shop", version: str = "v1", **fields) -> dict:
    metadata = {"name": name, "namespace": namespace, **fields.pop("metadata", {})}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **fields}


def pod(name: str, namespace: str = "shop", app: str = "web", node: str = "n1", **more) -> dict:
    return obj(
        "Pod",
        name,
        namespace,
        metadata={"labels": {"app": app}, "uid": f"uid-{name}", **more},
        spec={
            "nodeName": node,
            "containers": [{"ports": [{"name": "http", "containerPort": 8080}]}],
        },
        status={
            "phase": "Running",
            "podIPs": [{"ip": f"10.0.0.{len(name)}"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    )


def service(
    name: str, namespace: str = "shop", app: str | None = "web", port: object = "http"
) -> dict:
    spec = {"clusterIP": "10.96.0.1", "ports": [{"port": 80, "targetPort": port}]}
    if app:
        spec["selector"] = {"app": app}
    return obj("Service", name, namespace, spec=spec)


def policy(name: str, namespace: str = "shop", kind: str = "AuthorizationPolicy", **spec) -> dict:
    return obj(kind, name, namespace, "security.istio.io/v1", spec=spec)


class Driven:
    """An index, what it derived last, and how often it derived a workload."""

    def __init__(self, monkeypatch) -> None:
        self.index = ClusterIndex(Mesh())
        self.derived: list[str] = []
        original = workloads.pod_workload

        def counted(mesh, pod, *rest):
            self.derived.append(pod.name)
            return original(mesh, pod, *rest)

        monkeypatch.setattr(workloads, "pod_workload", counted)

    def put(self, *objects: dict) -> bool:
        self.derived.clear()
        for each in objects:
            self.index.receive(Put(ref_of(each), each, Source("live.json")))
        return self.index.settle()

    def delete(self, *refs: Ref) -> bool:
        self.derived.clear()
        for ref in refs:
            self.index.receive(Deleted(ref))
        return self.index.settle()

    def workload(self, name: str, namespace: str = "shop"):
        return self.index.addresses.get(f"Kubernetes//Pod/{namespace}/{name}")

    def messages(self) -> list[str]:
        return [str(each) for each in self.index.findings()]


@pytest.fixture
def driven(monkeypatch) -> Driven:
    return Driven(monkeypatch)


def test_a_pod_with_its_service_in_either_order(driven):
    assert driven.put(service("web"), pod("a"))
    first = driven.workload("a")
    assert first.services == {"shop/web.shop.svc.cluster.local": {80: 8080}}
    driven.delete(Ref("Service", "shop", "web"))
    assert driven.workload("a").services == {}
    driven.put(service("web"))
    assert driven.workload("a") == first


def test_equal_puts_change_nothing_and_keep_the_same_values(driven):
    driven.put(service("web"), pod("a"))
    before = dict(driven.index.addresses)
    assert not driven.put(service("web"), pod("a"))
    assert all(driven.index.addresses[key] is value for key, value in before.items())


def test_a_pod_touches_only_itself(driven):
    driven.put(pod("a"), pod("bb"), service("web"))
    captured = pod("a", annotations={"ambient.istio.io/redirection": "enabled"})
    assert driven.put(captured)
    assert driven.derived == ["a"]
    assert driven.workload("a").tunnel_protocol is TunnelProtocol.HBONE


def test_a_service_touches_what_it_selects_and_selected(driven):
    driven.put(
        pod("a"), pod("bb", app="db"), pod("ccc", app="x"), pod("dddd", "other"), service("web")
    )
    driven.put(service("web", app="db"))
    assert sorted(driven.derived) == ["a", "bb"]
    assert driven.workload("a").services == {}
    assert list(driven.workload("bb").services) == ["shop/web.shop.svc.cluster.local"]


def test_a_node_touches_the_pods_on_it_when_its_place_changes(driven):
    node = obj("Node", "n1", "", metadata={"labels": {"topology.kubernetes.io/zone": "z"}})
    driven.put(pod("a"), pod("bb", node="n2"))
    driven.put(node)
    assert driven.derived == ["a"]
    assert driven.workload("a").locality.zone == "z"
    node["metadata"]["labels"]["other"] = "x"
    driven.put(node)
    assert driven.derived == []
    driven.delete(Ref("Node", "", "n1"))
    assert driven.workload("a").locality.zone == ""


def test_a_namespace_touches_its_services_when_its_preference_changes(driven):
    driven.put(pod("a"), service("web"))
    key = "shop/web.shop.svc.cluster.local"
    assert driven.index.addresses[key].load_balancing.routing_preference == ()
    namespace = obj("Namespace", "shop", "", metadata={"labels": {"x": "y"}})
    assert not driven.put(namespace)
    namespace["metadata"]["annotations"] = {workloads.TRAFFIC_DISTRIBUTION: "PreferClose"}
    assert driven.put(namespace)
    assert driven.derived == []
    assert len(driven.index.addresses[key].load_balancing.routing_preference) == 3


def test_endpoint_slices_follow_their_service(driven):
    endpoints = obj(
        "EndpointSlice",
        "ext-1",
        version="discovery.k8s.io/v1",
        metadata={"labels": {"kubernetes.io/service-name": "ext"}},
        addressType="IPv4",
        ports=[{"port": 8080}],
        endpoints=[{"addresses": ["10.9.0.1"]}, {"addresses": ["10.9.0.2"]}],
    )
    uid = "Kubernetes/discovery.k8s.io/EndpointSlice/shop/ext-1/"
    driven.put(endpoints)
    assert driven.index.addresses == {}
    driven.put(service("ext", app=None, port=8080))
    assert driven.index.addresses[uid + "10.9.0.1"].services == {
        "shop/ext.shop.svc.cluster.local": {80: 8080}
    }
    endpoints["endpoints"].pop()
    driven.put(endpoints)
    assert uid + "10.9.0.2" not in driven.index.addresses
    driven.delete(Ref("Service", "shop", "ext"))
    assert driven.index.addresses == {}
    driven.put(service("ext", app=None, port=8080))
    driven.delete(Ref("EndpointSlice", "shop", "ext-1"))
    assert list(driven.index.addresses) == ["shop/ext.shop.svc.cluster.local"]


def test_a_policy_touches_the_workloads_that_start_or_stop_to_name_it(driven):
    driven.put(pod("a"), pod("bb", app="db"), pod("ccc", "other"))
    driven.put(policy("p", selector={"matchLabels": {"app": "web"}}, rules=[{}]))
    assert driven.derived == ["a"]
    assert driven.workload("a").authorization_policies == ("shop/p",)
    # What the policy says is its own matter.
    driven.put(policy("p", selector={"matchLabels": {"app": "web"}}, rules=[]))
    assert driven.derived == []
    driven.put(policy("p", selector={"matchLabels": {"app": "db"}}, rules=[]))
    assert sorted(driven.derived) == ["a", "bb"]
    driven.put(policy("p", rules=[]))
    assert driven.derived == ["bb"]
    assert driven.workload("bb").authorization_policies == ()
    assert driven.index.policies["shop/p"].scope is PolicyScope.NAMESPACE


def test_a_selecting_policy_of_the_root_namespace_reaches_all(driven):
    driven.put(pod("a"), pod("bb", "other"), pod("ccc", "other", app="db"))
    driven.put(policy("p", "istio-system", selector={"matchLabels": {"app": "web"}}))
    assert sorted(driven.derived) == ["a", "bb"]
    assert driven.workload("bb", "other").authorization_policies == ("istio-system/p",)
    driven.delete(Ref("AuthorizationPolicy", "istio-system", "p"))
    assert driven.workload("bb", "other").authorization_policies == ()
    assert driven.index.policies == {}


def test_peer_authentication_touches_its_reach(driven):
    driven.put(pod("a"), pod("bb", app="db"), pod("ccc", "other"))
    kind = "PeerAuthentication"
    driven.put(policy("pa", kind=kind, mtls={"mode": "STRICT"}))
    assert sorted(driven.derived) == ["a", "bb"]
    assert driven.workload("a").authorization_policies == (STRICT,)
    assert set(driven.index.policies) == {STRICT}
    driven.put(
        policy(
            "own",
            kind=kind,
            selector={"matchLabels": {"app": "db"}},
            portLevelMtls={"8080": {"mode": "PERMISSIVE"}},
        )
    )
    assert driven.derived == ["bb"]
    converted = "shop/converted_peer_authentication_own"
    assert driven.workload("bb").authorization_policies == (converted,)
    assert set(driven.index.policies) == {STRICT, converted}
    driven.put(policy("pa", "istio-system", kind=kind, mtls={"mode": "STRICT"}))
    assert len(driven.derived) == 3
    driven.delete(
        Ref(kind, "shop", "own"), Ref(kind, "shop", "pa"), Ref(kind, "istio-system", "pa")
    )
    assert driven.index.policies == {}
    assert driven.workload("bb").authorization_policies == ()


def test_a_pod_that_cannot_be_read_keeps_its_last_state(driven):
    driven.put(pod("a"))
    before = driven.workload("a")
    bad = pod("a")
    bad["status"]["podIPs"] = [{"ip": "nonsense"}]
    assert not driven.put(bad)
    assert driven.workload("a") is before
    (message,) = driven.messages()
    assert message.startswith("live.json: Pod shop/a: status.podIPs[0].ip: not an IP address")
    driven.put(pod("a"))
    assert driven.messages() == []
    driven.put(bad)
    driven.delete(Ref("Pod", "shop", "a"))
    assert (driven.workload("a"), driven.messages()) == (None, [])


def test_a_policy_that_cannot_be_read_keeps_its_last_state(driven):
    driven.put(policy("p", rules=[{}]))
    before = driven.index.policies["shop/p"]
    driven.put(policy("p", rulez=[{}]))
    assert driven.index.policies["shop/p"] is before
    assert "denied" not in driven.messages()[0]


@pytest.mark.parametrize(("action", "rules"), [("ALLOW", 0), ("DENY", 1)])
def test_a_policy_that_was_never_readable_denies(driven, action, rules):
    driven.put(pod("a"))
    bad = policy("p", action=action, selector={"matchLabels": {"app": "web"}}, rulez=[])
    driven.put(bad)
    found = driven.index.policies["shop/p"]
    assert (found.action, len(found.rules)) == (Action[action], rules)
    assert driven.workload("a").authorization_policies == ("shop/p",)
    assert "spec.rulez: unknown field; until it is repaired" in driven.messages()[0]
    driven.put(policy("p", action=action, rules=[]))
    assert driven.index.policies["shop/p"].scope is PolicyScope.NAMESPACE
    assert driven.workload("a").authorization_policies == ()
    driven.put(bad)
    driven.delete(Ref("AuthorizationPolicy", "shop", "p"))
    assert driven.index.policies == {}


def test_a_peer_authentication_that_was_never_readable_is_strict(driven):
    driven.put(pod("a"))
    driven.put(policy("pa", kind="PeerAuthentication", mtls={"mode": "permissive"}))
    assert driven.workload("a").authorization_policies == (STRICT,)
    driven.put(policy("pa", kind="PeerAuthentication", mtls={"mode": "PERMISSIVE"}))
    assert driven.workload("a").authorization_policies == ()


def test_findings_of_translation_come_and_go(driven):
    http = [{"to": [{"operation": {"methods": ["GET"]}}]}]
    driven.put(policy("p", rules=http))
    (message,) = driven.messages()
    assert message.startswith(
        "live.json: AuthorizationPolicy shop/p: spec.rules[0].to[0].operation"
    )
    driven.put(policy("p", rules=[{}]))
    assert driven.messages() == []


def test_faults_come_and_go_and_change_nothing_else(driven):
    driven.put(pod("a"))
    error = ConfigError("not YAML", file="f.yaml", line=3)
    driven.index.receive(Fault(error))
    driven.index.receive(Synced())
    assert not driven.index.settle()
    assert driven.messages() == ["f.yaml:3: not YAML"]
    assert driven.workload("a") is not None
    driven.index.receive(Fault(error, repaired=True))
    assert driven.messages() == []


def test_pods_for_the_node_rule(driven):
    driven.put(pod("a"), pod("bb", node="n2"), pod("ccc"))
    assert [each.name for each in driven.index.pods_on_node("n1")] == ["a", "ccc"]
    assert driven.index.pod("shop", "bb").uid == "uid-bb"
    driven.put(pod("a", node="n2"))
    driven.delete(Ref("Pod", "shop", "ccc"))
    assert list(driven.index.pods_on_node("n1")) == []
    assert [each.name for each in driven.index.pods_on_node("n2")] == ["bb", "a"]
    assert driven.index.pod("shop", "ccc") is None


def test_other_kinds_are_ignored(driven):
    assert not driven.put(obj("ConfigMap", "c", data={}))
    assert not driven.delete(Ref("ConfigMap", "shop", "c"))
