"""A tenant who may write anything into a namespace harms nobody else, and loosens nothing.

Good objects of every kind, with parts replaced by what does not belong there (other types, huge
values, nothing), applied and deleted in any order: the controller goes on, the resources of other
namespaces stay as they are, and a policy that cannot be read any more leaves the last one in force.
"""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from istiod_lite import snapshot, status
from istiod_lite.index import ClusterIndex
from istiod_lite.subscriptions import Share
from istiod_lite.workloads import Mesh
from mesh.cluster.api import Deleted, Put, Ref, ref_of
from mesh.cluster.inventory import PARSERS
from mesh.cluster.validate import Severity, check
from mesh.errors import ConfigError
from mesh.model.authorization import Authorization
from mesh.xds.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE
from tests.support import l7_samples
from tests.support.gateways import (
    GATEWAY_API,
    SECURITY,
    USE,
    authorization,
    gateway,
    namespace,
    obj,
    parent,
    pod,
    rate_limit,
    route,
    service,
    target,
    waypoint_pod,
)

EVIL = "evil"
NETWORKING = "networking.istio.io/v1"
RULE = {
    "from": [{"source": {"principals": ["a/b"], "notIpBlocks": ["10.0.0.0/8"]}}],
    "to": [{"operation": {"ports": ["80"], "methods": ["GET"], "paths": ["/a*"]}}],
    "when": [{"key": "source.namespace", "values": ["x"], "notValues": ["y"]}],
}
L4 = {"from": [{"source": {"namespaces": ["shop"]}}], "to": [{"operation": {"ports": ["8080"]}}]}
JWT = {"issuer": "i", "jwks": '{"keys": []}', "fromHeaders": [{"name": "a", "prefix": "b"}]}
MATCHES = [
    {
        "path": {"type": "PathPrefix", "value": "/a"},
        "headers": [{"name": "h", "value": "v", "type": "RegularExpression"}],
        "queryParams": [{"name": "q", "value": "v"}],
        "method": "GET",
    }
]
FILTERS = [
    {
        "type": "RequestHeaderModifier",
        "requestHeaderModifier": {"set": [{"name": "a", "value": "b"}]},
    },
    {
        "type": "URLRewrite",
        "urlRewrite": {"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"}},
    },
]
BACKENDS = [
    {"name": "web", "port": 80, "weight": 3},
    {"name": "web", "namespace": "shop", "port": 80},
]


def at(home: str) -> list[dict[str, Any]]:
    """One good object of each kind that a tenant may write."""
    bound = {USE: "wp"}
    rules = [
        {
            "matches": MATCHES,
            "filters": FILTERS,
            "backendRefs": BACKENDS,
            "timeouts": {"request": "1s"},
        }
    ]
    return [
        pod("a", home, ip="10.0.9.1"),
        waypoint_pod(home=home),
        service("web", home, labels=bound),
        service("wp", home, app="wp", ports={"mesh": 15008}),
        obj(
            "EndpointSlice",
            "s",
            home,
            "discovery.k8s.io/v1",
            metadata={"labels": {"kubernetes.io/service-name": "web"}},
            addressType="IPv4",
            ports=[{"name": "http", "port": 80}],
            endpoints=[
                {"addresses": ["10.0.9.2"], "nodeName": "n1", "conditions": {"ready": True}}
            ],
        ),
        obj(
            "ServiceEntry",
            "e",
            home,
            NETWORKING,
            spec={
                "hosts": ["x.example", "web.shop.svc.cluster.local"],
                "addresses": ["10.96.7.7"],
                "ports": [{"number": 80, "name": "p", "protocol": "HTTP"}],
                "resolution": "STATIC",
                "endpoints": [{"address": "10.5.0.1", "ports": {"p": 81}, "labels": {"a": "b"}}],
            },
        ),
        obj(
            "WorkloadEntry",
            "w",
            home,
            NETWORKING,
            spec={
                "address": "10.5.0.2",
                "labels": {"app": "web"},
                "ports": {"http": 81},
                "weight": 2,
            },
        ),
        obj(
            "DestinationRule",
            "d",
            home,
            NETWORKING,
            spec={
                "host": "web.shop.svc.cluster.local",
                "trafficPolicy": {
                    "outlierDetection": {"consecutive5xxErrors": 1},
                    "loadBalancer": {"simple": "RANDOM"},
                },
            },
        ),
        authorization("selected", home, refs=[], rules=[L4])
        | {"spec": {"action": "DENY", "rules": [L4]}},
        authorization("targeted", home, rules=[RULE]),
        obj(
            "PeerAuthentication",
            "p",
            home,
            SECURITY,
            spec={
                "selector": {"matchLabels": {"app": "web"}},
                "mtls": {"mode": "STRICT"},
                "portLevelMtls": {"80": {"mode": "PERMISSIVE"}},
            },
        ),
        obj(
            "RequestAuthentication",
            "j",
            home,
            SECURITY,
            spec={
                "targetRefs": [target()],
                "jwtRules": [JWT],
            },
        ),
        rate_limit("limits", home),
        *(
            obj(
                kind,
                f"l7-{number}",
                home,
                l7_samples.policy(kind, spec)["apiVersion"],
                spec=copy.deepcopy(spec),
            )
            for number, (kind, spec) in enumerate(l7_samples.ACCEPTED)
        ),
        gateway("wp", home),
        route("http", home, parents=[parent()], rules=rules),
        route("grpc", home, kind="GRPCRoute", rules=[{"backendRefs": BACKENDS}]),
        obj(
            "ReferenceGrant",
            "g",
            home,
            "gateway.networking.k8s.io/v1beta1",
            spec={
                "from": [
                    {"group": GATEWAY_API.split("/")[0], "kind": "HTTPRoute", "namespace": "shop"}
                ],
                "to": [{"group": "", "kind": "Service"}],
            },
        ),
    ]


