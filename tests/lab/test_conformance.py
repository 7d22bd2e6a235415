"""Gateway API's mesh conformance tests in a whole mesh: all HTTPRoute tests at once, each with a
service of its own, asked by pods of both namespaces through their node, the waypoint, the tunnel.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conformance.mesh_http import CONSUMER, NAMESPACE, Case
from tests.conformance.mesh_manifests import CASES, MANIFESTS, SERVICES
from tests.support.labs import TestLab, eventually, running_lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

_ECHO = """
import http.server, json, sys
class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", -1
    def do_GET(self):
        told = {"pod": sys.argv[1], "path": self.path}
        told["headers"] = {n.lower(): ",".join(self.headers.get_all(n)) for n in self.headers}
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("0.0.0.0", 8080), Echo).serve_forever()
"""
_ASK = """
import http.client, json, sys
told, kept = [], {}
for place, port, host, target, headers in json.loads(sys.argv[1]):
    try:
        key = (place, port)
        c = kept.pop(key, None) or http.client.HTTPConnection(place, port, timeout=20)
        c.request("GET", target, headers={"host": host, **headers})
        r = c.getresponse()
        body = r.read().decode()
        told.append([r.status, {n.lower(): v for n, v in r.getheaders()}, body])
        if not r.will_close:
            kept[key] = c
    except Exception as e:
        told.append([0, {}, type(e).__name__])
print(json.dumps(told))
"""
_ORDER = {name: number for number, name in enumerate(MANIFESTS)}
_DONE = [name for name in MANIFESTS if name in CASES or name == "MeshHTTPRouteWeight"]


def _own(service: str, test: str) -> str:
    """The name of `service` in one test: a route is a test's alone."""
    return f"{service}-{_ORDER[test]}"


def _objects() -> Iterator[dict[str, Any]]:
    ambient = {"istio.io/dataplane-mode": "ambient", "istio.io/use-waypoint": "waypoint",
               "istio.io/use-waypoint-namespace": NAMESPACE}  # fmt: skip
    for name in (NAMESPACE, CONSUMER):
        yield {"apiVersion": "v1", "kind": "Namespace",
               "metadata": {"name": name, "labels": ambient}}  # fmt: skip
        yield _pod("client", name, {}, {"command": ["sleep", "infinity"]})
    spec = {
        "gatewayClassName": "istio-waypoint",
        "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE",
                       "allowedRoutes": {"namespaces": {"from": "All"}}}],
    }  # fmt: skip
    yield {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
           "metadata": {"name": "waypoint", "namespace": NAMESPACE}, "spec": spec}  # fmt: skip
    yield {"apiVersion": "v1", "kind": "ConfigMap", "data": {"echo.py": _ECHO},
           "metadata": {"name": "programs", "namespace": NAMESPACE}}  # fmt: skip
    for version in ("v1", "v2"):
        run = {
            "command": ["python3", "-u", "/programs/echo.py", f"echo-{version}"],
            "volumeMounts": [{"name": "programs", "mountPath": "/programs"}],
            "readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1},
        }
        yield _pod(f"echo-{version}", NAMESPACE, {"app": "echo", "version": version}, run)
    for each in SERVICES:
        for test in ("", *_DONE):
            made = copy.deepcopy(each)
            del made["spec"]["clusterIP"]
            if test:
                made["metadata"]["name"] = _own(each["metadata"]["name"], test)
            yield made
    for test in _DONE:
        for number, each in enumerate(MANIFESTS[test]):
            made = copy.deepcopy(each)
            made["metadata"] = {"name": f"t{_ORDER[test]}-{number}",
                                "namespace": each["metadata"]["namespace"]}  # fmt: skip
            for parent in made["spec"]["parentRefs"]:
                parent["name"] = _own(parent["name"], test)
            yield made


def _pod(
    name: str, namespace: str, labels: dict[str, str], container: dict[str, Any]
) -> dict[str, Any]:
    spec: dict[str, Any] = {"nodeName": "node1" if "v2" not in name else "node2",
                            "containers": [{"name": "main", **container}]}  # fmt: skip
    if "volumeMounts" in container:
        spec["volumes"] = [{"name": "programs", "configMap": {"name": "programs"}}]
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestLab]:
    directory: Path = tmp_path_factory.mktemp("conformance")
    (directory / "all.yaml").write_text(yaml.safe_dump_all(_objects()))
    with running_lab(directory, "--nodes", "2", name="test-conformance") as lab:
        yield lab


def _asked(lab: TestLab, test: str, cases: list[Case]) -> list[tuple[Case, Any]]:
    """What came of each case, asked from the namespaces that they name."""
    told: list[tuple[Case, Any]] = []
    for namespace in (NAMESPACE, CONSUMER):
        mine = [each for each in cases if each.namespace == namespace]
        if mine:
            sent = [
                (f"{_own(each.service, test)}.{NAMESPACE}", each.port, each.host, each.target,
                 dict(each.headers)) for each in mine
            ]  # fmt: skip
            said = json.loads(lab.python(f"{namespace}/client", _ASK, json.dumps(sent)))
            told += zip(mine, said, strict=True)
    return told


def _check(case: Case, said: Any) -> str:
    """What is wrong, or empty text."""
    status, headers, body = said
    wrong = [] if status == case.status else [f"status {status}"]
    if case.location and headers.get("location") != case.location:
        wrong.append(f"location {headers.get('location')}")
    wrong += [f"{n}: {headers.get(n)}" for n, value in case.response if headers.get(n) != value]
    if status == 200 and not wrong:
        told = json.loads(body)
        if case.backend not in {"echo", told["pod"]}:
            wrong.append(f"answered by {told['pod']}")
        if case.path and told["path"] != case.path:
            wrong.append(f"path {told['path']}")
        seen = told["headers"]
        wrong += [f"saw {n}: {seen.get(n)}" for n, value in case.sees if seen.get(n) != value]
    return ", ".join(wrong)


def test_every_httproute_test_of_the_mesh_profile(lab: TestLab) -> None:
    def all_of(test: str) -> None:
        wrong = [f"{case.target} of {case.service}:{case.port} from {case.namespace}: {what}"
                 for case, said in _asked(lab, test, list(CASES[test]))
                 if (what := _check(case, said))]  # fmt: skip
        assert wrong == []

    failed: dict[str, str] = {}
    for test in CASES:
        try:
            eventually(lambda test=test: all_of(test), seconds=15 if not failed else 3)  # type: ignore[misc]
        except AssertionError as exc:
            failed[test] = str(exc)[:2000]
    assert failed == {}


def test_weights_are_kept(lab: TestLab) -> None:
    def near() -> None:
        said = _asked(lab, "MeshHTTPRouteWeight", [Case("/")] * 500)
        counts = Counter(json.loads(body)["pod"] for _, (_, _, body) in said)
        assert counts.keys() == {"echo-v1", "echo-v2"}
        assert abs(counts["echo-v1"] / 500 - 0.7) <= 0.05

    eventually(near)
