"""The lab's live objects, as an API server would number their changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from mesh.cluster.api import ref_of
from mesh.lab.live import Live

ROUTE: dict[str, Any] = {
    "apiVersion": "gateway.networking.k8s.io/v1",
    "kind": "HTTPRoute",
    "metadata": {"name": "web", "namespace": "shop"},
    "spec": {"rules": []},
}


async def test_generations_count_what_is_wanted_and_nothing_else(tmp_path: Path) -> None:
    live = Live(tmp_path / "objects", lambda _: None, lambda: None)
    ref = ref_of(ROUTE)

    def generation() -> Any:
        return live.objects[ref]["metadata"]["generation"]

    await live.apply(copy.deepcopy(ROUTE))
    assert generation() == 1
    await live.apply(copy.deepcopy(ROUTE))
    await live.patch(ref, {"status": {"parents": []}})
    await live.patch(ref, {"metadata": {"labels": {"a": "b"}}})
    assert generation() == 1
    changed = copy.deepcopy(ROUTE)
    changed["spec"] = {"rules": [{"name": "all"}]}
    await live.apply(changed)
    assert generation() == 2
    await live.patch(ref, {"spec": {"hostnames": ["x"]}})
    assert generation() == 3
    assert live.objects[ref]["status"] == {"parents": []}
    await live.delete(ref)
    await live.withdraw(ref)
    await live.apply(copy.deepcopy(ROUTE))
    assert generation() == 1
