"""Text of a file -> objects with places; what is refused, and where it says it is."""

from __future__ import annotations

import pytest

from mesh.cluster.documents import read_documents
from mesh.errors import ConfigError

POD = """\
apiVersion: v1
kind: Pod
metadata:
  name: p
  labels: {a: no, b: on, c: "true", d: yes, e: ~}
spec:
  hostNetwork: true
  containers:
  - name: x
    ports:
    - containerPort: 8080
"""


def refused(text: str, file: str = "f.yaml") -> str:
    with pytest.raises(ConfigError) as caught:
        read_documents(text.encode(), file)
    return str(caught.value)


def test_only_true_and_false_are_booleans():
    (document,) = read_documents(POD.encode(), "f.yaml")
    labels = document.object["metadata"]["labels"]
    assert labels == {"a": "no", "b": "on", "c": "true", "d": "yes", "e": None}
    assert document.object["spec"]["hostNetwork"] is True


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-12", -12),
        ("010", 8),
        ("0400", 0o400),
        ("08", 8),
        ("0x1F", 31),
        ("0o17", 15),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("1.2.3", "1.2.3"),
        ("10.0.0.1", "10.0.0.1"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("12:30:45", "12:30:45"),
        ("True", True),
        ("FALSE", False),
        ("Null", None),
        ("tRUE", "tRUE"),
        ("no", "no"),
        (".inf", ".inf"),
        ("null", None),
        ("", None),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("|\n    a\n    b", "a\nb\n"),
        ("<<", "<<"),
        ("١", "١"),
    ],
)
def test_plain_values(text, value):
    head = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\n"
    (document,) = read_documents(f"{head}x: {text}\n".encode(), "f.yaml")
    found = document.object["x"]
    assert (type(found), found) == (type(value), value)


def test_keys_are_text_whatever_they_look_like():
    text = "apiVersion: v1\nkind: X\nmetadata: {name: m}\nports: {8080: {mode: STRICT}, no: 1}\n"
    (document,) = read_documents(text.encode(), "f.yaml")
    assert document.object["ports"] == {"8080": {"mode": "STRICT"}, "no": 1}
    assert str(document.source.at("ports.no")) == "f.yaml:4:35"


def test_places_of_fields():
    text = "# comment\n---\n" + POD
    (document,) = read_documents(text.encode(), "f.yaml")
    source = document.source
    assert str(source) == "f.yaml:3:1"
    assert str(source.at("spec.containers[0].ports[0].containerPort")) == "f.yaml:13:22"
    assert str(source.at("spec.containers")) == "f.yaml:10:3"
    # What is not written is found at what is: its closest ancestor.
    assert str(source.at("spec.containers[0].image")) == "f.yaml:11:5"
    assert str(source.at("spec.nodeName")) == "f.yaml:8:1"


def test_lists_within_lists_are_taken_apart():
    text = (
        "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: ServiceAccountList\n"
        "  items:\n  - metadata: {name: a}\n  - metadata: {name: b}\n"
    )
    found = read_documents(text.encode(), "f.yaml")
    assert [(document.ref.kind, document.ref.name) for document in found] == [
        ("ServiceAccount", "a"),
        ("ServiceAccount", "b"),
    ]
    assert [document.source.line for document in found] == [7, 8]


@pytest.mark.parametrize(
    ("kind", "name", "namespace"),
    [("Service", "x" * 64, "a"), ("Namespace", "a.b", ""), ("Pod", "a", "x" * 64)],
)
def test_names_that_dns_cannot_carry_are_refused(kind, name, namespace):
    text = f"apiVersion: v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: '{namespace}'}}\n"
    with pytest.raises(ConfigError, match="not a name"):
        read_documents(text.encode(), "f.yaml")


