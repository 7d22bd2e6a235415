"""One client's subscriptions as transcripts: what it is sent, when, and how little."""

from __future__ import annotations

from dataclasses import replace

import pytest

from istiod_lite.snapshot import Snapshot, build, diff
from istiod_lite.subscriptions import MAX_TYPES, ClientState, Holding, parse_node
from mesh.errors import RemoteProtocolError
from mesh.model.authorization import Action, Authorization, PolicyScope
from mesh.model.l7_policy import TrafficConfig
from mesh.model.service import Service
from mesh.model.workload import NetworkAddress, Workload
from mesh.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node
from mesh.xds.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE, TRAFFIC_TYPE, resource_name

NODE = Node(id="ztunnel~10.0.0.1~ztunnel-n1.istio-system~istio-system.svc.cluster.local")
NODE.metadata.update({"NAMESPACE": "istio-system", "NODE_NAME": "n1", "WORKERS": 2})
HOST = "a.demo.svc.cluster.local"
A = Workload(
    uid="K//Pod/demo/a",
    name="a",
    namespace="demo",
    addresses=("10.0.0.1",),
    node="n2",
    services={f"demo/{HOST}": {80: 80}},
)
B = Workload(uid="K//Pod/demo/b", name="b", namespace="demo", node="n2")
LOCAL = Workload(uid="K//Pod/demo/local", name="local", namespace="demo", node="n1")
SERVICE = Service("a", "demo", HOST, addresses=(NetworkAddress("", "10.96.0.1"),))
DENY = Authorization("deny", "demo", PolicyScope.NAMESPACE, Action.DENY)


def snapshot(*resources: Workload | Service | Authorization) -> Snapshot:
    policies = {r.key: r for r in resources if isinstance(r, Authorization)}
    addresses = {resource_name(r): r for r in resources if not isinstance(r, Authorization)}
    return build(addresses, policies)


class Session:
    """A client state with a controller that keeps pushing to it."""

    def __init__(self, *resources: Workload | Service | Authorization) -> None:
        self.current = snapshot(*resources)
        self.state = ClientState(self.current)

    def push(self, *resources: Workload | Service | Authorization) -> None:
        new = snapshot(*resources)
        self.state.offer(new, diff(self.current, new))
        self.current = new

    def open(self, type_url: str = ADDRESS_TYPE, **fields: object) -> None:
        self.state.receive(DeltaDiscoveryRequest(node=NODE, type_url=type_url, **fields))  # type: ignore[arg-type]

    def ask(self, *keys: str) -> None:
        self.state.receive(
            DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, resource_names_subscribe=keys)
        )

    def ack(self, response: DeltaDiscoveryResponse) -> None:
        self.state.receive(
            DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
        )

    def nack(self, response: DeltaDiscoveryResponse, why: str) -> None:
        request = DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
        request.error_detail.message = why
        self.state.receive(request)

    def one(self) -> DeltaDiscoveryResponse:
        (response,) = self.state.responses()
        return response

    def next(self) -> DeltaDiscoveryResponse:
        response = self.one()
        self.ack(response)
        return response


def names(response: DeltaDiscoveryResponse) -> list[str]:
    return [entry.name for entry in response.resources]


def test_a_new_client_gets_everything_workloads_first() -> None:
    session = Session(SERVICE, B, A)
    session.open()
    response = session.one()
    assert names(response) == [A.uid, B.uid, f"demo/{HOST}"]
    assert response.nonce
    assert not response.removed_resources
    assert response.control_plane.identifier


def test_nothing_to_say_is_said_once() -> None:
    session = Session()
    session.open(AUTHORIZATION_TYPE)
    response = session.next()
    assert response.type_url == AUTHORIZATION_TYPE
    assert names(response) == []
    session.push()
    assert session.state.responses() == []


def test_addresses_come_before_policies() -> None:
    session = Session(A, DENY)
    session.open(AUTHORIZATION_TYPE)
    session.open(ADDRESS_TYPE)
    assert [response.type_url for response in session.state.responses()] == [
        ADDRESS_TYPE,
        AUTHORIZATION_TYPE,
    ]


