"""Which endpoint a request gets, with endpoints that only count."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from mesh.model.balancing import Candidate
from mesh.model.route import (
    BackendSettings,
    LoadBalancing,
    OutlierDetection,
    SessionPersistence,
)
from mesh.model.workload import Workload
from waypoint.balance.backend import BackendState
from waypoint.balance.session import AFFINITY
from waypoint.filters.chain import Headers, Request


class _Clock:
    def now(self) -> float:
        return 100.0

    def wall(self) -> float:
        return 1_000_000.0


@dataclass(eq=False)
class _Endpoint:
    candidate: Candidate
    load: float = 1.0
    ejected_until: float = 0.0
    active: int = 0
    turn: int = 0

    @property
    def name(self) -> str:
        return self.candidate.workload.name


def _endpoint(name: str, capacity: int = 1) -> _Endpoint:
    workload = Workload(uid=f"uid-{name}", name=name, namespace="shop", capacity=capacity)
    return _Endpoint(Candidate(workload, 8080))


def _backend(endpoints: list[_Endpoint], **settings: Any) -> BackendState[_Endpoint]:
    state: BackendState[_Endpoint] = BackendState("shop/web", 80, _Clock(), random.Random(7))
    state.update(endpoints, BackendSettings(**settings), "")
    return state


def _request(**fields: Any) -> Request:
    pairs = [(name.encode(), value) for name, value in fields.pop("headers", {}).items()]
    return Request(method=b"GET", scheme=b"http", authority=b"a", path=b"/",
                   headers=Headers(pairs), **fields)  # fmt: skip


def _names(state: BackendState[_Endpoint], count: int, **kind: Any) -> list[str]:
    return [state.draw(**kind).candidate.workload.name for _ in range(count)]


def test_in_turn_as_often_as_capacity_says() -> None:
    found = _backend([_endpoint("a"), _endpoint("b", 2), _endpoint("c")],
                     balancing=LoadBalancing("ROUND_ROBIN"))  # fmt: skip
    assert Counter(_names(found, 40)) == {"a": 10, "b": 20, "c": 10}
    assert "b b b" not in " ".join(_names(found, 40))


def test_less_load_wins_and_chance_does_not_look() -> None:
    busy, free = _endpoint("busy"), _endpoint("free")
    busy.load = 50.0
    assert set(_names(_backend([busy, free]), 50)) == {"free"}
    chance = Counter(_names(_backend([busy, free], balancing=LoadBalancing("RANDOM")), 400))
    assert min(chance.values()) > 120


def test_the_ejected_are_passed_over_within_bounds() -> None:
    endpoints = [_endpoint(name) for name in "abcd"]
    endpoints[0].ejected_until = 200.0
    strict = OutlierDetection(max_ejection_percent=10)
    assert "a" not in _names(_backend(endpoints, outlier=strict), 80), "one may always be out"
    endpoints[1].ejected_until = 200.0
    assert set(_names(_backend(endpoints, outlier=strict), 200)) == set("abcd")
    assert set(_names(_backend(endpoints), 200)) == set("cd")
    panic = OutlierDetection(min_health_percent=60)
    assert set(_names(_backend(endpoints, outlier=panic), 200)) == set("abcd")
    assert set(_names(_backend(endpoints), 50, excluded={endpoints[2]})) == {"d"}


@pytest.mark.parametrize(
    ("hash_on", "fields"),
    [
        ("header:X-User", {"headers": {"x-user": b"%d"}}),
        ("query:user", {"query": b"a=1&user=%d&user=0"}),
        ("cookie:user", {"headers": {"cookie": b"z=1; user=%d"}}),
        ("source-ip", {"source_ip": "10.0.0.%d"}),
    ],
)
def test_equal_hashes_meet_equal_endpoints(hash_on: str, fields: dict[str, Any]) -> None:
    endpoints = [_endpoint(name) for name in "abcde"]
    balancing = LoadBalancing("CONSISTENT_HASH", hash_on)
    one, other = _backend(endpoints, balancing=balancing), _backend(endpoints, balancing=balancing)
    used = set()
    for number in range(60):
        filled = {
            key: {k: v % number for k, v in each.items()} if key == "headers" else each % number
            for key, each in fields.items()
        }
        first = one.find(_request(**filled), None)
        assert other.find(_request(**filled), None) is first
        used.add(first.candidate.workload.name)
    assert used == set("abcde")


def test_who_has_no_cookie_to_hash_is_given_one() -> None:
    balancing = LoadBalancing("CONSISTENT_HASH", "cookie:u", cookie_path="/x", cookie_seconds=9.0)
    state = _backend([_endpoint(name) for name in "abc"], balancing=balancing)
    request = _request()
    chosen = state.find(request, None)
    name, value = request.notes[AFFINITY]
    assert name == b"set-cookie"
    assert value.endswith(b"; Path=/x; HttpOnly; Max-Age=9")
    again = _request(headers={"cookie": value.split(b";")[0]})
    assert state.find(again, None) is chosen
    assert AFFINITY not in again.notes


def test_a_session_stays_until_its_endpoint_cannot_serve() -> None:
    endpoints = [_endpoint(name) for name in "abc"]
    state = _backend(endpoints, session=SessionPersistence(kind="Header", name="sid"))
    first = _request()
    chosen = state.find(first, None)
    _, value = first.notes[AFFINITY]
    chosen.load = 1e9  # type: ignore[misc]
    for _ in range(30):
        again = _request(headers={"sid": value})
        assert state.find(again, None) is chosen
        assert AFFINITY not in again.notes
    chosen.ejected_until = 200.0
    moved = _request(headers={"sid": value})
    assert state.find(moved, None) is not chosen
    assert moved.notes[AFFINITY][1] != value