OBJECTS = at(EVIL)
GARBAGE: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    65536,
    10**40,
    1.5,
    "",
    "0",
    "*",
    "x" * 5000,
    "\x00",
    "\ud7ff",
    "a/b/c",
    "10.0.0.0/33",
    "::ffff:10.0.0.1",
    "[0-9",
    "(a*)*b",
    "9999999h",
    [],
    {},
    [None],
    [[]],
    {"": None},
    {"a": {"b": []}},
    ["x"] * 300,
    [{}] * 50,
]


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(deep for key, each in inner for deep in paths(each, (*path, key)))]


# What names an object is not the tenant's to falsify: the API server sees to that.
_FIXED = {
    (),
    ("apiVersion",),
    ("kind",),
    ("metadata",),
    ("metadata", "name"),
    ("metadata", "namespace"),
}
PATHS = [[each for each in paths(obj) if each not in _FIXED] for obj in OBJECTS]


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    number = draw(st.integers(0, len(OBJECTS) - 1))
    found = copy.deepcopy(OBJECTS[number])
    for path in draw(st.lists(st.sampled_from(PATHS[number]), max_size=3)):
        holder: Any = found
        try:
            for step in path[:-1]:
                holder = holder[step]
            if draw(st.booleans()):
                holder[path[-1]] = copy.deepcopy(draw(st.sampled_from(GARBAGE)))
            else:
                del holder[path[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took it away
    return found


def honest() -> ClusterIndex:
    index = ClusterIndex(Mesh())
    for each in (namespace("shop", **{USE: "wp"}), namespace(EVIL), *at("shop")):
        index.receive(Put(ref_of(each), each))
    index.settle()
    return index


def of_others(index: ClusterIndex) -> dict[str, Any]:
    """Everything that is told of other namespaces."""
    models = [*index.addresses.items(), *index.policies.items(), *index.traffic.configs.items()]
    return {key: model for key, model in models if EVIL not in key.split("/")}


def everybody(_type_url: str, _names: object, _account: str = "") -> Share:
    return Share(1, 1)


BASE = of_others(honest())


def test_the_honest_are_told_of():
    kinds = {ref_of(each).kind for each in OBJECTS}
    assert kinds >= set(PARSERS) - {
        "Namespace",
        "Node",
        "ServiceAccount",
        "GatewayClass",
        "XMesh",
        "XBackendTrafficPolicy",
        "ConfigMap",
        "NetworkPolicy",
        "TCPRoute",
        "TLSRoute",
    }
    assert len(BASE) > 6
    index = honest()
    assert not [each for each in index.findings() if each.severity is Severity.ERROR]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(mutated(), st.booleans()), max_size=25))
def test_others_are_told_what_they_were(steps):
    index = honest()
    published = snapshot.Snapshot()
    for obj_, is_deleted in steps:
        ref = ref_of(obj_)
        index.receive(Deleted(ref) if is_deleted else Put(ref, obj_))
        index.settle()
        addresses, policies = index.take_touched()
        touched = {ADDRESS_TYPE: addresses, AUTHORIZATION_TYPE: policies}
        published, _ = snapshot.advance(
            published, index.addresses, index.policies, index.traffic.configs, touched
        )
    # (A route of his for his own calls to another's Service would stand there too; he has none.)
    assert of_others(index) == BASE
    assert status.statuses(index, everybody)
    check([(each, None) for each, _ in steps])
    for each in index.addresses.values():
        assert set(getattr(each, "authorization_policies", ())) <= index.policies.keys()


POLICIES = [
    number
    for number, each in enumerate(OBJECTS)
    if each["kind"] in ("AuthorizationPolicy", "PeerAuthentication")
]


@settings(max_examples=150, deadline=None)
@given(mutated())
@example(OBJECTS[POLICIES[0]])
def test_a_policy_that_breaks_leaves_the_last_one_in_force(broken):
    ref = ref_of(broken)
    good = next(each for each in OBJECTS if ref_of(each) == ref)
    index = honest()
    for each in OBJECTS:
        index.receive(Put(ref_of(each), each))
    index.settle()
    before = dict(index.policies), dict(index.traffic.configs)
    index.receive(Put(ref, broken))
    index.settle()
    try:
        PARSERS[ref.kind](broken)
    except ConfigError:
        assert (index.policies, index.traffic.configs) == before
        assert index.errors(ref)
    index.receive(Put(ref, good))
    index.settle()
    assert (index.policies, index.traffic.configs) == before


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(POLICIES), mutated())
def test_a_policy_that_was_never_readable_denies(number, broken):
    if ref_of(broken) != ref_of(OBJECTS[number]):
        broken = {**OBJECTS[number], "spec": broken.get("spec")}
    ref: Ref = ref_of(broken)
    try:
        PARSERS[ref.kind](broken)
    except ConfigError:
        pass
    else:
        return
    index = ClusterIndex(Mesh())
    index.receive(Put(ref, broken))
    index.settle()
    assert index.errors(ref)
    if ref.kind == "PeerAuthentication":
        assert index.policies
    elif not isinstance(broken.get("spec"), dict) or not broken["spec"].get("targetRefs"):
        (only,) = index.policies.values()
        assert isinstance(only, Authorization)
