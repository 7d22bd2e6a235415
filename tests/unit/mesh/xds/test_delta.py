"""The delta client as transcripts: what each response makes it apply and answer."""

from __future__ import annotations

from google.protobuf.any_pb2 import Any as AnyMessage

from mesh.model.authorization import Action, Authorization, PolicyScope
from mesh.model.workload import Workload
from mesh.proto.discovery_pb2 import (
    DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
    Node,
    Resource,
)
from mesh.xds.delta import MAX_NACK_REASONS, Apply, DeltaClient, Ready, Rejected, Send
from mesh.xds.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE, encode, resource_name

NODE = Node(id="ztunnel~10.0.0.1~a.b~b.svc.cluster.local")
SLEEP = Workload(uid="Kubernetes//Pod/demo/sleep", name="sleep", namespace="demo")
HTTPBIN = Workload(uid="Kubernetes//Pod/demo/httpbin", name="httpbin", namespace="demo")
DENY = Authorization("deny", "demo", PolicyScope.NAMESPACE, Action.DENY)


def client(**kwargs: frozenset[str]) -> DeltaClient:
    machine = DeltaClient(NODE, [ADDRESS_TYPE, AUTHORIZATION_TYPE], **kwargs)
    machine.start()
    return machine


def entry(resource: Workload | Authorization, version: str = "1") -> Resource:
    return Resource(
        name=resource_name(resource), version=version, resource=AnyMessage(value=encode(resource))
    )


def broken(name: str) -> Resource:
    return Resource(name=name, version="9", resource=AnyMessage(value=b"\xff"))


def response(
    *resources: Resource, removed: tuple[str, ...] = (), type_url: str = ADDRESS_TYPE
) -> DeltaDiscoveryResponse:
    return DeltaDiscoveryResponse(
        type_url=type_url, nonce="n", resources=resources, removed_resources=removed
    )


def ack(type_url: str = ADDRESS_TYPE) -> Send:
    return Send(DeltaDiscoveryRequest(type_url=type_url, response_nonce="n"))


def test_a_stream_opens_with_one_wildcard_request_per_type() -> None:
    machine = DeltaClient(NODE, [ADDRESS_TYPE, AUTHORIZATION_TYPE])
    assert machine.start() == [
        Send(DeltaDiscoveryRequest(node=NODE, type_url=ADDRESS_TYPE)),
        Send(DeltaDiscoveryRequest(node=NODE, type_url=AUTHORIZATION_TYPE)),
    ]


def test_resources_are_applied_then_acknowledged_then_ready_once() -> None:
    machine = client()
    assert machine.receive(response(entry(SLEEP))) == [
        Apply(ADDRESS_TYPE, (SLEEP,), ()),
        ack(),
        Ready(ADDRESS_TYPE),
    ]
    assert machine.receive(response(entry(HTTPBIN), removed=(SLEEP.uid,))) == [
        Apply(ADDRESS_TYPE, (HTTPBIN,), (SLEEP.uid,)),
        ack(),
    ]
    assert machine.versions(ADDRESS_TYPE) == {HTTPBIN.uid: "1"}


def test_an_empty_response_makes_a_type_ready() -> None:
    assert client().receive(response(type_url=AUTHORIZATION_TYPE)) == [
        Apply(AUTHORIZATION_TYPE, (), ()),
        ack(AUTHORIZATION_TYPE),
        Ready(AUTHORIZATION_TYPE),
    ]


def test_a_bad_resource_is_refused_and_the_good_ones_are_applied() -> None:
    machine = client()
    applied, rejected, nack = machine.receive(response(entry(SLEEP), broken("x"), broken("y")))
    assert applied == Apply(ADDRESS_TYPE, (SLEEP,), ())
    assert rejected == Rejected(ADDRESS_TYPE, ("x: undecodable Address", "y: undecodable Address"))
    assert isinstance(nack, Send)
    assert nack.request.response_nonce == "n"
    assert nack.request.error_detail.message == "x: undecodable Address; y: undecodable Address"
    assert nack.request.error_detail.code != 0
    # Not ready before a response is accepted whole.
    assert machine.receive(response()) == [
        Apply(ADDRESS_TYPE, (), ()),
        ack(),
        Ready(ADDRESS_TYPE),
    ]


def test_of_a_refused_resource_the_previous_version_stays() -> None:
    machine = client()
    machine.receive(response(entry(SLEEP, "1")))
    machine.receive(response(broken(SLEEP.uid)))
    assert machine.versions(ADDRESS_TYPE) == {SLEEP.uid: "1"}


def test_a_resource_under_another_name_is_refused() -> None:
    """Removals go by name: what is held under the wrong one could never be removed."""
    wrong = Resource(name="other", version="1", resource=AnyMessage(value=encode(SLEEP)))
    machine = client()
    _, rejected, _ = machine.receive(response(wrong))
    assert isinstance(rejected, Rejected)
    assert SLEEP.uid in rejected.reasons[0]
    assert machine.versions(ADDRESS_TYPE) == {}


def test_a_type_that_was_not_asked_for_is_refused() -> None:
    rejected, nack = client().receive(response(type_url="type.googleapis.com/other"))
    assert isinstance(rejected, Rejected)
    assert isinstance(nack, Send)
    assert nack.request.type_url == "type.googleapis.com/other"


def test_a_nack_stays_small() -> None:
    commands = client().receive(response(*(broken(str(n)) for n in range(1000))))
    nack = commands[-1]
    assert isinstance(nack, Send)
    assert nack.request.error_detail.message.endswith(f"and {1000 - MAX_NACK_REASONS} more")


def test_the_next_stream_tells_the_versions_held() -> None:
    machine = client()
    machine.receive(response(entry(SLEEP, "s1"), entry(HTTPBIN, ""), broken("never")))
    machine.receive(response(entry(DENY, "d1"), type_url=AUTHORIZATION_TYPE))
    machine.stop()
    addresses, policies = machine.start()
    assert isinstance(addresses, Send)
    assert isinstance(policies, Send)
    held = dict(addresses.request.initial_resource_versions)
    assert held == {SLEEP.uid: "s1", HTTPBIN.uid: ""}
    assert dict(policies.request.initial_resource_versions) == {"demo/deny": "d1"}
    assert addresses.request.node == NODE


def test_a_resource_updated_and_removed_in_one_response_is_gone() -> None:
    machine = client()
    machine.receive(response(entry(SLEEP), removed=(SLEEP.uid,)))
    assert machine.versions(ADDRESS_TYPE) == {}


def test_an_on_demand_type_asks_for_nothing_until_told() -> None:
    machine = DeltaClient(NODE, [ADDRESS_TYPE], on_demand=frozenset({ADDRESS_TYPE}))
    opened = DeltaDiscoveryRequest(
        node=NODE,
        type_url=ADDRESS_TYPE,
        resource_names_subscribe=["*"],
        resource_names_unsubscribe=["*"],
    )
    assert machine.subscribe(ADDRESS_TYPE, ["/10.0.0.9"]) == []  # no stream yet
    opened.resource_names_subscribe.append("/10.0.0.9")
    assert machine.start() == [Send(opened)]
    key = DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, resource_names_subscribe=["/10.0.0.8"])
    assert machine.subscribe(ADDRESS_TYPE, ["/10.0.0.8", "/10.0.0.9"]) == [Send(key)]
    assert machine.subscribe(ADDRESS_TYPE, ["/10.0.0.8"]) == []
