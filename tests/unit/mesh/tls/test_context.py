"""The contexts, by handshakes in memory: what is agreed on, and who is turned away."""

from __future__ import annotations

import contextlib
import os
import ssl

import pytest

from mesh.errors import IdentityError
from mesh.identity import SpiffeId
from mesh.tls.context import (
    client_context,
    control_plane_client,
    control_plane_server,
    server_context,
    verify_client_peer,
    verify_parameters,
    verify_server_peer,
)
from tests.support.certs import make_ca

CA = make_ca()
SLEEP = CA.issue("spiffe://cluster.local/ns/demo/sa/sleep").certificate()
HTTPBIN = CA.issue("spiffe://cluster.local/ns/demo/sa/httpbin").certificate()
STRANGER = make_ca("other").issue("spiffe://cluster.local/ns/demo/sa/sleep").certificate()


def handshake(
    client: ssl.SSLContext, server: ssl.SSLContext, server_hostname: str | None = None
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends after a handshake in memory; raises what either raised."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname=server_hostname),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(6):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    for end in ends:
        with contextlib.suppress(ssl.SSLWantReadError):
            end.read(1)
    return ends


def test_both_ends_agree_on_tls13_h2_and_know_each_other() -> None:
    client, server = handshake(client_context(SLEEP), server_context(HTTPBIN))
    for end in (client, server):
        verify_parameters(end)
        assert not end.session_reused
    der = server.getpeercert(binary_form=True)
    assert verify_client_peer(der, "cluster.local") == SLEEP.identity
    der = client.getpeercert(binary_form=True)
    assert verify_server_peer(der, frozenset({HTTPBIN.identity})) == HTTPBIN.identity


def test_no_session_ticket_is_given() -> None:
    context = client_context(SLEEP)
    client, _ = handshake(context, server_context(HTTPBIN))
    assert client.session is None or not client.session.has_ticket


def test_a_client_without_certificate_is_turned_away() -> None:
    naked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    naked.check_hostname = False
    naked.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLError, match="CERTIFICATE"):
        handshake(naked, server_context(HTTPBIN))


def test_a_client_of_another_root_is_turned_away() -> None:
    untrusted = client_context(STRANGER)
    untrusted.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate|unknown ca"):
        handshake(untrusted, server_context(HTTPBIN))


def test_a_server_of_another_root_is_turned_away() -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(client_context(SLEEP), server_context(STRANGER))


def test_an_expired_peer_is_turned_away() -> None:
    expired = CA.issue("spiffe://cluster.local/ns/demo/sa/old", days=0)
    with pytest.raises(ssl.SSLError):
        handshake(client_context(SLEEP), server_context(expired.certificate()))


def test_tls12_is_turned_away() -> None:
    old = client_context(SLEEP)
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        handshake(old, server_context(HTTPBIN))


def test_a_peer_without_h2_is_turned_away_after_the_handshake() -> None:
    silent = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    silent.check_hostname = False
    silent.verify_mode = ssl.CERT_NONE
    server_side = control_plane_server(HTTPBIN.chain_pem, HTTPBIN.key_pem)
    _, server = handshake(silent, server_side)
    with pytest.raises(IdentityError, match="h2"):
        verify_parameters(server)


class ChaCha:
    def version(self) -> str:
        return "TLSv1.3"

    def cipher(self) -> tuple[str, str, int]:
        return ("TLS_CHACHA20_POLY1305_SHA256", "TLSv1.3", 256)

    def selected_alpn_protocol(self) -> str:
        return "h2"


def test_another_suite_is_turned_away() -> None:
    with pytest.raises(IdentityError, match="CHACHA20"):
        verify_parameters(ChaCha())


def test_a_client_of_another_trust_domain_is_refused() -> None:
    foreign = CA.issue("spiffe://other.example/ns/demo/sa/sleep")
    _, server = handshake(client_context(foreign.certificate()), server_context(HTTPBIN))
    with pytest.raises(IdentityError, match=r"not of trust domain cluster\.local"):
        verify_client_peer(server.getpeercert(binary_form=True), "cluster.local")


def test_a_server_that_is_not_the_expected_one_is_refused() -> None:
    client, _ = handshake(client_context(SLEEP), server_context(HTTPBIN))
    der = client.getpeercert(binary_form=True)
    with pytest.raises(IdentityError, match=r"sa/reviews, the peer is .*sa/httpbin"):
        verify_server_peer(der, frozenset({SpiffeId("cluster.local", "demo", "reviews")}))
    with pytest.raises(IdentityError, match="expected nobody"):
        verify_server_peer(der, frozenset())


def test_no_certificate_is_no_identity() -> None:
    with pytest.raises(IdentityError):
        verify_client_peer(None, "cluster.local")


def test_a_trust_bundle_without_roots_is_refused() -> None:
    with pytest.raises(IdentityError, match="no root"):
        control_plane_client(b"nonsense")


def test_a_key_of_another_certificate_is_refused() -> None:
    with pytest.raises(IdentityError, match="cannot be used"):
        control_plane_server(SLEEP.chain_pem, HTTPBIN.key_pem)


def test_loading_a_key_leaves_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    server_context(HTTPBIN)
    assert os.listdir("/proc/self/fd") == before
