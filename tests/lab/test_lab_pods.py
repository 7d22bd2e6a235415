"""What pods in a lab are: their view of the machine, their probes, files, restarts and ends.

Every test runs as root (if we are) and in a user namespace, which needs no privilege.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mesh.errors import ConfigError, Unavailable
from mesh.lab.control import Completed, NotThere
from tests.support.bare_labs import CALLER, GATE, LATE, MISC, PROGRAMS, WEB, BareLab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(90)]


def test_a_stateful_sets_pods_have_names_and_claims(lab: BareLab) -> None:
    assert lab.answer("db-0.db.shop.svc.cluster.local", 9000)[0] == "db-0"
    lab.shell("echo kept > /data/file", "db-0")
    lab.client.delete("Pod", "shop", "db-0")
    uid = next(p["metadata"]["uid"] for p in lab.pods("db") if p["metadata"]["name"] == "db-0")
    lab.until(lambda: all(p["metadata"]["uid"] != uid for p in lab.pods("db")))
    lab.client.wait_ready()
    assert lab.shell("cat /data/file", "db-0").stdout == b"kept\n"
    assert lab.shell("ls /data", "db-1").stdout == b""


def test_a_pod_has_its_own_view_of_the_machine(lab: BareLab) -> None:
    script = "hostname; pwd; cat /etc/greeting; echo; ls /etc/scratch/here /run; cat /etc/passwd"
    lines = lab.shell(script).stdout.decode().splitlines()
    assert lines[:3] == ["caller", "/app", "hello"]
    assert lines[-1] == Path("/etc/passwd").read_text().splitlines()[-1]
    assert not any("ambit" in line for line in lines)
    assert lab.shell("echo x > /etc/scratch/here/file && cat /etc/scratch/here/file").code == 0
    assert lab.shell("echo x > /app/greeting").code != 0
    for path in ("/app", "/etc/scratch", "/etc/greeting"):
        assert not Path(path).exists(), f"{path} was made on the machine"


def test_exec_hands_on_input_output_and_exit_code(lab: BareLab) -> None:
    done = lab.client.run("shop", "caller", ["sh", "-c", "cat; echo no >&2; exit 7"], stdin=b"in")
    assert done == Completed(7, b"in", b"no\n")
    assert lab.client.run("shop", "caller", ["sh", "-c", "kill -9 $$"]).code == 137
    with pytest.raises(ConfigError, match="cannot start no-such-program"):
        lab.client.run("shop", "caller", ["no-such-program"])
    with pytest.raises(NotThere, match="no pod shop/absent"):
        lab.client.run("shop", "absent", ["true"])


def test_a_command_ends_with_its_asker(lab: BareLab) -> None:
    script = (
        "from mesh.lab.control import LabClient;"
        f"LabClient({lab.client.address.name!r}).exec('shop', 'caller', ['sleep', '4242'])"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as asker:
        running = "ps ax | grep -v grep | grep -q 'sleep 4242'"
        lab.until(lambda: lab.shell(running).code == 0)
        asker.kill()
    lab.until(lambda: lab.shell(running).code != 0)


def test_logs(lab: BareLab) -> None:
    pod = lab.pods("web")[0]["metadata"]["name"]
    assert b"serving\n" in b"".join(lab.client.logs(pod=("shop", pod), tail=50))
    followed = lab.client.logs(pod=("shop", pod), tail=1, follow=True)
    assert next(followed) == b"serving\n"
    followed.close()  # type: ignore[attr-defined]


def test_a_container_that_dies_is_started_again(lab: BareLab) -> None:
    before = next(p for p in lab.client.status()["pods"] if p["name"] == "caller")
    lab.shell("pkill -x sleep; true")

    def restarted() -> bool:
        now = next(p for p in lab.client.status()["pods"] if p["name"] == "caller")
        return bool(now["restarts"] > before["restarts"] and now["ready"])

    lab.until(restarted)
    after = next(p for p in lab.client.status()["pods"] if p["name"] == "caller")
    assert (after["uid"], after["ips"]) == (before["uid"], before["ips"])


def test_liveness_restarts_and_a_completed_pod_stays(lab: BareLab) -> None:
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


def test_a_pod_waits_for_its_config_map(lab: BareLab) -> None:
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


def test_files_follow_their_config_map(lab: BareLab) -> None:
    lab.write("p.yaml", PROGRAMS.replace("greeting: hello", "greeting: good day"))
    lab.until(lambda: lab.shell("cat /app/greeting").stdout == b"good day")
    lab.write("p.yaml", PROGRAMS)


def test_a_label_set_live_outlives_an_edit_and_an_edit_of_it_wins(lab: BareLab) -> None:
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


def test_a_changed_template_rolls_without_a_refused_connection(lab: BareLab) -> None:
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


def test_unready_pods_get_no_traffic(lab: BareLab) -> None:
    lab.write("gate.yaml", GATE)
    lab.until(
        lambda: [pod["status"]["phase"] for pod in lab.pods("gate")] == ["Running", "Running"]
    )
    pods = [pod["metadata"]["name"] for pod in lab.pods("gate")]
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


def test_a_fault_names_its_place_and_changes_nothing(lab: BareLab) -> None:
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


def test_objects_can_be_applied_and_deleted(lab: BareLab) -> None:
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
