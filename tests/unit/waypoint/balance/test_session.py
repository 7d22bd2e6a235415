"""Session persistence: what the client is given, and what is made of what it brings."""

from __future__ import annotations

import pytest

from mesh.model.route import SessionPersistence
from waypoint.balance.session import Session, cookie
from waypoint.filters.chain import Headers, Request


def _request(*pairs: tuple[bytes, bytes]) -> Request:
    return Request(method=b"GET", scheme=b"http", authority=b"a", path=b"/",
                   headers=Headers(list(pairs)))  # fmt: skip


def _begin(session: Session, now: float = 1000.0) -> tuple[bytes, bytes]:
    return session.begin(
        session.backend_token("shop/web", 80), session.endpoint_token("uid", 8080), now
    )


def test_a_cookie_comes_back_among_others() -> None:
    session = Session(SessionPersistence(name="sid", path="/cart"), "rule")
    name, value = _begin(session)
    assert name == b"set-cookie"
    field, *attributes = value.split(b"; ")
    assert attributes == [b"Path=/cart", b"HttpOnly"]
    request = _request((b"cookie", b"a=1; " + field + b"; sid=second"))
    assert session.read(request, 1e9) == (
        session.backend_token("shop/web", 80),
        session.endpoint_token("uid", 8080),
    )
    assert b"uid" not in value
    assert b"web" not in value


def test_permanent_cookies_say_how_long_and_others_are_watched_here() -> None:
    permanent = SessionPersistence(name="sid", is_permanent=True, absolute_seconds=3600.0)
    assert b"; Max-Age=3600" in _begin(Session(permanent, "r"))[1]
    session = Session(SessionPersistence(name="sid", absolute_seconds=60.0), "r")
    _, value = _begin(session, 1000.0)
    assert b"Max-Age" not in value
    request = _request((b"cookie", value.split(b";")[0]))
    assert session.read(request, 1059.0) is not None
    assert session.read(request, 1062.0) is None
    # Made up, to live longer: no.
    assert session.read(request, 900.0) is None


def test_headers_and_names_of_their_own() -> None:
    session = Session(SessionPersistence(kind="Header", name="X-Session"), "r")
    name, value = _begin(session)
    assert name == b"x-session"
    assert session.read(_request((name, value)), 0.0) is not None
    unnamed = {Session(SessionPersistence(), scope).name for scope in ("one", "two")}
    assert len(unnamed) == 2


def test_sessions_of_two_rules_are_not_mixed() -> None:
    settings = SessionPersistence(kind="Header", name="s")
    one, two = Session(settings, "one"), Session(settings, "two")
    name, value = _begin(one)
    found = two.read(_request((name, value)), 0.0)
    assert found is not None
    assert found[0] != two.backend_token("shop/web", 80)
    assert found[1] != two.endpoint_token("uid", 8080)


@pytest.mark.parametrize(
    "value", [b"", b"x", b"%%%%", b"A" * 31, b"A" * 64, b"A" * 4096, b"\xff" * 32]
)
def test_nonsense_is_no_session(value: bytes) -> None:
    session = Session(SessionPersistence(name="sid"), "r")
    assert session.read(_request((b"cookie", b"sid=" + value)), 0.0) is None
    assert session.read(_request(), 0.0) is None


def test_cookies_are_found_in_every_field_and_without_quotes() -> None:
    request = _request((b"cookie", b"a=1"), (b"x", b"b=0"), (b"cookie", b'c; b = "2" ; d=3'))
    assert cookie(request, b"b") == b"2"
    assert cookie(request, b"c") is None
