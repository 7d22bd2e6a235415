"""ext_authz over HTTP: who is asked what, and what is made of the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mesh.errors import Unavailable
from mesh.model.l7_policy import ExternalAuthorizer, L7Authorization, L7Operation, L7Rule
from waypoint.filters.chain import Answer, Headers, Request, Respond, Response, Wait
from waypoint.filters.ext_authz import PLACE, ExternalAuthorization, denied, question, take

questions: list[tuple[Request, bytes]] = []
PROVIDER = ExternalAuthorizer(
    "opa", "http", "opa/opa.auth", 8000, path_prefix="/check",
    request_headers=("x-tenant", "Transfer-Encoding"), upstream_headers_on_allow=("x-user",),
    downstream_headers_on_deny=("x-why",),
)  # fmt: skip


def request(**headers: str) -> Request:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request(
        method=b"POST", scheme=b"http", authority=b"web", path=b"/a", query=b"q=1",
        headers=Headers(pairs), notes={PLACE: "here"},
    )  # fmt: skip


def answer(status: int, **headers: str) -> Response:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Response(status=status, headers=Headers(pairs))


def policy(provider: ExternalAuthorizer = PROVIDER, path: str = "/a", name: str = "p") -> Any:
    rule = L7Rule(operations=(L7Operation(paths=(path,)),))
    return L7Authorization("shop", name, "CUSTOM", (rule,), provider=provider)


async def decide(
    asked: Request, *policies: Any, **answers: Any
) -> tuple[Respond | None, list[str]]:
    """The verdict, and who was asked. `answers` are by provider: a Response or an error."""
    order: list[str] = []
    questions.clear()

    async def ask(
        place: Any, service: str, port: int, sent: Request, body: bytes, seconds: float
    ) -> Answer:
        assert place == asked.notes.get(PLACE, place)
        assert (port, seconds) == (8000, 5.0)
        name = service.partition("/")[0]
        order.append(name)
        questions.append((sent, body))
        found = answers[name]
        if isinstance(found, Exception):
            raise found
        return found if isinstance(found, Answer) else Answer(found, b"body")

    verdict = ExternalAuthorization(policies, ask).on_request(asked)
    if isinstance(verdict, Wait):
        return await verdict.ask(), order
    return verdict, order


def test_the_question_is_the_head_that_the_provider_wants() -> None:
    sent = request(
        authorization="Bearer x", x_tenant="t", cookie="c", content_length="5", x_other="o"
    )
    asked = question(PROVIDER, sent)
    assert (asked.method, asked.authority, asked.path, asked.query) == (
        b"POST", b"web", b"/check/a", b"q=1",
    )  # fmt: skip
    assert asked.headers.pairs == [
        (b"authorization", b"Bearer x"), (b"x-tenant", b"t"), (b"content-length", b"0"),
    ]  # fmt: skip


async def test_who_is_not_concerned_is_not_asked_about() -> None:
    assert await decide(request(), policy(path="/other")) == (None, [])


async def test_all_must_agree_in_their_order() -> None:
    two = replace(PROVIDER, name="two", service="two/opa.auth")
    policies = (policy(), policy(two, name="q"))
    assert await decide(request(), *policies, opa=answer(200), two=answer(200)) == (
        None, ["opa", "two"],
    )  # fmt: skip
    said, order = await decide(request(), *policies, opa=answer(200), two=answer(401))
    assert said is not None
    assert (said.status, said.policy, said.flag, order) == (401, "shop/q", "UAEX", ["opa", "two"])
    said, order = await decide(request(), *policies, opa=answer(403), two=answer(200))
    assert order == ["opa"]


@pytest.mark.parametrize("broken", [answer(500), answer(503), Unavailable("no endpoint")])
async def test_errors_deny_unless_the_provider_fails_open(broken: Any) -> None:
    said, _ = await decide(request(), policy(replace(PROVIDER, status_on_error=503)), opa=broken)
    assert said is not None
    assert said.status == 503
    sent = request(x_user="admin")
    said, _ = await decide(sent, policy(replace(PROVIDER, is_fail_open=True)), opa=broken)
    assert said is None
    # Nobody vouched for what the caller called itself.
    assert sent.headers.get(b"x-user") is None


def test_what_it_allows_it_may_say_and_callers_may_not() -> None:
    sent = request(x_user="admin", x_tenant="t")
    take(PROVIDER, answer(200, x_user="alice", x_admin="1"), sent)
    assert sent.headers.pairs == [(b"x-tenant", b"t"), (b"x-user", b"alice")]
    take(PROVIDER, answer(200), sent)
    assert sent.headers.get(b"x-user") is None
    framing = replace(PROVIDER, upstream_headers_on_allow=("Content-Length", "Host", "connection"))
    take(framing, answer(200, content_length="9", connection="close"), sent)
    assert sent.headers.pairs == [(b"x-tenant", b"t")]


@pytest.mark.parametrize(
    ("status", "told"), [(401, 401), (302, 302), (429, 429), (304, 403), (204, 403), (101, 403)]
)
def test_a_denial_is_the_authorizers_own(status: int, told: int) -> None:
    response = answer(
        status, x_why="no", location="/login", set_cookie="s", content_length="9", connection="x"
    )
    said = denied(PROVIDER, response, b"no", "shop/p", "0")
    assert (said.status, said.body) == (told, b"no")
    assert said.headers == ((b"x-why", b"no"), (b"location", b"/login"))
