"""Which certificates a node needs, as its workloads come and go."""

from __future__ import annotations

from dataclasses import replace

from mesh.identity import SpiffeId
from mesh.model.store import Store
from mesh.model.workload import TunnelProtocol, Workload
from ztunnel.prefetch import Needs, NodeIdentities

A = Workload(
    "a", "a", "shop", node="n1", service_account="sa", tunnel_protocol=TunnelProtocol.HBONE
)
B = replace(A, uid="b", name="b")
SA = SpiffeId("cluster.local", "shop", "sa")


class World:
    def __init__(self, node: str = "n1") -> None:
        self.store = Store()
        self.identities = NodeIdentities(node)

    def say(self, *workloads: Workload, removed: tuple[str, ...] = ()) -> Needs:
        changed = self.store.apply_addresses(workloads, removed)
        return self.identities.changed(changed.workloads, self.store)


def test_one_certificate_for_all_workloads_of_an_identity() -> None:
    world = World()
    assert world.say(A) == Needs(fetch=(SA,))
    assert world.say(B) == Needs()
    assert world.say(removed=("a",)) == Needs()
    assert world.say(removed=("b",)) == Needs(drop=(SA,))
    assert world.say(removed=("b",)) == Needs()


def test_only_tunnelled_workloads_of_this_node() -> None:
    world = World()
    assert world.say(replace(A, node="n2")) == Needs()
    assert world.say(replace(A, tunnel_protocol=TunnelProtocol.NONE)) == Needs()
    native = replace(A, tunnel_protocol=TunnelProtocol.NONE, native_tunnel=True)
    assert world.say(native) == Needs(fetch=(SA,))
    assert world.say(replace(A, node="n2")) == Needs(drop=(SA,))


def test_a_new_account_exchanges_identities() -> None:
    world = World()
    world.say(A)
    other = SpiffeId("cluster.local", "shop", "other")
    assert world.say(replace(A, service_account="other")) == Needs((other,), (SA,))


def test_a_swap_within_one_change_drops_nothing() -> None:
    world = World()
    world.say(A)
    assert world.say(B, removed=("a",)) == Needs()


def test_an_identity_that_cannot_be_is_skipped() -> None:
    assert World().say(replace(A, service_account="no/slash")) == Needs()


def test_without_a_node_name_nothing_is_fetched_ahead() -> None:
    assert World("").say(replace(A, node="")) == Needs()
