"""PeerAuthentication: who refuses plain text, by all combinations of levels and ports."""

from __future__ import annotations

from itertools import product

import pytest

from istiod_lite.peer_authentication import convert, policies_for, reaches
from mesh.authz import ConnectionContext, Permit, evaluate
from mesh.cluster.api import Ref
from mesh.cluster.policies import PeerAuthentication
from mesh.identity import SpiffeId

ROOT = "istio-system"
STRICT = f"{ROOT}/istio_converted_static_strict"
LABELS = {"app": "web"}
MODES = (None, "UNSET", "DISABLE", "PERMISSIVE", "STRICT")


def peer(namespace: str, mode: str = "UNSET", name: str = "pa", **more) -> PeerAuthentication:
    return PeerAuthentication(ref=Ref("PeerAuthentication", namespace, name), mode=mode, **more)


def own(mode: str = "UNSET", ports: dict[int, str] | None = None, **more) -> PeerAuthentication:
    return peer("shop", mode, selector=LABELS, port_modes=ports or {}, **{"name": "own", **more})


def takes_plain_text(peers: list[PeerAuthentication], port: int = 80) -> bool:
    known = convert(peers, ROOT)
    named = [known[key] for key in policies_for(peers, "shop", LABELS, ROOT)]
    plain = ConnectionContext(None, "10.0.0.1", "10.0.0.2", port)
    secure = ConnectionContext(SpiffeId("td", "a", "b"), "10.0.0.1", "10.0.0.2", port)
    assert isinstance(evaluate(named, secure), Permit)
    return isinstance(evaluate(named, plain), Permit)


@pytest.mark.parametrize(("mesh", "namespace", "workload"), [*product(MODES, MODES, MODES)])
def test_precedence(mesh, namespace, workload):
    peers = []
    if mesh:
        peers.append(peer(ROOT, mesh))
    if namespace:
        peers.append(peer("shop", namespace))
    if workload:
        peers.append(own(workload))
    told = [mode for mode in (workload, namespace, mesh) if mode not in (None, "UNSET")]
    is_strict = bool(told) and told[0] == "STRICT"
    assert takes_plain_text(peers) is not is_strict
    assert policies_for(peers, "shop", LABELS, ROOT) == ((STRICT,) if is_strict else ())
    assert (STRICT in convert(peers, ROOT)) is bool(peers)


@pytest.mark.parametrize(
    ("mesh", "base", "at_port"), [*product(("PERMISSIVE", "STRICT"), MODES[1:], MODES[1:])]
)
def test_ports(mesh, base, at_port):
    peers = [peer(ROOT, mesh), own(base, {8080: at_port})]
    base_strict = (mesh if base == "UNSET" else base) == "STRICT"
    port_strict = base_strict if at_port == "UNSET" else at_port == "STRICT"
    assert takes_plain_text(peers, 80) is not base_strict
    assert takes_plain_text(peers, 8080) is not port_strict


def test_several_ports():
    peers = [own("STRICT", {1: "DISABLE", 2: "PERMISSIVE", 3: "STRICT"})]
    assert [takes_plain_text(peers, port) for port in (1, 2, 3, 4)] == [True, True, False, False]
    assert policies_for(peers, "shop", LABELS, ROOT) == ("shop/converted_peer_authentication_own",)
    peers = [own("PERMISSIVE", {1: "STRICT", 2: "STRICT", 3: "DISABLE"})]
    assert [takes_plain_text(peers, port) for port in (1, 2, 3, 4)] == [False, False, True, True]


def test_the_oldest_wins():
    old = own("STRICT", name="z", created="2020-01-01T00:00:00Z")
    new = own("DISABLE", name="a", created="2021-01-01T00:00:00Z")
    assert not takes_plain_text([new, old])
    assert not takes_plain_text([old, new])
    old, new = (
        peer("shop", "DISABLE", "z", created="2020-01-01T00:00:00Z"),
        peer("shop", "STRICT", "a", created="2021-01-01T00:00:00Z"),
    )
    assert takes_plain_text([new, old])


def test_whom_it_does_not_concern():
    for other in (
        peer("other", "STRICT"),
        peer("shop", "STRICT", selector={"app": "db"}),
        peer(ROOT, "STRICT", selector=LABELS),
    ):
        assert takes_plain_text([other])


def test_a_selector_without_labels_is_none():
    assert not takes_plain_text([peer("shop", "STRICT", selector={})])


@pytest.mark.parametrize(
    ("one", "namespace"),
    [
        (peer(ROOT), ""),
        (peer("shop"), "shop"),
        (own(), "shop"),
        (peer(ROOT, selector=LABELS), None),
    ],
)
def test_reach(one, namespace):
    assert reaches(one, ROOT) == namespace
