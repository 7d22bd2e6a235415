"""What the authority signs, and that its chains hold in a real handshake."""

from __future__ import annotations

import ssl
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from istiod_lite.authority import (
    BACKDATE_SECONDS,
    DAY_SECONDS,
    MAX_REQUEST_BYTES,
    Authority,
    open_authority,
)
from mesh.errors import ConfigError, RemoteProtocolError
from mesh.identity import SpiffeId
from mesh.tls.certificate import issued_certificate, new_request, summarize, utc
from mesh.tls.context import (
    client_context,
    control_plane_client,
    control_plane_server,
    server_context,
)

NOW = 1_900_000_000.0
SLEEP = SpiffeId("cluster.local", "demo", "sleep")
AUTHORITY = Authority.create("cluster.local", NOW)


def leaf_of(chain: list[str]) -> x509.Certificate:
    return x509.load_pem_x509_certificate(chain[0].encode())


def sign(ttl: float = 3600.0, csr: bytes = b"") -> list[str]:
    return AUTHORITY.sign(csr or new_request(SLEEP)[1], SLEEP, ttl, NOW)


def request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, san: str = str(SLEEP)) -> bytes:
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(san)])
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(names, critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def test_the_chain_is_leaf_intermediate_root_and_verifies() -> None:
    chain = [x509.load_pem_x509_certificate(pem.encode()) for pem in sign()]
    leaf, intermediate, root = chain
    leaf.verify_directly_issued_by(intermediate)
    intermediate.verify_directly_issued_by(root)
    root.verify_directly_issued_by(root)
    assert sign()[2].encode() == AUTHORITY.root_pem


def test_a_leaf_carries_both_usages_and_is_no_authority() -> None:
    extensions = leaf_of(sign()).extensions
    usages = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    san = extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert san.critical
    assert san.value.get_values_for_type(x509.UniformResourceIdentifier) == [str(SLEEP)]


def test_validity_is_backdated_and_as_asked() -> None:
    leaf = leaf_of(sign(600))
    assert leaf.not_valid_before_utc == utc(NOW - BACKDATE_SECONDS)
    assert leaf.not_valid_after_utc == utc(NOW + 600)


@pytest.mark.parametrize("ttl", [0, -5])
def test_no_validity_means_a_day(ttl: float) -> None:
    assert leaf_of(sign(ttl)).not_valid_after_utc == utc(NOW + DAY_SECONDS)


def test_more_than_ninety_days_are_refused() -> None:
    assert sign(90 * DAY_SECONDS)
    with pytest.raises(RemoteProtocolError, match="90 days"):
        sign(90 * DAY_SECONDS + 1)


def test_a_leaf_does_not_outlive_its_signer() -> None:
    end = summarize(sign()[1].encode())[0].not_after
    chain = AUTHORITY.sign(new_request(SLEEP)[1], SLEEP, 30 * DAY_SECONDS, end - 60)
    assert leaf_of(chain).not_valid_after_utc.timestamp() == end


def test_the_name_comes_from_the_authorised_identity_never_from_the_request() -> None:
    asked = request(ec.generate_private_key(ec.SECP256R1()), "spiffe://cluster.local/ns/x/sa/root")
    assert summarize(sign(csr=asked)[0].encode())[0].subject_alt_names == (str(SLEEP),)


def test_a_request_that_its_key_did_not_sign_is_refused() -> None:
    der = bytearray(
        x509.load_pem_x509_csr(new_request(SLEEP)[1]).public_bytes(serialization.Encoding.DER)
    )
    der[-4] ^= 0xFF
    with pytest.raises(RemoteProtocolError):
        sign(
            csr=ssl.DER_cert_to_PEM_cert(bytes(der))
            .replace("CERTIFICATE", "CERTIFICATE REQUEST")
            .encode()
        )


@pytest.mark.parametrize(
    "csr", [b"junk", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n", b"x" * (MAX_REQUEST_BYTES + 1)]
)
def test_an_unreadable_request_is_refused(csr: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        sign(csr=csr)


def test_weak_and_strange_keys_are_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="1024 bits"):
        sign(csr=request(rsa.generate_private_key(65537, 1024)))
    strange = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(ed25519.Ed25519PrivateKey.generate(), None)
    )
    with pytest.raises(RemoteProtocolError, match="kind of key"):
        sign(csr=strange.public_bytes(serialization.Encoding.PEM))


def test_an_rsa_key_is_signed() -> None:
    assert sign(csr=request(rsa.generate_private_key(65537, 2048)))


def test_issued_certificates_shake_hands() -> None:
    """With real time, as OpenSSL looks at the clock."""
    now = _real_now()
    authority = Authority.create("cluster.local", now)
    certificates = []
    for name in ("sleep", "httpbin"):
        identity = SpiffeId("cluster.local", "demo", name)
        key, csr = new_request(identity)
        chain = authority.sign(csr, identity, 600, now)
        certificates.append(issued_certificate(chain, key, identity))
    client, server = client_context(certificates[0]), server_context(certificates[1])
    assert _shake(client, server, None) == "TLSv1.3"


def test_the_serving_certificate_names_the_control_plane() -> None:
    now = _real_now()
    authority = Authority.create("cluster.local", now)
    chain, key = authority.serving_certificate(["istiod.istio-system.svc", "172.18.0.254"], now)
    server, client = control_plane_server(chain, key), control_plane_client(authority.root_pem)
    assert _shake(client, server, "istiod.istio-system.svc") == "TLSv1.3"
    assert _shake(client, server, "172.18.0.254") == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        _shake(client, server, "other.istio-system.svc")


def test_a_serving_name_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError):
        AUTHORITY.serving_certificate(["ünicode.svc"], NOW)