def test_nothing_is_answered_before_the_first_snapshot() -> None:
    """An early empty answer would tell a reconnecting client that everything is gone."""
    state = ClientState()
    state.receive(
        DeltaDiscoveryRequest(
            node=NODE, type_url=ADDRESS_TYPE, initial_resource_versions={A.uid: "x"}
        )
    )
    assert state.responses() == []
    state.offer(snapshot(B), diff(Snapshot(), snapshot(B)))
    (response,) = state.responses()
    assert names(response) == [B.uid]
    assert response.removed_resources == [A.uid]


def test_only_differences_follow() -> None:
    session = Session(A, B)
    session.open()
    session.next()
    session.push(replace(A, node="n3"), SERVICE)
    response = session.next()
    assert names(response) == [A.uid, f"demo/{HOST}"]
    assert response.removed_resources == [B.uid]
    assert session.state.responses() == []


def test_a_reconnecting_client_gets_only_what_differs() -> None:
    session = Session(A, B, SERVICE)
    current = session.current.of(ADDRESS_TYPE)
    held = {A.uid: current[A.uid].version, B.uid: "old", "K//Pod/demo/gone": "1"}
    session.open(initial_resource_versions=held)
    response = session.one()
    assert names(response) == [B.uid, f"demo/{HOST}"]
    assert response.removed_resources == ["K//Pod/demo/gone"]


def test_an_up_to_date_client_gets_an_empty_answer() -> None:
    session = Session(A)
    version = session.current.of(ADDRESS_TYPE)[A.uid].version
    session.open(initial_resource_versions={A.uid: version})
    response = session.one()
    assert (names(response), list(response.removed_resources)) == ([], [])


def test_one_response_in_flight_and_the_rest_coalesces() -> None:
    session = Session(A)
    session.open()
    first = session.one()
    for number in range(100):
        session.push(replace(A, node=str(number)), B)
        assert session.state.responses() == []
    session.ack(first)
    response = session.next()
    assert names(response) == [A.uid, B.uid]
    last = session.current.of(ADDRESS_TYPE)[A.uid].version
    assert response.resources[0].version == last


def test_what_came_and_went_while_a_client_was_stuck_is_never_told() -> None:
    session = Session(A)
    session.open()
    first = session.one()
    for number in range(1000):
        session.push(A, replace(B, uid=f"K//Pod/demo/{number}"))
    session.push(A)
    assert session.state.status()[ADDRESS_TYPE].pending == 0
    session.ack(first)
    assert session.state.responses() == []


def test_what_changed_and_changed_back_is_never_told() -> None:
    session = Session(A)
    session.open()
    first = session.one()
    session.push(replace(A, node="n9"))
    session.push(A)
    session.ack(first)
    assert session.state.responses() == []


def test_a_stale_nonce_acknowledges_nothing() -> None:
    session = Session(A)
    session.open()
    first = session.next()
    session.push(A, B)
    second = session.one()
    session.ack(first)
    session.push(A)
    assert session.state.responses() == []
    session.ack(second)
    assert session.one().removed_resources == [B.uid]


def test_a_nack_is_remembered_and_not_repeated() -> None:
    session = Session(A)
    session.open()
    session.nack(session.one(), "a: unknown Scope 0" + "x" * 10_000)
    status = session.state.status()[ADDRESS_TYPE]
    assert status.last_nack.startswith("a: unknown Scope 0")
    assert len(status.last_nack) < 5000
    assert (status.nacks, status.acked, status.in_flight) == (1, "", "")
    assert session.state.responses() == []
    session.push(replace(A, node="n7"))
    accepted = session.next()
    assert names(accepted) == [A.uid]
    assert session.state.status()[ADDRESS_TYPE].acked == accepted.nonce


def test_status_tells_versions() -> None:
    session = Session(A)
    session.open()
    session.next()
    version = session.current.of(ADDRESS_TYPE)[A.uid].version
    assert session.state.status()[ADDRESS_TYPE].versions == {A.uid: version}


