"""CUSTOM AuthorizationPolicy: an external authorizer over HTTP (Envoy's ext_authz) is asked.

First of all filters, before tokens are looked at. Only a request that a rule matches is asked
about; with several policies each authorizer must agree, in the policies' order. 200 allows; a 5xx,
silence or no endpoint is an error and denies unless the provider fails open; whatever else is the
authorizer's denial and answers the caller, within bounds.

The question is the request's head without its body: Host, method, path, Authorization and the
fields that the provider names. Of an answer only end-to-end fields are taken, never those that
frame a message or name the caller. Providers over gRPC and those that want a body are not asked
here: `waypoint.filters.authorize` denies what their policies match.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from mesh.errors import Unavailable
from mesh.model.l7_policy import ExternalAuthorizer, L7Authorization
from waypoint.filters.authorize import GRPC_PERMISSION_DENIED, compile_policy, is_asked
from waypoint.filters.chain import (
    FRAMING,
    Headers,
    Pair,
    PassingFilter,
    Request,
    Respond,
    Response,
    Verdict,
    Wait,
)

MAX_FIELDS: Final = 32
_NEVER_TAKEN: Final = FRAMING | {
    b"trailer", b"keep-alive", b"proxy-authenticate", b"x-forwarded-client-cert",
}  # fmt: skip
_ALWAYS_TOLD: Final = frozenset({b"location", b"www-authenticate", b"content-type"})

Ask = Callable[[Any, ExternalAuthorizer, Request], Awaitable[tuple[Response, bytes]]]
"""The shell: (what the exchange runs in, whom, the question) -> the answer. Raises Unavailable."""
PLACE: Final = "ext_authz.place"
"""The note under which a waiting exchange says what it runs in."""


@dataclass(frozen=True, slots=True)
class _Found:
    provider: ExternalAuthorizer
    policy: str
    rule: str


class ExternalAuthorization(PassingFilter):
    """Asks the authorizers of the policies that match, one after the other."""

    name = "AuthorizationPolicy CUSTOM"

    def __init__(self, policies: Iterable[L7Authorization], ask: Ask) -> None:
        self._policies = [
            (each.provider, compile_policy(each))
            for each in policies
            if is_asked(each) and each.provider is not None
        ]
        self._ask = ask

    def on_request(self, request: Request) -> Verdict:
        """Wait for the authorizers, if a rule matches; deny what cannot be judged."""
        found = []
        for provider, policy in self._policies:
            if policy.problem:
                return _denial(403, policy.key, "", policy.problem)
            rule = policy.match(request)
            if rule is not None:
                found.append(_Found(provider, policy.key, rule))
        return Wait(lambda: self._ask_all(request, found)) if found else None

    async def _ask_all(self, request: Request, found: list[_Found]) -> Respond | None:
        place = request.notes.pop(PLACE)
        for each in found:
            provider = each.provider
            try:
                response, body = await self._ask(place, provider, question(provider, request))
                if response.status >= 500:
                    raise Unavailable(f"it answers {response.status}")
            except Unavailable as error:
                if provider.is_fail_open:
                    # What the caller says under its names is no more the authorizer's word now.
                    take(provider, Response(status=200), request)
                    continue
                said = f"the external authorizer {provider.name} cannot be asked: {error}"
                return _denial(provider.status_on_error, each.policy, each.rule, said)
            if response.status != 200:
                return denied(each.provider, response, body, each.policy, each.rule)
            take(provider, response, request)
        return None


def question(provider: ExternalAuthorizer, request: Request) -> Request:
    """What the authorizer is asked about `request`."""
    wanted = {each.lower().encode() for each in provider.request_headers}
    wanted = (wanted | {b"authorization"}) - FRAMING
    pairs = [pair for pair in request.headers.pairs if pair[0] in wanted]
    return Request(
        method=request.method, scheme=request.scheme, authority=request.authority,
        path=provider.path_prefix.encode() + request.path, query=request.query,
        headers=Headers([*pairs, (b"content-length", b"0")]),
    )  # fmt: skip


def take(provider: ExternalAuthorizer, response: Response, request: Request) -> None:
    """Set the fields of an allowing answer that the provider may set. A caller's own field of such
    a name goes even if the answer has none: it would pass for the authorizer's word.
    """
    for name in provider.upstream_headers_on_allow:
        key = name.lower().encode()
        if key in _NEVER_TAKEN or key[:1] == b":":
            continue
        values = response.headers.get_all(key)[:MAX_FIELDS]
        if values or key != b"authorization":
            request.headers.remove(key)
        for value in values:
            request.headers.add(key, value)


def denied(
    provider: ExternalAuthorizer, response: Response, body: bytes, policy: str, rule: str
) -> Respond:
    """The caller's answer: the authorizer's status (3xx, 4xx), fields and body."""
    named = {each.lower().encode() for each in provider.downstream_headers_on_deny}
    told: list[Pair] = [
        pair
        for pair in response.headers.pairs
        if pair[0] not in _NEVER_TAKEN
        and pair[0][:1] != b":"
        and (not named or pair[0] in named or pair[0] in _ALWAYS_TOLD)
    ][:MAX_FIELDS]
    status = response.status if 300 <= response.status < 500 and response.status != 304 else 403
    said = f"the external authorizer {provider.name} denies with {response.status}"
    return _denial(status, policy, rule, said, body, tuple(told))


def _denial(
    status: int,
    policy: str,
    rule: str,
    reason: str,
    body: bytes = b"RBAC: access denied",
    headers: tuple[Pair, ...] = (),
) -> Respond:
    return Respond(
        status, body, headers, flag="UAEX", policy=policy, rule=rule, reason=reason,
        grpc_status=GRPC_PERMISSION_DENIED,
    )  # fmt: skip
