"""CreateCertificate over real gRPC and TLS: who gets what, and who does not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from mesh.errors import IdentityError, Unavailable
from mesh.grpc.client import open_channel
from mesh.grpc.codec import Code, GrpcError
from mesh.identity import SpiffeId
from mesh.proto.ca_pb2 import IstioCertificateRequest
from mesh.secrets import CREATE_CERTIFICATE, SecretManager, fetch_certificate
from mesh.tls.certificate import new_request, summarize
from tests.support.istiod import Istiod, mint, now, running_istiod

pytestmark = pytest.mark.usefixtures("no_fd_leak")

SLEEP = SpiffeId("cluster.local", "demo", "sleep")
HTTPBIN = SpiffeId("cluster.local", "demo", "httpbin")
A_WORKLOAD = {"namespace": "demo", "account": "sleep", "pod": "sleep-1", "uid": "uid-of-sleep-1"}


@pytest.fixture
async def istiod(tmp_path: Path) -> AsyncIterator[Istiod]:
    async with running_istiod(tmp_path) as running:
        yield running


async def test_a_node_proxy_gets_the_certificates_of_its_node(istiod: Istiod) -> None:
    certificate = await fetch_certificate(istiod.channel(mint()), SLEEP, 600)
    assert certificate.identity == SLEEP
    assert certificate.not_after == pytest.approx(now() + 600, abs=10)
    leaf, intermediate = summarize(certificate.chain_pem)
    assert leaf.subject_alt_names == (str(SLEEP),)
    assert intermediate.is_authority
    assert certificate.roots_pem.strip() == istiod.authority.root_pem.strip()


@pytest.mark.parametrize(
    ("identity", "token"),
    [
        # What is minted is minted in the test: a token that is over would be refused for that.
        pytest.param(HTTPBIN, {}, id="another node's"),
        pytest.param(SpiffeId("other.example", "demo", "sleep"), {}, id="trust domain"),
        pytest.param(SLEEP, {"uid": "uid-2"}, id="an old pod"),
        pytest.param(SLEEP, A_WORKLOAD, id="a workload"),
        pytest.param(SLEEP, "absent-file", id="no token"),
        pytest.param(SLEEP, "a.b.c", id="bad token"),
    ],
)
async def test_all_others_are_refused_alike(
    istiod: Istiod, identity: SpiffeId, token: str | dict[str, str]
) -> None:
    text = token if isinstance(token, str) else mint(**token)
    with pytest.raises(GrpcError) as refused:
        await fetch_certificate(istiod.channel(text), identity)
    assert refused.value.code == Code.UNAUTHENTICATED
    assert "node" not in refused.value.message


async def test_a_caller_that_names_nobody_gets_its_own(istiod: Istiod) -> None:
    identity = SpiffeId("cluster.local", "demo", "waypoint")
    token = mint("demo", "waypoint", "waypoint-1", "uid-of-waypoint-1")
    own = await fetch_certificate(istiod.channel(token), identity, impersonate=False)
    assert own.identity == identity
    with pytest.raises(IdentityError, match="the authority issued"):
        await fetch_certificate(istiod.channel(token), SLEEP, impersonate=False)


async def _status(istiod: Istiod, request: IstioCertificateRequest) -> GrpcError:
    async with istiod.channel(mint())() as channel:
        with pytest.raises(GrpcError) as refused:
            await channel.unary(CREATE_CERTIFICATE, request, timeout=5)
    return refused.value


async def test_a_request_that_proves_no_key_is_invalid(istiod: Istiod) -> None:
    for csr in ("", "junk", "x" * 100_000):
        error = await _status(istiod, IstioCertificateRequest(csr=csr))
        assert error.code == Code.INVALID_ARGUMENT


async def test_too_long_a_validity_is_invalid(istiod: Istiod) -> None:
    csr = new_request(SLEEP)[1].decode()
    request = IstioCertificateRequest(csr=csr, validity_duration=91 * 86400)
    assert (await _status(istiod, request)).code == Code.INVALID_ARGUMENT


@pytest.mark.parametrize("value", ["", "spiffe://", "spiffe://cluster.local/ns/a", 7, None])
async def test_an_identity_that_is_none_is_refused(istiod: Istiod, value: object) -> None:
    request = IstioCertificateRequest(csr=new_request(SLEEP)[1].decode())
    request.metadata.update({"ImpersonatedIdentity": value})
    assert (await _status(istiod, request)).code == Code.UNAUTHENTICATED


async def test_the_secret_manager_on_the_real_authority(
    istiod: Istiod, nursery: trio.Nursery
) -> None:
    secrets = SecretManager(lambda identity: fetch_certificate(istiod.channel(mint()), identity))
    nursery.start_soon(secrets.run)
    with trio.fail_after(30):
        certificate = await secrets.get(SLEEP)
    assert summarize(certificate.chain_pem)[0].subject_alt_names == (str(SLEEP),)
    with trio.move_on_after(2), pytest.raises(IdentityError, match="UNAUTHENTICATED"):
        await secrets.get(HTTPBIN)


async def test_an_authority_that_is_away_is_unavailable() -> None:
    with pytest.raises(Unavailable):
        await fetch_certificate(lambda: open_channel("127.0.0.1", 1, None), SLEEP)
