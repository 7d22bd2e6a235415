"""Who asks, and may they ask for that identity: tokens to callers, and the node rule.

A caller is whoever a token reviewer says. `SignedTokenReviewer` verifies a projected
service-account token against public keys (a JWKS file); inside Kubernetes a TokenReview
does the same behind the same protocol.

A node proxy asks for the certificates of *its* workloads. The rule (`may_request`) bounds
what a stolen node proxy token is worth: only identities of pods that run on the node of
the very pod the token is bound to. Every doubt is a refusal, and all refusals look alike
to the caller (UNAUTHENTICATED); the reason is for our log.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from mesh.cluster.objects import Pod
from mesh.errors import ConfigError, IdentityError, Refusal
from mesh.identity import SpiffeId

ALGORITHMS = ("ES256", "RS256")
MAX_TOKEN_BYTES = 16 * 1024
MAX_KEYS_BYTES = 256 * 1024
_LEEWAY_SECONDS = 5
SUBJECT_PREFIX = "system:serviceaccount:"


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated service account; the pod fields are empty for an unbound token."""

    namespace: str
    service_account: str
    pod_name: str = ""
    pod_uid: str = ""
    node: str = ""

    @property
    def account(self) -> str:
        """`namespace/service-account`, as CA_TRUSTED_NODE_ACCOUNTS lists it."""
        return f"{self.namespace}/{self.service_account}"


class TokenReviewer(Protocol):
    """Says whose token this is."""

    async def review(self, token: str) -> Caller:
        """Raises IdentityError when the token proves nothing."""
        ...


class PodIndex(Protocol):
    """The pods as the controller knows them now."""

    def pod(self, namespace: str, name: str) -> Pod | None:
        """The pod of that name, if it exists."""
        ...

    def pods_on_node(self, node: str) -> Iterable[Pod]:
        """All pods of a node."""
        ...


class SignedTokenReviewer:
    """Verifies tokens by signature: algorithm, audience, issuer and time are all required.

    The JWKS file is read again for every review (it is small, and keys rotate), so a new key
    works at once and a removed one stops at once. `clock` gives seconds since the epoch. An
    empty `issuers` accepts any issuer whose key is in the file.
    """

    def __init__(
        self,
        keys: Path,
        *,
        audiences: Collection[str],
        clock: Callable[[], float],
        issuers: Collection[str] = (),
    ) -> None:
        self._keys = keys
        self._audiences = sorted(audiences)
        self._issuers = sorted(issuers)
        self._clock = clock

    async def review(self, token: str) -> Caller:
        """Raises IdentityError when the token proves nothing, ConfigError without keys."""
        return verify_token(
            token,
            read_keys(self._keys),
            audiences=self._audiences,
            issuers=self._issuers,
            now=self._clock(),
        )


