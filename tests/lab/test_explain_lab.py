"""`ambit explain` beside what really happens: a table of connections, under several policies."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.labs import TestLab, eventually, running_lab
from tests.support.tree import ROOT

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

READER = "cluster.local/ns/shop/sa/reader"
POLICIES = {
    "nothing": "",
    "only-reader": f"""\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: only-reader, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: web}}}}
  rules:
    - from: [{{source: {{principals: [{READER}]}}}}]
      to: [{{operation: {{ports: ["8080"]}}}}]
""",
    "no-echo": """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-echo, namespace: shop}
spec:
  action: DENY
  rules:
    - to: [{operation: {ports: ["9000"]}}]
""",
    "strict": """\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: shop}
spec:
  mtls: {mode: STRICT}
""",
}
SOURCES = ("shop/reader", "shop/stranger", "outside/visitor")
TARGETS = ("web.shop:80", "web.shop:9000", "redis.shop:6379", "empty.shop:80")
# Any byte back means that the connection was carried; the two servers that wait are spoken to.
TRY = """
import socket, sys
host, _, port = sys.argv[1].rpartition(":")
try:
    with socket.create_connection((host, int(port)), timeout=10) as c:
        if port == "80":
            c.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
        elif port == "6379":
            c.sendall(b"PING\\r\\n")
        print("carried" if c.recv(1) else "not")
except OSError:
    print("not")
"""
EMPTY = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "empty", "namespace": "shop"},
    "spec": {"selector": {"app": "nobody"}, "ports": [{"port": 80}]},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestLab]:
    directory = tmp_path_factory.mktemp("explain") / "shop"
    shutil.copytree(ROOT / "manifests" / "examples" / "shop", directory)
    with running_lab(directory, name="test-explain") as lab:
        run(lab, "enroll", "shop")
        lab.client.apply(EMPTY)
        yield lab


def run(lab: TestLab, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mesh.cli", *argv, "--lab", lab.client.address.name],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def explained(lab: TestLab, source: str, target: str) -> dict[str, Any]:
    done = run(lab, "explain", source, target, "-o", "json")
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert isinstance(report, dict)
    assert done.returncode == (0 if report["result"] == "allowed" else 1), done.stderr
    return report


def say(lab: TestLab, name: str) -> Path:
    """Put one policy into the directory, alone, and wait until the proxies have it."""
    for other in POLICIES:
        (lab.directory / f"90-{other}.yaml").unlink(missing_ok=True)
    path = lab.directory / f"90-{name}.yaml"
    if POLICIES[name]:
        path.write_text(POLICIES[name])
    wanted = {"nothing": set(), "strict": {"istio_converted_static_strict"}}.get(name, {name})

    def there() -> None:
        rows = json.loads(run(lab, "policies", "-o", "json").stdout)
        assert {row["name"] for row in rows} == wanted
        assert all(row["held_by"] == ["node1", "node2"] for row in rows)

    eventually(there, seconds=60)
    return path


@pytest.mark.parametrize("policy", POLICIES)
def test_explain_says_what_happens(lab: TestLab, policy: str) -> None:
    say(lab, policy)

    def agree() -> None:
        # Just after a change the two may be asked on different sides of it.
        for source in SOURCES:
            for target in TARGETS:
                report = explained(lab, source, target)
                happened = lab.python(source, TRY, target)
                said = "carried" if report["result"] == "allowed" else "not"
                assert said == happened, f"{source} to {target}: {report['reason']}"

    eventually(agree, seconds=60)


def test_what_is_said_of_each_refusal(lab: TestLab) -> None:
    path = say(lab, "only-reader")

    def denied() -> None:
        report = explained(lab, "shop/stranger", "svc/web.shop:80")
        assert report["result"] == "denied"
        verdict = report["ways"][0]["hops"][-1]["verdict"]
        assert verdict["policy"] == "shop/only-reader"
        assert verdict["places"] == [f"{path}:1 (AuthorizationPolicy shop/only-reader)"]

    eventually(denied, seconds=30)
    allowed = explained(lab, "shop/reader", "svc/web.shop:80")["ways"][0]["hops"][-1]["verdict"]
    where = f"{path}:7 (AuthorizationPolicy shop/only-reader, spec.rules[0])"
    assert (allowed["rule"], allowed["places"]) == (0, [where])
    text = run(lab, "explain", "shop/stranger", "svc/web.shop:80").stdout
    assert "DENIED: no ALLOW policy matched (shop/only-reader)" in text
    assert "an ALLOW for principal cluster.local/ns/shop/sa/stranger at port 8080" in text
    nobody = explained(lab, "shop/reader", "empty.shop:80")
    assert (nobody["result"], nobody["ways"][0]["hops"][-1]["flag"]) == ("refused", "CONNECT")


def test_strict_mode_is_traced_to_the_file_that_asks_for_it(lab: TestLab) -> None:
    path = say(lab, "strict")

    def denied() -> None:
        report = explained(lab, "outside/visitor", "web.shop:80")
        assert report["result"] == "denied"
        verdict = report["ways"][0]["hops"][-1]["verdict"]
        assert verdict["places"] == [f"{path}:5 (PeerAuthentication shop/strict, spec.mtls)"]

    eventually(denied, seconds=30)


# A Service of its own has the waypoint: the others' connections stay as they are.
L7 = """\
apiVersion: v1
kind: Service
metadata: {name: front, namespace: shop, labels: {istio.io/use-waypoint: waypoint}}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: front, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: front, port: 80}]
  rules:
    - name: told-apart
      matches: [{headers: [{name: x-new, value: "yes"}]}]
      filters:
        - {type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /new}}}
      backendRefs: [{name: front, port: 80}]
    - backendRefs: [{name: front, port: 80}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-admin, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: front}]
  action: DENY
  rules:
    - to: [{operation: {paths: ["/admin"]}}]
