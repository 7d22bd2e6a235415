"""RequestAuthentication (security.istio.io/v1): which tokens count, and what they say.

A request without a token goes on without claims; whether that is enough is authorization's to say.
A token that is there must be good: its issuer configured, its signature by a key of that issuer,
its times and audience right, or the request is answered 401. Only asymmetric algorithms count.

Keys come with the policy, or from the issuer by `waypoint.filters.jwks`; only when they are not
here yet does a request wait for them. Headers that a policy fills from claims are taken from
every request first, so that nobody fills them himself.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol
from urllib.parse import parse_qsl, unquote_plus

from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from mesh.model.l7_policy import JwtRule, RequestAuthentication, TokenPlace
from waypoint.filters.chain import FRAMING, PassingFilter, Request, Respond, Verdict, Wait

ALGORITHMS: Final = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA", "Ed25519"),
)
GRPC_UNAUTHENTICATED: Final = 16
MAX_TOKEN_BYTES: Final = 16 * 1024
MAX_KEYS: Final = 1000
LEEWAY_SECONDS: Final = 60.0
_LARGEST_TIME: Final = 1 << 53
_DEFAULT_PLACES: Final = (
    TokenPlace("header", "authorization", "Bearer "),
    TokenPlace("param", "access_token"),
)
_NEVER_FILLED: Final = FRAMING | {b""}
_ALWAYS_SPLIT: Final = ("scope", "permission")


class KeySource(Protocol):
    """The keys of one issuer."""

    def known(self, kid: str) -> KeySet | None:
        """Its keys, when they are here and one of them may be called `kid`; else they are to be
        fetched.
        """
        ...

    async def fetch(self, kid: str) -> KeySet | None:
        """Its keys as they are now; None when they cannot be had. Bounds its own time."""
        ...


KeySources = Callable[[JwtRule], KeySource]


class Bad(Exception):
    """Why a token does not count."""


@dataclass(frozen=True, slots=True)
class _Token:
    place: TokenPlace
    text: str
    header: Mapping[str, Any]
    claims: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Rule:
    policy: str
    rule: JwtRule
    keys: KeySource


class Jwt(PassingFilter):
    """The RequestAuthentications of one service. `clock` gives seconds since the epoch."""

    name = "RequestAuthentication"

    def __init__(
        self,
        policies: Iterable[RequestAuthentication],
        sources: KeySources,
        clock: Callable[[], float],
    ) -> None:
        self._rules = [
            _Rule(f"{policy.namespace}/{policy.name}", rule, sources(rule))
            for policy in policies
            for rule in policy.rules
        ]
        self._clock = clock
        self._places = tuple(
            dict.fromkeys(p for each in self._rules for p in each.rule.places or _DEFAULT_PLACES)
        )
        self._filled = tuple(
            dict.fromkeys(
                name.lower().encode()
                for each in self._rules
                for name in (each.rule.payload_header, *(h for h, _ in each.rule.claim_headers))
                if name.lower().encode() not in _NEVER_FILLED
            )
        )

    def on_request(self, request: Request) -> Verdict:
        """Accept the token, refuse it, or wait for its issuer's keys."""
        for name in self._filled:
            request.headers.remove(name)
        try:
            found = self._find(request)
            if found is None:
                return None
            token, rules = found
            pending: list[_Rule] = []
            for each in rules:
                keys = each.keys.known(_kid(token))
                if keys is None:
                    pending.append(each)
                    continue
                self._check(each.rule, token, keys)
                self._accept(request, each.rule, token)
                return None
        except Bad as error:
            return self._refuse(str(error))

        async def ask() -> Respond | None:
            return await self._ask(request, token, pending)

        return Wait(ask)

    async def _ask(self, request: Request, token: _Token, rules: list[_Rule]) -> Respond | None:
        reason = "Jwks remote fetch is failed"
        for each in rules:
            keys = await each.keys.fetch(_kid(token))
            if keys is None:
                continue
            try:
                self._check(each.rule, token, keys)
            except Bad as error:
                reason = str(error)
                continue
            self._accept(request, each.rule, token)
            return None
        return self._refuse(reason)

    def _find(self, request: Request) -> tuple[_Token, list[_Rule]] | None:
        """The token, and the rules that may accept it. Raises Bad."""
        texts: dict[str, TokenPlace] = {}
        for place in self._places:
            for text in _texts(request, place):
                texts.setdefault(text, place)
        if not texts:
            return None
        if len(texts) > 1:
            # Which of them counts would be anybody's guess, so none does.
            raise Bad("several different Jwts are sent")
        (text, place), *_ = texts.items()
        token = _read(text, place)
        issuer = token.claims.get("iss", "")
        rules = [
            each
            for each in self._rules
            if each.rule.issuer in (issuer, "") and place in (each.rule.places or _DEFAULT_PLACES)
        ]
        if not rules:
            raise Bad("Jwt issuer is not configured")
        return token, rules

    def _check(self, rule: JwtRule, token: _Token, keys: KeySet) -> None:
        """Raises Bad."""
        _verify(token, keys)
        now, claims = self._clock(), token.claims
        expires, begins = _number(claims, "exp"), _number(claims, "nbf")
        if expires is not None and now > expires + LEEWAY_SECONDS:
            raise Bad("Jwt is expired")
        if begins is not None and now < begins - LEEWAY_SECONDS:
            raise Bad("Jwt not yet valid")
        audience = claims.get("aud", [])
        listed = audience if isinstance(audience, list) else [audience]
        if rule.audiences and not any(each in rule.audiences for each in listed):
            raise Bad("Audiences in Jwt are not allowed")

    def _accept(self, request: Request, rule: JwtRule, token: _Token) -> None:
        claims = dict(token.claims)
        for name in (*_ALWAYS_SPLIT, *rule.space_delimited_claims):
            if isinstance(claims.get(name), str):
                claims[name] = claims[name].split()
        request.claims = claims
        issuer, subject = claims.get("iss", ""), claims.get("sub", "")
        request.principal = f"{issuer}/{subject}" if issuer and subject else ""
        if not rule.forwards_token:
            for place in rule.places or _DEFAULT_PLACES:
                if place is token.place or _texts(request, place):
                    _remove(request, place)
        if rule.payload_header.lower().encode() not in _NEVER_FILLED:
            payload = token.text.split(".")[1].encode()
            request.headers.set(rule.payload_header.lower().encode(), payload)
        for header, claim in rule.claim_headers:
            value = _look_up(token.claims, claim)
            if value is not None and header.lower().encode() not in _NEVER_FILLED:
                request.headers.set(header.lower().encode(), value)

    def _refuse(self, reason: str) -> Respond:
        return Respond(
            401,
            reason.encode(),
            ((b"www-authenticate", b'Bearer realm="mesh", error="invalid_token"'),),
            flag="DENY",
            policy=self._rules[0].policy,
            reason=reason,
            grpc_status=GRPC_UNAUTHENTICATED,
        )


