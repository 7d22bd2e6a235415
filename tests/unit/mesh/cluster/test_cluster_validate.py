"""Checks over a set of files, with file, line and column in every finding."""

from __future__ import annotations

import pytest

from mesh.cluster.documents import read_documents
from mesh.cluster.validate import Severity, check

GOOD = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: shop}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  template:
    metadata: {labels: {app: web}}
    spec:
      serviceAccountName: web
      containers:
      - ports: [{name: http, containerPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: http}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  rules: [{}]
"""


def found(text: str, file: str = "f.yaml") -> list[str]:
    documents = read_documents(text.encode(), file)
    return [str(each) for each in check([(each.object, each.source) for each in documents])]


def test_nothing_to_say_about_a_good_set():
    assert found(GOOD) == []


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "{app: web}\n  ports",
            "{app: wbe}\n  ports",
            "f.yaml:24:3: Service shop/web: spec.selector: selects nothing: "
            "no pod in 'shop' has app=wbe",
        ),
        (
            "targetPort: http}",
            "targetPort: htpp}",
            "f.yaml:25:34: Service shop/web: spec.ports[0].targetPort: "
            'no container port named "htpp" (TCP) in web',
        ),
        (
            "serviceAccountName: web",
            "serviceAccountName: wbe",
            "f.yaml:16:27: Deployment shop/web: spec.template.spec.serviceAccountName: "
            'no service account "wbe" is defined in namespace "shop"',
        ),
        (
            "  rules: [{}]\n",
            "",
            "f.yaml:30:1: AuthorizationPolicy shop/a: spec.rules: ALLOW without rules never "
            "matches: it denies everything that no other policy allows",
        ),
        (
            "  rules: [{}]\n",
            "  action: DENY\n",
            "f.yaml:30:1: AuthorizationPolicy shop/a: spec.rules: DENY without rules never "
            "matches: it does nothing",
        ),
        (
            "matchLabels: {app: web}",
            "matchLabels: {app: wbe}",
            "f.yaml:31:14: AuthorizationPolicy shop/a: spec.selector.matchLabels: "
            "selects nothing: no pod in 'shop' has app=wbe",
        ),
        (
            "containers:\n",
            "containers:\n      - ports: [{containerPort: 8080}]\n",
            "f.yaml:17:7: Deployment shop/web: spec.template.spec.containers: port 8080/TCP is "
            "declared twice: the containers of a pod share its address, so only one of them can "
            "listen there",
        ),
        (
            "{app: web}\n  ports",
            "{app: web}\n  prots: []\n  ports",
            "f.yaml:25:3: Service shop/web: spec.prots: unknown field: it is ignored",
        ),
        (
            "containerPort: 8080",
            "containerPort: x",
            "f.yaml:18:45: Deployment shop/web: "
            'spec.template.spec.containers[0].ports[0].containerPort: not a port: "x"',
        ),
    ],
)
def test_one_thing_wrong(old, new, says):
    assert old in GOOD
    assert says in found(GOOD.replace(old, new))


def test_a_namespace_that_nobody_defines():
    text = GOOD.partition("---\n")[2]
    messages = found(text)
    assert len(messages) == 4
    assert all('metadata.namespace: no namespace "shop" is defined' in each for each in messages)
    assert messages[0].startswith("f.yaml:3:34: ServiceAccount shop/web")
    for given in ("default", "kube-system"):
        assert not any("no namespace" in each for each in found(text.replace("shop", given)))


def test_duplicates_name_the_other_place():
    first = read_documents(GOOD.encode(), "a.yaml")
    second = read_documents(GOOD.encode(), "b.yaml")
    findings = check([(each.object, each.source) for each in [*first, *second]])
    assert [each.severity for each in findings] == [Severity.ERROR] * 5
    assert str(findings[4]) == (
        "b.yaml:29:18: AuthorizationPolicy shop/a: metadata.name: already defined at a.yaml:27:1"
    )


def test_everything_wrong_is_told_at_once():
    text = GOOD.replace("targetPort: http", "targetPort: 0").replace("rules", "rulez")
    errors = [each for each in found(text) if "not a port" in each or "unknown field" in each]
    assert len(errors) == 2


def test_root_namespace_policies_look_everywhere():
    policy = """
---
apiVersion: security.istio.io/v1
kind: {kind}
metadata: {{name: a, namespace: istio-system}}
spec:
  selector: {{matchLabels: {{app: web}}}}
{more}
---
apiVersion: v1
kind: Namespace
metadata: {{name: istio-system}}
"""
    text = policy.format(kind="AuthorizationPolicy", more="  rules: [{}]")
    assert found(GOOD + text) == []
    text = policy.format(kind="PeerAuthentication", more="  mtls: {mode: STRICT}")
    assert [each.rpartition(": ")[2] for each in found(GOOD + text)] == [
        "a selector in the root namespace has no effect"
    ]


def test_an_object_that_is_none():
    (finding,) = check([({"kind": "Pod"}, None)])
    assert str(finding) == "apiVersion: missing"


def test_a_misspelt_field_names_what_it_may_have_meant():
    documents = read_documents(GOOD.replace("  selector: {app", "  selectr: {app").encode(), "f")
    (finding,) = check([(each.object, each.source) for each in documents])
    assert finding.severity is Severity.WARNING
    assert (finding.field, finding.hint) == ("spec.selectr", "did you mean selector?")
