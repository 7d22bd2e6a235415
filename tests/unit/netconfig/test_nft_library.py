"""What is said when libnftables is not there."""

from __future__ import annotations

import pytest

from mesh.errors import KernelError
from netconfig import nft


def test_a_missing_library_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "LIBRARY", "libnftables.so.0-absent")
    nft._library.cache_clear()
    try:
        with pytest.raises(KernelError, match="libnftables") as caught:
            nft.check_library()
    finally:
        nft._library.cache_clear()
    assert caught.value.hint == "apt-get install libnftables1"
