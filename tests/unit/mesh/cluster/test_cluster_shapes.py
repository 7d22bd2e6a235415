"""The tables of known fields: against Kubernetes' own client, and at what is misspelt."""

from __future__ import annotations

import re

import pytest
from kubernetes import client

from mesh.cluster.shapes import KINDS, MAX_TOLD, Shape, unknown_fields


def children(model: type) -> dict[str, type | None]:
    """The fields of a model of the official client, and the models inside them."""
    found = {}
    for attribute, name in model.attribute_map.items():
        inner = re.sub(r"^list\[(.*)\]$", r"\1", model.openapi_types[attribute])
        found[name] = getattr(client, inner, None)
    return found


def differences(shape: Shape, model: type, path: str) -> list[str]:
    official = children(model)
    found = [f"{path}.{name}: not known here" for name in official.keys() - shape.keys()]
    # A later Kubernetes than the client may know more; an unknown name of ours is a mistake.
    found += [f"{path}.{name}: not Kubernetes'" for name in shape.keys() - official.keys()]
    for name, inner in shape.items():
        if inner is not None and official.get(name) is not None:
            found += differences(inner, official[name], f"{path}.{name}")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_tables_are_kubernetes(kind):
    assert differences(KINDS[kind], getattr(client, f"V1{kind}"), kind) == []


@pytest.mark.parametrize(
    ("kind", "obj", "found"),
    [
        ("Service", {"spec": {"selectr": {"a": "b"}}}, [("spec.selectr", "selector")]),
        ("Service", {"spec": {"ports": [{}, {"prot": 1}]}}, [("spec.ports[1].prot", "port")]),
        ("Pod", {"spec": {"containrs": []}}, [("spec.containrs", "containers")]),
        ("Pod", {"metadata": {"label": {}}}, [("metadata.label", "labels")]),
        ("Pod", {"zzz": 1}, [("zzz", "")]),
        (
            "Deployment",
            {"spec": {"template": {"spec": {"containers": [{"comand": ["x"]}]}}}},
            [("spec.template.spec.containers[0].comand", "command")],
        ),
        ("Pod", {"spec": {"containers": [{"resources": {"what": "ever"}}]}}, []),
        ("Pod", {"metadata": {"labels": {"any": "thing"}}}, []),
        ("Pod", {"spec": "text", "metadata": ["list"]}, []),
        ("Gadget", {"whatever": 1}, []),
    ],
)
def test_what_is_not_known_and_what_it_may_have_meant(kind, obj, found):
    assert list(unknown_fields(kind, obj)) == found


def test_not_everything_is_told():
    obj = {f"no-such-{number}": 1 for number in range(1000)}
    assert len(list(unknown_fields("Pod", obj))) == MAX_TOLD
