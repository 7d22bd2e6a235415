"""The TLS contexts of the mesh, and the judgement of the peer behind a finished handshake.

TLS 1.3 only, ALPN `h2`, no session tickets and no resumption. OpenSSL verifies the chain
and the key usage; who the peer *is* is judged here, from the leaf, once the handshake is
done: call `verify_parameters` and then `verify_client_peer` or `verify_server_peer` before
the first byte of data is believed.

Contexts are built from PEM in memory. Python's ssl reads a key only from a path, so the
key goes through an anonymous memfd that exists only during the call; it never has a name.
Building one costs about a millisecond: keep the context as long as its certificate.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator
from typing import Protocol

from mesh.errors import ConfigError, IdentityError
from mesh.identity import SpiffeId
from mesh.tls.certificate import Certificate, peer_identities, readable_roots

ALPN = "h2"
ALLOWED_SUITES = frozenset({"TLS_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256"})


class Negotiated(Protocol):
    """The part of an SSLObject or SSLSocket that tells what was agreed."""

    def version(self) -> str | None:
        """The protocol version."""
        ...

    def cipher(self) -> tuple[str, str, int] | None:
        """Suite name, protocol, secret bits."""
        ...

    def selected_alpn_protocol(self) -> str | None:
        """The ALPN protocol."""
        ...


def server_context(certificate: Certificate) -> ssl.SSLContext:
    """Accept HBONE: present `certificate`, require one of the peer. Raises IdentityError."""
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    _trust(context, certificate.roots_pem)
    _present(context, certificate.chain_pem, certificate.key_pem)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(certificate: Certificate) -> ssl.SSLContext:
    """Dial HBONE: present `certificate`, verify the chain; no SNI. Raises IdentityError.

    Names are not compared here: `verify_server_peer` compares SPIFFE IDs instead.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    _trust(context, certificate.roots_pem)
    _present(context, certificate.chain_pem, certificate.key_pem)
    return context


def control_plane_client(root_pem: bytes | None) -> ssl.SSLContext:
    """Dial the control plane: its name is verified against `root_pem`, or the system's roots.

    Raises IdentityError when `root_pem` holds no readable root: trusting nothing by accident
    would look like a network failure later.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    if root_pem is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _trust(context, root_pem)
    return context


def control_plane_server(chain_pem: bytes, key_pem: bytes) -> ssl.SSLContext:
    """Serve the control plane: callers prove themselves by token, not by certificate.

    Raises IdentityError.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    _present(context, chain_pem, key_pem)
    return context


def verify_parameters(session: Negotiated) -> None:
    """Refuse what the contexts cannot forbid: a suite outside AES-GCM, or no `h2`.

    Python 3.11 has no call to choose TLS 1.3 suites, so a peer that insists on another one
    gets this far and no further. Raises IdentityError.
    """
    suite = session.cipher()
    if session.version() != "TLSv1.3" or suite is None or suite[0] not in ALLOWED_SUITES:
        raise IdentityError(f"the peer insists on {suite[0] if suite else 'no cipher'}")
    if session.selected_alpn_protocol() != ALPN:
        raise IdentityError("the peer does not speak h2 (ALPN)")


def verify_client_peer(der: bytes | None, own_trust_domain: str) -> SpiffeId:
    """The identity of who dialled us. Raises IdentityError.

    It is the first SPIFFE ID of the leaf, and it must belong to our trust domain; what it
    may do is for policy.
    """
    identities = peer_identities(_presented(der))
    if not identities:
        raise IdentityError("the peer's certificate holds no SPIFFE ID")
    if identities[0].trust_domain != own_trust_domain:
        raise IdentityError(
            f"{identities[0]} is not of trust domain {own_trust_domain}",
            hint="both ends must be configured with the same trust domain",
        )
    return identities[0]


def verify_server_peer(der: bytes | None, expected: frozenset[SpiffeId]) -> SpiffeId:
    """The identity of whom we dialled, which must be one of `expected`. Raises IdentityError."""
    identities = peer_identities(_presented(der))
    for identity in identities:
        if identity in expected:
            return identity
    wanted = ", ".join(sorted(map(str, expected))) or "nobody"
    got = ", ".join(map(str, identities)) or "no SPIFFE ID"
    raise IdentityError(f"expected {wanted}, the peer is {got}")


def _presented(der: bytes | None) -> bytes:
    if not der:
        raise IdentityError("the peer presented no certificate")
    return der


def _context(protocol: ssl._SSLMethod) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols([ALPN])
    return context


def _trust(context: ssl.SSLContext, roots_pem: bytes) -> None:
    roots = readable_roots(roots_pem)
    if not roots:
        raise IdentityError("no root certificate can be read in the trust bundle")
    try:
        context.load_verify_locations(cadata=b"".join(roots).decode("ascii"))
    except (UnicodeDecodeError, ssl.SSLError) as exc:
        raise IdentityError(f"the trust bundle cannot be used: {exc}") from exc


def _present(context: ssl.SSLContext, chain_pem: bytes, key_pem: bytes) -> None:
    try:
        with _anonymous_file(chain_pem + b"\n" + key_pem) as path:
            context.load_cert_chain(path)
    except ssl.SSLError as exc:
        raise IdentityError(f"certificate and key cannot be used: {exc}") from exc


@contextlib.contextmanager
def _anonymous_file(content: bytes) -> Iterator[str]:
    """A path, good inside the block only, of a file in memory that has no name."""
    try:
        fd = os.memfd_create("ambit-key", os.MFD_CLOEXEC)
    except OSError as exc:
        raise ConfigError(f"cannot create a memfd: {exc.strerror}") from exc
    with open(fd, "wb", buffering=0) as file:
        view = memoryview(content)
        while view:
            view = view[file.write(view) :]
        path = f"/proc/self/fd/{fd}"
        if not os.path.exists(path):
            raise ConfigError("/proc is not mounted for this process, keys cannot be loaded")
        yield path
