"""DECIDES which pods of this node are captured, and what is to be done about each. Pure.

`reconcile` compares the pods as they are with what the agent already intends for each of
them (`Enrol`, `Drain` or `Withdraw`, by pod uid) and returns only what changes.

A pod is selected by its label `istio.io/dataplane-mode: ambient`, or by its namespace's if
its own is not `none`. Never captured are pods on the host network, pods with a sidecar, pods
of excluded namespaces, node proxies and pods that have ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from mesh.cluster.api import Ref
from mesh.cluster.objects import Namespace, Pod
from netconfig.ruleset import Capture

MODE_LABEL = "istio.io/dataplane-mode"
SIDECAR_ANNOTATION = "sidecar.istio.io/status"
DNS_ANNOTATION = "ambient.istio.io/dns-capture"
BYPASS_ANNOTATION = "ambient.istio.io/bypass-inbound-capture"


@dataclass(frozen=True, slots=True)
class Selection:
    """The agent's part of the decision: its node, and what holds for every pod."""

    node: str
    system_namespace: str = "istio-system"
    excluded_namespaces: frozenset[str] = frozenset()
    capture: Capture = field(default_factory=Capture)


@dataclass(frozen=True, slots=True)
class Target:
    """A pod to be captured: who it is on the wire, and how its rules look."""

    uid: str
    ref: Ref
    service_account: str
    capture: Capture


@dataclass(frozen=True, slots=True)
class Excluded:
    """A pod that is not captured, and why, for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class Enrol:
    """Capture this pod, or capture it anew with other rules."""

    uid: str
    ref: Ref
    target: Target


@dataclass(frozen=True, slots=True)
class Drain:
    """This pod lives on without us: release it, letting its open connections end."""

    uid: str
    ref: Ref


@dataclass(frozen=True, slots=True)
class Withdraw:
    """This pod is gone: let go of everything that is its, at once."""

    uid: str
    ref: Ref


@dataclass(frozen=True, slots=True)
class Recognised:
    """An agent before us captured this pod, or was draining it: nothing is decided yet."""

    uid: str
    ref: Ref


Action: TypeAlias = Enrol | Drain | Withdraw
Intent: TypeAlias = Action | Recognised


def judge(pod: Pod, namespace: Namespace | None, selection: Selection) -> Target | Excluded:
    """Whether and how a pod is captured. The order of the reasons is the order of checks."""
    reason = _exclusion(pod, selection)
    if not reason and not _is_selected(pod, namespace):
        reason = f"neither the pod nor its namespace has the label {MODE_LABEL}=ambient"
        if pod.labels.get(MODE_LABEL) == "none":
            reason = f"the pod has the label {MODE_LABEL}=none"
    if reason:
        return Excluded(reason)
    return Target(pod.uid, pod.ref, pod.service_account, capture_of(pod, selection.capture))


def _exclusion(pod: Pod, selection: Selection) -> str:
    if not pod.uid:
        return "the pod has no uid"
    if pod.node != selection.node:
        return "the pod is not on this node"
    if pod.is_terminal:
        return f"the pod has ended ({pod.phase})"
    if pod.host_network:
        return "the pod is on the host network"
    if SIDECAR_ANNOTATION in pod.annotations:
        return "the pod has a sidecar"
    if pod.namespace in selection.excluded_namespaces:
        return f"namespace {pod.namespace} is excluded"
    if pod.namespace == selection.system_namespace and pod.labels.get("app") == "ztunnel":
        return "the pod is a node proxy"
    return ""


def _is_selected(pod: Pod, namespace: Namespace | None) -> bool:
    own = pod.labels.get(MODE_LABEL)
    if own in ("ambient", "none"):
        return own == "ambient"
    return namespace is not None and namespace.labels.get(MODE_LABEL) == "ambient"


def capture_of(pod: Pod, default: Capture) -> Capture:
    """The node's settings with the pod's annotations over them; other texts count as unset."""
    return Capture(
        dns=_switch(pod, DNS_ANNOTATION, default=default.dns),
        inbound=default.inbound and not _switch(pod, BYPASS_ANNOTATION, default=False),
        ipv6=default.ipv6,
        exempt=default.exempt,
    )


def _switch(pod: Pod, annotation: str, *, default: bool) -> bool:
    text = pod.annotations.get(annotation, "").strip().lower()
    return text == "true" if text in ("true", "false") else default


def reconcile(
    pods: Iterable[Pod],
    namespaces: Mapping[str, Namespace],
    enrolled: Mapping[str, Intent],
    selection: Selection,
) -> list[Action]:
    """What to do now. `enrolled` has, by uid, what is already being done about a pod.

    Withdrawals come first: they are quick, and a new pod may have a dead one's address.
    """
    actions: list[Action] = []
    alive: set[str] = set()
    for pod in pods:
        judged = judge(pod, namespaces.get(pod.namespace), selection)
        current = enrolled.get(pod.uid)
        if pod.is_terminal or pod.node != selection.node:
            continue
        alive.add(pod.uid)
        if isinstance(judged, Target):
            wanted = Enrol(pod.uid, pod.ref, judged)
            if current != wanted:
                actions.append(wanted)
        elif isinstance(current, Enrol | Recognised):
            actions.append(Drain(pod.uid, pod.ref))
    gone = [
        Withdraw(uid, action.ref)
        for uid, action in enrolled.items()
        if uid not in alive and not isinstance(action, Withdraw)
    ]
    return [*gone, *actions]
