"""Ranks of locality, as numbers."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from mesh.model.balancing import choose_endpoint, locality_rank
from mesh.model.service import Scope, Service, ServicePort
from mesh.model.store import Store
from mesh.model.workload import Locality, Workload, WorkloadStatus

SOURCE = Workload("s", "s", "ns", network="n", locality=Locality("r", "z", "s"), node="x")
NETWORK_REGION_ZONE = (Scope.NETWORK, Scope.REGION, Scope.ZONE)


@pytest.mark.parametrize(
    ("network", "region", "zone", "rank"),
    [
        ("n", "r", "z", 5),
        ("n", "r", "-", 4),
        ("n", "-", "z", 3),
        ("-", "r", "z", 2),
        ("-", "r", "-", 1),
        ("-", "-", "z", 0),
    ],
)
def test_a_leading_network_is_preferred_not_required(
    network: str, region: str, zone: str, rank: int
) -> None:
    workload = Workload("w", "w", "ns", network=network, locality=Locality(region, zone))
    assert locality_rank(NETWORK_REGION_ZONE, SOURCE, workload) == rank


@pytest.mark.parametrize(
    ("workload", "rank"),
    [
        (Workload("w", "w", "ns", network="n", node="x", locality=Locality("r", "z", "s")), 6),
        (Workload("w", "w", "ns", network="n", node="y", locality=Locality("r", "z", "s")), 4),
        (Workload("w", "w", "ns", network="n", node="x", locality=Locality("r", "z", "-")), 2),
        (Workload("w", "w", "ns", network="n", node="x", locality=Locality("-", "z", "s")), 0),
        (Workload("w", "w", "ns", network="-", node="x", locality=Locality("r", "z", "s")), 3),
    ],
)
def test_other_scopes_end_the_count(workload: Workload, rank: int) -> None:
    preference = (Scope.REGION, Scope.ZONE, Scope.SUBZONE, Scope.NETWORK, Scope.NODE, Scope.CLUSTER)
    assert locality_rank(preference, SOURCE, workload) == rank


def test_chance_follows_capacity_and_every_change() -> None:
    service = Service(
        name="web", namespace="shop", hostname="web.shop", ports={80: ServicePort(80, 8080)}
    )
    pods = [
        Workload(
            uid=name,
            name=name,
            namespace="shop",
            service_account="web",
            addresses=(f"10.0.0.{capacity}",),
            capacity=capacity,
            services={"shop/web.shop": {80: 8080}},
        )
        for name, capacity in (("none", 0), ("one", 1), ("three", 3))
    ]
    store, rng = Store(), random.Random(7)
    store.apply_addresses([service, *pods], [])

    def chosen() -> Counter[str]:
        found: Counter[str] = Counter()
        for _ in range(400):
            choice = choose_endpoint(service, store.endpoints(service.key), 80, pods[0], rng)
            found[choice.candidate.workload.name if choice.candidate else choice.reason] += 1
        return found

    assert set(chosen()) == {"one", "three"}
    assert 2 * chosen()["one"] < chosen()["three"]
    # Asked again after a change, nothing of before is remembered.
    store.apply_addresses([replace(pods[2], status=WorkloadStatus.UNHEALTHY)], [])
    assert set(chosen()) == {"one"}
    store.apply_addresses([], ["one"])
    assert all("web.shop:80" in each for each in chosen())
    store.apply_addresses([pods[1], pods[2]], [])
    assert set(chosen()) == {"one", "three"}
