"""Field paths and the reader that carries them."""

from __future__ import annotations

import pytest

from mesh.cluster.api import Marks, Ref, Source, located, merge_patch, ref_of, source_of
from mesh.cluster.fields import Reader, format_path, split_path
from mesh.errors import ConfigError


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            ("spec", "rules", 1, "to", 0, "operation", "ports", 0),
            "spec.rules[1].to[0].operation.ports[0]",
        ),
        (
            ("metadata", "labels", "app.kubernetes.io/name"),
            'metadata.labels["app.kubernetes.io/name"]',
        ),
        (("a", 'b"]\\c', 0), 'a["b\\"]\\\\c"][0]'),
        ((), ""),
        ((0, "a"), "[0].a"),
    ],
)
def test_paths_both_ways(path, text):
    assert format_path(path) == text
    assert split_path(text) == path


def test_what_is_no_path_ends_it():
    assert split_path("spec.rules[x]") == ("spec", "rules")


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda r: r.get("n").text(), "n: expected text, not 5"),
        (lambda r: r.get("b").text(), "b: expected text, not true"),
        (lambda r: r.get("t").integer(), 't: expected a whole number, not "x"'),
        (lambda r: r.get("b").integer(), "b: expected a whole number, not true"),
        (lambda r: r.get("t").boolean(), 't: expected true or false, not "x"'),
        (lambda r: r.get("t").port(), 't: not a port: "x"'),
        (lambda r: r.get("b").port(), "b: not a port: true"),
        (lambda r: r.get("zero").port(), "zero: not a port: 0"),
        (lambda r: r.get("t").address(), 't: not an IP address: "x"'),
        (lambda r: r.get("t").get("x"), 't: expected a mapping, not "x"'),
        (lambda r: list(r.get("m").items()), "m: expected a list, not a mapping"),
        (lambda r: r.get("l").texts(), "l[1]: empty"),
        (lambda r: r.get("m").labels(), "m.a: expected text, not 1"),
        (lambda r: r.get("t").choice(("a", "b")), 't: unknown value "x"'),
        (lambda r: r.get("m").only("b"), "m.a: unknown field"),
        (lambda r: r.at("m", "x").name(), "m.x: missing"),
    ],
)
def test_complaints_name_the_field(read, says):
    reader = Reader({"n": 5, "t": "x", "b": True, "zero": 0, "m": {"a": 1}, "l": ["a", ""]})
    with pytest.raises(ConfigError) as caught:
        read(reader)
    assert str(caught.value) == says


def test_absent_is_null_is_the_default():
    reader = Reader({"a": None})
    for each in (reader.get("a"), reader.get("b"), reader.at("a", "b", "c")):
        assert not each.exists
        assert (each.text("d"), each.integer(3), each.boolean(default=True)) == ("d", 3, True)
        assert (list(each.items()), dict(each.entries()), each.labels()) == ([], {}, {})


def test_addresses_become_canonical():
    assert Reader("FD00:0::1").address() == "fd00::1"
    assert Reader("::ffff:10.0.0.1").address() == "10.0.0.1"


def _object(kind: str, version: str = "v1", **metadata: object) -> dict:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": "x", **metadata}}


@pytest.mark.parametrize(
    ("obj", "ref"),
    [
        (_object("Pod"), Ref("Pod", "default", "x")),
        (_object("Pod", namespace="shop"), Ref("Pod", "shop", "x")),
        (_object("Node", namespace="shop"), Ref("Node", "", "x")),
        (
            _object("Service", "serving.knative.dev/v1"),
            Ref("Service.serving.knative.dev", "default", "x"),
        ),
        (
            _object("Gateway", "networking.istio.io/v1"),
            Ref("Gateway.networking.istio.io", "default", "x"),
        ),
        (_object("Gateway", "gateway.networking.k8s.io/v1"), Ref("Gateway", "default", "x")),
        (_object("Deployment", "v1"), Ref("Deployment.core", "default", "x")),
        (
            _object("AuthorizationPolicy", "security.istio.io/v1beta1"),
            Ref("AuthorizationPolicy", "default", "x"),
        ),
    ],
)
def test_names_of_objects(obj, ref):
    assert ref_of(obj) == ref


@pytest.mark.parametrize(
    ("obj", "field"),
    [
        ([], ""),
        ({"kind": "Pod"}, "apiVersion"),
        ({**_object("Pod"), "apiVersion": "../x"}, "apiVersion"),
        ({**_object("Pod"), "kind": "../Pod"}, "kind"),
        ({**_object("Pod"), "metadata": None}, "metadata"),
        (_object("Pod", name=5), "metadata.name"),
        (_object("Pod", name=".."), "metadata.name"),
        (_object("Pod", name="x" * 254), "metadata.name"),
        (_object("Pod", namespace="a/b"), "metadata.namespace"),
    ],
)
def test_no_names(obj, field):
    with pytest.raises(ConfigError) as caught:
        ref_of(obj)
    assert caught.value.field == field


def test_an_error_is_located_once():
    marks = Marks(1, 1, {"spec": Marks(3, 1, {"ports": Marks(4, 3, [Marks(5, 5)])})})
    error = ConfigError("bad", field="spec.ports[0].port", hint="look")
    found = located(error, Source("f.yaml", 1, 1, marks))
    assert str(found) == "f.yaml:5:5: spec.ports[0].port: bad"
    assert found.hint == "look"
    assert located(found, Source("other", 9)) is found
    assert located(error, None) is error


def test_source_annotation():
    here = Source("live.json")
    note = {"metadata": {"annotations": {"ambit.dev/source": "/a b/c:d.yaml:12"}}}
    assert source_of(note, here) == Source("/a b/c:d.yaml", 12)
    for text in ("", "x", ":3", "x:y", "x:"):
        assert source_of({"metadata": {"annotations": {"ambit.dev/source": text}}}, here) is here
    assert source_of({}, here) is here


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    # The examples of RFC 7386, appendix A.
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patch(target, patch, result):
    before = repr(target)
    assert merge_patch(target, patch) == result
    assert repr(target) == before
