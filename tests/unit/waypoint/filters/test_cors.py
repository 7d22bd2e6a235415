"""CORS by the tables of Gateway API and the Fetch standard; faults by their share."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mesh.model.route import Cors, Fault
from waypoint.filters.chain import Headers, Request, Respond, Response, Wait
from waypoint.filters.cors import CorsFilter
from waypoint.filters.fault import FaultFilter

SHOP = Cors(
    allow_origins=("https://shop.example", "https://*.bar.com", "http://odd.example:8080"),
    allow_methods=("PUT",),
    allow_headers=("x-team",),
    expose_headers=("x-total",),
    max_age_seconds=60,
)


def request(method: bytes = b"GET", **headers: str) -> Request:
    pairs = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    return Request(
        method=method, scheme=b"http", authority=b"api", path=b"/", headers=Headers(pairs)
    )


def preflight(cors: Cors, origin: str, wanted: str = "x-team") -> dict[bytes, bytes]:
    answer = CorsFilter(cors).on_request(
        request(
            b"OPTIONS",
            origin=origin,
            access_control_request_method="DELETE",
            access_control_request_headers=wanted,
        )
    )
    assert isinstance(answer, Respond)
    assert answer.status == 204
    return dict(answer.headers)


@pytest.mark.parametrize(
    ("origin", "is_allowed"),
    [
        ("https://shop.example", True),
        ("https://shop.example:443", True),
        ("HTTPS://Shop.Example", True),
        ("http://shop.example", False),
        ("https://shop.example:444", False),
        ("https://x.www.bar.com", True),
        ("https://bar.com", False),
        ("https://evil.com/.bar.com", False),
        ("https://evilbar.com", False),
        ("http://odd.example:8080", True),
        ("http://odd.example", False),
        ("null", False),
        ("https://shop.example.evil.com", False),
    ],
)
def test_origins(origin: str, is_allowed: bool) -> None:
    assert CorsFilter(SHOP).allows(origin.encode()) is is_allowed
    assert CorsFilter(Cors(allow_origins=("*",))).allows(origin.encode())
    assert not CorsFilter(Cors()).allows(origin.encode())


def test_a_preflight_is_answered_here() -> None:
    assert preflight(SHOP, "https://shop.example") == {
        b"access-control-allow-origin": b"https://shop.example",
        b"access-control-allow-methods": b"GET, HEAD, POST, PUT",
        b"access-control-allow-headers": b"x-team",
        b"access-control-max-age": b"60",
        b"vary": b"origin",
    }
    refused = preflight(SHOP, "https://evil.example")
    assert not [name for name in refused if name.startswith(b"access-control")]


def test_wildcards_without_and_with_credentials() -> None:
    wild: dict[str, Any] = {
        "allow_origins": ("*",),
        "allow_methods": ("*",),
        "allow_headers": ("*",),
    }
    open_ = preflight(Cors(**wild), "https://any.example")
    assert open_[b"access-control-allow-origin"] == b"*"
    assert open_[b"access-control-allow-methods"] == b"*"
    assert open_[b"access-control-allow-headers"] == b"*"
    assert b"access-control-allow-credentials" not in open_
    echoed = preflight(Cors(**wild, allow_credentials=True), "https://any.example", "x-a, x-b")
    assert echoed[b"access-control-allow-origin"] == b"https://any.example"
    assert echoed[b"access-control-allow-methods"] == b"DELETE"
    assert echoed[b"access-control-allow-headers"] == b"x-a, x-b"
    assert echoed[b"access-control-allow-credentials"] == b"true"


def test_a_simple_request_goes_on_and_its_origin_may_read() -> None:
    filter_, asked = CorsFilter(SHOP), request(origin="https://shop.example")
    assert filter_.on_request(asked) is None
    answer = Response(status=200, headers=Headers([(b"access-control-allow-origin", b"*")]))
    filter_.on_response(asked, answer)
    assert answer.headers.pairs == [
        (b"access-control-allow-origin", b"https://shop.example"),
        (b"access-control-expose-headers", b"x-total"),
        (b"vary", b"origin"),
    ]
    stranger, answer = request(origin="https://evil.example"), Response(status=200)
    assert filter_.on_request(stranger) is None
    filter_.on_response(stranger, answer)
    assert answer.headers.pairs == [(b"vary", b"origin")]


def test_faults_by_their_share() -> None:
    rng = random.Random(7)
    abort = FaultFilter(Fault(abort_status=503, abort_percent=30), rng)
    answers = [abort.on_request(request()) for _ in range(1000)]
    assert 250 < sum(isinstance(each, Respond) for each in answers) < 350
    assert FaultFilter(Fault(abort_status=503), rng).on_request(request()) is None


async def test_a_delay_ends_in_going_on_or_in_the_abort(autojump_clock: object) -> None:
    rng = random.Random(7)
    waits = FaultFilter(Fault(delay_seconds=60, delay_percent=100), rng).on_request(request())
    assert isinstance(waits, Wait)
    assert await waits.ask() is None
    fault = Fault(delay_seconds=60, delay_percent=100, abort_status=500, abort_percent=100)
    waits = FaultFilter(fault, rng).on_request(request())
    assert isinstance(waits, Wait)
    ended = await waits.ask()
    assert ended is not None
    assert ended.status == 500
