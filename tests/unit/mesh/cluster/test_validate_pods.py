"""What `ambit check` says of objects that want different things of the same pods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mesh.cli.main import ambit
from mesh.cluster.network_policies import parse_network_policy
from mesh.cluster.objects import parse_pod
from mesh.cluster.validate import check
from mesh.errors import ConfigError
from tests.support.gateways import USE, gateway, namespace, pod, service

AMBIENT = {"istio.io/dataplane-mode": "ambient"}
ACCOUNT = {
    "apiVersion": "v1",
    "kind": "ServiceAccount",
    "metadata": {"name": "a", "namespace": "shop"},
}


def policy(name: str = "np", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"podSelector": {}, **spec},
    }


def told(*objects: dict[str, Any]) -> list[str]:
    found = check([(each, None) for each in objects])
    return [
        f"{each.ref} {each.field}"
        for each in found
        if "tunnels" in each.message or "two waypoints" in each.message
    ]


def ingress(*ports: dict[str, Any]) -> dict[str, Any]:
    return policy(ingress=[{"from": [{"podSelector": {}}], "ports": list(ports)}])


CUT = ["NetworkPolicy shop/np spec.ingress"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (ingress({"port": 8080}), CUT),
        (ingress({"port": "http"}), CUT),
        (ingress({"port": 15008, "protocol": "UDP"}), CUT),
        (ingress({"port": 8080}, {"port": 15008}), []),
        (ingress({"port": 15000, "endPort": 15010}), []),
        (ingress({"protocol": "TCP"}), []),
        (ingress(), []),
        (policy(), CUT),  # nothing is admitted at all
        (policy(ingress=[{}]), []),
        (policy(policyTypes=["Egress"]), ["NetworkPolicy shop/np spec.egress"]),
        (
            policy(policyTypes=["Egress"], egress=[{"ports": [{"port": 53, "protocol": "UDP"}]}]),
            ["NetworkPolicy shop/np spec.egress"],
        ),
        (policy(egress=[{}]), CUT),
        (policy(policyTypes=[]), CUT),
        (policy(podSelector={"matchLabels": {"app": "other"}}), []),
        (
            policy(
                podSelector={
                    "matchExpressions": [
                        {"key": "app", "operator": "In", "values": ["web"]},
                        {"key": "tier", "operator": "DoesNotExist"},
                        {"key": "app", "operator": "NotIn", "values": ["db"]},
                        {"key": "app", "operator": "Exists"},
                    ]
                }
            ),
            CUT,
        ),
    ],
)
def test_network_policies_that_drop_the_meshs_tunnels(
    written: dict[str, Any], expected: list[str]
) -> None:
    assert told(namespace("shop", **AMBIENT), ACCOUNT, pod("a"), written) == expected
    # Whom the mesh does not carry, it does not matter to.
    assert told(namespace("shop"), ACCOUNT, pod("a"), written) == []
    out = pod("a")
    out["metadata"]["labels"]["istio.io/dataplane-mode"] = "none"
    assert told(namespace("shop", **AMBIENT), ACCOUNT, out, written) == []
    out["metadata"]["labels"]["istio.io/dataplane-mode"] = "ambient"
    assert told(namespace("shop"), ACCOUNT, out, written) == expected


def test_policies_add_up_and_each_is_told_once() -> None:
    base = (namespace("shop", **AMBIENT), ACCOUNT, pod("a"), pod("b", ip="10.0.0.2"))
    two = (policy("x"), policy("y", ingress=[{"ports": [{"port": 80}]}]))
    assert told(*base, *two) == [
        "NetworkPolicy shop/x spec.ingress",
        "NetworkPolicy shop/y spec.ingress",
    ]
    assert told(*base, *two, policy("z", ingress=[{"ports": [{"port": 15008}]}])) == []


def test_what_is_no_network_policy() -> None:
    for spec in (
        {"podSelector": {"matchExpressions": [{"key": "a", "operator": "Like"}]}},
        {"ingress": {}},
        {"ingress": [{"ports": [{"port": 0}]}]},
    ):
        with pytest.raises(ConfigError):
            parse_network_policy(policy(**spec))
    assert not parse_network_policy(policy()).isolates(parse_pod(pod("a")), "Egress")


def test_services_that_share_pods_behind_different_waypoints() -> None:
    base = (namespace("shop", **{USE: "wp"}), gateway(), gateway("other"), ACCOUNT, pod("a"))
    second = service("again", labels={USE: "other"})
    assert told(*base, service(), second) == [f'Service shop/again metadata.labels["{USE}"]']
    assert told(*base, service(), service("again")) == []
    # Another port of the pod is another matter, as are other pods.
    assert told(*base, service(), service("again", target=9999, labels={USE: "other"})) == []
    assert told(*base, service(), service("again", app="db", labels={USE: "other"})) == []
    assert told(*base, service(), service("again", labels={USE: "none"})) == []


def test_it_says_where(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(
        """\
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: shop}
spec: {containers: [{name: c, image: c}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: np, namespace: shop}
spec:
  podSelector: {}
  ingress:
    - ports: [{port: 8080}]
"""
    )
    done = CliRunner().invoke(ambit, ["check", str(tmp_path)])
    assert done.exit_code == 0
    assert "all.yaml:15:3: warning: spec.ingress: TCP port 15008 is not among" in done.stdout
    assert "add `ports: [{port: 15008}]`" in done.stdout
