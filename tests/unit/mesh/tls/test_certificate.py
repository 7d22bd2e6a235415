"""Certificates in and out: what an authority answered, and what a peer presents."""

from __future__ import annotations

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ObjectIdentifier

from mesh.errors import IdentityError
from mesh.identity import SpiffeId
from mesh.tls.certificate import (
    issued_certificate,
    new_request,
    peer_identities,
    readable_roots,
    summarize,
)
from tests.support.certs import make_ca

SLEEP = SpiffeId("cluster.local", "demo", "sleep")
HTTPBIN = SpiffeId("cluster.local", "demo", "httpbin")
NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)


def self_signed(*extensions: tuple[x509.ExtensionType, bool]) -> bytes:
    """DER of a certificate with exactly these extensions."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW)
        .not_valid_after(NOW + datetime.timedelta(days=1))
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def uris(*texts: str) -> tuple[x509.ExtensionType, bool]:
    names = [x509.UniformResourceIdentifier(text) for text in texts]
    return x509.SubjectAlternativeName(names), True


def raw_san(der: bytes) -> tuple[x509.ExtensionType, bool]:
    return x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.17"), der), True


def chain_for(identity: SpiffeId) -> tuple[list[str], bytes]:
    ca = make_ca()
    leaf = ca.issue(identity)
    return [leaf.chain_pem.decode(), ca.pem.decode()], leaf.key_pem


def test_a_request_names_the_identity_in_a_critical_san_and_proves_the_key() -> None:
    key_pem, csr_pem = new_request(SLEEP)
    csr = x509.load_pem_x509_csr(csr_pem)
    assert csr.is_signature_valid
    assert list(csr.subject) == []
    san = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert san.critical
    assert san.value.get_values_for_type(x509.UniformResourceIdentifier) == [str(SLEEP)]
    key = serialization.load_pem_private_key(key_pem, None)
    assert key.public_key() == csr.public_key()
    assert key_pem.startswith(b"-----BEGIN PRIVATE KEY-----")


def test_an_issued_chain_becomes_a_certificate() -> None:
    chain, key = chain_for(SLEEP)
    certificate = issued_certificate(chain, key, SLEEP)
    leaf = x509.load_pem_x509_certificate(chain[0].encode())
    assert certificate.identity == SLEEP
    assert certificate.not_after == leaf.not_valid_after_utc.timestamp()
    assert certificate.serial == str(leaf.serial_number)
    assert certificate.chain_pem.count(b"BEGIN CERTIFICATE") == 1  # the first PEM of an element
    assert certificate.is_valid_at(certificate.not_after - 1)
    assert not certificate.is_valid_at(certificate.not_after)
    assert "PRIVATE" not in repr(certificate)


def test_a_chain_of_one_is_refused() -> None:
    chain, key = chain_for(SLEEP)
    with pytest.raises(IdentityError, match="1 certificates"):
        issued_certificate(chain[:1], key, SLEEP)


def test_another_identity_is_refused() -> None:
    chain, key = chain_for(HTTPBIN)
    with pytest.raises(IdentityError, match=r"issued spiffe://cluster\.local/ns/demo/sa/httpbin"):
        issued_certificate(chain, key, SLEEP)


def test_another_key_is_refused() -> None:
    chain, _ = chain_for(SLEEP)
    other, _ = new_request(SLEEP)
    with pytest.raises(IdentityError, match="not for our key"):
        issued_certificate(chain, other, SLEEP)


@pytest.mark.parametrize("root", ["", "junk", "-----BEGIN CERTIFICATE-----\nAA\n"])
def test_a_chain_without_a_readable_root_is_refused(root: str) -> None:
    chain, key = chain_for(SLEEP)
    with pytest.raises(IdentityError, match="no root"):
        issued_certificate([chain[0], root], key, SLEEP)


def test_an_oversized_chain_is_refused() -> None:
    chain, key = chain_for(SLEEP)
    with pytest.raises(IdentityError, match="oversized"):
        issued_certificate([chain[0]] * 11, key, SLEEP)


def test_one_damaged_root_does_not_hide_the_others() -> None:
    first, second = make_ca("one").pem, make_ca("two").pem
    leaf = make_ca().issue(SLEEP).chain_pem.split(b"-----END CERTIFICATE-----")[0]
    bundle = first + b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n" + second
    assert [pem.strip() for pem in readable_roots(bundle)] == [first.strip(), second.strip()]
    assert readable_roots(leaf + b"-----END CERTIFICATE-----\n") == []


def test_identities_are_read_in_order_and_other_uris_skipped() -> None:
    der = self_signed(uris("https://example.com", str(SLEEP), str(HTTPBIN)))
    assert peer_identities(der) == (SLEEP, HTTPBIN)


def test_a_leaf_without_san_has_no_identity() -> None:
    assert peer_identities(self_signed()) == ()


def test_an_other_name_is_no_obstacle_and_no_identity() -> None:
    other = x509.OtherName(ObjectIdentifier("1.3.6.1.4.1.311.20.2.3"), b"\x0c\x01a")
    san = x509.SubjectAlternativeName([other, x509.UniformResourceIdentifier(str(SLEEP))])
    assert peer_identities(self_signed((san, True))) == (SLEEP,)


def test_an_authority_is_not_a_peer() -> None:
    der = self_signed((x509.BasicConstraints(ca=True, path_length=None), True), uris(str(SLEEP)))
    with pytest.raises(IdentityError, match="authority"):
        peer_identities(der)


@pytest.mark.parametrize(
    "san",
    [
        pytest.param(uris(f"{SLEEP}\x00.evil"), id="nul in uri"),
        pytest.param(raw_san(b"\x30\x05\x82\x03a\x00b"), id="nul in dns"),
        pytest.param(raw_san(b"\x30\x04\x86\x02\xc3\xa9"), id="not ascii"),
        pytest.param(raw_san(b"\x30\x09\x86\x02ab"), id="truncated"),
        pytest.param(raw_san(b"\x30\x03\x87\x01\x0a"), id="ip of one byte"),
        pytest.param(raw_san(b"\x30\x02\xa3\x00"), id="x400"),
    ],
)
def test_a_malformed_name_refuses_the_whole_leaf(san: tuple[x509.ExtensionType, bool]) -> None:
    with pytest.raises(IdentityError):
        peer_identities(self_signed(san))


@pytest.mark.parametrize("der", [b"", b"\x30\x00", b"x" * 40_000])
def test_what_is_no_certificate_is_refused(der: bytes) -> None:
    with pytest.raises(IdentityError):
        peer_identities(der)


def test_a_summary_of_a_bundle() -> None:
    ca = make_ca()
    leaf, root = summarize(ca.issue(SLEEP).chain_pem)
    assert (leaf.subject_alt_names, leaf.is_authority) == ((str(SLEEP),), False)
    assert root.is_authority
    assert leaf.not_before < leaf.not_after
