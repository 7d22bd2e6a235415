"""A waypoint in a whole mesh: deployed by command, routing, policy, limits, redaction, closing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.labs import TestLab, eventually, running_lab
from tests.support.tree import ROOT

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

API = {"group": "", "kind": "Service", "name": "api"}
ASK = """
import http.client, json, sys
method, host, path, headers, count = sys.argv[1:4] + [json.loads(sys.argv[4]), int(sys.argv[5])]
told = []
for _ in range(count):
    try:
        c = http.client.HTTPConnection(host, 80, timeout=20)
        c.request(method, path, headers=headers)
        r = c.getresponse()
        told.append([r.status, r.read().decode(), dict(r.getheaders())])
        c.close()
    except OSError as e:
        told.append([0, type(e).__name__, {}])
print(json.dumps(told))
"""

# Asks all the time, by connections kept and by new ones, until the file argv[1] is there.
LOAD = """
import http.client, json, os, sys, threading, time
stop, failed, counts, lock = sys.argv[1], [], [0, 0], threading.Lock()

def loop(keeps):
    c = None
    while not os.path.exists(stop):
        try:
            c = c or http.client.HTTPConnection("api", 80, timeout=20)
            c.request("GET", "/load")
            r = c.getresponse()
            r.read()
            told = r.status if r.status != 200 else None
            ends = r.will_close
        except Exception as e:
            told, ends = f"{type(e).__name__}: {e}", True
        with lock:
            counts[keeps] += 1
            if told is not None:
                failed.append([keeps, told])
        if not keeps or ends:
            c.close()
            c = None
        time.sleep(0.005)

threads = [threading.Thread(target=loop, args=(each % 2,)) for each in range(4)]
[each.start() for each in threads]
[each.join() for each in threads]
os.unlink(stop)
print(json.dumps({"new": counts[0], "kept": counts[1], "failed": failed}))
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestLab]:
    directory = tmp_path_factory.mktemp("waypoint")
    shutil.copytree(ROOT / "tests" / "lab" / "data" / "waypoint", directory, dirs_exist_ok=True)
    with running_lab(Path(directory), "--nodes", "2", name="test-waypoint") as lab:
        done = ambit(lab, "waypoint", "apply", "-n", "shop", "--enroll-namespace", "--wait")
        assert done.returncode == 0, done.stderr
        eventually(lambda: through_waypoint(lab))
        yield lab