def read_keys(path: Path) -> KeySet:
    """The public keys of a JWKS file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_KEYS_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"cannot be read: {exc.strerror}", file=str(path)) from exc
    if len(content) > MAX_KEYS_BYTES:
        raise ConfigError("is too large for a set of keys", file=str(path))
    return parse_keys(content, str(path))


def parse_keys(content: bytes, origin: str = "") -> KeySet:
    """The public keys of a JWKS document. Raises ConfigError."""
    try:
        document = json.loads(content)
        if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
            raise ConfigError("is not a set of keys (JWKS)", file=origin)
        return KeySet.import_key_set(document)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, JoseError) as exc:
        raise ConfigError(f"is not a set of keys (JWKS): {exc}", file=origin) from exc


def verify_token(
    token: str,
    keys: KeySet,
    *,
    audiences: Collection[str],
    issuers: Collection[str] = (),
    now: float,
) -> Caller:
    """The caller that a signed service-account token names, at `now` (epoch seconds).

    Raises IdentityError, without a word of the token, when anything about it is wrong.
    """
    if not audiences:
        raise ConfigError("no token audience is configured")  # would accept every audience
    if len(token) > MAX_TOKEN_BYTES:
        raise IdentityError("the token is too large")
    registry = jwt.JWTClaimsRegistry(
        now=int(now),
        leeway=_LEEWAY_SECONDS,
        aud={"essential": True, "values": sorted(audiences)},
        iss={"essential": True, "values": sorted(issuers)} if issuers else {"essential": True},
        exp={"essential": True},
        sub={"essential": True},
    )
    try:
        claims = jwt.decode(token, keys, algorithms=list(ALGORITHMS)).claims
        registry.validate(claims)
    except (JoseError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        # The library's text may quote the token; its kind says enough.
        raise IdentityError(f"the token is not accepted: {type(exc).__name__}") from None
    return _caller(claims)


def may_request(
    caller: Caller,
    identity: SpiffeId,
    index: PodIndex,
    *,
    trusted_accounts: Collection[str],
) -> Refusal | None:
    """None if `caller` may have a certificate of `identity`, else why not.

    Only a trusted node account may, whose token is bound to a pod that exists with that UID
    and account, on the node that the token names (if any), for a service account of which a
    pod that has not failed runs on that node. The trust domain is not compared here. (A caller
    that names no identity gets its own, by another path.)
    """
    if caller.account not in trusted_accounts:
        return _refuse(f"{caller.account} is not a trusted node account")
    if not caller.pod_name or not caller.pod_uid:
        return _refuse(f"the token of {caller.account} is not bound to a pod")
    pod = index.pod(caller.namespace, caller.pod_name)
    if pod is None:
        return _refuse(f"the caller's pod {caller.namespace}/{caller.pod_name} does not exist")
    if pod.uid != caller.pod_uid:
        return _refuse(f"the caller's pod {caller.namespace}/{caller.pod_name} has another UID")
    if pod.service_account != caller.service_account:
        return _refuse(f"the caller's pod {caller.pod_name} runs as {pod.service_account}")
    if not pod.node:
        return _refuse(f"the caller's pod {caller.pod_name} is on no node")
    if caller.node and caller.node != pod.node:
        return _refuse(f"the token is of node {caller.node}, the caller's pod on {pod.node}")
    for other in index.pods_on_node(pod.node):
        if (
            other.namespace == identity.namespace
            and other.service_account == identity.service_account
            and other.node == pod.node
            and other.phase != "Failed"
        ):
            return None
    return _refuse(f"no pod of {identity.principal} is on node {pod.node}")


def _refuse(reason: str) -> Refusal:
    return Refusal("IDENTITY_ERROR", reason)


def _caller(claims: Mapping[str, Any]) -> Caller:
    subject = claims["sub"].removeprefix(SUBJECT_PREFIX)
    namespace, found, account = subject.partition(":")
    if not claims["sub"].startswith(SUBJECT_PREFIX) or not found or not namespace or not account:
        raise IdentityError("the token is not of a service account")
    bound = _mapping(claims.get("kubernetes.io"))
    pod, node = _mapping(bound.get("pod")), _mapping(bound.get("node"))
    if bound.get("namespace", namespace) != namespace:
        raise IdentityError("the token contradicts itself about its namespace")
    return Caller(
        namespace=namespace,
        service_account=account,
        pod_name=_text(pod.get("name")),
        pod_uid=_text(pod.get("uid")),
        node=_text(node.get("name")),
    )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


class Authenticator:
    """The caller behind the metadata of a call: bearer token and cluster."""

    def __init__(self, reviewer: TokenReviewer, cluster_id: str) -> None:
        self._reviewer = reviewer
        self._cluster_id = cluster_id

    async def caller(self, metadata: Mapping[str, str]) -> Caller:
        """Raises IdentityError without a good token, or for a cluster that is not ours."""
        if metadata.get("clusterid", self._cluster_id) != self._cluster_id:
            raise IdentityError("the caller's cluster is not known here")
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise IdentityError("no bearer token")
        return await self._reviewer.review(token.strip())