def test_lists_of_both_kinds_are_taken_apart():
    text = """\
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Pod, metadata: {name: a}}
- {apiVersion: v1, kind: Pod, metadata: {name: b}}
---
apiVersion: v1
kind: PodList
items:
- metadata: {name: c}
"""
    found = read_documents(text.encode(), "f.yaml")
    assert [(each.ref.kind, each.ref.name) for each in found] == [
        ("Pod", "a"),
        ("Pod", "b"),
        ("Pod", "c"),
    ]
    assert str(found[1].source) == "f.yaml:5:3"


def test_json_has_places_when_asked_for_and_is_cheap_when_not():
    text = '{\n "apiVersion": "v1",\n "kind": "Pod",\n "metadata": {"name": "p"}\n}'
    (document,) = read_documents(text.encode(), "f.json")
    assert str(document.source.at("metadata.name")) == "f.json:4:23"
    (document,) = read_documents(text.encode(), "f.json", marks=False)
    assert str(document.source.at("metadata.name")) == "f.json"


def test_json_that_is_no_yaml_is_still_read():
    text = r'{"apiVersion": "v1", "kind": "X", "metadata": {"name": "p"}, "a": "\ud83d\ude00"}'
    (document,) = read_documents(text.encode(), "f.json")
    assert document.object["a"] == "😀"


@pytest.mark.parametrize("text", ["", "---\n", "# nothing\n", "null\n", "---\n---\n..."])
def test_nothing_in_it(text):
    assert read_documents(text.encode(), "f.yaml") == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &x 1", "f.yaml:1:4: anchors"),
        ("a: *x", "f.yaml:1:4: aliases"),
        ("a: 1\nb: 2\na: 3", "f.yaml:3:1: key 'a' is written twice, first in line 1"),
        ("? {a: 1}\n: b", "f.yaml:1:3: a key must be plain text"),
        ("? [a]\n: b", "f.yaml:1:3: a key must be plain text"),
        ("a: !!binary aGk=", "f.yaml:1:4: tag"),
        ("!!set {a}", "f.yaml:1:1: tag"),
        ("a: {", "f.yaml:2:1: not YAML"),
        ("a: 'x", "f.yaml:1:6: not YAML"),
        ("a: b: c", "f.yaml:1:5: not YAML"),
        ("[" * 200, "f.yaml:1:101: nested deeper"),
        ("- " * 200, "f.yaml:1:201: nested deeper"),
        ("a: " + "9" * 60, "f.yaml:1:4: the number is too long"),
        ("a: 1e999", "f.yaml:1:4: the number is too large"),
        ("\x01", "f.yaml: not YAML"),
        ("just text", "f.yaml:1:1: not a Kubernetes object"),
        ("- a", "f.yaml:1:1: not a Kubernetes object"),
        ("kind: Pod\nmetadata: {name: p}", "f.yaml:1:1: apiVersion: missing"),
        (POD + "---\n" + POD, "f.yaml:13:1: Pod default/p stands in this file twice, first at"),
        ("apiVersion: v1\nkind: P\nmetadata:\n  name: A/b", "f.yaml:4:9: metadata.name: not a n"),
        ("apiVersion: v1\nkind: P\nmetadata:\n  name: a_b", "f.yaml:4:9: metadata.name: not a n"),
    ],
)
def test_refused_yaml(text, says):
    assert refused(text).startswith(says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 2}', "f.json: key 'a' is written twice"),
        ('{"a": NaN}', "f.json: NaN is not JSON"),
        ("[" * 100_000, "f.json: numbers too long or nesting too deep"),
        ('{"a": 1' + "0" * 5000 + "}", "f.json: numbers too long"),
        ('{"a"', "f.json:1:5: not JSON: expecting"),
        ("{} {}", "f.json:1:4: not JSON: extra data"),
    ],
)
def test_refused_json(text, says):
    assert refused(text, "f.json").startswith(says)


def test_not_utf8():
    with pytest.raises(ConfigError, match=r"f.yaml:2: not UTF-8 text"):
        read_documents(b"a: 1\nb: \xff\n", "f.yaml")
