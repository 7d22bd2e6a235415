"""Where a deciding policy is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mesh.cli.explain import read_request
from mesh.cli.written import places, rule_places
from mesh.cluster.documents import read_documents
from mesh.errors import ConfigError

TEXT = """\
# two objects
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop}
spec:
  rules:
    - to: [{operation: {methods: [GET]}}]
    - from: [{source: {namespaces: [shop]}}]
    - {}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: shop}
spec:
  mtls: {mode: STRICT}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "policies.yaml"
    path.write_text(TEXT)
    return path


class Objects:
    def __init__(self, file: Path) -> None:
        self.objects: list[dict[str, Any]] = []
        for each in read_documents(file.read_bytes(), str(file)):
            made: dict[str, Any] = dict(each.object)
            source = {"ambit.dev/source": f"{each.source.file}:{each.source.line}"}
            made["metadata"] = {**made["metadata"], "annotations": source}
            self.objects.append(made)

    def get(self, kind: str, namespace: str, name: str) -> list[dict[str, Any]]:
        return [
            each
            for each in self.objects
            if each["kind"] == kind
            and each["metadata"]["namespace"] == namespace
            and name in ("", each["metadata"]["name"])
        ]


def test_a_rule_by_its_line_past_those_that_the_tunnel_never_got(file: Path) -> None:
    get = Objects(file).get
    about = "AuthorizationPolicy shop/web"
    assert places(get, "shop/web", 0, "shop") == [f"{file}:8 ({about}, spec.rules[1])"]
    assert places(get, "shop/web", 1, "shop") == [f"{file}:9 ({about}, spec.rules[2])"]
    assert places(get, "shop/web", None, "shop") == [f"{file}:2 ({about})"]
    assert places(get, "shop/gone", 0, "shop") == []


def test_a_deny_keeps_all_its_rules(file: Path) -> None:
    file.write_text(TEXT.replace("spec:\n  rules", "spec:\n  action: DENY\n  rules", 1))
    get = Objects(file).get
    assert places(get, "shop/web", 0, "shop")[0].startswith(f"{file}:8 ")


def test_strict_mode_leads_to_what_made_it(file: Path) -> None:
    get = Objects(file).get
    expected = [f"{file}:15 (PeerAuthentication shop/strict, spec.mtls)"]
    assert places(get, "istio-system/istio_converted_static_strict", 0, "shop") == expected
    (made,) = places(get, "shop/converted_peer_authentication_strict", 0, "shop")
    assert made.startswith(f"{file}:")


def test_what_is_not_in_a_file_any_more(file: Path) -> None:
    objects = Objects(file)
    file.unlink()
    assert places(objects.get, "shop/web", 0, "shop")[0].startswith(f"{file}:2 ")
    del objects.objects[0]["metadata"]["annotations"]
    (said,) = places(objects.get, "shop/web", 0, "shop")
    assert said == "AuthorizationPolicy shop/web, spec.rules[1] (applied by hand)"


ROUTES = """\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  rules:
    - name: "7"
    - backendRefs: []
    - name: beta
"""


@pytest.mark.parametrize(
    ("rule", "line"), [("beta", 8), ("1", 7), ("7", 6), ("9", 1), ("gone", 1), ("", 1), (None, 1)]
)
def test_a_rule_by_its_name_or_number(tmp_path: Path, rule: str | None, line: int) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text(ROUTES)
    (place,) = rule_places(Objects(path).get, "HTTPRoute", "shop/web", rule)
    assert place.startswith(f"{path}:{line} (HTTPRoute shop/web")
    assert rule_places(Objects(path).get, "GRPCRoute", "shop/web", rule) == []


def test_a_request_from_options() -> None:
    assert read_request(None, "/a?b=1", ["Host: web", "x-a:1", "X-B: a b"]) == {
        "method": "GET",
        "path": "/a?b=1",
        "host": "web",
        "headers": "x-a: 1\nX-B: a b",
    }


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/", ["nothing"]),
        ("GET", "/", [": x"]),
        ("GET", "/", ["a: b\r\nc: d"]),
        ("GET /x", "/", []),
        ("GET", "/a b", []),
        ("GET", "/\n", []),
    ],
)
def test_what_is_no_request(method: str, path: str, headers: list[str]) -> None:
    with pytest.raises(ConfigError):
        read_request(method, path, headers)
