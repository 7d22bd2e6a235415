"""Ranks of locality, as numbers."""

from __future__ import annotations

import pytest

from mesh.model.balancing import locality_rank
from mesh.model.service import Scope
from mesh.model.workload import Locality, Workload

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
