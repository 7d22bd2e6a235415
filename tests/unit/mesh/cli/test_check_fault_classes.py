"""`ambit check` on every class of fault, all of them in one file: each with its place, none hidden
by another, not even by one in the same object.
"""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from mesh.cli.main import ambit

FAULTY = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/use-waypoint: wp, istio.io/dataplane-mode: ambient}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: wp, namespace: shop}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  containers:
    - name: c
      image: c
      ports: [{containerPort: 8080}, {containerPort: 15006}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: shop}
spec:
  parentRefs:
    - {group: "", kind: Service, name: web}
    - {group: "", kind: Service, name: gone}
  rules:
    - matches: [{path: {type: PathPrefix, value: /a}}]
      backendRefs: [{name: web, port: 80}]
    - matches: [{path: {type: PathPrefix, value: /a}}]
      backendRefs: [{name: nobody, port: 80}]
      timeoutz: {}
    - matches: [{path: {type: PathPrefix, value: /b}}]
    - matches: [{path: {type: PathPrefix, value: /c}}]
      backendRefs: [{name: mistaken, port: 80}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p1, namespace: shop}
spec:
  action: DENY
  rules:
    - from: [{source: {principals: [a/b], notPrincipals: [a/b]}}]
    - to: [{operation: {ports: ["80"], notPorts: ["80"]}}]
    - to: [{operation: {methods: [GET]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p2, namespace: shop}
spec:
  selector: {matchLabels: {app: nope}}
  rules: [{}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p3, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: none}]
  rules: [{}]
---
apiVersion: v1
kind: Service
metadata: {name: mistaken, namespace: shop}
spec:
  selectr: {app: web}
  selector: {app: web}
  ports: [{name: http, port: 80}, {name: odd, port: 99999}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: n, namespace: shop}
spec:
  podSelector: {}
  policyTypes: [Ingress, Egress]
  ingress: [{ports: [{port: 8080}]}]
  egress: [{ports: [{port: 53}]}]
"""
FOUND = {
    "ports of the mesh": [
        "23:3: warning: spec.containers: port 15006 is the mesh's own in every enrolled "
        "pod, for plain text that comes to the pod",
    ],
    "dangling references": [
        "34:40: warning: spec.parentRefs[1].name: there is no Service shop/gone",
        "39:28: warning: spec.rules[1].backendRefs[0].name: there is no Service "
        "shop/nobody: its share is answered with errors",
        "59:14: warning: spec.selector.matchLabels: selects nothing: no pod in 'shop' has app=nope",
        "66:49: warning: spec.targetRefs[0].name: there is no Service shop/none: nothing "
        "is enforced",
    ],
    "shadowed rules": [
        "38:7: warning: spec.rules[1].matches: never reached: rule 0 matches the same "
        "and goes first",
    ],
    "unknown fields": [
        "40:7: error: spec.rules[1].timeoutz: unknown field",
        "73:3: warning: spec.selectr: unknown field: it is ignored",
    ],
    "unreachable routes": [
        "41:7: warning: spec.rules[2].backendRefs: without backends every request is answered 500",
    ],
    "policies that never match": [
        "51:24: warning: spec.rules[0].from[0].source.principals: never matches: all "
        "that it asks for is excluded beside it",
        "52:25: warning: spec.rules[1].to[0].operation.ports: never matches: all that it "
        "asks for is excluded beside it",
        "53:7: warning: spec.rules[2]: node proxies see no HTTP, so the rule denies more "
        "than it says, or nothing",
    ],
    "values": [
        "75:53: error: spec.ports[1].port: not a port: 99999",
    ],
    "network policies": [
        "83:3: warning: spec.ingress: TCP port 15008 is not among its ports: the mesh's "
        "tunnels that come to Pod shop/web are dropped",
        "84:3: warning: spec.egress: TCP port 15008 is not among its ports: the mesh's "
        "tunnels that leave Pod shop/web are dropped",
    ],
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("check") / "all.yaml"
    path.write_text(FAULTY)
    done = CliRunner().invoke(ambit, ["check", str(path)])
    assert done.exit_code == 2
    lines = done.stdout.splitlines()
    return [line.removeprefix(f"{path}:") for line in lines if not line.startswith("    hint:")]


@pytest.mark.parametrize("what", FOUND)
def test_each_class_is_found_at_its_place(told: list[str], what: str) -> None:
    assert [line for line in told if line in FOUND[what]] == FOUND[what]


def test_nothing_else_is_said(told: list[str]) -> None:
    """Nor that there is no Service "mistaken": it is there, with a mistake in it."""
    assert "backendRefs: [{name: mistaken" in FAULTY
    assert sorted(told) == sorted(line for lines in FOUND.values() for line in lines)
