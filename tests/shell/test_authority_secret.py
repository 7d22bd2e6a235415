"""The authority's keys in a Secret, with the roots that are trusted while one is exchanged."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from istiod_lite.authority import EXTRA_ROOTS, FILES, open_authority
from istiod_lite.authority_secret import open_shared_authority
from mesh.cluster.api import Conflict, Ref
from mesh.errors import ConfigError, Unavailable

NOW = 1_900_000_000.0
SECRET = Ref("Secret", "istio-system", "ambit-ca")


class OneObject:
    """As much of a cluster as one Secret needs."""

    def __init__(self) -> None:
        self.found: Any = None

    async def get(self, _ref: Ref) -> Any:
        return self.found

    async def create(self, new: Any) -> None:
        if self.found is not None:
            raise Conflict("it is there")
        self.found = {**new, "metadata": {**new["metadata"], "resourceVersion": "1"}}

    async def replace(self, new: Any) -> None:
        self.found = new


async def test_two_replicas_share_one_authority_and_its_extra_roots(tmp_path: Path) -> None:
    cluster: Any = OneObject()

    async def replica(name: str) -> bytes:
        directory = tmp_path / name
        found = await open_shared_authority(cluster, SECRET, directory, "cluster.local", NOW)
        return found.root_pem

    first = await replica("a")
    assert await replica("b") == first
    assert set(cluster.found["data"]) == set(FILES)

    new = open_authority(tmp_path / "new", "cluster.local", NOW).root_pem
    cluster.found["data"][EXTRA_ROOTS] = base64.b64encode(new).decode()
    assert await replica("a") == await replica("b") == first + new
    assert set(cluster.found["data"]) == {*FILES, EXTRA_ROOTS}

    del cluster.found["data"][EXTRA_ROOTS]
    assert await replica("a") == first
    assert not (tmp_path / "a" / EXTRA_ROOTS).exists()

    cluster.found["data"][EXTRA_ROOTS] = "?"
    with pytest.raises(ConfigError, match=r"base64"):
        await replica("a")


async def test_without_a_server_the_working_copy_is_used(tmp_path: Path) -> None:
    cluster: Any = OneObject()
    directory = tmp_path / "a"
    first = await open_shared_authority(cluster, SECRET, directory, "cluster.local", NOW)

    async def silent(_ref: Ref) -> Any:
        raise Unavailable("no answer")

    cluster.get = silent
    again = await open_shared_authority(cluster, SECRET, directory, "cluster.local", NOW)
    assert again.root_pem == first.root_pem
    # Never a new root because nobody could be asked for the old one.
    for missing in ("ca-key.pem", "root-cert.pem"):
        (directory / missing).unlink()
        with pytest.raises(Unavailable):
            await open_shared_authority(cluster, SECRET, directory, "cluster.local", NOW)
    with pytest.raises(Unavailable):
        await open_shared_authority(cluster, SECRET, tmp_path / "b", "cluster.local", NOW)
    assert not (tmp_path / "b").exists()
