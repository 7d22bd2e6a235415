"""The detectors against a corpus drawn anew from a seed: all of what people write, none of what
only looks like it.
"""

from __future__ import annotations

from collections import Counter

import pytest

from mesh.model.l7_policy import RedactionRule
from tests.support.pii_corpus import Corpus
from waypoint.filters.redact.detectors import BUILT_IN
from waypoint.filters.redact.scanner import Scanner

_EACH = [(i, RedactionRule(name=kind, detector=kind)) for i, kind in enumerate(BUILT_IN)]


@pytest.mark.parametrize("seed", [1, 2])
def test_every_value_is_found_whole_and_alone(seed: int) -> None:
    together = Scanner(_EACH)
    alone = {kind: Scanner([(0, RedactionRule(name=kind, detector=kind))]) for kind in BUILT_IN}
    missed: list[str] = []
    tried: Counter[str] = Counter()
    for kind, text, value in Corpus(seed).wanted():
        tried[kind] += 1
        view = text.encode()
        for scanner in (alone[kind], together):
            found = [view[hit.start : hit.end].decode() for hit in scanner.find(view)]
            if value not in found:
                missed.append(f"{kind}: {text} {found}")
    assert missed == []
    assert all(count > 20 for count in tried.values()) or tried["jwt"] > 10


@pytest.mark.parametrize("seed", [3, 4])
def test_what_looks_like_a_value_is_left(seed: int) -> None:
    """Numbers with check digits are hit by chance; everything else never is."""
    scanner = Scanner(_EACH)
    taken = []
    for name, text in Corpus(seed).unwanted():
        view = text.encode()
        taken += [(name, hit.kind, text) for hit in scanner.find(view)]
    assert taken == []