def test_on_demand_begins_with_the_own_node_and_answers_keys() -> None:
    session = Session(A, B, LOCAL, SERVICE)
    session.open(resource_names_subscribe=["*"], resource_names_unsubscribe=["*"])
    assert names(session.next()) == [LOCAL.uid]
    session.ask("/10.96.0.1")
    response = session.next()
    assert names(response) == [A.uid, f"demo/{HOST}"]
    # The key is no resource's name: it is answered by being listed as removed.
    assert response.removed_resources == ["/10.96.0.1"]


def test_on_demand_an_unknown_key_is_answered_and_followed() -> None:
    session = Session()
    session.open(resource_names_subscribe=["*"], resource_names_unsubscribe=["*"])
    assert names(session.next()) == []
    session.ask(f"demo/{HOST}")
    assert session.next().removed_resources == [f"demo/{HOST}"]
    session.push(SERVICE, B)
    assert names(session.next()) == [f"demo/{HOST}"]
    session.push(SERVICE, A, B)
    assert names(session.next()) == [A.uid]
    session.push(SERVICE, B)
    assert session.next().removed_resources == [A.uid]


def test_on_demand_asking_again_sends_again() -> None:
    session = Session(A)
    session.open(resource_names_subscribe=["*", A.uid], resource_names_unsubscribe=["*"])
    assert names(session.next()) == [A.uid]
    session.ask(A.uid)
    assert names(session.next()) == [A.uid]
    assert session.state.responses() == []


def test_on_demand_what_is_no_longer_needed_is_removed() -> None:
    session = Session(A, SERVICE)
    session.open(resource_names_subscribe=["*", f"demo/{HOST}"], resource_names_unsubscribe=["*"])
    session.next()
    session.push(replace(A, services={}), SERVICE)
    assert session.next().removed_resources == [A.uid]


def test_a_type_nobody_serves_is_empty() -> None:
    session = Session(A)
    session.open("type.googleapis.com/istio.workload.Workload")
    assert names(session.one()) == []


def test_types_are_bounded() -> None:
    session = Session()
    for number in range(MAX_TYPES):
        session.open(str(number))
    with pytest.raises(RemoteProtocolError):
        session.open("one more")


def test_the_node_is_read() -> None:
    node = parse_node(NODE)
    assert (node.proxy_type, node.address, node.pod) == ("ztunnel", "10.0.0.1", "ztunnel-n1")
    assert (node.namespace, node.node_name) == ("istio-system", "n1")
    assert "WORKERS" not in node.metadata


@pytest.mark.parametrize(
    "node_id", ["", "ztunnel", "a~b~c", "ztunnel~no-ip~a.b~c", "a~1.1.1.1~b~c~d"]
)
def test_a_node_that_does_not_say_who_it_is_is_refused(node_id: str) -> None:
    with pytest.raises(RemoteProtocolError):
        ClientState().receive(DeltaDiscoveryRequest(node=Node(id=node_id), type_url=ADDRESS_TYPE))


def traffic(*configs: TrafficConfig) -> Snapshot:
    return build({}, {}, None, {each.key: each for each in configs})


def told(state: ClientState) -> set[str]:
    found: set[str] = set()
    for response in state.responses():
        found |= {each.name for each in response.resources}
        state.receive(
            DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
        )
    return found


def test_a_waypoint_is_told_its_own_traffic_and_nobody_elses():
    own, other = TrafficConfig("shop/wp", "shop/a"), TrafficConfig("shop/wp2", "shop/a")
    first = traffic(own, other)
    states = {who: ClientState(first, who) for who in ("shop/wp", "shop/wp2", "shop/pod", None)}
    opening = DeltaDiscoveryRequest(node=NODE, type_url=TRAFFIC_TYPE)
    for state in states.values():
        state.receive(opening)
    assert {who: told(state) for who, state in states.items()} == {
        "shop/wp": {own.key},
        "shop/wp2": {other.key},
        "shop/pod": set(),
        None: {own.key, other.key},
    }
    second = traffic(replace(own, explains_denials=True), replace(other, explains_denials=True))
    for state in states.values():
        state.offer(second, diff(first, second))
    assert told(states["shop/wp"]) == {own.key}
    assert told(states["shop/pod"]) == set()