"""
STATUS = """
import http.client, sys
c = http.client.HTTPConnection("front.shop", 80, timeout=20)
c.request("GET", sys.argv[1])
print(c.getresponse().status)
"""


@pytest.fixture
def l7(lab: TestLab) -> Iterator[Path]:
    """The file, with a waypoint; the others' lab is as it was afterwards."""
    say(lab, "nothing")
    path = lab.directory / "95-l7.yaml"
    path.write_text(L7)
    applied = run(lab, "waypoint", "apply", "-n", "shop", "--wait")
    assert applied.returncode == 0, applied.stderr
    yield path
    path.unlink()
    assert run(lab, "waypoint", "delete", "-n", "shop", "waypoint").returncode == 0
    eventually(lambda: say(lab, "nothing"), seconds=60)


def test_a_request_through_a_waypoint(lab: TestLab, l7: Path) -> None:
    path = l7

    def explain(*argv: str) -> tuple[int, dict[str, Any]]:
        done = run(lab, "explain", "shop/reader", "front.shop:80", "-o", "json", *argv)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    def denied() -> None:
        code, report = explain("--path", "/admin")
        assert (code, report["result"]) == (1, "denied"), report["reason"]
        hop = next(each for each in report["ways"][0]["hops"] if each["kind"] == "waypoint")
        step = next(each for each in hop["steps"] if each["filter"] == "AuthorizationPolicy")
        where = f"{path}:28 (AuthorizationPolicy shop/no-admin, spec.rules[0])"
        assert step["places"] == [where]
        assert lab.python("shop/reader", STATUS, "/admin") == "403"

    eventually(denied, seconds=60)
    code, report = explain("-H", "x-new: yes", "--path", "/old?a=1")
    assert (code, report["result"]) == (0, "allowed"), report["reason"]
    hop = next(each for each in report["ways"][0]["hops"] if each["kind"] == "waypoint")
    assert hop["places"] == [f"{path}:14 (HTTPRoute shop/front, spec.rules[0])"]
    assert (hop["route"]["rule"], hop["sends"]["path"]) == ("told-apart", "/new?a=1")
    assert lab.python("shop/reader", STATUS, "/") == "200"
    text = run(lab, "explain", "shop/reader", "front.shop:80", "--path", "/").stdout
    assert "HTTPRoute shop/front, rule 1" in text
    # Who asks past the waypoint is told so.
    done = run(lab, "explain", "outside/visitor", "front.shop:80", "--path", "/")
    assert "no waypoint is on the way" in done.stderr


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("shop/nobody", "web.shop:80"), 3, "no proxy knows a pod shop/nobody"),
        (("svc/web.shop", "web.shop:80"), 2, "shop/web is no pod"),
        (("shop/reader", "svc/web.shop"), 2, "its ports are 80, 9000"),
        (("shop/reader", "web.shop:eighty"), 2, "not a port"),
        (("shop/reader", "web.shop:80", "-H", "nothing"), 2, "not a header"),
    ],
)
def test_mistakes(lab: TestLab, argv: tuple[str, str], code: int, said: str) -> None:
    done = run(lab, "explain", *argv)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
