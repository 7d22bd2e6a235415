"""Versions that are held, as differences from what all have."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from istiod_lite.held_versions import HeldVersions

NAMES = st.sampled_from([f"r{number}" for number in range(6)])
VERSIONS = st.sampled_from(["1", "2", "3"])
MAPPINGS = st.dictionaries(NAMES, VERSIONS)
STEPS = st.one_of(
    st.tuples(st.just("set"), NAMES, VERSIONS),
    st.tuples(st.just("drop"), NAMES, st.just("")),
    st.tuples(st.sampled_from(["share", "take"]), MAPPINGS, st.just("")),
)


@given(held=MAPPINGS, steps=st.lists(STEPS, max_size=12), wanted=MAPPINGS)
def test_it_is_a_dictionary_whatever_is_shared(held, steps, wanted):
    twin, found = dict(held), HeldVersions(held)
    for what, value, version in steps:
        match what:
            case "set":
                twin[value] = version
                found.put(value, version)
            case "drop":
                twin.pop(value, None)
                found.drop(value)
            case "share":
                found.share(value)
            case _:
                twin = dict(value)
                found.take(value)
        assert found.as_dict() == twin
        assert (set(found), bool(found)) == (set(twin), bool(twin))
        assert [found.get(f"r{each}") for each in range(7)] == [
            twin.get(f"r{each}") for each in range(7)
        ]
    names = wanted.keys() | twin.keys()
    expected = {name for name in names if wanted.get(name) != twin.get(name)}
    assert found.differing(wanted) == expected
    found.share(wanted)
    assert found.differing(wanted) == expected


def test_what_collects_is_told_and_goes_away():
    present = {f"r{number}": "1" for number in range(100)}
    found = HeldVersions()
    found.take(present)
    later = dict.fromkeys(present, "2")
    assert not found.is_far
    for name, version in later.items():
        found.put(name, version)
    assert found.is_far
    found.share(later)
    assert not found.is_far
    assert found.differing(later) == set()