def test_asking_by_name_gets_nobody_anothers_traffic():
    other = TrafficConfig("shop/wp2", "shop/a")
    state = ClientState(traffic(other), "shop/wp")
    state.receive(
        DeltaDiscoveryRequest(
            node=NODE, type_url=TRAFFIC_TYPE, resource_names_subscribe=[other.key]
        )
    )
    (response,) = state.responses()
    assert (list(response.resources), list(response.removed_resources)) == ([], [other.key])


def test_what_a_client_holds_is_what_it_acknowledged():
    session = Session(A)
    state = session.state
    assert state.holds(ADDRESS_TYPE, A.uid) is None
    session.open()
    assert state.holds(ADDRESS_TYPE, A.uid) is Holding.PENDING
    (response,) = state.responses()
    assert state.holds(ADDRESS_TYPE, A.uid) is Holding.PENDING
    state.receive(DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, response_nonce=response.nonce))
    assert state.holds(ADDRESS_TYPE, A.uid) is Holding.HELD
    # Of what does not exist it should have nothing.
    assert state.holds(ADDRESS_TYPE, B.uid) is Holding.HELD
    session.push(replace(A, node="n9"), B)
    assert state.holds(ADDRESS_TYPE, A.uid) is Holding.PENDING
    (response,) = state.responses()
    refusal = DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, response_nonce=response.nonce)
    refusal.error_detail.message = "no"
    state.receive(refusal)
    assert state.holds(ADDRESS_TYPE, A.uid) is Holding.REFUSED
    assert state.refusal(ADDRESS_TYPE) == "no"
    session.push(A)
    (response,) = state.responses()
    assert state.holds(ADDRESS_TYPE, A.uid) is Holding.PENDING
    assert state.holds(ADDRESS_TYPE, B.uid) is Holding.PENDING
    state.receive(DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, response_nonce=response.nonce))
    assert state.holds(ADDRESS_TYPE, A.uid) is Holding.HELD
    assert state.holds(ADDRESS_TYPE, B.uid) is Holding.HELD


def test_what_a_client_claims_to_hold_counts_when_it_is_so():
    session = Session(A)
    version = session.current.of(ADDRESS_TYPE)[A.uid].version
    session.open(initial_resource_versions={A.uid: version})
    assert session.state.holds(ADDRESS_TYPE, A.uid) is Holding.HELD


def test_clients_that_are_told_the_same_share_its_bytes() -> None:
    first, second = snapshot(A, B), snapshot(replace(A, node="n9"))
    clients = [ClientState(first), ClientState(first), ClientState(first)]
    for each in clients:
        each.receive(DeltaDiscoveryRequest(node=NODE, type_url=ADDRESS_TYPE))
        (response,) = each.responses()
        each.receive(DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, response_nonce=response.nonce))
        each.offer(second, diff(first, second))
    one, other, third = (each.answers()[0] for each in clients)
    assert one.parts[1] is other.parts[1] is third.parts[1]
    told = DeltaDiscoveryResponse.FromString(b"".join(one.parts))
    assert (names(told), list(told.removed_resources)) == ([A.uid], [B.uid])


def test_what_is_new_to_one_and_gone_for_another_is_not_mixed_up() -> None:
    current = snapshot(A, B)
    found = {}
    for wanted, left in ((A.uid, B.uid), (B.uid, A.uid)):
        client = ClientState(current)
        held = {left: current.of(ADDRESS_TYPE)[left].version}
        client.receive(
            DeltaDiscoveryRequest(
                node=NODE,
                type_url=ADDRESS_TYPE,
                resource_names_subscribe=[wanted],
                initial_resource_versions=held,
            )
        )
        (response,) = client.responses()
        found[wanted] = (names(response), list(response.removed_resources))
    assert found == {A.uid: ([A.uid], [B.uid]), B.uid: ([B.uid], [A.uid])}
