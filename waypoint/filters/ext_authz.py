"""CUSTOM AuthorizationPolicy: an external authorizer is asked (Envoy's ext_authz, HTTP and gRPC).

First of all filters, before tokens are looked at. Only a request that a rule matches is asked
about; with several policies each authorizer must agree, in the policies' order. Over HTTP 200
allows, a 5xx is an error, whatever else is the authorizer's denial and answers the caller, within
bounds. Errors, silence and no endpoint deny unless the provider fails open.

Over HTTP the question is Host, method, path, Authorization and the fields that the provider names
(names have the syntax of policies' strings); over gRPC it is the whole head
(`waypoint.filters.ext_authz_grpc`). Of an answer only end-to-end fields are taken, never those that
frame a message or name the caller.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from mesh.errors import Unavailable
from mesh.grpc.codec import encode_message
from mesh.model.l7_policy import ExternalAuthorizer, L7Authorization
from mesh.proto.ext_authz_pb2 import CheckResponse
from waypoint.filters import ext_authz_grpc
from waypoint.filters.authorize import GRPC_PERMISSION_DENIED, compile_policy, is_asked
from waypoint.filters.chain import (
    FRAMING,
    Answer,
    Headers,
    Pair,
    PassingFilter,
    Request,
    Respond,
    Response,
    Verdict,
    Wait,
    add_to_log,
)
from waypoint.filters.strings import Matches, any_of

MAX_FIELDS: Final = 32
_NEVER_TAKEN: Final = FRAMING | {
    b"trailer", b"keep-alive", b"proxy-authenticate", b"x-forwarded-client-cert",
}  # fmt: skip
_TOLD: Final = "ext_authz.told"
_CHANGED: Final = "ext_authz.changed"
_ALWAYS_TOLD: Final = frozenset({b"location", b"www-authenticate", b"content-type"})
# The caller's own word to the callee, unless the authorizer says another.
_CALLERS: Final = frozenset({b"authorization"})

_BODILESS: Final = frozenset({204, 205, 304})


class Place(Protocol):
    """What the exchange runs in: `waypoint.place`."""

    @property
    def protocol(self) -> str:
        """What the caller speaks."""
        ...

    async def read_body(self, most: int) -> tuple[bytes, bool] | None:
        """The beginning of the body, and whether it is all; None: it did not come."""
        ...


Ask = Callable[[Any, str, int, Request, bytes, float], Awaitable[Answer]]
"""The shell: (the place, a service, its port, the question's head and body, seconds) -> the
answer. Raises Unavailable."""
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

    def __init__(
        self, policies: Iterable[L7Authorization], ask: Ask, clock: Callable[[], float] = float
    ) -> None:
        """`clock` gives seconds since the epoch."""
        self._policies = [
            (each.provider, compile_policy(each))
            for each in policies
            if is_asked(each) and each.provider is not None
        ]
        self._ask = ask
        self._clock = clock

    def would_ask(self, request: Request) -> list[tuple[str, str, str]]:
        """The policy, the rule and the provider's name of each question that a request raises."""
        return [
            (policy.key, rule or "", provider.name)
            for provider, policy in self._policies
            if policy.problem or (rule := policy.match(request)) is not None
        ]

    def on_request(self, request: Request) -> Verdict:
        """Wait for the authorizers, if a rule matches; deny what cannot be judged."""
        found = []
        for provider, policy in self._policies:
            if policy.problem:
                return refusal(403, policy.key, "", policy.problem)
            rule = policy.match(request)
            if rule is not None:
                found.append(_Found(provider, policy.key, rule))
        return Wait(lambda: self._ask_all(request, found)) if found else None

    async def _ask_all(self, request: Request, found: list[_Found]) -> Respond | None:
        place: Place = request.notes.pop(PLACE)
        epoch = self._clock()
        for each in found:
            provider = each.provider
            if provider.problem:
                return refusal(provider.status_on_error, each.policy, each.rule, provider.problem)
            body, is_whole = None, True
            if provider.max_body_bytes:
                read = await place.read_body(provider.max_body_bytes)
                if read is None:
                    return refusal(408, each.policy, each.rule, "the body did not come in time")
                body, is_whole = read
                if not is_whole and not provider.allows_partial_body:
                    said = f"more than {provider.max_body_bytes} bytes, which {provider.name} reads"
                    return refusal(413, each.policy, each.rule, said, b"")
            try:
                if provider.protocol == "grpc":
                    denial = await self._check(place, each, request, body, is_whole, epoch)
                else:
                    denial = await self._fetch(place, each, request, body, is_whole)
            except Unavailable as error:
                if provider.is_fail_open:
                    # What the caller says under its names is no more the authorizer's word now.
                    take(provider, Response(status=200), request)
                    _note(request, each, "failed open")
                    continue
                said = f"the external authorizer {provider.name} cannot be asked: {error}"
                return refusal(provider.status_on_error, each.policy, each.rule, said)
            if denial is not None:
                return denial
            _note(request, each, "allowed")
        return None

    async def _fetch(
        self, place: Place, found: _Found, request: Request, body: bytes | None, is_whole: bool
    ) -> Respond | None:
        """Ask over HTTP."""
        provider = found.provider
        asked = question(provider, request, body, is_partial=not is_whole)
        answer = await self._ask(
            place, provider.service, provider.port, asked, body or b"", provider.timeout_seconds
        )
        response = answer.response
        if response.status >= 500:
            raise Unavailable(f"it answers {response.status}")
        if response.status != 200:
            return denied(provider, response, answer.body, found.policy, found.rule)
        take(provider, response, request)
        return None

    async def _check(
        self,
        place: Place,
        found: _Found,
        request: Request,
        body: bytes | None,
        is_whole: bool,
        epoch: float,
    ) -> Respond | None:
        """Ask over gRPC."""
        provider = found.provider
        asked = ext_authz_grpc.check_request(
            request,
            body=body,
            packs_as_bytes=provider.packs_body_as_bytes,
            is_partial=not is_whole,
            protocol=place.protocol,
            extensions={"policy": found.policy, "rule": found.rule, "service": request.service},
            epoch=epoch,
        )
        seconds = provider.timeout_seconds
        answer = await self._ask(
            place,
            provider.service,
            provider.port,
            ext_authz_grpc.call(provider.service, ext_authz_grpc.METHOD, seconds, request),
            encode_message(asked),
            seconds,
        )
        said = ext_authz_grpc.hear(answer)
        if said.status.code:
            return checked(provider, said, found.policy, found.rule)
        allowed = said.ok_response
        upstream = ext_authz_grpc.changes(allowed.headers)
        told = ext_authz_grpc.changes(allowed.response_headers_to_add, by_action=True)
        for name in allowed.headers_to_remove[:MAX_FIELDS]:
            if may_say(name.lower().encode()):
                request.headers.remove(name.lower().encode())
        ext_authz_grpc.apply((each for each in upstream if may_say(each[1])), request.headers)
        if told:
            kept = [each for each in told if may_say(each[1])]
            request.notes.setdefault(_CHANGED, []).extend(kept)
        return None

    def on_response(self, request: Request, response: Response) -> Respond | None:
        """Tell the caller what the authorizers that allowed it wanted told."""
        for name, value in request.notes.get(_TOLD, ()):
            response.headers.add(name, value)
        ext_authz_grpc.apply(request.notes.get(_CHANGED, ()), response.headers)
        return None


def question(
    provider: ExternalAuthorizer,
    request: Request,
    body: bytes | None = None,
    *,
    is_partial: bool = False,
) -> Request:
    """What the authorizer is asked about `request`. `body` None: it wants none."""
    is_wanted = _names(provider.request_headers)
    pairs = [
        pair
        for pair in request.headers.pairs
        if pair[0] not in FRAMING and (pair[0] == b"authorization" or is_wanted(pair[0]))
    ]
    for name, value in provider.additional_headers:
        key = name.encode()
        if key not in FRAMING:
            pairs = [pair for pair in pairs if pair[0] != key]
            pairs.append((key, value.encode()))
    pairs = [pair for pair in pairs if pair[0] != ext_authz_grpc.PARTIAL]
    if body is not None:
        pairs.append((ext_authz_grpc.PARTIAL, b"true" if is_partial else b"false"))
    pairs.append((b"content-length", b"%d" % len(body or b"")))
    return Request(
        method=request.method, scheme=request.scheme, authority=request.authority,
        path=provider.path_prefix.encode() + request.path, query=request.query,
        headers=Headers(pairs),
    )  # fmt: skip


def take(provider: ExternalAuthorizer, response: Response, request: Request) -> None:
    """Set the fields of an allowing answer that the provider may set. A caller's own field of such
    a name goes even if the answer has none: it would pass for the authorizer's word.
    """
    if provider.upstream_headers_on_allow:
        is_taken = _names(provider.upstream_headers_on_allow)
        # `*` is whatever the authorizer says, and no claim to every field of the caller's.
        is_its = _names(tuple(each for each in provider.upstream_headers_on_allow if each != "*"))
        said = [pair for pair in response.headers.pairs if may_say(pair[0]) and is_taken(pair[0])]
        names = {key for key, _ in said}
        for key in {key for key, _ in request.headers.pairs}:
            if key in names or (is_its(key) and may_say(key) and key not in _CALLERS):
                request.headers.remove(key)
        for key, value in said[:MAX_FIELDS]:
            request.headers.add(key, value)
    if provider.downstream_headers_on_allow:
        is_told = _names(provider.downstream_headers_on_allow)
        told = [pair for pair in response.headers.pairs if may_say(pair[0]) and is_told(pair[0])]
        request.notes.setdefault(_TOLD, []).extend(told[:MAX_FIELDS])


def denied(
    provider: ExternalAuthorizer, response: Response, body: bytes, policy: str, rule: str
) -> Respond:
    """The caller's answer: the authorizer's status (3xx, 4xx), fields and body."""
    is_named = _names(provider.downstream_headers_on_deny or ("*",))
    told: list[Pair] = [
        pair
        for pair in response.headers.pairs
        if may_say(pair[0]) and (is_named(pair[0]) or pair[0] in _ALWAYS_TOLD)
    ][:MAX_FIELDS]
    status = response.status if 300 <= response.status < 500 and response.status != 304 else 403
    said = f"the external authorizer {provider.name} denies with {response.status}"
    return refusal(status, policy, rule, said, body, tuple(told))


def _note(request: Request, found: _Found, outcome: str) -> None:
    """For the access log: who let it pass."""
    add_to_log(request, "ext_authz", f"{found.policy} {found.provider.name} {outcome}")


def _names(texts: tuple[str, ...]) -> Matches:
    return any_of(texts, folds_case=True)


def may_say(name: bytes) -> bool:
    """Whether who is asked may set a field: none that frames a message or names the caller."""
    return name not in _NEVER_TAKEN and name[:1] != b":"


def checked(provider: ExternalAuthorizer, said: CheckResponse, policy: str, rule: str) -> Respond:
    """The caller's answer to a denial over gRPC. Raises Unavailable if it cannot be sent."""
    told = said.denied_response
    changed = ext_authz_grpc.changes(told.headers)
    headers = ext_authz_grpc.pairs_of(each for each in changed if may_say(each[1]))
    code = told.status.code
    status = code if 200 <= code <= 599 and code not in _BODILESS else 403
    reason = f"the external authorizer {provider.name} denies with {status}"
    body = told.body.encode() if said.HasField("denied_response") else b"RBAC: access denied"
    return refusal(status, policy, rule, reason, body, headers)


def refusal(
    status: int,
    policy: str,
    rule: str,
    reason: str,
    body: bytes = b"RBAC: access denied",
    headers: tuple[Pair, ...] = (),
) -> Respond:
    """The caller's answer when it may not pass."""
    return Respond(
        status, body, headers, flag="UAEX", policy=policy, rule=rule, reason=reason,
        grpc_status=GRPC_PERMISSION_DENIED,
    )  # fmt: skip
