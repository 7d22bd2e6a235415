"""Whose token is this, asked of the API server: a TokenReview, remembered for a moment.

The server checks signature, time, audience, and that the pod and service account which the
token is bound to still exist. A good answer is kept for a minute and a bad one for seconds,
by the token's hash, in a bounded table: a node proxy that reconnects often, and a caller
who hammers us with rubbish, cost the API server little.

While the API server does not answer, a token is judged by the keys that it published before:
signature, issuer, audience and time as it would, and the token must be bound to a pod that we
know, with its uid and account. What it alone could tell (a token that was revoked) is not
known then; an unbound token therefore proves nothing.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from istiod_lite.authenticate import (
    MAX_TOKEN_BYTES,
    SUBJECT_PREFIX,
    Caller,
    PodIndex,
    parse_keys,
    verify_token,
)
from istiod_lite.saved_state import TokenKeys
from mesh.cluster.api import VersionedCluster
from mesh.errors import ConfigError, IdentityError, Unavailable

MAX_REMEMBERED = 4096
_GOOD_SECONDS = 60.0
_BAD_SECONDS = 5.0
_EXTRA = "authentication.kubernetes.io/"


@dataclass
class _Answer:
    """What is known of one token; whoever asks meanwhile waits for the first to learn it."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    until: float = 0.0
    caller: Caller | None = None
    reason: str = ""


class Known(PodIndex, Protocol):
    """What is known without asking: the pods, and the keys of tokens."""

    keys: TokenKeys


class KubernetesTokenReviewer:
    """A `TokenReviewer` by way of the API server; tokens must be for one of `audiences`.

    Without `known` nothing is accepted while it is silent. `clock` gives seconds since the epoch.
    """

    def __init__(
        self,
        cluster: VersionedCluster,
        audiences: Sequence[str],
        known: Callable[[], Known] | None = None,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._known = known
        self._clock = clock
        self._cluster = cluster
        self._audiences = tuple(audiences)
        self._answers: OrderedDict[bytes, _Answer] = OrderedDict()

    async def review(self, token: str) -> Caller:
        """Raises IdentityError when the token proves nothing, Unavailable when nobody can tell."""
        if len(token) > MAX_TOKEN_BYTES:
            raise IdentityError("the token is too large")
        # Only the hash is kept: a dump of our memory should not hold tokens for longer than a call.
        key = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        answer = self._answers.setdefault(key, _Answer())
        self._answers.move_to_end(key)
        while len(self._answers) > MAX_REMEMBERED:
            self._answers.popitem(last=False)
        async with answer.lock:
            if trio.current_time() >= answer.until:
                await self._ask(token, answer)
        if answer.caller is None:
            raise IdentityError(answer.reason)
        return answer.caller

    async def _ask(self, token: str, answer: _Answer) -> None:
        try:
            review = await self._cluster.create(
                {
                    "apiVersion": "authentication.k8s.io/v1",
                    "kind": "TokenReview",
                    "metadata": {},
                    "spec": {"token": token, "audiences": list(self._audiences)},
                }
            )
        except Unavailable:
            if self._known is None:
                raise
            answer.until = trio.current_time() + _BAD_SECONDS
            try:
                known = self._known()
                answer.caller = judged(token, known, self._audiences, self._clock())
                answer.reason = ""
            except IdentityError as exc:
                answer.caller, answer.reason = None, f"{exc} (the API server cannot be asked)"
            return
        try:
            answer.caller, answer.reason = caller_of(review.get("status"), self._audiences), ""
            answer.until = trio.current_time() + _GOOD_SECONDS
        except IdentityError as exc:
            answer.caller, answer.reason = None, str(exc)
            answer.until = trio.current_time() + _BAD_SECONDS


def judged(token: str, known: Known, audiences: Sequence[str], now: float) -> Caller:
    """The caller, by what is known while nobody can be asked. Raises IdentityError."""
    if not known.keys.jwks or not known.keys.issuer:
        raise IdentityError("the keys of tokens are not known")
    try:
        keys = parse_keys(known.keys.jwks)
    except ConfigError as exc:
        raise IdentityError("the keys of tokens cannot be read") from exc
    caller = verify_token(token, keys, audiences=audiences, issuers=[known.keys.issuer], now=now)
    pod = known.pod(caller.namespace, caller.pod_name) if caller.pod_name else None
    if pod is None or not pod.uid or pod.uid != caller.pod_uid:
        raise IdentityError("the token is not bound to a pod that is known")
    if pod.service_account != caller.service_account:
        raise IdentityError("the token is not of its pod's account")
    return caller


def caller_of(status: Any, audiences: Sequence[str]) -> Caller:
    """The caller that the `status` of a TokenReview names. Raises IdentityError."""
    if not isinstance(status, Mapping) or status.get("authenticated") is not True:
        raise IdentityError("the token is not accepted by the API server")
    # A server that knows nothing of audiences would accept a token that was meant for others.
    if not set(_texts(status.get("audiences"))) & set(audiences):
        raise IdentityError("the token is for another audience")
    user = status.get("user")
    if not isinstance(user, Mapping):
        raise IdentityError("the token is nobody's")
    name = user.get("username")
    if not isinstance(name, str) or not name.startswith(SUBJECT_PREFIX):
        raise IdentityError("the token is not of a service account")
    namespace, found, account = name.removeprefix(SUBJECT_PREFIX).partition(":")
    if not found or not namespace or not account:
        raise IdentityError("the token is not of a service account")
    extra = user.get("extra")
    bound = extra if isinstance(extra, Mapping) else {}

    def one(key: str) -> str:
        values = _texts(bound.get(_EXTRA + key))
        return values[0] if len(values) == 1 else ""

    return Caller(
        namespace=namespace,
        service_account=account,
        pod_name=one("pod-name"),
        pod_uid=one("pod-uid"),
        node=one("node-name"),
    )


def _texts(values: Any) -> list[str]:
    return [each for each in values if isinstance(each, str)] if isinstance(values, list) else []
