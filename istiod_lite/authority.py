"""The certificate authority: a root and an intermediate, EC P-256, and what they sign.

The keys live in one directory, readable by its owner only, made at the first start. The
root signs the intermediate and nothing else; the intermediate signs leafs. `sign` believes
nothing in a request except the proof that the asker holds the key: the SAN comes from the
identity that was authorised, subject and extensions of the request are ignored.

A root is exchanged in three steps, each followed by a restart: its successor is added to
`extra-roots.pem`, so that everybody comes to trust both; when every certificate was renewed
once, the successor's four files take the place of the old ones, and the old root that in
`extra-roots.pem`; and when every certificate was renewed again, `extra-roots.pem` goes.

Who may ask for what is not decided here (`istiod_lite.authenticate`).
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh.errors import ConfigError, RemoteProtocolError
from mesh.identity import SpiffeId
from mesh.tls.certificate import utc

DAY_SECONDS = 86400.0
DEFAULT_TTL_SECONDS = DAY_SECONDS
MAX_TTL_SECONDS = 90 * DAY_SECONDS
# Clocks of nodes may lag behind ours.
BACKDATE_SECONDS = 120.0
MAX_REQUEST_BYTES = 16 * 1024
_ROOT_SECONDS = 3650 * DAY_SECONDS
_INTERMEDIATE_SECONDS = 1825 * DAY_SECONDS
_SERVING_SECONDS = 365 * DAY_SECONDS
_MIN_RSA_BITS, _MAX_RSA_BITS = 2048, 8192
FILES = ("root-cert.pem", "root-key.pem", "ca-cert.pem", "ca-key.pem")
EXTRA_ROOTS = "extra-roots.pem"
MAXEXTRA_ROOTS = 8


@dataclass(frozen=True, slots=True)
class _Signer:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def not_after(self) -> float:
        return self.certificate.not_valid_after_utc.timestamp()


class Authority:
    """Signs for one trust domain. Made by `create` or `open_authority`."""

    def __init__(
        self, trust_domain: str, root: _Signer, intermediate: _Signer, extra_roots: str = ""
    ) -> None:
        self.trust_domain = trust_domain
        self._extra_roots = extra_roots
        self._root = root
        self._intermediate = intermediate

    @classmethod
    def create(cls, trust_domain: str, now: float) -> Authority:
        """New keys; `now` is seconds since the epoch."""
        root = _new_signer(f"{trust_domain} root", None, now, _ROOT_SECONDS)
        return cls(trust_domain, root, _new_intermediate(trust_domain, root, now))

    @property
    def root_pem(self) -> bytes:
        """What everyone in the mesh trusts: our root, and while roots are exchanged others."""
        return (self._root.pem + self._extra_roots).encode()

    def save(self, directory: Path) -> None:
        """Write keys and certificates, files 0600. Raises OSError."""
        _store(directory, "root", self._root)
        _store(directory, "ca", self._intermediate)

    def sign(self, csr: bytes, identity: SpiffeId, ttl_seconds: float, now: float) -> list[str]:
        """[leaf, intermediate, roots] in PEM for the key in `csr` (PKCS#10 PEM) and `identity`.

        A `ttl_seconds` of 0 or less means 24 hours; the end is clamped to the signer's.
        Raises RemoteProtocolError for a request that is unreadable, unproven or too long.
        """
        if ttl_seconds > MAX_TTL_SECONDS:
            raise RemoteProtocolError(f"certificates last {MAX_TTL_SECONDS / DAY_SECONDS:g} days")
        public_key = _proven_key(csr)
        ttl = ttl_seconds if ttl_seconds > 0 else DEFAULT_TTL_SECONDS
        uri = x509.UniformResourceIdentifier(str(identity))
        leaf = self._leaf(public_key, x509.SubjectAlternativeName([uri]), ttl, now)
        pem = leaf.public_bytes(serialization.Encoding.PEM).decode()
        return [pem, self._intermediate.pem, self.root_pem.decode()]

    def serving_certificate(self, names: Sequence[str], now: float) -> tuple[bytes, bytes]:
        """(chain PEM, key PEM) for a server of these DNS names and IP addresses, one year.

        Raises ConfigError for a name that is neither.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            san = x509.SubjectAlternativeName([_general_name(name) for name in names])
        except ValueError as exc:
            raise ConfigError(f"not names for a certificate: {', '.join(names)}: {exc}") from exc
        leaf = self._leaf(key.public_key(), san, _SERVING_SECONDS, now)
        chain = leaf.public_bytes(serialization.Encoding.PEM) + self._intermediate.pem.encode()
        return chain, _key_pem(key)

    def _leaf(
        self,
        public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
        san: x509.SubjectAlternativeName,
        ttl_seconds: float,
        now: float,
    ) -> x509.Certificate:
        signer = self._intermediate
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(signer.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(utc(now - BACKDATE_SECONDS))
            .not_valid_after(utc(min(now + ttl_seconds, signer.not_after)))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(is_authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(_authority_key_id(signer.certificate), critical=False)
            # Critical, as the subject is empty (RFC 5280, 4.2.1.6).
            .add_extension(san, critical=True)
            .sign(signer.key, hashes.SHA256())
        )


def open_authority(directory: Path, trust_domain: str, now: float) -> Authority:
    """The authority kept in `directory`, made there (files 0600) if there is none yet.

    An intermediate in its last tenth is replaced. Raises ConfigError when the files are
    incomplete, unreadable or do not belong together: a new root by accident would cut every
    workload off, so that is left to a person.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        present = [name for name in FILES if (directory / name).exists()]
        if not present:
            authority = Authority.create(trust_domain, now)
            authority.save(directory)
            return authority
        if len(present) != len(FILES):
            missing = ", ".join(sorted(set(FILES) - set(present)))
            raise ConfigError(
                f"the authority's directory lacks {missing}",
                file=str(directory),
                hint="restore the files, or remove all of them to begin with a new root",
            )
        root, intermediate = _load(directory, "root"), _load(directory, "ca")
        if not _is_signed_by(intermediate, root):
            raise ConfigError("ca-cert.pem is not signed by root-cert.pem", file=str(directory))
        if root.not_after <= now:
            raise ConfigError("root-cert.pem has expired", file=str(directory))
        if intermediate.not_after - now < _INTERMEDIATE_SECONDS / 10:
            intermediate = _new_intermediate(trust_domain, root, now)
            _store(directory, "ca", intermediate)
        extra_roots = _load_extra_roots(directory / EXTRA_ROOTS)
    except OSError as exc:
        raise ConfigError(
            f"the authority's directory cannot be used: {exc.strerror}", file=str(directory)
        ) from exc
    return Authority(trust_domain, root, intermediate, extra_roots)


def _load_extra_roots(path: Path) -> str:
    """The other roots to trust, in PEM, empty without a file. Raises ConfigError, OSError."""
    if not path.exists():
        return ""
    try:
        roots = x509.load_pem_x509_certificates(path.read_bytes())
        are_roots = all(
            each.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
            for each in roots
        )
    except (ValueError, x509.ExtensionNotFound) as exc:
        raise ConfigError(f"extra-roots.pem cannot be read: {exc}", file=str(path)) from exc
    if not are_roots or len(roots) > MAXEXTRA_ROOTS:
        raise ConfigError(
            f"extra-roots.pem must hold certificates of authorities, at most {MAXEXTRA_ROOTS}",
            file=str(path),
        )
    return "".join(each.public_bytes(serialization.Encoding.PEM).decode() for each in roots)


def _proven_key(csr: bytes) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
    """The public key of a request whose signature proves possession of the private one."""
    if len(csr) > MAX_REQUEST_BYTES:
        raise RemoteProtocolError("the certificate request is too large")
    try:
        request = x509.load_pem_x509_csr(csr)
        key = request.public_key()
        # The size is judged before the signature: verifying with a huge key is the attack.
        if isinstance(key, rsa.RSAPublicKey):
            if not _MIN_RSA_BITS <= key.key_size <= _MAX_RSA_BITS:
                raise RemoteProtocolError(f"an RSA key of {key.key_size} bits is not accepted")
        elif not isinstance(key, ec.EllipticCurvePublicKey):
            raise RemoteProtocolError("the certificate request's kind of key is not accepted")
        if not request.is_signature_valid:
            raise RemoteProtocolError("the certificate request is not signed by its own key")
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as exc:
        raise RemoteProtocolError(f"the certificate request cannot be read: {exc}") from exc
    return key


def _new_intermediate(trust_domain: str, root: _Signer, now: float) -> _Signer:
    return _new_signer(f"{trust_domain} intermediate", root, now, _INTERMEDIATE_SECONDS)


def _new_signer(name: str, parent: _Signer | None, now: float, seconds: float) -> _Signer:
    key = ec.generate_private_key(ec.SECP256R1())
    # A common name holds 64 characters at most; a trust domain may be longer.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[-64:])])
    end = now + seconds
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if parent is None else parent.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(utc(now - BACKDATE_SECONDS))
        .not_valid_after(utc(end if parent is None else min(end, parent.not_after)))
        .add_extension(
            x509.BasicConstraints(ca=True, path_length=None if parent is None else 0),
            critical=True,
        )
        .add_extension(_key_usage(is_authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if parent is not None:
        builder = builder.add_extension(_authority_key_id(parent.certificate), critical=False)
    return _Signer(builder.sign(key if parent is None else parent.key, hashes.SHA256()), key)


def _authority_key_id(signer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    subject = signer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject)


def _key_usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=not is_authority,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _is_signed_by(child: _Signer, parent: _Signer) -> bool:
    try:
        child.certificate.verify_directly_issued_by(parent.certificate)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _load(directory: Path, name: str) -> _Signer:
    cert_path, key_path = directory / f"{name}-cert.pem", directory / f"{name}-key.pem"
    try:
        certificate = x509.load_pem_x509_certificate(cert_path.read_bytes())
        key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound) as exc:
        raise ConfigError(
            f"{name} certificate or key cannot be read: {exc}", file=str(directory)
        ) from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("the authority's key is not an EC key", file=str(key_path))
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"{name} certificate and key do not match", file=str(directory))
    return _Signer(certificate, key)


def _store(directory: Path, name: str, signer: _Signer) -> None:
    """Key first: a certificate without its key would look complete and be useless."""
    _write(directory / f"{name}-key.pem", _key_pem(signer.key))
    _write(directory / f"{name}-cert.pem", signer.pem.encode())


def _write(path: Path, content: bytes) -> None:
    """Replace `path` at once, owner-readable only from its first moment, and durable."""
    temporary = path.with_suffix(".tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
