"""Which pods are captured, and what changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mesh.cluster.api import Ref
from mesh.cluster.objects import Namespace, Pod
from netconfig.plan import (
    Drain,
    Enrol,
    Excluded,
    Recognised,
    Selection,
    Target,
    Withdraw,
    judge,
    reconcile,
)
from netconfig.ruleset import Capture

AMBIENT = {"istio.io/dataplane-mode": "ambient"}
NONE = {"istio.io/dataplane-mode": "none"}
SELECTION = Selection(node="node1", excluded_namespaces=frozenset({"kube-system"}))
SHOP = Namespace(ref=Ref("Namespace", "", "shop"), labels=AMBIENT)
PLAIN = Namespace(ref=Ref("Namespace", "", "shop"))


def pod(name: str = "web", namespace: str = "shop", **changes: Any) -> Pod:
    one = Pod(
        ref=Ref("Pod", namespace, name),
        uid=f"uid-{name}",
        node="node1",
        phase="Running",
        service_account="web-sa",
    )
    return dataclasses.replace(one, **changes)


def enrol(one: Pod, capture: Capture = SELECTION.capture) -> Enrol:
    target = Target(one.uid, one.ref, one.service_account, capture)
    return Enrol(one.uid, one.ref, target)


@pytest.mark.parametrize(
    ("own", "namespace", "captured"),
    [
        ({}, SHOP, True),
        ({}, PLAIN, False),
        ({}, None, False),
        (AMBIENT, PLAIN, True),
        (AMBIENT, None, True),
        (NONE, SHOP, False),
        ({"istio.io/dataplane-mode": "sidecar"}, SHOP, True),
        ({"istio.io/dataplane-mode": "sidecar"}, PLAIN, False),
    ],
)
def test_the_pods_label_wins_over_its_namespaces(
    own: dict[str, str], namespace: Namespace | None, captured: bool
) -> None:
    judged = judge(pod(labels=own), namespace, SELECTION)
    assert isinstance(judged, Target) == captured


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (pod(labels=AMBIENT, uid=""), "no uid"),
        (pod(labels=AMBIENT, node="node2"), "not on this node"),
        (pod(labels=AMBIENT, node=""), "not on this node"),
        (pod(labels=AMBIENT, phase="Succeeded"), "ended (Succeeded)"),
        (pod(labels=AMBIENT, phase="Failed"), "ended (Failed)"),
        (pod(labels=AMBIENT, host_network=True), "host network"),
        (pod(labels=AMBIENT, annotations={"sidecar.istio.io/status": "{}"}), "sidecar"),
        (pod(labels=AMBIENT, namespace="kube-system"), "kube-system is excluded"),
        (pod(namespace="istio-system", labels={**AMBIENT, "app": "ztunnel"}), "node proxy"),
        (pod(labels=NONE), "dataplane-mode=none"),
    ],
)
def test_some_pods_are_never_captured(one: Pod, reason: str) -> None:
    judged = judge(one, SHOP, SELECTION)
    assert isinstance(judged, Excluded)
    assert reason in judged.reason


def test_a_ztunnel_label_outside_the_system_namespace_means_nothing() -> None:
    assert isinstance(judge(pod(labels={"app": "ztunnel"}), SHOP, SELECTION), Target)


@pytest.mark.parametrize(
    ("annotations", "capture"),
    [
        ({}, Capture()),
        ({"ambient.istio.io/dns-capture": "false"}, Capture(dns=False)),
        ({"ambient.istio.io/dns-capture": " True "}, Capture()),
        ({"ambient.istio.io/dns-capture": "perhaps"}, Capture()),
        ({"ambient.istio.io/bypass-inbound-capture": "true"}, Capture(inbound=False)),
        ({"ambient.istio.io/bypass-inbound-capture": "false"}, Capture()),
    ],
)
def test_annotations_change_what_is_captured(annotations: dict[str, str], capture: Capture) -> None:
    judged = judge(pod(annotations=annotations), SHOP, SELECTION)
    assert isinstance(judged, Target)
    assert judged.capture == capture


def test_the_nodes_settings_hold_where_the_pod_says_nothing() -> None:
    node = dataclasses.replace(
        SELECTION, capture=Capture(dns=False, ipv6=False, exempt=("10.0.0.1",))
    )
    judged = judge(pod(annotations={"ambient.istio.io/dns-capture": "true"}), SHOP, node)
    assert isinstance(judged, Target)
    assert judged.capture == Capture(dns=True, ipv6=False, exempt=("10.0.0.1",))


def test_a_label_on_the_namespace_enrols_every_pod_of_it_on_this_node() -> None:
    pods = [pod("a"), pod("b", labels=NONE), pod("c", node="node2"), pod("d", "other")]
    assert reconcile(pods, {"shop": SHOP}, {}, SELECTION) == [enrol(pods[0])]


def test_what_is_already_wanted_is_no_change() -> None:
    one = pod()
    assert reconcile([one], {"shop": SHOP}, {one.uid: enrol(one)}, SELECTION) == []


def test_changed_settings_enrol_anew() -> None:
    one = pod(annotations={"ambient.istio.io/dns-capture": "false"})
    enrolled = {one.uid: enrol(one)}
    assert reconcile([one], {"shop": SHOP}, enrolled, SELECTION) == [enrol(one, Capture(dns=False))]


def test_a_label_taken_away_drains_once() -> None:
    one = pod()
    drain = Drain(one.uid, one.ref)
    assert reconcile([one], {"shop": PLAIN}, {one.uid: enrol(one)}, SELECTION) == [drain]
    assert reconcile([one], {"shop": PLAIN}, {one.uid: drain}, SELECTION) == []


def test_a_draining_pod_is_enrolled_again() -> None:
    one = pod()
    draining = {one.uid: Drain(one.uid, one.ref)}
    assert reconcile([one], {"shop": SHOP}, draining, SELECTION) == [enrol(one)]


def test_a_pod_that_is_gone_is_withdrawn_once() -> None:
    one = pod()
    withdraw = Withdraw(one.uid, one.ref)
    assert reconcile([], {"shop": SHOP}, {one.uid: enrol(one)}, SELECTION) == [withdraw]
    assert reconcile([], {"shop": SHOP}, {one.uid: withdraw}, SELECTION) == []
    assert reconcile([], {}, {one.uid: Drain(one.uid, one.ref)}, SELECTION) == [withdraw]


@pytest.mark.parametrize("change", [{"phase": "Succeeded"}, {"node": "node2"}])
def test_a_pod_that_ended_or_left_is_withdrawn(change: dict[str, Any]) -> None:
    one = pod()
    after = dataclasses.replace(one, **change)
    assert reconcile([after], {"shop": SHOP}, {one.uid: enrol(one)}, SELECTION) == [
        Withdraw(one.uid, one.ref)
    ]


def test_a_terminating_pod_stays_captured_until_it_is_gone() -> None:
    one = pod(is_terminating=True)
    assert reconcile([one], {"shop": SHOP}, {one.uid: enrol(one)}, SELECTION) == []


def test_a_new_pod_of_the_same_name_replaces_the_old_one() -> None:
    old, new = pod(uid="old"), pod(uid="new")
    assert reconcile([new], {"shop": SHOP}, {"old": enrol(old)}, SELECTION) == [
        Withdraw("old", old.ref),
        enrol(new),
    ]


def test_what_an_agent_before_left_is_enrolled_or_drained() -> None:
    one = pod()
    left = {one.uid: Recognised(one.uid, one.ref)}
    assert reconcile([one], {"shop": SHOP}, left, SELECTION) == [enrol(one)]
    assert reconcile([one], {"shop": PLAIN}, left, SELECTION) == [Drain(one.uid, one.ref)]
    assert reconcile([], {}, left, SELECTION) == [Withdraw(one.uid, one.ref)]


def test_a_captured_pod_that_gets_a_sidecar_is_drained() -> None:
    one = pod()
    after = dataclasses.replace(one, annotations={"sidecar.istio.io/status": "{}"})
    assert reconcile([after], {"shop": SHOP}, {one.uid: enrol(one)}, SELECTION) == [
        Drain(one.uid, one.ref)
    ]
