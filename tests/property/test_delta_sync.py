"""The delta client and the ADS machine together: however pushes, losses and reconnects fall,
a client that catches up holds exactly what was published last.

Both machines are the product's; between them is a wire that may break at any message and
an in-memory store that is updated only by the client's commands.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from istiod_lite.snapshot import Snapshot, build, diff
from istiod_lite.subscriptions import ClientState
from mesh.model.authorization import Action, Authorization, PolicyScope
from mesh.model.service import Service
from mesh.model.store import Store
from mesh.model.workload import Workload
from mesh.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node
from mesh.xds.delta import Apply, Command, DeltaClient, Ready, Send
from mesh.xds.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource, resource_name

NODE = Node(id="ztunnel~10.0.0.1~z.istio-system~istio-system.svc.cluster.local")
TYPES = (ADDRESS_TYPE, AUTHORIZATION_TYPE)


def _workload(number: int, node: int) -> Workload:
    return Workload(
        uid=f"K//Pod/demo/{number}",
        name=str(number),
        namespace="demo",
        node=str(node),
        addresses=(f"10.0.0.{number}",),
        services={"demo/s1": {80: 80}} if number % 2 else {},
    )


def _service(number: int, name: int) -> Service:
    return Service(str(name), "demo", f"s{number}")


def _policy(number: int, dry_run: bool) -> Authorization:
    return Authorization(f"p{number}", "demo", PolicyScope.NAMESPACE, Action.DENY, dry_run=dry_run)


resources = st.one_of(
    st.builds(_workload, st.integers(1, 6), st.integers(1, 3)),
    st.builds(_service, st.integers(1, 3), st.integers(1, 2)),
    st.builds(_policy, st.integers(1, 3), st.booleans()),
)


class DeltaSync(RuleBasedStateMachine):
    """One controller and one node proxy."""

    def __init__(self) -> None:
        super().__init__()
        self.published: dict[str, Resource] = {}
        self.snapshot: Snapshot | None = None
        self.server: ClientState | None = None
        self.client = DeltaClient(NODE, TYPES)
        self.store = Store()
        self.ready: list[str] = []
        self.to_server: list[DeltaDiscoveryRequest] = []
        self.to_client: list[DeltaDiscoveryResponse] = []

    # -- the world

    @rule(changes=st.lists(resources, max_size=4), gone=st.sets(st.integers(0, 12), max_size=4))
    def push(self, changes: list[Resource], gone: set[int]) -> None:
        """Publish a new snapshot."""
        for resource in changes:
            self.published[resource_name(resource)] = resource
        for index in sorted(gone, reverse=True):
            if index < len(self.published):
                del self.published[sorted(self.published)[index]]
        values = self.published.values()
        new = build(
            {resource_name(r): r for r in values if isinstance(r, Workload | Service)},
            {resource_name(r): r for r in values if isinstance(r, Authorization)},
            self.snapshot,
        )
        assert not new.faults
        if self.server is not None:
            self.server.offer(new, diff(self.snapshot or Snapshot(), new))
        self.snapshot = new

    @precondition(lambda self: self.server is None)
    @rule()
    def connect(self) -> None:
        """A new stream, to a controller that remembers nothing of the client."""
        self.server = ClientState(self.snapshot)
        self._perform(self.client.start())

    @precondition(lambda self: self.server is not None)
    @rule(restart=st.booleans())
    def lose(self, restart: bool) -> None:
        """The stream breaks with messages in the air; the controller may restart too."""
        self.server = None
        self.client.stop()
        self.to_server.clear()
        self.to_client.clear()
        if restart and self.snapshot is not None:
            self.snapshot = build(
                {name: e.model for name, e in self.snapshot.of(ADDRESS_TYPE).items()},  # type: ignore[misc]
                {name: e.model for name, e in self.snapshot.of(AUTHORIZATION_TYPE).items()},  # type: ignore[misc]
            )

    @precondition(lambda self: self.to_server)
    @rule()
    def serve(self) -> None:
        """The controller reads one request."""
        assert self.server is not None
        self.server.receive(self.to_server.pop(0))

    @precondition(lambda self: self.server is not None)
    @rule()
    def answer(self) -> None:
        """The controller sends what it wants to."""
        assert self.server is not None
        self.to_client += self.server.responses()

    @precondition(lambda self: self.to_client)
    @rule()
    def read(self) -> None:
        """The client reads one response."""
        wire = self.to_client.pop(0).SerializeToString()
        self._perform(self.client.receive(DeltaDiscoveryResponse.FromString(wire)))

    @precondition(lambda self: self.snapshot is not None)
    @rule()
    def catch_up(self) -> None:
        """Everything in the air arrives; then both must agree."""
        if self.server is None:
            self.connect()
        for _ in range(20):
            while self.to_server:
                self.serve()
            self.answer()
            if not self.to_client:
                break
            while self.to_client:
                self.read()
        else:
            raise AssertionError("the two never come to rest")
        self._agree()
        assert set(self.ready) == set(TYPES)

    # -- what must hold

    def _agree(self) -> None:
        published = self.published.values()
        assert {w.uid: w for w in self.store.workloads()} == {
            r.uid: r for r in published if isinstance(r, Workload)
        }
        assert {s.key: s for s in self.store.services()} == {
            r.key: r for r in published if isinstance(r, Service)
        }
        assert {p.key: p for p in self.store.policies()} == {
            r.key: r for r in published if isinstance(r, Authorization)
        }
        assert self.snapshot is not None
        for type_url in TYPES:
            current = {n: e.version for n, e in self.snapshot.of(type_url).items()}
            assert self.client.versions(type_url) == current

    @invariant()
    def one_response_in_flight(self) -> None:
        """Per type, however much is published."""
        for type_url in TYPES:
            assert sum(r.type_url == type_url for r in self.to_client) <= 1

    @invariant()
    def marks_are_bounded(self) -> None:
        """A stuck client costs no more than what it holds and what exists."""
        if self.server is None or self.snapshot is None:
            return
        for type_url, status in self.server.status().items():
            known = status.versions.keys() | self.snapshot.of(type_url).keys()
            assert status.pending <= len(known)

    @invariant()
    def ready_once(self) -> None:
        """Each type at most once."""
        assert len(self.ready) == len(set(self.ready))

    def _perform(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Send(request):
                    self.to_server.append(
                        DeltaDiscoveryRequest.FromString(request.SerializeToString())
                    )
                case Apply(type_url, updated, removed):
                    if type_url == ADDRESS_TYPE:
                        self.store.apply_addresses(updated, removed)  # type: ignore[arg-type]
                    else:
                        self.store.apply_policies(updated, removed)  # type: ignore[arg-type]
                case Ready(type_url):
                    self.ready.append(type_url)
                case _:
                    raise AssertionError(command)


TestDeltaSync = DeltaSync.TestCase
TestDeltaSync.settings = settings(stateful_step_count=40, max_examples=60, deadline=None)
