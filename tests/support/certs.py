"""Certificates for tests: a CA and leaves with a SPIFFE URI SAN, as istiod issues them."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh.identity import SpiffeId
from mesh.tls.certificate import Certificate


@dataclass(frozen=True)
class Leaf:
    """PEM of one identity."""

    identity: SpiffeId
    chain_pem: bytes
    key_pem: bytes
    roots_pem: bytes

    def certificate(self) -> Certificate:
        """The form that mesh.tls.context takes."""
        leaf = x509.load_pem_x509_certificate(self.chain_pem)
        return Certificate(
            chain_pem=self.chain_pem,
            key_pem=self.key_pem,
            roots_pem=self.roots_pem,
            identity=self.identity,
            not_before=leaf.not_valid_before_utc.timestamp(),
            not_after=leaf.not_valid_after_utc.timestamp(),
            serial=f"{leaf.serial_number:x}",
        )

    def write(self, directory: Path, name: str) -> None:
        """`<name>.pem`, `<name>.key` and `ca.pem`, for programs that want files."""
        (directory / f"{name}.pem").write_bytes(self.chain_pem)
        (directory / f"{name}.key").write_bytes(self.key_pem)
        (directory / "ca.pem").write_bytes(self.roots_pem)


class CertificateAuthority:
    """A self-signed root that issues leaves."""

    def __init__(self, name: str = "ambit test root") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._certificate = (
            self._builder(self._name, self._key.public_key(), days=30)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        self.pem = self._certificate.public_bytes(serialization.Encoding.PEM)

    def _builder(
        self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=days))
        )

    def issue(self, spiffe_id: SpiffeId | str, *, days: int = 1) -> Leaf:
        """A leaf for client and server use; `days` below 0 gives an expired one."""
        identity = SpiffeId.parse(spiffe_id) if isinstance(spiffe_id, str) else spiffe_id
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            self._builder(x509.Name([]), key.public_key(), days)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))]),
                critical=True,
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        return Leaf(
            identity,
            certificate.public_bytes(serialization.Encoding.PEM) + self.pem,
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            self.pem,
        )


def make_ca(name: str = "ambit test root") -> CertificateAuthority:
    """A fresh CA."""
    return CertificateAuthority(name)
