"""Findings of the files' objects, joined with what the controller says of them."""

from __future__ import annotations

from typing import Any

from mesh.cluster.api import Put, Ref
from mesh.cluster.documents import read_documents
from mesh.cluster.validate import Finding, Severity, check
from mesh.errors import ConfigError
from mesh.lab.checks import as_live, merged, without

POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a}
spec:
  rulez: []
"""


def read(text: str) -> tuple[dict[Ref, Put], list[Finding]]:
    documents = read_documents(text.encode(), "f.yaml")
    puts = {each.ref: Put(each.ref, each.object, each.source) for each in documents}
    return puts, check([(each.object, each.source) for each in documents])


def told(**changes: Any) -> dict[str, Any]:
    return {
        "severity": "error",
        "object": "AuthorizationPolicy default/a",
        "field": "spec.rulez",
        "message": "unknown field; everything is denied",
        "hint": "",
        "source": "/elsewhere.json:9",
        **changes,
    }


def test_the_controllers_words_stand_at_our_place():
    puts, own = read(POLICY)
    (joined,) = merged(own, [told()], puts)
    assert str(joined) == (
        "f.yaml:5:3: AuthorizationPolicy default/a: spec.rulez: unknown field; everything is denied"
    )
    assert joined.hint == own[0].hint


def test_what_only_the_controller_knows_is_added_with_its_place():
    puts, own = read(POLICY)
    extra = told(severity="warning", field="spec", message="has no effect", hint="drop it")
    assert merged(own, [extra], puts) == [
        *own,
        Finding(
            Severity.WARNING,
            "has no effect",
            Ref("AuthorizationPolicy", "default", "a"),
            "spec",
            puts[Ref("AuthorizationPolicy", "default", "a")].source,
            "drop it",
        ),
    ]


def test_other_objects_and_other_words_change_nothing():
    puts, own = read(POLICY)
    others = [
        told(object="AuthorizationPolicy default/gone"),
        told(message="something else of the same field"),
        "no mapping",
        {"object": ["no", "text"]},
        None,
    ]
    assert merged(own, others, puts) == own


def test_a_fault_of_the_same_field_says_it_already():
    _, own = read(POLICY)
    fault = ConfigError("in other words", file="f.yaml", line=5, column=3, field="spec.rulez")
    assert without([fault], own) == []
    elsewhere = ConfigError("in other words", file="g.yaml", line=5, column=3, field="spec.rulez")
    assert without([elsewhere], own) == own


def test_labels_that_were_set_live_count():
    written = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": "shop", "labels": {"a": "b"}},
    }
    live = {**written, "metadata": {"name": "shop", "labels": {"istio.io/use-waypoint": "w"}}}
    seen = as_live(written, live)
    assert seen["metadata"]["labels"] == {"istio.io/use-waypoint": "w"}
    assert as_live(written, None) == written
    pod = {"kind": "Pod", "metadata": {"name": "p"}}
    assert as_live(pod, {**pod, "metadata": {"name": "p", "labels": {"x": "y"}}}) == pod
