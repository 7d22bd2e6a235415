"""What a TokenReview's status is worth, and what of it is remembered."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from istiod_lite.authenticate import Caller
from istiod_lite.saved_state import TokenKeys
from istiod_lite.token_review import MAX_REMEMBERED, KubernetesTokenReviewer, caller_of, judged
from mesh.cluster.api import Object, Ref
from mesh.cluster.objects import Pod
from mesh.errors import IdentityError, Unavailable
from tests.support.istiod import KEY, mint, now

EXTRA = {
    "authentication.kubernetes.io/node-name": ["n1"],
    "authentication.kubernetes.io/pod-name": ["ztunnel-abc"],
    "authentication.kubernetes.io/pod-uid": ["uid-1"],
}
GOOD: dict[str, Any] = {
    "authenticated": True,
    "audiences": ["istio-ca"],
    "user": {"username": "system:serviceaccount:istio-system:ztunnel", "extra": EXTRA},
}


def with_user(**user: Any) -> dict[str, Any]:
    return {**GOOD, "user": {**GOOD["user"], **user}}


def test_a_bound_token_names_account_pod_and_node() -> None:
    assert caller_of(GOOD, ["istio-ca"]) == Caller(
        "istio-system", "ztunnel", "ztunnel-abc", "uid-1", "n1"
    )


@pytest.mark.parametrize("extra", [None, {}, [], {"authentication.kubernetes.io/pod-name": "x"}])
def test_an_unbound_token_names_no_pod(extra: Any) -> None:
    caller = caller_of(with_user(extra=extra), ["istio-ca"])
    assert caller == Caller("istio-system", "ztunnel")


@pytest.mark.parametrize(
    "status",
    [
        None,
        {},
        {**GOOD, "authenticated": False},
        {**GOOD, "authenticated": "true"},
        {**GOOD, "audiences": []},
        {**GOOD, "audiences": None},
        {**GOOD, "audiences": ["https://kubernetes.default.svc"]},
        {**GOOD, "user": None},
        with_user(username="kubernetes-admin"),
        with_user(username="system:serviceaccount:only"),
        with_user(username="system:serviceaccount::x"),
        with_user(username=7),
    ],
)
def test_every_doubt_is_a_refusal(status: Any) -> None:
    with pytest.raises(IdentityError):
        caller_of(status, ["istio-ca"])


class Server:
    """Answers reviews from a table, and counts them."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_up = True

    async def get(self, ref: Ref) -> Object | None:
        raise NotImplementedError

    async def replace(self, object: Object) -> Object:  # noqa: A002
        raise NotImplementedError

    async def create(self, object: Object) -> Object:  # noqa: A002
        assert object["spec"]["audiences"] == ["istio-ca"]
        self.asked.append(object["spec"]["token"])
        await trio.sleep(0.1)
        if not self.is_up:
            raise Unavailable("no answer")
        is_good = object["spec"]["token"].startswith("good")
        return {"status": GOOD if is_good else {"authenticated": False}}


async def test_answers_are_remembered_for_a_while(autojump_clock: trio.testing.MockClock) -> None:
    server = Server()
    reviewer = KubernetesTokenReviewer(server, ["istio-ca"])
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(reviewer.review, "good")
    assert server.asked == ["good"]
    await trio.sleep(61)
    await reviewer.review("good")
    assert len(server.asked) == 2
    for _ in range(3):
        with pytest.raises(IdentityError):
            await reviewer.review("bad")
    assert len(server.asked) == 3
    await trio.sleep(6)
    with pytest.raises(IdentityError):
        await reviewer.review("bad")
    assert len(server.asked) == 4


async def test_nobody_to_ask_is_neither_yes_nor_remembered(
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = Server()
    server.is_up = False
    reviewer = KubernetesTokenReviewer(server, ["istio-ca"])
    with pytest.raises(Unavailable):
        await reviewer.review("good")
    server.is_up = True
    assert (await reviewer.review("good")).service_account == "ztunnel"


KNOWN_POD = Pod(
    ref=Ref("Pod", "istio-system", "ztunnel-n1"),
    uid="uid-1",
    service_account="ztunnel",
    node="n1",
    phase="Running",
)
KEYS = TokenKeys(
    "https://kubernetes.default.svc",
    json.dumps({"keys": [KEY.as_dict(private=False)]}).encode(),
)


class Known:
    """What a controller knows by itself."""

    def __init__(self, pod: Pod | None = KNOWN_POD, keys: TokenKeys = KEYS) -> None:
        self._pod = pod
        self.keys = keys

    def pod(self, namespace: str, name: str) -> Pod | None:
        found = self._pod
        return found if found and (found.namespace, found.name) == (namespace, name) else None

    def pods_on_node(self, node: str) -> list[Pod]:
        raise NotImplementedError


async def test_without_a_server_the_known_keys_judge(
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = Server()
    server.is_up = False
    known = Known()
    reviewer = KubernetesTokenReviewer(server, ["istio-ca"], lambda: known, now)
    caller = await reviewer.review(mint())
    assert caller == Caller("istio-system", "ztunnel", "ztunnel-n1", "uid-1", "n1")
    for token in (
        mint(uid="uid-0"),  # a pod of that name that was there before
        mint(pod="gone"),
        mint(pod=""),
        mint(account="other"),
        mint(namespace="demo"),
        mint()[:-8] + "AAAAAAAA",
        "rubbish",
    ):
        with pytest.raises(IdentityError, match="cannot be asked"):
            await reviewer.review(token)
    # As soon as the server answers again, its word counts.
    server.is_up = True
    await trio.sleep(6)
    with pytest.raises(IdentityError, match="not accepted by the API server"):
        await reviewer.review(mint())


@pytest.mark.parametrize(
    "known",
    [
        Known(keys=TokenKeys()),
        Known(keys=TokenKeys("", KEYS.jwks)),
        Known(keys=TokenKeys("https://another.issuer", KEYS.jwks)),
        Known(keys=TokenKeys(KEYS.issuer, b"rubbish")),
        Known(keys=TokenKeys(KEYS.issuer, b'{"keys": []}')),
        Known(pod=None),
        Known(pod=replace(KNOWN_POD, uid="")),
        Known(pod=replace(KNOWN_POD, service_account="other")),
    ],
)
def test_what_is_not_known_proves_nothing(known: Known) -> None:
    with pytest.raises(IdentityError):
        judged(mint(), known, ["istio-ca"], now())
    with pytest.raises(IdentityError):
        judged(mint(), Known(), ["another"], now())
    with pytest.raises(IdentityError):
        judged(mint(), Known(), ["istio-ca"], now() + 3600)


async def test_what_is_remembered_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    reviewer = KubernetesTokenReviewer(Server(), ["istio-ca"])
    for number in range(MAX_REMEMBERED + 50):
        await reviewer.review(f"good {number}")
    assert len(reviewer._answers) == MAX_REMEMBERED
    with pytest.raises(IdentityError, match="too large"):
        await reviewer.review("x" * (1 << 20))