def ambit(lab: TestLab, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mesh.cli", *arguments, "--lab", lab.client.address.name]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


def through_waypoint(lab: TestLab) -> None:
    ask(lab)
    (pod,) = [
        each
        for each in lab.client.get("Pod", "shop")
        if each["metadata"]["name"].startswith("waypoint-")
    ]
    log = b"".join(lab.client.logs(pod=("shop", pod["metadata"]["name"])))
    assert b"request complete" in log


def ask(  # an answer each: status, body, headers
    lab: TestLab,
    path: str = "/",
    *,
    method: str = "GET",
    host: str = "api",
    client: str = "web",
    count: int = 1,
    **headers: str,
) -> list[tuple[int, str, dict[str, str]]]:
    sent = json.dumps({name.replace("_", "-"): value for name, value in headers.items()})
    said = lab.python(f"shop/{client}", ASK, method, host, path, sent, str(count))
    return [(status, body, told) for status, body, told in json.loads(said)]


@pytest.fixture
def apply(lab: TestLab) -> Iterator[Callable[..., None]]:
    made: list[tuple[str, str]] = []

    def apply(kind: str, name: str, spec: dict[str, Any]) -> None:
        group = {
            "HTTPRoute": "gateway.networking.k8s.io/v1",
            "AuthorizationPolicy": "security.istio.io/v1",
            "ServiceEntry": "networking.istio.io/v1",
        }.get(kind, "ambit.dev/v1alpha1")
        metadata = {"name": name, "namespace": "shop"}
        lab.client.apply({"apiVersion": group, "kind": kind, "metadata": metadata, "spec": spec})
        made.append((kind, name))

    yield apply
    for kind, name in made:
        lab.client.delete(kind, "shop", name)

    def plain() -> None:
        for client in ("web", "guest"):
            told = ask(lab, "/after", method="PUT", client=client)[0]
            assert told[0] == 200
            assert "jo@example.com" in told[1]
            assert "ratelimit" not in told[2]
        assert {json.loads(body)["version"] for _, body, _ in ask(lab, count=20)} == {"v1", "v2"}

    eventually(plain)


def test_the_command_line_shows_it(lab: TestLab) -> None:
    listed = ambit(lab, "waypoint", "list", "-n", "shop", "-o", "json")
    (row,) = json.loads(listed.stdout)
    assert (row["name"], row["programmed"], row["traffic_type"]) == ("waypoint", "True", "service")


def test_routes_by_header_by_weight_and_nowhere(lab: TestLab, apply: Callable[..., None]) -> None:
    beta = {"name": "x-beta", "value": "yes"}
    apply(
        "HTTPRoute",
        "api",
        {
            "parentRefs": [API],
            "rules": [
                {
                    "matches": [{"headers": [beta]}],
                    "backendRefs": [{"name": "api-v2", "port": 80}],
                },
                {
                    "matches": [{"path": {"type": "PathPrefix", "value": "/split"}}],
                    "backendRefs": [
                        {"name": "api-v1", "port": 80, "weight": 3},
                        {"name": "api-v2", "port": 80, "weight": 1},
                    ],
                },
                {
                    "matches": [{"path": {"type": "Exact", "value": "/old"}}],
                    "filters": [
                        {
                            "type": "RequestRedirect",
                            "requestRedirect": {
                                "statusCode": 301,
                                "path": {"type": "ReplaceFullPath", "replaceFullPath": "/new"},
                            },
                        }
                    ],
                },
            ],
        },
    )

    def routed() -> None:
        told = ask(lab, x_beta="yes", count=5)
        assert {json.loads(body)["version"] for _, body, _ in told} == {"v2"}
        assert ask(lab, "/nowhere")[0][0] == 404

    eventually(routed)
    versions = [json.loads(body)["version"] for _, body, _ in ask(lab, "/split", count=200)]
    assert 0.6 < versions.count("v1") / 200 < 0.9
    status, _, headers = ask(lab, "/old")[0]
    assert (status, headers["location"]) == (301, "http://api/new")


def test_policy_and_limits(lab: TestLab, apply: Callable[..., None]) -> None:
    apply(
        "AuthorizationPolicy",
        "readers",
        {
            "targetRefs": [API],
            "rules": [
                {
                    "from": [{"source": {"serviceAccounts": ["web"]}}],
                    "to": [{"operation": {"methods": ["GET"], "paths": ["/", "/ok/*"]}}],
                }
            ],
        },
    )

    def denied() -> None:
        assert ask(lab, method="PUT")[0][:2] == (403, "RBAC: access denied")

    eventually(denied)
    assert ask(lab)[0][0] == 200
    assert ask(lab, "/ok/x")[0][0] == 200
    assert ask(lab, client="guest")[0][0] == 403
    for path in ("/secret", "/ok/../secret", "/ok/%2e%2e/secret"):
        assert ask(lab, path)[0][0] == 403
    # Not past the waypoint either: the pod itself takes its port from nobody else.
    ip = lab.client.get("Pod", "shop", "api-v1")[0]["status"]["podIP"]
    eventually(lambda: _refused(lab, ip))

    apply(
        "RateLimitPolicy",
        "calm",
        {
            "targetRefs": [API],
            "rules": [
                {
                    "name": "each",
                    "limit": {"requests": 5, "window": "1h"},
                    "key": [{"type": "Identity"}],
                }
            ],
        },
    )

    def limited() -> None:
        status, _, headers = ask(lab)[0]
        assert status == 429
        assert int(headers["retry-after"]) > 0

    eventually(limited)


PROVIDER = """
extensionProviders:
- name: judge
  envoyExtAuthzHttp:
    service: judge.shop.svc.cluster.local
    port: 8000
    timeout: 20s
    pathPrefix: /check
    failOpen: %s
    includeRequestHeadersInCheck: [x-ask]
    headersToUpstreamOnAllow: [x-user]
"""


def _name_providers(lab: TestLab, text: str) -> None:
    metadata = {"name": "istio", "namespace": "istio-system"}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
    lab.client.apply({**config, "data": {"mesh": text}})


def _condition(lab: TestLab, policy: str) -> dict[str, str]:
    (found,) = lab.client.get("AuthorizationPolicy", "shop", policy)
    told = found.get("status", {}).get("conditions", ())
    return next((each for each in told if each["type"] == "WaypointAccepted"), {})


def test_an_external_authorizer_is_asked(lab: TestLab, apply: Callable[..., None]) -> None:
    rule = {"to": [{"operation": {"paths": ["/judged/*"]}}]}
    spec = {"action": "CUSTOM", "provider": {"name": "judge"}, "rules": [rule]}
    apply("AuthorizationPolicy", "asked", {"targetRefs": [API], **spec})

    def unknown() -> None:
        assert ask(lab, "/judged/a", x_ask="please")[0][:2] == (403, "RBAC: access denied")
        assert _condition(lab, "asked").get("reason") == "UnknownProvider"

    eventually(unknown)
    assert ask(lab, "/free")[0][0] == 200
    try:
        _name_providers(lab, PROVIDER % "false")

        def allowed() -> None:
            status, body, _ = ask(lab, "/judged/a", x_ask="please", x_user="root")[0]
            assert status == 200
            assert json.loads(body)["user"] == "please /check/judged/a"
            assert _condition(lab, "asked").get("status") == "True"

        eventually(allowed)
        assert ask(lab, "/judged/a", x_ask="now")[0][:2] == (403, "judged")
        told = ambit(lab, "explain", "shop/web", "svc/api.shop:80", "--path", "/judged/a")
        assert "the external authorizer judge would be asked" in told.stdout, told
        assert "shop/asked" in told.stdout
        log = [each for pod in _waypoints(lab, 1) for each in _logged(lab, pod, "/judged/a")]
        assert "shop/asked judge allowed" in [each.get("ext_authz") for each in log]
        assert [each["policy"] for each in log if "judge denies" in each.get("error", "")]

        # What cannot be read leaves what was, and says so.
        _name_providers(lab, "extensionProviders: [")

        def unread() -> None:
            assert "not YAML" in _condition(lab, "asked").get("message", "")

        eventually(unread)
        assert ask(lab, "/judged/a", x_ask="please")[0][0] == 200

        _name_providers(lab, PROVIDER % "false")
        lab.client.delete("Pod", "shop", "judge")

        def closed() -> None:
            told = ask(lab, "/judged/a", x_ask="please")[0]
            assert told[:2] == (403, "RBAC: access denied")

        eventually(closed)
        _name_providers(lab, PROVIDER % "true")

        def opened() -> None:
            status, body, _ = ask(lab, "/judged/a", x_user="root")[0]
            assert status == 200
            assert not json.loads(body)["user"]

        eventually(opened)
    finally:
        lab.client.delete("ConfigMap", "istio-system", "istio")


def _logged(lab: TestLab, pod: str, path: str) -> list[dict[str, Any]]:
    lines = b"".join(lab.client.logs(pod=("shop", pod))).splitlines()
    found = [json.loads(each) for each in lines if b"request complete" in each]
    return [each for each in found if each["path"] == path]


def _refused(lab: TestLab, ip: str) -> None:
    said = lab.client.run("shop", "web", ["curl", "-s", "-m", "5", f"http://{ip}:8080/"])
    assert said.code != 0
    assert not said.stdout


def test_an_external_host_goes_through_it(lab: TestLab, apply: Callable[..., None]) -> None:
    (address, *_) = [
        each["status"]["podIP"]
        for each in lab.client.get("Pod", "shop")
        if each["metadata"].get("labels", {}).get("app") == "api"
    ]
    host = "api.partner.example"
    spec = {
        "hosts": [host],
        "resolution": "STATIC",
        "ports": [{"number": 80, "name": "http", "protocol": "HTTP", "targetPort": 8080}],
        "endpoints": [{"address": address}],
    }
    apply("ServiceEntry", "partner", spec)

    def reached() -> None:
        assert ask(lab, "/", host=host)[0][0] == 200

    eventually(reached)
    outside = {"group": "networking.istio.io", "kind": "ServiceEntry", "name": "partner"}
    rules = [{"to": [{"operation": {"methods": ["PUT"]}}]}]
    policy = {"targetRefs": [outside], "action": "DENY", "rules": rules}
    apply("AuthorizationPolicy", "partner", policy)

    def judged() -> None:
        assert ask(lab, "/", host=host, method="PUT")[0][0] == 403
        assert ask(lab, "/", host=host)[0][0] == 200

    eventually(judged)

    def told() -> None:
        (entry,) = lab.client.get("ServiceEntry", "shop")
        given = entry.get("status", {}).get("addresses", [{"value": ""}])
        assert given[0]["value"].startswith("240.240.")

    eventually(told)


def test_values_are_taken_out_of_the_traffic(lab: TestLab, apply: Callable[..., None]) -> None:
    rules = [{"detector": "email", "action": {"type": "mask"}}]
    apply("RedactionPolicy", "hide", {"targetRefs": [API], "rules": rules})

    def hidden() -> None:
        _, body, _ = ask(lab, "/find/bob@example.com")[0]
        told = json.loads(body)
        assert (told["path"], told["mail"]) == ("/find/***************", "**************")

    eventually(hidden)


@contextlib.contextmanager
def _load(lab: TestLab, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Load meanwhile; afterwards what came of it."""
    told: dict[str, Any] = {}
    stop = tmp_path / "stop"
    thread = threading.Thread(
        target=lambda: told.update(json.loads(lab.python("shop/web", LOAD, str(stop))))
    )
    thread.start()
    try:
        yield told
    finally:
        stop.touch()
        thread.join(60)


def _waypoints(lab: TestLab, count: int) -> list[str]:
    """The names of the waypoint's pods, all ready."""

    def ready() -> list[str]:
        pods = [
            each
            for each in lab.client.get("Pod", "shop")
            if each["metadata"]["name"].startswith("waypoint-")
        ]
        for each in pods:
            conditions = each.get("status", {}).get("conditions", [])
            assert any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
            assert "deletionTimestamp" not in each["metadata"]
        assert len(pods) == count
        return [each["metadata"]["name"] for each in pods]

    return eventually(ready, seconds=60)


def test_replicas_come_and_go_under_load(lab: TestLab, tmp_path: Path) -> None:
    (deployment,) = (
        each
        for each in lab.client.get("Deployment", "shop")
        if each["metadata"]["name"] == "waypoint"
    )
    deployment["spec"]["replicas"] = 2
    lab.client.apply(deployment)
    names = _waypoints(lab, 2)
    with _load(lab, tmp_path) as told:
        for name in names:
            before = set(_waypoints(lab, 2))
            lab.client.delete("Pod", "shop", name)
            eventually(lambda: _is_replaced(lab, before), seconds=60)  # noqa: B023
    assert told["new"] > 50
    assert told["kept"] > 50
    assert told["failed"] == []

    # A crash costs what was in flight: one request of each of the four at most.
    victim = _nearest(lab, "web")
    with _load(lab, tmp_path) as told:
        eventually(lambda: ask(lab)[0][0] == 200)
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: _is_back(lab, victim), seconds=60)
    assert len(told["failed"]) <= 4, told["failed"]
    cuts = ("ConnectionResetError", "RemoteDisconnected")
    assert all(str(why).startswith(cuts) for _, why in told["failed"]), told["failed"]
    _waypoints(lab, 2)

    def is_well() -> None:
        assert [ask(lab)[0][0] for _ in range(10)] == [200] * 10

    eventually(is_well)
    deployment["spec"]["replicas"] = 1
    lab.client.apply(deployment)
    _waypoints(lab, 1)


def test_a_service_moves_to_another_waypoint_and_back_without_a_failed_request(
    lab: TestLab, tmp_path: Path
) -> None:
    done = ambit(lab, "waypoint", "apply", "-n", "shop", "--name", "second", "--wait")
    assert done.returncode == 0, done.stderr
    (service,) = (e for e in lab.client.get("Service", "shop") if e["metadata"]["name"] == "api")

    def uses(name: str) -> Callable[[], None]:
        def check() -> None:
            (found,) = (
                e for e in lab.client.get("Service", "shop") if e["metadata"]["name"] == "api"
            )
            (bound,) = (
                e
                for e in found.get("status", {}).get("conditions", [])
                if e["type"] == "istio.io/WaypointBound"
            )
            assert bound["message"].endswith(f"waypoint shop/{name}")

        return check

    with _load(lab, tmp_path) as told:
        for name in ("second", "waypoint"):
            service["metadata"].setdefault("labels", {})["istio.io/use-waypoint"] = name
            lab.client.apply(service)
            eventually(uses(name))
            ask(lab, count=20)
    assert told["new"] > 50
    assert told["kept"] > 50
    assert told["failed"] == []
    del service["metadata"]["labels"]["istio.io/use-waypoint"]
    lab.client.apply(service)
    done = ambit(lab, "waypoint", "delete", "second", "-n", "shop")
    assert done.returncode == 0, done.stderr


def _is_replaced(lab: TestLab, before: set[str]) -> None:
    assert set(_waypoints(lab, 2)) != before


def _nearest(lab: TestLab, pod: str) -> int:
    """The process of the waypoint on this pod's node: all that the pod sends goes there."""
    pods = {each["metadata"]["name"]: each for each in lab.client.get("Pod", "shop")}
    node = pods[pod]["spec"]["nodeName"]
    (name,) = (
        name
        for name, each in pods.items()
        if name.startswith("waypoint-") and each["spec"]["nodeName"] == node
    )
    (found,) = (
        pid
        for pid in lab.processes("waypoint")
        if f"POD_NAME={name}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )
    return found


def _is_back(lab: TestLab, victim: int) -> None:
    now = lab.processes("waypoint")
    assert victim not in now
    assert len(now) >= 2
    _waypoints(lab, 2)


def test_without_its_waypoint_a_service_with_policy_is_closed(
    lab: TestLab, apply: Callable[..., None]
) -> None:
    apply(
        "AuthorizationPolicy",
        "gets",
        {"targetRefs": [API], "rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]},
    )
    eventually(lambda: _status(lab, 403, method="PUT"))
    eventually(lambda: _status(lab, 200))
    for pod in lab.client.get("Pod", "shop"):
        if pod["metadata"]["name"].startswith("waypoint-"):
            lab.client.delete("Pod", "shop", pod["metadata"]["name"])
    # Until it is back nothing passes that its policy would have stopped.
    statuses = {ask(lab, method="PUT")[0][0] for _ in range(20)}
    assert 200 not in statuses
    eventually(lambda: _status(lab, 200), seconds=60)
    assert ask(lab, method="PUT")[0][0] == 403


def _status(lab: TestLab, status: int, **fields: str) -> None:
    assert ask(lab, **fields)[0][0] == status  # type: ignore[arg-type]
