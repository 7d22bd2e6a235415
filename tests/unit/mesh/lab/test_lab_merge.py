"""Three-way merge: files, live changes, and who wins."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.cluster.api import merge_patch
from mesh.lab.merge import merge_patch_for, service_patch_for

LABEL = "istio.io/dataplane-mode"


def labels(**values: str) -> dict[str, Any]:
    return {"metadata": {"labels": values}}


@pytest.mark.parametrize(
    ("last", "new", "live", "expected"),
    [
        # Nothing changed in the file: a label set live stays.
        (labels(a="1"), labels(a="1"), labels(a="1", ambient="x"), labels(a="1", ambient="x")),
        # Another label changed in the file: the one set live still stays.
        (labels(a="1"), labels(a="2"), labels(a="1", ambient="x"), labels(a="2", ambient="x")),
        # The very label changed in the file: the file wins.
        (labels(a="1"), labels(a="2"), labels(a="live"), labels(a="2")),
        # Changed live only: it stays, also when it was removed live.
        (labels(a="1"), labels(a="1"), labels(a="live"), labels(a="live")),
        (labels(a="1", b="1"), labels(a="1", b="1"), labels(b="1"), labels(b="1")),
        # Removed from the file: gone.
        (labels(a="1", b="1"), labels(b="1"), labels(a="1", b="1", c="1"), labels(b="1", c="1")),
        # The first time a file has the object: it is laid over what is there.
        (None, labels(a="1"), labels(b="1"), labels(a="1", b="1")),
        # Lists are values.
        ({"l": [1, 2]}, {"l": [1]}, {"l": [1, 2, 3]}, {"l": [1]}),
        ({"l": [1]}, {"l": [1]}, {"l": [9]}, {"l": [9]}),
        # A mapping in place of a value, and the other way round.
        ({"x": 1}, {"x": {"y": 1}}, {"x": 1}, {"x": {"y": 1}}),
        ({"x": {"y": 1}}, {"x": 1}, {"x": {"y": 1, "z": 2}}, {"x": 1}),
    ],
)
def test_merge(
    last: dict[str, Any] | None,
    new: dict[str, Any],
    live: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    assert merge_patch(live, merge_patch_for(last, new, live)) == expected


def test_no_difference_is_no_patch() -> None:
    spec = {"spec": {"ports": [{"port": 80}]}, **labels(a="1")}
    live = {**spec, "status": {"x": 1}}
    assert merge_patch_for(spec, spec, live) == {}


@pytest.mark.parametrize(
    ("last", "new", "spec"),
    [
        ({}, {}, {"clusterIP": "10.96.1.1", "clusterIPs": ["10.96.1.1"], "ipFamilies": ["IPv4"]}),
        ({}, {"clusterIP": "None"}, {"clusterIP": "None"}),
        ({}, {"ipFamilies": ["IPv6"]}, {"ipFamilies": ["IPv6"]}),
        ({"clusterIP": "10.96.1.1"}, {}, {}),
        ({}, {"type": "ExternalName"}, {"type": "ExternalName"}),
    ],
)
def test_what_was_filled_in_for_a_service_goes_when_its_addressing_changes(
    last: dict[str, Any], new: dict[str, Any], spec: dict[str, Any]
) -> None:
    filled = {"clusterIP": "10.96.1.1", "clusterIPs": ["10.96.1.1"], "ipFamilies": ["IPv4"]}
    ports = {"ports": [{"port": 80}]}
    patch = service_patch_for(
        {"spec": {**ports, **last}}, {"spec": {**ports, **new}}, {"spec": {**ports, **filled}}
    )
    assert merge_patch({"spec": {**ports, **filled}}, patch) == {"spec": {**ports, **spec}}


def test_a_spec_that_is_none_is_left_for_others_to_refuse() -> None:
    assert service_patch_for({"spec": {"a": 1}}, {"spec": "x"}, {}) == {"spec": "x"}
