"""Tokens to callers, and the rule that bounds what a node proxy may ask for."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, RSAKey

from istiod_lite.authenticate import (
    Authenticator,
    Caller,
    SignedTokenReviewer,
    may_request,
    parse_keys,
    verify_token,
)
from mesh.cluster.api import Ref
from mesh.cluster.objects import Pod
from mesh.errors import ConfigError, IdentityError
from mesh.identity import SpiffeId

NOW = 1_900_000_000
ISSUER = "https://kubernetes.default.svc"
EC_KEY = ECKey.generate_key("P-256", {"kid": "ec"})
RSA_KEY = RSAKey.generate_key(2048, {"kid": "rsa"})
KEYS = KeySet.import_key_set(
    {"keys": [EC_KEY.as_dict(private=False), RSA_KEY.as_dict(private=False)]}
)
CALLER = Caller("istio-system", "ztunnel", "ztunnel-n1", "uid-1", "n1")


def claims(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "iss": ISSUER,
        "aud": ["istio-ca"],
        "exp": NOW + 600,
        "iat": NOW,
        "nbf": NOW,
        "sub": "system:serviceaccount:istio-system:ztunnel",
        "kubernetes.io": {
            "namespace": "istio-system",
            "node": {"name": "n1", "uid": "x"},
            "pod": {"name": "ztunnel-n1", "uid": "uid-1"},
            "serviceaccount": {"name": "ztunnel", "uid": "y"},
        },
    }
    found.update(changes)
    return {key: value for key, value in found.items() if value is not None}


def token(key: Any = EC_KEY, alg: str = "ES256", kid: str = "ec", **changes: Any) -> str:
    return jwt.encode({"alg": alg, "kid": kid}, claims(**changes), key, algorithms=[alg])


def verify(text: str, **kwargs: Any) -> Caller:
    settings = {"audiences": ["istio-ca"], "issuers": [ISSUER], "now": NOW} | kwargs
    return verify_token(text, KEYS, **settings)


def test_a_projected_token_names_its_pod() -> None:
    assert verify(token()) == CALLER


def test_rs256_too_and_a_single_audience() -> None:
    assert verify(token(RSA_KEY, "RS256", "rsa", aud="istio-ca")) == CALLER


def test_an_unbound_token_names_no_pod() -> None:
    unbound = {"kubernetes.io": {"namespace": "istio-system"}}
    assert verify(token(**unbound)) == Caller("istio-system", "ztunnel")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(token(exp=NOW - 60), id="expired"),
        pytest.param(token(exp=None), id="without expiry"),
        pytest.param(token(nbf=NOW + 60), id="not yet"),
        pytest.param(token(aud=["other"]), id="audience"),
        pytest.param(token(aud=None), id="without audience"),
        pytest.param(token(aud=[]), id="empty audience"),
        pytest.param(token(iss="https://other"), id="issuer"),
        pytest.param(token(iss=None), id="without issuer"),
        pytest.param(token(sub="alice"), id="not a service account"),
        pytest.param(token(sub="system:serviceaccount:ns"), id="half a subject"),
        pytest.param(token(sub=7), id="subject of a strange type"),
        pytest.param(
            token(**{"kubernetes.io": {"namespace": "other"}}), id="namespace contradicts"
        ),
        pytest.param(token(ECKey.generate_key("P-256")), id="another key"),
        pytest.param(token(kid="unknown"), id="unknown key id"),
        pytest.param(token()[:-4] + "AAAA", id="signature"),
        pytest.param(token(ECKey.generate_key("P-384"), "ES384"), id="algorithm not allowed"),
        pytest.param("", id="empty"),
        pytest.param("a.b.c", id="junk"),
        pytest.param("x" * 20_000, id="too long"),
        pytest.param("[" * 5000 + ".a.b", id="nested"),
    ],
)
def test_a_token_that_proves_nothing_is_refused_without_quoting_it(text: str) -> None:
    with pytest.raises(IdentityError) as refused:
        verify(text)
    assert not text or text not in str(refused.value)


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def test_alg_none_is_refused() -> None:
    body = token().split(".")[1]
    with pytest.raises(IdentityError):
        verify(_b64(b'{"alg":"none"}') + "." + body + ".")


def test_a_public_key_is_no_hmac_secret() -> None:
    signed = _b64(b'{"alg":"HS256","kid":"rsa"}') + "." + token().split(".")[1]
    mac = hmac.digest(RSA_KEY.as_pem(private=False), signed.encode(), "sha256")
    with pytest.raises(IdentityError):
        verify(f"{signed}.{_b64(mac)}")


def test_no_audience_configured_accepts_nobody() -> None:
    with pytest.raises(ConfigError):
        verify(token(), audiences=[])


def test_any_issuer_when_none_is_configured() -> None:
    assert verify(token(iss="https://other"), issuers=[]) == CALLER


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"keys": [{"kty": "X"}]}', b'{"keys": 7}']
)
def test_a_document_that_is_no_key_set_is_told(content: bytes) -> None:
    with pytest.raises(ConfigError, match="not a set of keys"):
        parse_keys(content, "keys.json")


async def test_the_reviewer_reads_rotated_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [RSA_KEY.as_dict(private=False)]}))
    reviewer = SignedTokenReviewer(path, audiences=["istio-ca"], clock=lambda: NOW)
    with pytest.raises(IdentityError):
        await reviewer.review(token())
    path.write_text(json.dumps({"keys": [EC_KEY.as_dict(private=False)]}))
    assert await reviewer.review(token()) == CALLER
    path.unlink()
    with pytest.raises(ConfigError):
        await reviewer.review(token())


async def test_the_authenticator_needs_a_bearer_of_our_cluster(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(KEYS.as_dict(private=False)))
    reviewer = SignedTokenReviewer(path, audiences=["istio-ca"], clock=lambda: NOW)
    authenticator = Authenticator(reviewer, "Kubernetes")
    good = {"authorization": f"Bearer {token()}"}
    assert await authenticator.caller(good) == CALLER
    assert await authenticator.caller(good | {"clusterid": "Kubernetes"}) == CALLER
    for bad in ({}, {"authorization": "Basic x"}, good | {"clusterid": "other"}):
        with pytest.raises(IdentityError):
            await authenticator.caller(bad)


# -- the node rule


class Pods:
    """A pod index over a list."""

    def __init__(self, *pods: Pod) -> None:
        self._pods = pods

    def pod(self, namespace: str, name: str) -> Pod | None:
        found = [p for p in self._pods if (p.namespace, p.name) == (namespace, name)]
        return found[0] if found else None

    def pods_on_node(self, node: str) -> Iterable[Pod]:
        return [pod for pod in self._pods if pod.node == node]


def pod(namespace: str, name: str, account: str, node: str, **fields: Any) -> Pod:
    values = {"uid": f"uid-of-{name}", "phase": "Running"} | fields
    return Pod(ref=Ref("Pod", namespace, name), node=node, service_account=account, **values)


ZTUNNEL = pod("istio-system", "ztunnel-n1", "ztunnel", "n1", uid="uid-1")
SLEEP = pod("demo", "sleep-1", "sleep", "n1")
HTTPBIN = pod("demo", "httpbin-1", "httpbin", "n2")
TRUSTED = frozenset({"istio-system/ztunnel"})


def ask(
    account: str,
    *pods: Pod,
    caller: Caller = CALLER,
    trusted: frozenset[str] = TRUSTED,
    namespace: str = "demo",
) -> str:
    identity = SpiffeId("cluster.local", namespace, account)
    refusal = may_request(caller, identity, Pods(*pods), trusted_accounts=trusted)
    return refusal.reason if refusal is not None else ""


def test_a_workload_of_the_callers_node_is_granted() -> None:
    assert ask("sleep", ZTUNNEL, SLEEP, HTTPBIN) == ""


@pytest.mark.parametrize("phase", ["Pending", "Running", "Succeeded", "Unknown"])
def test_any_pod_that_has_not_failed_counts(phase: str) -> None:
    assert ask("sleep", ZTUNNEL, pod("demo", "sleep-1", "sleep", "n1", phase=phase)) == ""


def test_a_workload_of_another_node_is_refused() -> None:
    assert "is on node n1" in ask("httpbin", ZTUNNEL, SLEEP, HTTPBIN)


def test_the_same_account_name_in_another_namespace_is_refused() -> None:
    assert "other/sa/sleep" in ask("sleep", ZTUNNEL, SLEEP, namespace="other")


def test_a_failed_pod_counts_no_more() -> None:
    assert ask("sleep", ZTUNNEL, pod("demo", "sleep-1", "sleep", "n1", phase="Failed"))


def test_an_account_that_is_not_trusted_is_refused() -> None:
    assert "not a trusted node account" in ask("sleep", ZTUNNEL, SLEEP, trusted=frozenset())
    thief = Caller("demo", "sleep", "sleep-1", "uid-of-sleep-1", "n1")
    assert "not a trusted node account" in ask("sleep", ZTUNNEL, SLEEP, caller=thief)


@pytest.mark.parametrize(
    "caller",
    [
        Caller("istio-system", "ztunnel"),
        Caller("istio-system", "ztunnel", "ztunnel-n1", ""),
        Caller("istio-system", "ztunnel", "", "uid-1"),
    ],
)
def test_a_token_that_is_not_bound_to_a_pod_is_refused(caller: Caller) -> None:
    assert "not bound" in ask("sleep", ZTUNNEL, SLEEP, caller=caller)


def test_a_callers_pod_that_is_gone_is_refused() -> None:
    assert "does not exist" in ask("sleep", SLEEP)


def test_a_callers_pod_that_was_replaced_is_refused() -> None:
    new = pod("istio-system", "ztunnel-n1", "ztunnel", "n1", uid="uid-2")
    assert "another UID" in ask("sleep", new, SLEEP)


def test_a_callers_pod_of_another_account_is_refused() -> None:
    other = pod("istio-system", "ztunnel-n1", "default", "n1", uid="uid-1")
    assert "runs as default" in ask("sleep", other, SLEEP)


def test_a_callers_pod_without_a_node_is_refused() -> None:
    unscheduled = pod("istio-system", "ztunnel-n1", "ztunnel", "", uid="uid-1")
    pending = pod("demo", "sleep-1", "sleep", "")
    assert "on no node" in ask("sleep", unscheduled, pending)


def test_a_token_of_another_node_than_its_pod_is_worth_nothing() -> None:
    liar = Caller("istio-system", "ztunnel", "ztunnel-n1", "uid-1", node="n2")
    assert ask("httpbin", ZTUNNEL, SLEEP, HTTPBIN, caller=liar)
    assert ask("sleep", ZTUNNEL, SLEEP, HTTPBIN, caller=liar)
