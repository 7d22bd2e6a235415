"""What is remembered of the decisions about a connection's tunnels, and when it is forgotten."""

from __future__ import annotations

from dataclasses import replace

from mesh.authz import ConnectionContext, Permit
from mesh.errors import Refusal
from mesh.identity import SpiffeId
from mesh.model.authorization import Action, Authorization, PolicyScope, Rule
from mesh.model.store import Store
from mesh.model.workload import Workload
from mesh.sockets import SocketAddress
from ztunnel.admission import Admissions, Admitted, Rejected
from ztunnel.connections import Judges
from ztunnel.plan import InboundConnection

LOCAL = Workload("Kubernetes//Pod/shop/web", "web", "shop", ("10.0.0.2",), service_account="web")
CURL = Workload("Kubernetes//Pod/shop/curl", "curl", "shop", ("10.0.0.1",), service_account="curl")
ARRIVED = InboundConnection(
    SpiffeId("cluster.local", "shop", "curl"),
    SocketAddress("10.0.0.1", 40001),
    SocketAddress("10.0.0.2", 15008),
)
WANTED = "10.0.0.2:8080"
ALL = (Rule(),)
DENY = Authorization("nobody", "shop", PolicyScope.NAMESPACE, Action.DENY, ALL)


class CountingJudges:
    """The real ones, and how often they were asked."""

    def __init__(self, store: Store) -> None:
        self.asked = 0
        self._judges = Judges(store)
        self.rehearses = self._judges.rehearses

    def evaluate(self, workload: Workload, context: ConnectionContext) -> Permit | Refusal:
        self.asked += 1
        return self._judges.evaluate(workload, context)


def made() -> tuple[Admissions, Store, CountingJudges]:
    store = Store()
    store.apply_addresses([LOCAL, CURL], [])
    judges = CountingJudges(store)
    return Admissions(ARRIVED, LOCAL.identity, store, judges), store, judges


def refusal(decided: Admitted | Rejected) -> Refusal:
    assert isinstance(decided, Rejected)
    return decided.refusal


def test_tunnels_that_are_alike_are_judged_once() -> None:
    admissions, _, judges = made()
    first = admissions.decide(LOCAL, WANTED, "")
    assert isinstance(first, Admitted)
    assert (first.plan.upstream, first.plan.source_workload) == (("10.0.0.2", 8080), CURL)
    assert admissions.decide(LOCAL, WANTED, "") is first
    other = admissions.decide(LOCAL, "10.0.0.2:8081", "")
    assert isinstance(other, Admitted)
    assert other.plan.context.destination_port == 8081
    assert judges.asked == 2


def test_a_change_of_policy_counts_for_the_next_tunnel() -> None:
    admissions, store, _ = made()
    assert isinstance(admissions.decide(LOCAL, WANTED, ""), Admitted)
    store.apply_policies([DENY], [])
    refused = refusal(admissions.decide(LOCAL, WANTED, ""))
    assert (refused.policy, refused.http_status) == ("shop/nobody", 401)
    store.apply_policies([], ["shop/nobody"])
    assert isinstance(admissions.decide(LOCAL, WANTED, ""), Admitted)


def test_a_refusal_is_decided_anew() -> None:
    admissions, store, judges = made()
    store.apply_policies([DENY], [])
    rejected = [admissions.decide(LOCAL, WANTED, "") for _ in range(3)]
    assert {refusal(each).policy for each in rejected} == {"shop/nobody"}
    assert all(isinstance(each, Rejected) and each.plan is not None for each in rejected)
    assert judges.asked == 3


def test_dry_run_policies_are_asked_each_time() -> None:
    admissions, store, judges = made()
    store.apply_policies([replace(DENY, dry_run=True)], [])
    for _ in range(3):
        assert isinstance(admissions.decide(LOCAL, WANTED, ""), Admitted)
    assert judges.asked == 3


def test_another_identity_or_none_is_refused_at_once() -> None:
    admissions, store, _ = made()
    assert isinstance(admissions.decide(LOCAL, WANTED, ""), Admitted)
    renamed = replace(LOCAL, service_account="other")
    assert refusal(admissions.decide(renamed, WANTED, "")).flag == "IDENTITY_ERROR"
    store.apply_addresses([renamed], [])
    assert refusal(admissions.decide(renamed, WANTED, "")).flag == "IDENTITY_ERROR"
    assert "unknown" in refusal(admissions.decide(None, WANTED, "")).reason


def test_what_the_pod_does_not_serve_is_refused() -> None:
    admissions, _, _ = made()
    assert refusal(admissions.decide(LOCAL, "10.0.0.77:80", "")).http_status == 400
    assert refusal(admissions.decide(LOCAL, "nonsense", "")).http_status == 400


def test_what_is_remembered_is_bounded() -> None:
    admissions, _, _ = made()
    for port in range(1, 2000):
        admissions.decide(LOCAL, f"10.0.0.2:{port}", "")
    assert len(admissions._known) <= 256