def test_the_keys_are_kept_private_and_used_again(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    first = open_authority(directory, "cluster.local", NOW)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert modes == dict.fromkeys(
        ["root-cert.pem", "root-key.pem", "ca-cert.pem", "ca-key.pem"], 0o600
    )
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    again = open_authority(directory, "cluster.local", NOW + 60)
    assert again.root_pem == first.root_pem
    csr = new_request(SLEEP)[1]
    assert again.sign(csr, SLEEP, 60, NOW)[1:] == first.sign(csr, SLEEP, 60, NOW)[1:]


def test_an_aging_intermediate_is_replaced_under_the_same_root(tmp_path: Path) -> None:
    first = open_authority(tmp_path, "cluster.local", NOW)
    later = open_authority(tmp_path, "cluster.local", NOW + 1700 * DAY_SECONDS)
    assert later.root_pem == first.root_pem
    csr = new_request(SLEEP)[1]
    assert later.sign(csr, SLEEP, 60, NOW)[1] != first.sign(csr, SLEEP, 60, NOW)[1]


@pytest.mark.parametrize("victim", ["root-cert.pem", "ca-key.pem"])
def test_an_incomplete_directory_is_not_begun_anew(tmp_path: Path, victim: str) -> None:
    open_authority(tmp_path, "cluster.local", NOW)
    (tmp_path / victim).unlink()
    with pytest.raises(ConfigError, match=victim):
        open_authority(tmp_path, "cluster.local", NOW)


def test_keys_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    open_authority(tmp_path / "a", "cluster.local", NOW)
    open_authority(tmp_path / "b", "cluster.local", NOW)
    for name in ("root-cert.pem", "root-key.pem"):
        (tmp_path / "b" / name).replace(tmp_path / "a" / name)
    with pytest.raises(ConfigError, match="not signed by"):
        open_authority(tmp_path / "a", "cluster.local", NOW)


def test_an_unreadable_file_is_told(tmp_path: Path) -> None:
    open_authority(tmp_path, "cluster.local", NOW)
    (tmp_path / "ca-cert.pem").write_text("junk")
    with pytest.raises(ConfigError, match="ca certificate or key cannot be read"):
        open_authority(tmp_path, "cluster.local", NOW)


def test_an_expired_root_is_told(tmp_path: Path) -> None:
    open_authority(tmp_path, "cluster.local", NOW)
    with pytest.raises(ConfigError, match="expired"):
        open_authority(tmp_path, "cluster.local", NOW + 4000 * DAY_SECONDS)


def test_roots_are_exchanged_while_everybody_trusts_both(tmp_path: Path) -> None:
    now = _real_now()
    old, new = tmp_path / "old", tmp_path / "new"
    open_authority(old, "cluster.local", now)
    open_authority(new, "cluster.local", now)
    held = []
    for _ in range(2):
        (old / "extra-roots.pem").write_bytes((new / "root-cert.pem").read_bytes())
        authority = open_authority(old, "cluster.local", now)
        assert authority.root_pem.count(b"BEGIN") == 2
        key, csr = new_request(SLEEP)
        held.append(issued_certificate(authority.sign(csr, SLEEP, 60, now), key, SLEEP))
        old, new = new, old
    before, after = held
    for client, server in ((before, after), (after, before)):
        assert _shake(client_context(client), server_context(server), None)


@pytest.mark.parametrize("content", ["junk", "", "leaf"])
def test_extra_roots_that_are_none_are_told(tmp_path: Path, content: str) -> None:
    authority = open_authority(tmp_path, "cluster.local", NOW)
    if content == "leaf":
        content = authority.sign(new_request(SLEEP)[1], SLEEP, 60, NOW)[0]
    (tmp_path / "extra-roots.pem").write_text(content)
    with pytest.raises(ConfigError, match=r"extra-roots\.pem"):
        open_authority(tmp_path, "cluster.local", NOW)


def _real_now() -> float:
    return datetime.now(UTC).timestamp()


def _shake(client: ssl.SSLContext, server: ssl.SSLContext, name: str | None) -> str | None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    done: set[int] = set()
    for _ in range(6):
        for index, end in enumerate(ends):
            try:
                end.do_handshake()
                done.add(index)
            except ssl.SSLWantReadError:
                continue
    assert done == {0, 1}
    return ends[0].version()
