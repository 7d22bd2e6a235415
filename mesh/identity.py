"""SPIFFE identities: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.

Exactly these segments, nothing else, as Istio writes them (SPIFFE-ID §2, path of
Istio's workload identity). This module parses, formats and matches; it does not look
at certificates (`mesh.tls.certificate` does).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NewType

from mesh.errors import ConfigError

TrustDomain = NewType("TrustDomain", str)

DEFAULT_TRUST_DOMAIN = TrustDomain("cluster.local")

_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]{1,253}")


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """One workload identity. Raises ConfigError when a segment is not allowed."""

    trust_domain: str
    namespace: str
    service_account: str

    def __post_init__(self) -> None:
        if not _TRUST_DOMAIN.fullmatch(self.trust_domain):
            raise ConfigError(f"not a trust domain: {self.trust_domain!r}")
        for segment in (self.namespace, self.service_account):
            if not _SEGMENT.fullmatch(segment) or segment in {".", ".."}:
                raise ConfigError(f"not a SPIFFE path segment: {segment!r}")

    def __str__(self) -> str:
        return f"spiffe://{self.principal}"

    @property
    def principal(self) -> str:
        """The form that AuthorizationPolicy compares: without the scheme."""
        return f"{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """Read `spiffe://td/ns/NS/sa/SA`. Raises ConfigError on anything else."""
        scheme, found, rest = text.partition("://")
        parts = rest.split("/")
        if (
            not found
            or scheme != "spiffe"
            or len(parts) != 5
            or parts[1] != "ns"
            or parts[3] != "sa"
        ):
            raise ConfigError(f"not a workload SPIFFE ID: {text[:200]!r}")
        return cls(parts[0], parts[2], parts[4])