def read_keys(text: str | bytes) -> KeySet:
    """A JWKS. Raises Bad."""
    try:
        found = json.loads(text)
        if isinstance(found, dict) and len(found.get("keys", ())) > MAX_KEYS:
            raise Bad(f"the Jwks has more than {MAX_KEYS} keys")
        return KeySet.import_key_set(found)
    except (ValueError, KeyError, TypeError, AttributeError, JoseError, RecursionError) as exc:
        raise Bad(f"the Jwks cannot be read: {exc}") from exc


class InlineKeys:
    """Keys that came with the policy."""

    def __init__(self, jwks: str) -> None:
        try:
            self._keys: KeySet | None = read_keys(jwks)
        except Bad:
            self._keys = None

    def known(self, kid: str) -> KeySet | None:
        """All of them."""
        del kid
        return self._keys

    async def fetch(self, kid: str) -> KeySet | None:
        """There are no others."""
        del kid
        return self._keys


def _kid(token: _Token) -> str:
    kid = token.header.get("kid", "")
    return kid if isinstance(kid, str) else ""


def _verify(token: _Token, keys: KeySet) -> None:
    algorithm, kid = token.header.get("alg"), _kid(token)
    if algorithm not in ALGORITHMS:
        raise Bad("Jwt header [alg] is not supported")
    fitting = [key for key in keys.keys if not kid or key.kid in (kid, None)]
    if not fitting:
        raise Bad("Jwks doesn't have key to match kid or alg from Jwt")
    for key in fitting[:16]:
        try:
            jws.deserialize_compact(token.text, key, algorithms=list(ALGORITHMS))
        except (JoseError, ValueError, TypeError):
            continue
        return
    raise Bad("Jwt verification fails")


