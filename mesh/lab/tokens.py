"""Service account tokens: bound tokens as a Kubernetes API server issues them, by a lab's own key.

The key lives as long as the lab. The controller gets the public half and so can tell who asks:
service account, pod and node are claims of the token.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from joserfc import jwt
from joserfc.jwk import ECKey

ISSUER = "https://kubernetes.default.svc.cluster.local"
AUDIENCE = "istio-ca"
LIFETIME_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a token speaks for."""

    namespace: str
    service_account: str
    service_account_uid: str
    pod: str
    pod_uid: str
    node: str
    node_uid: str


class Issuer:
    """Signs tokens with ES256."""

    def __init__(self) -> None:
        self._key = ECKey.generate_key("P-256", {"use": "sig", "alg": "ES256"}, auto_kid=True)

    def public_keys(self) -> str:
        """The JWKS that verifies the tokens."""
        return json.dumps({"keys": [self._key.as_dict(private=False)]})

    def issue(
        self,
        subject: Subject,
        now: float,
        *,
        audience: str = AUDIENCE,
        lifetime: float = LIFETIME_SECONDS,
    ) -> str:
        """A token for `audience`, good from `now` (epoch seconds) for `lifetime` seconds."""
        claims: dict[str, Any] = {
            "iss": ISSUER,
            "aud": [audience],
            "sub": f"system:serviceaccount:{subject.namespace}:{subject.service_account}",
            "iat": int(now),
            "nbf": int(now),
            "exp": int(now + lifetime),
            "jti": str(uuid.uuid4()),
            "kubernetes.io": {
                "namespace": subject.namespace,
                "serviceaccount": {
                    "name": subject.service_account,
                    "uid": subject.service_account_uid,
                },
                "pod": {"name": subject.pod, "uid": subject.pod_uid},
                "node": {"name": subject.node, "uid": subject.node_uid},
            },
        }
        header = {"alg": "ES256", "kid": self._key.kid}
        return str(jwt.encode(header, claims, self._key, algorithms=["ES256"]))
