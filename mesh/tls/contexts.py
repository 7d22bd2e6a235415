"""TLS contexts kept as long as the certificates behind them. Parameters are `context`'s."""

from __future__ import annotations

import ssl
from collections.abc import Callable

from mesh.identity import SpiffeId
from mesh.tls import context as tls
from mesh.tls.certificate import Certificate


class TlsContexts:
    """TLS contexts by identity, rebuilt when the certificate behind them was renewed."""

    def __init__(self) -> None:
        self._servers: dict[SpiffeId, tuple[Certificate, ssl.SSLContext]] = {}
        self._clients: dict[SpiffeId, tuple[Certificate, ssl.SSLContext]] = {}

    def server(self, certificate: Certificate) -> ssl.SSLContext:
        """For accepting tunnels. Raises IdentityError."""
        return _kept(self._servers, certificate, tls.server_context)

    def client(self, certificate: Certificate) -> ssl.SSLContext:
        """For dialling tunnels. Raises IdentityError."""
        return _kept(self._clients, certificate, tls.client_context)

    def forget(self, identity: SpiffeId) -> None:
        """Its certificate was dropped."""
        self._servers.pop(identity, None)
        self._clients.pop(identity, None)


def _kept(
    contexts: dict[SpiffeId, tuple[Certificate, ssl.SSLContext]],
    certificate: Certificate,
    make: Callable[[Certificate], ssl.SSLContext],
) -> ssl.SSLContext:
    kept = contexts.get(certificate.identity)
    if kept is None or kept[0] is not certificate:
        kept = contexts[certificate.identity] = (certificate, make(certificate))
    return kept[1]