def _read(text: str, place: TokenPlace) -> _Token:
    parts = text.split(".")
    if len(parts) != 3 or len(text) > MAX_TOKEN_BYTES:
        raise Bad("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections")
    header, claims = _decode(parts[0]), _decode(parts[1])
    if "crit" in header:
        raise Bad("Jwt header [crit] is not supported")
    return _Token(place, text, header, claims)


def _decode(part: str) -> dict[str, Any]:
    try:
        padded = part + "=" * (-len(part) % 4)
        found = json.loads(
            base64.b64decode(padded, altchars=b"-_", validate=True),
            object_pairs_hook=_once,
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError) as exc:
        raise Bad("Jwt is not base64url encoded JSON") from exc
    if not isinstance(found, dict):
        raise Bad("Jwt is not base64url encoded JSON")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A member that is there twice is read in two ways. Raises ValueError."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a member is there twice")
    return found


def _refuse_constant(name: str) -> object:
    """NaN is later and earlier than nothing. Raises ValueError."""
    raise ValueError(f"{name} is no JSON")


def _number(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Bad(f"Jwt claim [{name}] is no number")
    if not -_LARGEST_TIME < value < _LARGEST_TIME:
        raise Bad(f"Jwt claim [{name}] is out of range")
    return float(value)


def _texts(request: Request, place: TokenPlace) -> list[str]:
    match place.kind:
        case "header":
            values = request.headers.get_all(place.name.lower().encode())
            found = [value.decode("latin-1") for value in values]
            prefix = place.prefix
            # The scheme's name has no case (RFC 9110 section 11.1).
            return [v[len(prefix) :] for v in found if v.lower().startswith(prefix.lower())]
        case "param":
            pairs = _query(request)
            return [value for name, value in pairs if name == place.name]
        case "cookie":
            return [value for name, value in _cookies(request) if name == place.name]


def _query(request: Request) -> list[tuple[str, str]]:
    try:
        return parse_qsl(request.query.decode("latin-1"), True, max_num_fields=1000)
    except ValueError as exc:
        raise Bad("the query has too many parameters to look for a Jwt in") from exc


def _parameter_name(part: bytes) -> str:
    return unquote_plus(part.partition(b"=")[0].decode("latin-1"))


def _cookies(request: Request) -> list[tuple[str, str]]:
    sent = b"; ".join(request.headers.get_all(b"cookie")).decode("latin-1")
    pairs = [each.partition("=") for each in sent.split(";")]
    return [(name.strip(), value.strip()) for name, _, value in pairs]


def _remove(request: Request, place: TokenPlace) -> None:
    match place.kind:
        case "header":
            request.headers.remove(place.name.lower().encode())
        case "param":
            # The others go on as they were sent, byte for byte.
            parts = request.query.split(b"&")
            kept = [each for each in parts if _parameter_name(each) != place.name]
            request.query = b"&".join(kept)
        case "cookie":
            left = [f"{n}={v}" for n, v in _cookies(request) if n and n != place.name]
            request.headers.remove(b"cookie")
            if left:
                request.headers.set(b"cookie", "; ".join(left).encode("latin-1"))


def _look_up(claims: Mapping[str, Any], path: str) -> bytes | None:
    """A claim as a header value, nested by dots; None when it is no plain value."""
    found: Any = claims
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    if isinstance(found, bool):
        return b"true" if found else b"false"
    if not isinstance(found, str | int):
        return None
    text = str(found)
    return text.encode() if text.isprintable() else None
