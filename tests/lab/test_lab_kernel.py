"""A lab without daemons: nodes, pods, Services, names and probes, in real namespaces.

Every test runs as root (if we are) and in a user namespace, which needs no privilege.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mesh.errors import ConfigError, Unavailable
from mesh.lab.control import Completed, LabClient, NotThere, list_labs
from mesh.lab.launch import LabSettings, RunningLab, start

pytestmark = [pytest.mark.lab, pytest.mark.timeout(90)]

PROGRAMS = """
apiVersion: v1
kind: ConfigMap
metadata: {name: programs, namespace: shop}
data:
  greeting: hello
  serve.py: |
    import os, socket, sys, threading
    def serve(port):
        l = socket.socket(socket.AF_INET6)
        l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        l.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        l.bind(("::", port)); l.listen(50)
        while True:
            c, a = l.accept()
            c.sendall(f"{os.environ['POD']} {port} {a[0].removeprefix('::ffff:')}".encode())
            c.close()
    print("serving", flush=True)
    threading.Thread(target=serve, args=(9000,), daemon=True).start()
    serve(8080)
  ask.py: |
    import socket, sys
    s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=4)
    print(s.recv(100).decode(), s.getpeername()[0])
"""
WEB = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: main
          command: [python3, /app/serve.py]
          env: [{name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
          ports: [{name: http, containerPort: 8080}, {name: extra, containerPort: 9000}]
          readinessProbe: {tcpSocket: {port: http}, periodSeconds: 1}
          volumeMounts: [{name: programs, mountPath: /app}]
      volumes: [{name: programs, configMap: {name: programs}}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: web}
  ports:
    - {name: http, port: 80, targetPort: http}
    - {name: extra, port: 81, targetPort: extra}
---
apiVersion: v1
kind: Service
metadata: {name: six, namespace: shop}
spec:
  ipFamilies: [IPv6]
  selector: {app: web}
  ports: [{port: 80, targetPort: http}]
---
apiVersion: v1
kind: Service
metadata: {name: nobody, namespace: shop}
spec:
  selector: {app: nobody}
  ports: [{port: 80}]
"""
CALLER = """
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: caller, namespace: shop, labels: {app: caller}}
spec:
  nodeSelector: {kubernetes.io/hostname: node1}
  containers:
    - name: main
      command: [sleep, infinity]
      workingDir: /app
      volumeMounts:
        - {name: programs, mountPath: /app}
        - {name: scratch, mountPath: /etc/scratch/here}
        - {name: programs, mountPath: /etc/greeting, subPath: greeting}
  volumes:
    - {name: programs, configMap: {name: programs}}
    - {name: scratch, emptyDir: {}}
"""
DATABASE = """
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: None, selector: {app: db}, ports: [{name: sql, port: 9000}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: shop}
spec:
  serviceName: db
  replicas: 2
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: main
          command: [python3, /app/serve.py]
          env: [{name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
          readinessProbe: {tcpSocket: {port: 9000}, periodSeconds: 1}
          volumeMounts: [{name: programs, mountPath: /app}, {name: data, mountPath: /data}]
      volumes: [{name: programs, configMap: {name: programs}}]
  volumeClaimTemplates: [{metadata: {name: data}}]
"""

