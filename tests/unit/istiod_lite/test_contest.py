"""When an object drifts too often it is left as it is, and who changes it is named."""

from __future__ import annotations

from itertools import pairwise

from istiod_lite.contest import LONGEST_WAIT_SECONDS, Contests, owners
from mesh.cluster.api import Ref

REF = Ref("Deployment", "shop", "wp")
GATEWAY = Ref("Gateway", "shop", "wp")


def fight(contests: Contests, begin: float, rounds: int) -> list[float]:
    """Somebody changes it every second; when it was put back."""
    done = []
    for second in range(rounds):
        now = begin + second
        contests.see([REF], now)
        if contests.may_mend(REF, now):
            contests.mended(REF, now)
            done.append(now - begin)
    return done


def test_a_slip_is_put_back_and_said_nowhere():
    contests = Contests()
    for now in (0.0, 100.0, 200.0, 300.0):
        contests.see([REF], now)
        assert contests.may_mend(REF, now)
        contests.mended(REF, now)
        assert contests.conditions() == {}


def test_a_fight_is_left_for_longer_each_time():
    contests = Contests()
    assert fight(contests, 0.0, 2000) == [0, 1, 2, 62, 182, 422, 902, 1802]
    assert contests.conditions()[GATEWAY].status == "False"
    waited = fight(contests, 2000.0, 5000)
    assert {b - a for a, b in pairwise(waited)} == {LONGEST_WAIT_SECONDS}


def test_who_it_is_is_said_as_long_as_it_lasts():
    contests = Contests()
    fight(contests, 0.0, 10)
    assert contests.is_nameless(REF)
    assert "by somebody" in contests.conditions()[GATEWAY].message
    contests.name_others(REF, ("gitops",))
    assert not contests.is_nameless(REF)
    assert "Deployment shop/wp is changed again and again by gitops" in (
        contests.conditions()[GATEWAY].message
    )
    contests.see([], 20.0)
    assert contests.conditions() == {}
    # Not forgotten at once: who comes back at once goes on where it was.
    contests.see([REF], 30.0)
    assert not contests.may_mend(REF, 30.0)
    contests.see([], 200.0)
    assert contests.may_mend(REF, 201.0)
    assert fight(contests, 300.0, 5) == [0, 1, 2]


def test_the_owner_of_a_field():
    fields = {"f:spec": {"f:template": {"f:spec": {"f:serviceAccountName": {}}}, "f:replicas": {}}}
    obj = {
        "metadata": {
            "managedFields": [
                {"manager": "ours", "fieldsV1": fields},
                {"manager": "gitops", "fieldsV1": fields},
                {"manager": "hpa", "fieldsV1": {"f:spec": {"f:replicas": {}}}},
                {"manager": "odd", "fieldsV1": "x"},
            ]
        }
    }
    patch = {"spec": {"template": {"spec": {"serviceAccountName": "wp"}}}}
    assert owners(obj, patch, "ours") == ("gitops",)
    assert owners(obj, {"spec": {"replicas": 1}}, "ours") == ("gitops", "hpa")
    assert owners({}, patch, "ours") == ()
