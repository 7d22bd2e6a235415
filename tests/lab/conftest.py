"""The shared lab of the lab tests: up once per module and privilege, put back after each test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.bare_labs import FILES, MODES, BareLab, lab_of


@pytest.fixture(scope="module", params=MODES)
def shared_lab(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BareLab]:
    """A lab without daemons, as root and in a user namespace, which needs no privilege."""
    module = request.module.__name__.rpartition("_")[2]
    name = f"test-{os.getpid()}-{module}-{request.param}"
    rootless = request.param == "rootless"
    with lab_of(tmp_path_factory.mktemp("shop"), name, FILES, rootless=rootless) as made:
        yield made


@pytest.fixture
def lab(shared_lab: BareLab) -> Iterator[BareLab]:
    """The shared lab; files that the test changed are put back, also when it fails."""
    yield shared_lab
    shared_lab.restore()
