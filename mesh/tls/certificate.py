"""X.509 in and out: certificate requests, issued chains, and the SPIFFE IDs of a peer.

Pure: bytes in, values out; the current time is an argument. A workload certificate is a
leaf with one URI SAN `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.

What a peer presents is untrusted even after its chain was verified: a leaf that is itself
an authority, a SAN that does not parse or that hides a NUL byte is refused whole, because
two readers could understand it differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mesh.errors import ConfigError, IdentityError
from mesh.identity import SpiffeId

MAX_CHAIN_ELEMENTS = 10
MAX_CHAIN_BYTES = 256 * 1024
MAX_LEAF_BYTES = 32 * 1024
_PEM_BEGIN = b"-----BEGIN CERTIFICATE-----"
_PEM_END = b"-----END CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class Certificate:
    """A workload certificate with its key, ready for a TLS context.

    `chain_pem` is the leaf and the intermediates, `roots_pem` what peers are verified
    against; `not_before` and `not_after` are seconds since the epoch, `serial` is decimal.
    """

    chain_pem: bytes
    key_pem: bytes = field(repr=False)
    roots_pem: bytes
    identity: SpiffeId
    not_before: float
    not_after: float
    serial: str

    def is_valid_at(self, now: float) -> bool:
        """Whether `now` (seconds since the epoch) is before expiry."""
        return now < self.not_after


@dataclass(frozen=True, slots=True)
class CertificateSummary:
    """What a listing shows of one certificate; times are seconds since the epoch."""

    subject_alt_names: tuple[str, ...]
    not_before: float
    not_after: float
    serial: str
    is_authority: bool


def new_request(identity: SpiffeId) -> tuple[bytes, bytes]:
    """A fresh EC P-256 key and a request for `identity`: (PKCS#8 key PEM, PKCS#10 PEM).

    The subject is empty, so the SAN is critical (RFC 5280, 4.2.1.6).
    """
    key = ec.generate_private_key(ec.SECP256R1())
    san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))])
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(san, critical=True)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return key_pem, csr.public_bytes(serialization.Encoding.PEM)


def issued_certificate(
    cert_chain: Sequence[str], key_pem: bytes, identity: SpiffeId
) -> Certificate:
    """Check what an authority answered and make it a Certificate.

    `cert_chain` is [leaf, intermediate…, root bundle]; of every element but the last only
    the first PEM counts. Raises IdentityError when the chain is too short or too long, the
    leaf is not for `identity` or not for our key, or no root can be read.
    """
    if len(cert_chain) < 2:
        raise IdentityError(f"the authority returned {len(cert_chain)} certificates for {identity}")
    total = sum(map(len, cert_chain))
    if len(cert_chain) > MAX_CHAIN_ELEMENTS or total > MAX_CHAIN_BYTES:
        raise IdentityError(f"the authority returned an oversized chain for {identity}")
    elements = [_first_pem(element.encode()) for element in cert_chain[:-1]]
    leaf = _load_pem(elements[0])
    presented = leaf_identities(leaf)
    if not presented or presented[0] != identity:
        got = presented[0] if presented else "no SPIFFE ID"
        raise IdentityError(f"asked for {identity}, the authority issued {got}")
    for intermediate in elements[1:]:
        _load_pem(intermediate)
    if _public_bytes(leaf) != _key_public_bytes(key_pem):
        raise IdentityError(f"the certificate issued for {identity} is not for our key")
    roots = readable_roots(cert_chain[-1].encode())
    if not roots:
        raise IdentityError(f"no root certificate can be read in the chain for {identity}")
    return Certificate(
        chain_pem=b"".join(elements),
        key_pem=key_pem,
        roots_pem=b"".join(roots),
        identity=identity,
        not_before=leaf.not_valid_before_utc.timestamp(),
        not_after=leaf.not_valid_after_utc.timestamp(),
        serial=str(leaf.serial_number),
    )


def peer_identities(der: bytes) -> tuple[SpiffeId, ...]:
    """The workload SPIFFE IDs among the URI SANs of a leaf, in order; others are skipped.

    Raises IdentityError when the leaf is unreadable, an authority, or carries a malformed
    or NUL-bearing name.
    """
    if len(der) > MAX_LEAF_BYTES:
        raise IdentityError("the peer's certificate is too large")
    try:
        leaf = x509.load_der_x509_certificate(der)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise IdentityError(f"the peer's certificate cannot be read: {exc}") from exc
    return leaf_identities(leaf)


def leaf_identities(leaf: x509.Certificate) -> tuple[SpiffeId, ...]:
    """As `peer_identities`, for a certificate that is already parsed. Raises IdentityError."""
    names, is_authority = _names(leaf)
    if is_authority:
        raise IdentityError("the peer presented an authority's certificate as its own")
    identities = []
    for name in names:
        try:
            identities.append(SpiffeId.parse(name))
        except ConfigError:
            continue  # another scheme of URI SAN is allowed beside ours
    return tuple(identities)


def summarize(pem: bytes) -> tuple[CertificateSummary, ...]:
    """Facts of each certificate in a PEM bundle. Raises IdentityError."""
    summaries = []
    for block in _split_pem(pem):
        certificate = _load_pem(block)
        names, is_authority = _names(certificate)
        summaries.append(
            CertificateSummary(
                subject_alt_names=names,
                not_before=certificate.not_valid_before_utc.timestamp(),
                not_after=certificate.not_valid_after_utc.timestamp(),
                serial=str(certificate.serial_number),
                is_authority=is_authority,
            )
        )
    return tuple(summaries)


def readable_roots(pem: bytes) -> list[bytes]:
    """Each PEM of a root bundle that parses and is an authority; the rest is left out.

    One damaged entry must not take away trust in the others.
    """
    roots = []
    for block in _split_pem(pem[:MAX_CHAIN_BYTES]):
        try:
            certificate = _load_pem(block)
            _, is_authority = _names(certificate)
        except IdentityError:
            continue
        if is_authority:
            roots.append(block)
    return roots


def utc(seconds: float) -> datetime:
    """An aware datetime, whole seconds, for the epoch seconds given."""
    return datetime.fromtimestamp(int(seconds), UTC)


def _names(certificate: x509.Certificate) -> tuple[tuple[str, ...], bool]:
    """The URI SANs, and whether this is an authority. Raises IdentityError."""
    try:
        extensions = certificate.extensions
        constraints = [e.value for e in extensions if isinstance(e.value, x509.BasicConstraints)]
        sans = [e.value for e in extensions if isinstance(e.value, x509.SubjectAlternativeName)]
        texts = [
            name.value
            for san in sans
            for name in san
            if isinstance(name, x509.UniformResourceIdentifier | x509.DNSName | x509.RFC822Name)
        ]
        uris = [
            uri for san in sans for uri in san.get_values_for_type(x509.UniformResourceIdentifier)
        ]
    except (
        ValueError,
        x509.UnsupportedGeneralNameType,
        x509.DuplicateExtension,
        UnsupportedAlgorithm,
    ) as exc:
        raise IdentityError(f"a certificate's extensions are malformed: {exc}") from exc
    if any(not text.isascii() or not text.isprintable() for text in texts):
        raise IdentityError("a subject alternative name holds an unprintable character")
    return tuple(uris), any(constraint.ca for constraint in constraints)


def _split_pem(pem: bytes) -> list[bytes]:
    blocks = []
    position = 0
    while (start := pem.find(_PEM_BEGIN, position)) >= 0:
        end = pem.find(_PEM_END, start)
        if end < 0:
            break
        position = end + len(_PEM_END)
        blocks.append(pem[start:position] + b"\n")
    return blocks


def _first_pem(pem: bytes) -> bytes:
    blocks = _split_pem(pem)
    if not blocks:
        raise IdentityError("an element of the chain holds no certificate")
    return blocks[0]


def _load_pem(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise IdentityError(f"a certificate cannot be read: {exc}") from exc


def _public_bytes(certificate: x509.Certificate) -> bytes:
    try:
        return certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise IdentityError(f"a certificate's key cannot be read: {exc}") from exc


def _key_public_bytes(key_pem: bytes) -> bytes:
    key = serialization.load_pem_private_key(key_pem, password=None)
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