GATE = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: gate, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: gate}}
  template:
    metadata: {labels: {app: gate}}
    spec:
      terminationGracePeriodSeconds: 1
      initContainers:
        - {name: first, command: [sh, -c, "exit $(CODE)"], env: [{name: CODE, value: "0"}]}
      containers:
        - name: main
          command: [python3, /app/serve.py]
          env: [{name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
          startupProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
          readinessProbe:
            exec: {command: [test, -f, /scratch/open]}
            periodSeconds: 1
            failureThreshold: 1
          volumeMounts:
            - {name: programs, mountPath: /app}
            - {name: scratch, mountPath: /scratch}
      volumes: [{name: programs, configMap: {name: programs}}, {name: scratch, emptyDir: {}}]
---
apiVersion: v1
kind: Service
metadata: {name: gate, namespace: shop}
spec: {selector: {app: gate}, ports: [{port: 80, targetPort: 8080}]}
"""

MISC = """
apiVersion: v1
kind: Pod
metadata: {name: sick, namespace: shop, labels: {app: misc}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      command: [sh, -c, "echo first life; exec sleep infinity"]
      livenessProbe:
        exec: {command: [test, "!", -f, /scratch/sick]}
        periodSeconds: 1
        failureThreshold: 1
      volumeMounts: [{name: scratch, mountPath: /scratch}]
  volumes: [{name: scratch, emptyDir: {}}]
---
apiVersion: v1
kind: Pod
metadata: {name: done, namespace: shop, labels: {app: misc}}
spec:
  restartPolicy: OnFailure
  containers: [{name: main, command: ["true"]}]
"""
LATE = """
apiVersion: v1
kind: Pod
metadata: {name: late, namespace: shop, labels: {app: late}}
spec:
  containers:
    - name: main
      command: [sleep, infinity]
      env: [{name: KEY, valueFrom: {configMapKeyRef: {name: late, key: key}}}]
      volumeMounts: [{name: late, mountPath: /late}]
  volumes: [{name: late, configMap: {name: late}}]
"""


class Lab:
    """A running lab and its directory."""

    def __init__(self, running: RunningLab, directory: Path) -> None:
        self.running = running
        self.client: LabClient = running.client
        self.directory = directory

    def ask(self, host: str, port: int, pod: str = "caller") -> Completed:
        return self.client.run("shop", pod, ["python3", "/app/ask.py", host, str(port)])

    def answer(self, host: str, port: int, pod: str = "caller") -> list[str]:
        done = self.ask(host, port, pod)
        assert done.code == 0, done
        return done.stdout.decode().split()

    def shell(self, script: str, pod: str = "caller") -> Completed:
        return self.client.run("shop", pod, ["sh", "-c", script])

    def write(self, name: str, text: str) -> None:
        beside = self.directory / f".{name}"
        beside.write_text(text)
        beside.replace(self.directory / name)

    def pods(self, app: str) -> list[dict]:  # type: ignore[type-arg]
        found = self.client.get("Pod", "shop")
        return [pod for pod in found if pod["metadata"]["labels"].get("app") == app]

    def until(self, what: Callable[[], bool], seconds: float = 15) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.client.status()
            select.select([], [], [], 0.05)


@contextlib.contextmanager
def lab_of(directory: Path, name: str, files: dict[str, str], *, rootless: bool) -> Iterator[Lab]:
    for file, text in files.items():
        (directory / file).write_text(text)
    running = start(LabSettings(directory, name=name, mesh=False, rootless=rootless))
    try:
        yield Lab(running, directory)
    finally:
        running.stop()


MODES = ["root", "rootless"] if os.getuid() == 0 else ["rootless"]


@pytest.fixture(scope="module", params=MODES)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    files = {"p.yaml": PROGRAMS, "web.yaml": WEB, "caller.yaml": CALLER, "db.yaml": DATABASE}
    directory = tmp_path_factory.mktemp("shop")
    name = f"test-{os.getpid()}-{request.param}"
    with lab_of(directory, name, files, rootless=request.param == "rootless") as made:
        yield made


def test_everything_is_ready(lab: Lab) -> None:
    status = lab.client.wait_ready()
    assert status["phase"] == "ready"
    assert not status["faults"]
    assert {pod["node"] for pod in status["pods"] if pod["owner"].startswith("Deploy")} == {
        "node1",
        "node2",
    }
    assert [node["name"] for node in status["nodes"]] == ["node1", "node2"]


def test_pods_reach_each_other_and_see_each_other(lab: Lab) -> None:
    own = {ip["ip"] for ip in lab.pods("caller")[0]["status"]["podIPs"]}
    for pod in lab.pods("web"):
        for entry in pod["status"]["podIPs"]:
            who, port, sees, peer = lab.answer(entry["ip"], 8080)
            assert (who, port, peer) == (pod["metadata"]["name"], "8080", entry["ip"])
            assert sees in own


def test_cluster_ips_of_both_families_reach_every_endpoint_and_port(lab: Lab) -> None:
    names = {pod["metadata"]["name"] for pod in lab.pods("web")}
    web = lab.client.get("Service", "shop", "web")[0]
    assert web["spec"]["ipFamilies"] == ["IPv4", "IPv6"]
    for vip in web["spec"]["clusterIPs"]:
        answers = [lab.answer(vip, 80) for _ in range(12)]
        assert {answer[0] for answer in answers} == names
        assert {answer[3] for answer in answers} == {vip}
        assert lab.answer(vip, 81)[1] == "9000"


def test_an_ipv6_only_service_has_no_ipv4(lab: Lab) -> None:
    six = lab.client.get("Service", "shop", "six")[0]["spec"]
    assert (len(six["clusterIPs"]), six["ipFamilies"]) == (1, ["IPv6"])
    assert ":" in lab.answer("six", 80)[3]
    found = lab.shell("getent ahostsv4 six")
    assert found.code != 0


def test_a_pod_reaches_itself_through_its_service(lab: Lab) -> None:
    """Hairpin, of both families: the pod sees its node as the other side."""
    pod = lab.pods("web")[0]
    name = pod["metadata"]["name"]
    web = lab.client.get("Service", "shop", "web")[0]
    for vip in web["spec"]["clusterIPs"]:
        answers = [lab.answer(vip, 80, name) for _ in range(10)]
        mine = [answer for answer in answers if answer[0] == name]
        assert mine
        assert {answer[2] for answer in mine} <= {"10.244.1.1", "10.244.2.1"} | {
            "fd00:10:244:1::1",
            "fd00:10:244:2::1",
        }


def test_a_service_without_endpoints_refuses_at_once(lab: Lab) -> None:
    vip = lab.client.get("Service", "shop", "nobody")[0]["spec"]["clusterIP"]
    started = time.monotonic()
    assert b"refused" in lab.ask(vip, 80).stderr
    assert time.monotonic() - started < 3


def test_the_node_itself_reaches_services(lab: Lab) -> None:
    web = lab.client.get("Service", "shop", "web")[0]
    for vip in web["spec"]["clusterIPs"]:
        # The server speaks no HTTP: that it answers at all is what counts.
        with pytest.raises(Unavailable, match=r"no HTTP|no answer|broke"):
            lab.client.http_get("node2", "/", host=vip, port=80)


@pytest.mark.parametrize(
    "name",
    ["web", "web.shop", "web.shop.svc.cluster.local", "db-1.db", "db.shop"],
)
def test_names(lab: Lab, name: str) -> None:
    assert lab.answer(name, 9000 if name.startswith("db") else 80)


def test_names_that_do_not_exist_fail_fast(lab: Lab) -> None:
    started = time.monotonic()
    assert b"Name or service not known" in lab.ask("absent", 80).stderr
    assert lab.ask("example.com", 80).code == 1
    assert time.monotonic() - started < 5


def test_the_dns_server_answers_over_tcp(lab: Lab) -> None:
    done = lab.shell("echo 'options use-vc' >> /etc/resolv.conf; getent hosts web")
    assert done.code == 0, done


def test_a_stateful_sets_pods_have_names_and_claims(lab: Lab) -> None:
    assert lab.answer("db-0.db.shop.svc.cluster.local", 9000)[0] == "db-0"
    lab.shell("echo kept > /data/file", "db-0")
    lab.client.delete("Pod", "shop", "db-0")
    uid = next(p["metadata"]["uid"] for p in lab.pods("db") if p["metadata"]["name"] == "db-0")
    lab.until(lambda: all(p["metadata"]["uid"] != uid for p in lab.pods("db")))
    lab.client.wait_ready()
    assert lab.shell("cat /data/file", "db-0").stdout == b"kept\n"
    assert lab.shell("ls /data", "db-1").stdout == b""


def test_a_pod_has_its_own_view_of_the_machine(lab: Lab) -> None:
    script = "hostname; pwd; cat /etc/greeting; echo; ls /etc/scratch/here /run; cat /etc/passwd"
    lines = lab.shell(script).stdout.decode().splitlines()
    assert lines[:3] == ["caller", "/app", "hello"]
    assert lines[-1] == Path("/etc/passwd").read_text().splitlines()[-1]
    assert not any("ambit" in line for line in lines)
    assert lab.shell("echo x > /etc/scratch/here/file && cat /etc/scratch/here/file").code == 0
    assert lab.shell("echo x > /app/greeting").code != 0
    for path in ("/app", "/etc/scratch", "/etc/greeting"):
        assert not Path(path).exists(), f"{path} was made on the machine"


def test_exec_hands_on_input_output_and_exit_code(lab: Lab) -> None:
    done = lab.client.run("shop", "caller", ["sh", "-c", "cat; echo no >&2; exit 7"], stdin=b"in")
    assert done == Completed(7, b"in", b"no\n")
    assert lab.client.run("shop", "caller", ["sh", "-c", "kill -9 $$"]).code == 137
    with pytest.raises(ConfigError, match="cannot start no-such-program"):
        lab.client.run("shop", "caller", ["no-such-program"])
    with pytest.raises(NotThere, match="no pod shop/absent"):
        lab.client.run("shop", "absent", ["true"])


def test_a_command_ends_with_its_asker(lab: Lab) -> None:
    script = (
        "from mesh.lab.control import LabClient;"
        f"LabClient({lab.client.address.name!r}).exec('shop', 'caller', ['sleep', '4242'])"
    )
    with subprocess.Popen([os.sys.executable, "-c", script]) as asker:  # type: ignore[attr-defined]
        running = "ps ax | grep -v grep | grep -q 'sleep 4242'"
        lab.until(lambda: lab.shell(running).code == 0)
        asker.kill()
    lab.until(lambda: lab.shell(running).code != 0)


def test_logs(lab: Lab) -> None:
    pod = lab.pods("web")[0]["metadata"]["name"]
    assert b"serving\n" in b"".join(lab.client.logs(pod=("shop", pod), tail=50))
    followed = lab.client.logs(pod=("shop", pod), tail=1, follow=True)
    assert next(followed) == b"serving\n"
    followed.close()  # type: ignore[attr-defined]


def test_a_container_that_dies_is_started_again(lab: Lab) -> None:
    before = next(p for p in lab.client.status()["pods"] if p["name"] == "caller")
    lab.shell("pkill -x sleep; true")

    def restarted() -> bool:
        now = next(p for p in lab.client.status()["pods"] if p["name"] == "caller")
        return bool(now["restarts"] > before["restarts"] and now["ready"])

    lab.until(restarted)
    after = next(p for p in lab.client.status()["pods"] if p["name"] == "caller")
    assert (after["uid"], after["ips"]) == (before["uid"], before["ips"])


def test_liveness_restarts_and_a_completed_pod_stays(lab: Lab) -> None:
    lab.write("misc.yaml", MISC)
    lab.until(lambda: len(lab.pods("misc")) == 2)

    def of(name: str) -> dict:  # type: ignore[type-arg]
        return next(pod for pod in lab.client.status()["pods"] if pod["name"] == name)

    lab.until(lambda: of("sick")["ready"] and of("done")["phase"] == "Succeeded")
    assert of("done")["restarts"] == 0
    lab.client.wait_ready()
    lab.shell("touch /scratch/sick", "sick")
    lab.until(lambda: of("sick")["restarts"] > 0)
    assert b"first life\n" in b"".join(lab.client.logs(pod=("shop", "sick")))
    (lab.directory / "misc.yaml").unlink()
    lab.until(lambda: not lab.pods("misc"))


def test_a_pod_waits_for_its_config_map(lab: Lab) -> None:
    lab.write("late.yaml", LATE)
    lab.until(lambda: bool(lab.pods("late")))

    def late() -> dict:  # type: ignore[type-arg]
        return next(pod for pod in lab.client.status()["pods"] if pod["name"] == "late")

    lab.until(lambda: "waits for ConfigMap late" in late()["message"])
    with pytest.raises(Unavailable, match="does not run"):
        lab.shell("true", "late")
    lab.client.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "late", "namespace": "shop"},
            "data": {"key": "value"},
        }
    )
    lab.until(lambda: late()["ready"])
    assert lab.shell("cat /late/key; echo $KEY", "late").stdout == b"valuevalue\n"
    (lab.directory / "late.yaml").unlink()
    lab.until(lambda: not lab.pods("late"))


def test_files_follow_their_config_map(lab: Lab) -> None:
    lab.write("p.yaml", PROGRAMS.replace("greeting: hello", "greeting: good day"))
    lab.until(lambda: lab.shell("cat /app/greeting").stdout == b"good day")
    lab.write("p.yaml", PROGRAMS)


def test_a_label_set_live_outlives_an_edit_and_an_edit_of_it_wins(lab: Lab) -> None:
    label = "istio.io/dataplane-mode"

    def labels() -> dict[str, str]:
        return dict(lab.client.get("Namespace", name="shop")[0]["metadata"]["labels"])

    lab.client.patch("Namespace", "", "shop", {"metadata": {"labels": {label: "ambient"}}})
    lab.write("caller.yaml", CALLER.replace("{name: shop}", "{name: shop, labels: {a: b}}"))
    lab.until(lambda: labels().get("a") == "b")
    assert labels()[label] == "ambient"
    edited = CALLER.replace("{name: shop}", f"{{name: shop, labels: {{{label}: none}}}}")
    lab.write("caller.yaml", edited)
    lab.until(lambda: labels().get(label) == "none")
    lab.write("caller.yaml", CALLER)
    lab.until(lambda: label not in labels())


def test_a_changed_template_rolls_without_a_refused_connection(lab: Lab) -> None:
    old = {pod["metadata"]["name"] for pod in lab.pods("web")}
    vip = lab.client.get("Service", "shop", "web")[0]["spec"]["clusterIP"]
    lab.write("web.yaml", WEB.replace("labels: {app: web}", "labels: {app: web, version: v2}"))
    failures = []

    def rolled() -> bool:
        done = lab.ask(vip, 80)
        if done.code != 0:
            failures.append(done)
        return {pod["metadata"]["name"] for pod in lab.pods("web")}.isdisjoint(old)

    lab.until(rolled, 30)
    assert not failures, failures
    lab.client.wait_ready()
    assert len(lab.pods("web")) == 2


def test_unready_pods_get_no_traffic(lab: Lab) -> None:
    lab.write("gate.yaml", GATE)
    lab.until(lambda: len(lab.pods("gate")) == 2)
    pods = [pod["metadata"]["name"] for pod in lab.pods("gate")]
    lab.until(lambda: all(lab.shell("true", pod).code == 0 for pod in pods))
    vip = lab.client.get("Service", "shop", "gate")[0]["spec"]["clusterIP"]
    assert b"refused" in lab.ask(vip, 80).stderr
    assert lab.ask("gate", 80).code != 0

    def serving() -> set[str]:
        done = [lab.ask(vip, 80) for _ in range(6)]
        return {each.stdout.decode().split()[0] for each in done if each.code == 0}

    lab.shell("touch /scratch/open", pods[0])
    lab.until(lambda: serving() == {pods[0]})
    lab.shell("touch /scratch/open", pods[1])
    lab.until(lambda: serving() == set(pods))
    lab.shell("rm /scratch/open", pods[0])
    lab.until(lambda: serving() == {pods[1]})
    (lab.directory / "gate.yaml").unlink()
    lab.until(lambda: not lab.pods("gate"))


def test_a_fault_names_its_place_and_changes_nothing(lab: Lab) -> None:
    names = {pod["metadata"]["name"] for pod in lab.pods("web")}
    lab.write("web.yaml", WEB.replace("containerPort: 8080", "containerPort: eight"))
    lab.until(lambda: bool(lab.client.status()["faults"]))
    fault = lab.client.status()["faults"][0]
    assert fault["file"].endswith("web.yaml")
    assert fault["field"] == "spec.template.spec.containers[0].ports[0].containerPort"
    assert fault["line"] > 0
    assert {pod["metadata"]["name"] for pod in lab.pods("web")} == names
    assert b"containerPort" in b"".join(lab.client.logs())
    lab.write("bad.yaml", "apiVersion: v1\nkind: [\n")
    lab.until(lambda: len(lab.client.status()["faults"]) == 2)
    lab.write("web.yaml", WEB)
    (lab.directory / "bad.yaml").unlink()
    lab.until(lambda: not lab.client.status()["faults"])
    lab.until(lambda: all("version" not in p["metadata"]["labels"] for p in lab.pods("web")))


def test_a_tap_sees_the_wire_between_nodes_only(lab: Lab) -> None:
    lab.client.wait_ready()
    tap = lab.client.tap_start()
    by_node = {pod["spec"]["nodeName"]: pod for pod in lab.pods("web")}
    for node in ("node1", "node2"):
        lab.answer(by_node[node]["status"]["podIP"], 8080)
    needles = [by_node[node]["metadata"]["name"].encode() for node in ("node1", "node2")]
    report = lab.client.tap_stop(tap, needles)
    assert list(report.seen.values()) == [False, True]
    flows = [flow for flow in report.flows if flow.port == 8080]
    assert {flow.destination for flow in flows if flow.source.startswith("10.244.1.")} == {
        by_node["node2"]["status"]["podIP"]
    }
    with pytest.raises(NotThere):
        lab.client.tap_read(tap)


def test_objects_can_be_applied_and_deleted(lab: Lab) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "guest", "namespace": "shop", "labels": {"app": "guest"}},
        "spec": {"containers": [{"name": "main", "command": ["sleep", "infinity"]}]},
    }
    lab.client.apply(pod)
    lab.until(lambda: bool(lab.pods("guest")))
    lab.client.wait_ready()
    assert lab.shell("hostname", "guest").stdout == b"guest\n"
    lab.client.delete("Pod", "shop", "guest")
    lab.until(lambda: not lab.pods("guest"))
    with pytest.raises(NotThere):
        lab.client.delete("Pod", "shop", "guest")
    with pytest.raises(NotThere):
        lab.client.patch("Namespace", "", "absent", {"metadata": {"labels": {"a": "b"}}})


def test_a_name_is_taken_once(lab: Lab, tmp_path: Path) -> None:
    name = lab.client.address.name
    assert name in [found.name for found in list_labs(uid=os.getuid())]
    with pytest.raises(ConfigError, match=f"a lab named {name} is already up"):
        start(LabSettings(tmp_path, name=name, mesh=False))


def test_another_user_is_refused(lab: Lab) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user to try")
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as asker:
            asker.connect(lab.client.address.socket_name)
            asker.sendall(b'{"verb": "status"}\n')
            os.write(writing, asker.recv(4096))
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as answer:
        assert json.loads(answer.read())["kind"] == "Denied"


def host_view() -> dict[str, list[str]]:
    """Whatever a lab could leave behind on the machine."""
    return {
        "links": [name for _, name in socket.if_nameindex()],
        "mounts": Path("/proc/self/mounts").read_text().splitlines(),
        "run": sorted(os.listdir("/run")),
        "root": sorted(os.listdir("/")),
        "tmp": [name for name in os.listdir("/tmp") if "ambit" in name],
        "labs": [lab.name for lab in list_labs(uid=os.getuid()) if "leave" in lab.name],
        "processes": processes_named("4243"),
    }


def processes_named(mark: str) -> list[str]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                command = Path("/proc", entry, "cmdline").read_text().replace("\0", " ")
                if f"sleep {mark}" in command:
                    found.append(command)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("end", ["down", "stop", "keeper", "supervisor"])
def test_nothing_is_left(tmp_path: Path, mode: str, end: str) -> None:
    before = host_view()
    pod = CALLER.replace("infinity", "'4243'")
    files = {"p.yaml": PROGRAMS, "caller.yaml": pod}
    name = f"leave-{os.getpid()}-{mode}-{end}"
    with lab_of(tmp_path, name, files, rootless=mode == "rootless") as lab:
        assert len(processes_named("4243")) == 1
        children = Path(f"/proc/{lab.running.pid}/task/{lab.running.pid}/children")
        supervisor = int(children.read_text().split()[0])
        match end:
            case "down":
                lab.client.down()
            case "stop":
                assert lab.running.stop() == 0
            case "keeper":
                os.kill(lab.running.pid, signal.SIGKILL)
            case "supervisor":
                os.kill(supervisor, signal.SIGKILL)
        lab.running.wait()
        lab.until(lambda: host_view() == before, 10)


def test_a_detached_lab_outlives_its_caller(tmp_path: Path) -> None:
    (tmp_path / "caller.yaml").write_text(CALLER)
    (tmp_path / "p.yaml").write_text(PROGRAMS)
    name = f"leave-{os.getpid()}-detached"
    pid = os.fork()
    if pid == 0:
        start(LabSettings(tmp_path, name=name, mesh=False, detach=True))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    client = LabClient(name)
    assert client.status()["phase"] == "ready"
    assert client.run("shop", "caller", ["hostname"]).stdout == b"caller\n"
    client.down()
    assert not client.is_up()


def test_a_lab_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no lab named absent is up"):
        LabClient("absent").status()
    with pytest.raises(ConfigError, match="no such directory"):
        start(LabSettings(tmp_path / "absent", name="absent"))
