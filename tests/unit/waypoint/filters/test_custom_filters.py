"""Filters of others: found, held to their budget, failing as declared; the page's example."""

from __future__ import annotations

import random
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
import trio

from mesh.model.route import RouteFilter
from waypoint.assemble import Assembly
from waypoint.filters import custom
from waypoint.filters.chain import (
    Blocked,
    BodyFilter,
    Headers,
    PassingFilter,
    Request,
    Respond,
    Response,
    Verdict,
    Wait,
)
from waypoint.filters.custom import CustomFilters, Declaration, Guarded

PAGE = Path(__file__).parents[4] / "docs/reference/filters.md"


class Hands:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Odd(PassingFilter):
    """Changes what it sees, then does what the header `do` says."""

    def __init__(self, clock: Hands) -> None:
        self.clock = clock
        self.calls = 0

    def on_request(self, request: Request) -> Verdict:
        self.calls += 1
        request.headers.set(b"seen", b"yes")
        request.path = b"/changed"
        match request.headers.get(b"do"):
            case b"raise":
                raise KeyError("a secret of the caller")
            case b"dawdle":
                self.clock.now += 1.0
            case b"hang":
                return Wait(trio.sleep_forever)
            case b"deny":
                return Respond(418)
        return None

    def on_response(self, request: Request, response: Response) -> Respond | None:
        response.headers.set(b"seen", b"yes")
        raise ValueError

    def open_request_body(self, request: Request) -> BodyFilter | None:
        return Stumbling()


class Stumbling:
    def feed(self, data: bytes) -> bytes:
        return data.upper()

    def finish(self) -> bytes:
        raise ZeroDivisionError


def request(do: bytes = b"") -> Request:
    return Request(
        method=b"GET", scheme=b"http", authority=b"a", path=b"/", headers=Headers([(b"do", do)])
    )


def guarded(on_failure: str, wait_seconds: float = 60.0) -> tuple[Guarded, Odd, Hands]:
    clock = Hands()
    odd = Odd(clock)
    declared = Declaration(lambda _: odd, on_failure, 0.5, wait_seconds)  # type: ignore[arg-type]
    return Guarded("odd", declared, odd, clock), odd, clock


@pytest.mark.parametrize("do", [b"raise", b"dawdle"])
def test_one_that_fails_closed_answers_500_without_telling_what_it_raised(do: bytes) -> None:
    verdict = guarded("Closed")[0].on_request(request(do))
    assert isinstance(verdict, Respond)
    assert verdict.status == 500
    assert "odd" in verdict.reason
    assert "secret" not in verdict.reason


@pytest.mark.parametrize("do", [b"raise", b"dawdle"])
def test_one_that_fails_open_leaves_the_request_as_it_was(do: bytes) -> None:
    seen = request(do)
    assert guarded("Open")[0].on_request(seen) is None
    assert (seen.path, seen.headers.pairs) == (b"/", [(b"do", do)])
    assert len(seen.notes["custom.failed"]) == 1


def test_one_in_time_decides_and_changes() -> None:
    seen = request(b"deny")
    assert guarded("Open")[0].on_request(seen) == Respond(418)
    assert seen.headers.get(b"seen") == b"yes"


def test_one_that_is_late_again_and_again_rests_and_comes_back() -> None:
    one, odd, clock = guarded("Open")
    for _ in range(5):
        one.on_request(request(b"dawdle"))
    assert odd.calls == 3
    clock.now += 60
    assert one.on_request(request(b"deny")) == Respond(418)


async def test_an_answer_that_does_not_come_is_a_failure() -> None:
    for on_failure, status in (("Open", None), ("Closed", 500)):
        verdict = guarded(on_failure, 0.01)[0].on_request(request(b"hang"))
        assert isinstance(verdict, Wait)
        with trio.fail_after(30):
            answer = await verdict.ask()
        assert (answer.status if answer else None) == status


def test_a_response_gets_its_head_back() -> None:
    response = Response(status=200)
    assert guarded("Open")[0].on_response(request(), response) is None
    assert response.headers.pairs == []
    assert guarded("Closed")[0].on_response(request(), response) is not None


def test_a_body_that_fails_is_cut_even_by_one_that_fails_open() -> None:
    body = guarded("Open")[0].open_request_body(request())
    assert body is not None
    assert body.feed(b"abc") == b"ABC"
    with pytest.raises(Blocked) as caught:
        body.finish()
    assert caught.value.respond.status == 500


def test_unknown_ones_are_nobodys_and_broken_ones_refuse() -> None:
    found = [EntryPoint("gone", "no.such.module:x", custom.GROUP),
             EntryPoint("wrong", "json:loads", custom.GROUP)]  # fmt: skip
    filters = CustomFilters(found)
    assert filters.make("filters.ambit.dev/Filter/shop/other") is None
    assert filters.make("example.com/Filter/shop/gone") is None
    for name in ("gone", "wrong"):
        made = filters.make(f"filters.ambit.dev/Filter/shop/{name}")
        assert made is not None
        assert isinstance(made.on_request(request()), Respond)


def test_the_example_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    module = ModuleType("shop_filters")
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, "shop_filters", module)
    installed = CustomFilters([EntryPoint("tenant", "shop_filters:tenant", custom.GROUP)])
    assembly = Assembly(lambda: 0.0, random.Random(1), custom=installed)
    made = assembly.make_route_filter(RouteFilter(extension="filters.ambit.dev/Filter/shop/tenant"))
    assert made is not None
    refused = made.on_request(request())
    assert isinstance(refused, Respond)
    assert refused.status == 400
    asked = request()
    asked.headers.add(b"x-tenant", b"Blue")
    assert made.on_request(asked) is None
    assert asked.headers.get(b"x-tenant") == b"blue"
    assert asked.headers.get(b"x-tenant-of") == b"shop"
