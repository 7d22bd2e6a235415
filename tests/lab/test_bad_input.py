"""A directory in which everything is wrong that can be, beside an application that is right: each
mistake is one clear message with its place, and the application runs on. And labs, and daemons,
that cannot start: one message, what to do next, an exit code, never a traceback.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import MeshError
from mesh.lab.control import LabClient
from mesh.lab.tokens import Issuer
from tests.support.labs import TestLab, eventually, running_lab
from tests.support.mistakes import (
    ERRORS,
    GOOD,
    IS_ROOT,
    NOT_READ,
    OTHERS,
    SERVICE,
    WARNINGS,
    Mistake,
    bad_directory,
)

pytestmark = [pytest.mark.lab, pytest.mark.timeout(90)]

GET = "import urllib.request as u; print(u.urlopen('http://web/', timeout=5).status)"

# Root may read every file, so for this lab it gives that up.
MAY_NOT_READ_ALL = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
MAY_NOT_READ_ALL += ["--inh-caps", "-dac_override,-dac_read_search"]


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestLab]:
    under = MAY_NOT_READ_ALL if IS_ROOT else []
    directory = tmp_path_factory.mktemp("bad")
    bad_directory(directory)
    name = f"test-{os.getpid()}-bad"
    with running_lab(directory, "--nodes", "1", name=name, under=under, settled=False) as lab:
        eventually(lambda: serves(lab), seconds=30)
        yield lab
    if IS_ROOT:
        (directory / "secret").chmod(0o700)


def serves(lab: TestLab) -> None:
    """The application works, through the mesh."""
    try:
        done = lab.client.run("shop", "caller", ["python3", "-c", GET])
    except MeshError as error:
        raise AssertionError(error) from error
    assert done.stdout == b"200\n", done


def complaints(lab: TestLab, key: str, file: str) -> list[dict[str, Any]]:
    return [each for each in lab.client.status()[key] if Path(each["file"]).name == file]


def where(complaint: dict[str, Any]) -> str:
    return "".join(f":{complaint[key]}" for key in ("line", "column") if complaint[key])


def told(lab: TestLab, key: str, name: str, mistake: Mistake) -> None:
    """One complaint, in the status and on stderr."""
    found = complaints(lab, key, name)
    assert len(found) == 1, found
    (it,) = found
    assert (where(it), it["object"], it["field"]) == (mistake.place, mistake.object, mistake.field)
    assert it["message"].startswith(mistake.message)
    assert it["hint"] == mistake.hint
    mark = "warning: " if key == "warnings" else ""
    parts = (f"{mark}{lab.directory}/{name}{mistake.place}", mistake.object, mistake.field)
    line = ": ".join(part for part in (*parts, mistake.message) if part)
    lines = [each for each in lab.said().splitlines() if f"/{name}" in each.partition(" at ")[0]]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"ambit: {line}"), lines
    if mistake.hint:
        assert f"{lines[0]}\nambit: hint: {mistake.hint}\n" in lab.said()


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_told_once_with_its_place(bad: TestLab, name: str) -> None:
    eventually(lambda: told(bad, "faults", name, ERRORS[name]))


@pytest.mark.parametrize("name", WARNINGS)
def test_a_warning_is_told_once_with_its_place(bad: TestLab, name: str) -> None:
    eventually(lambda: told(bad, "warnings", name, WARNINGS[name]))


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_readable_file_is_named(bad: TestLab, name: str) -> None:
    (fault,) = complaints(bad, "faults", name)
    assert fault["message"] == OTHERS[name]
    assert f"ambit: {bad.directory}/{name}: {OTHERS[name]}\n" in bad.said()


def test_nothing_else_is_complained_of(bad: TestLab) -> None:
    files = {
        Path(each["file"]).name
        for key in ("faults", "warnings")
        for each in bad.client.status()[key]
    }
    assert files == {*ERRORS, *WARNINGS, *OTHERS}
    assert "Traceback" not in bad.said()


def test_the_application_runs_beside_all_of_it(bad: TestLab) -> None:
    serves(bad)
    (web,) = bad.client.get("Pod", "shop", "web")
    assert web["metadata"]["annotations"]["ambient.istio.io/redirection"] == "enabled"


def test_a_taken_port_and_a_missing_program_are_seen_in_the_status(bad: TestLab) -> None:
    def explained() -> None:
        pods = {pod["name"]: pod["message"] for pod in bad.client.status()["pods"]}
        assert "exit code 1: OSError: [Errno 98] Address already in use" in pods["twins"]
        assert "the containers of a pod share its ports" in pods["twins"]
        assert pods["twins"][:3] in ("a: ", "b: ")
        assert pods["program"].startswith("command: cannot start no-such-program: No such file")
        assert pods["program"].endswith("is it installed and in PATH?")

    eventually(explained)


def test_the_command_line_shows_it_and_exits_well(bad: TestLab) -> None:
    def shown() -> subprocess.CompletedProcess[str]:
        done = ambit("lab", "status", "--lab", bad.client.address.name)
        assert done.returncode == 0
        assert "Address already in use" in done.stdout
        return done

    done = eventually(shown)
    text = ERRORS["service-port.yaml"]
    line = f"{bad.directory}/service-port.yaml:7:11: spec.ports[0].port: {text.message}"
    assert f"ambit: {line}\nambit: hint: {text.hint}\n" in done.stderr
    found = WARNINGS["service-nothing.yaml"]
    line = f"{bad.directory}/service-nothing.yaml:5:3: {found.object}: spec.selector"
    assert f"ambit: warning: {line}: {found.message}\n" in done.stderr


# -- live -------------------------------------------------------------------------------


def write(lab: TestLab, name: str, text: str, *, says: str) -> None:
    """Write a file, and wait until the one fault of it says so."""
    (lab.directory / name).write_text(text)

    def found() -> None:
        faults = complaints(lab, "faults", name)
        said = [where(fault) + " " + str(fault["message"]) for fault in faults]
        assert len(said) == 1, said
        assert said[0].startswith(says), said

    eventually(found)


def mended(lab: TestLab, name: str) -> None:
    def gone() -> None:
        assert not complaints(lab, "faults", name)

    eventually(gone)
    serves(lab)


def test_a_file_broken_live_changes_nothing(bad: TestLab) -> None:
    pods = {pod["name"]: pod["uid"] for pod in bad.client.status()["pods"]}
    write(bad, "app.yaml", GOOD + "---\nkind: {\n", says=":26:1 not YAML")
    serves(bad)
    (fault,) = complaints(bad, "faults", "app.yaml")
    assert fault["hint"] == "mend it; until then what it last held stays in force"
    wrong = GOOD.replace("tcpSocket: {port: 80}", "tcpSocket: {port: 0}")
    write(bad, "app.yaml", wrong, says=":13:40 not a port: 0")
    serves(bad)
    wrong = GOOD.replace("ports: [{port: 80}]", "ports: [{port: 80}, {port: 80}]")
    write(bad, "app.yaml", wrong, says=":18:38 missing: each of several ports needs a name")
    serves(bad)
    (bad.directory / "app.yaml").write_text(GOOD)
    mended(bad, "app.yaml")
    assert {pod["name"]: pod["uid"] for pod in bad.client.status()["pods"]} == pods


def test_a_bomb_and_a_huge_file_dropped_in_live_are_refused(bad: TestLab) -> None:
    bomb = "a: &a [" + "x, " * 1000 + "]\n" + "".join(f"b{i}: [*a]\n" for i in range(9))
    write(bad, "late.yaml", bomb, says=":1:4 anchors are not allowed")
    bomb = 'apiVersion: v1\nkind: ConfigMap\nmetadata: {name: big}\ndata: {a: "%s"}\n'
    size = 64 << 20
    before = memory(bad)
    write(bad, "late.yaml", bomb % ("x" * size), says=" larger than 1024 KiB")
    assert memory(bad) - before < size / 2
    assert not bad.client.get("ConfigMap", "default", "big")
    (bad.directory / "late.yaml").unlink()
    mended(bad, "late.yaml")


def memory(lab: TestLab) -> int:
    """The supervisor's resident memory, in bytes."""
    found = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _is_supervisor(entry, lab.client.address.name):
            found += int((entry / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert found
    return found


def _is_supervisor(entry: Path, name: str) -> bool:
    try:
        environment = (entry / "environ").read_bytes()
        return f'"name": "{name}"'.encode() in environment
    except OSError:
        return False


def test_a_warning_comes_and_goes_with_its_cause(bad: TestLab) -> None:
    file = bad.directory / "late.yaml"
    text = SERVICE % "late" + "  selector: {app: wbe}\n  ports: [{port: 80}]\n"
    file.write_text(text)

    def warned() -> None:
        said = [each["message"] for each in complaints(bad, "warnings", "late.yaml")]
        assert said == ["selects nothing: no pod in 'shop' has app=wbe"]

    def silent() -> None:
        assert not complaints(bad, "warnings", "late.yaml")

    eventually(warned)
    file.write_text(text.replace("wbe", "web"))
    eventually(silent)
    file.unlink()


# -- what cannot start ------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """How a command ended."""

    code: int
    said: str

    def says(self, code: int, *lines: str) -> None:
        assert self.code == code, self
        assert "Traceback" not in self.said
        assert self.said == "".join(f"ambit: {line}\n" for line in lines)


def ambit(*arguments: str, under: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    argv = [*under, sys.executable, "-m", "mesh.cli", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def refused(directory: Path | str, *arguments: str, under: Sequence[str] = ()) -> Refused:
    """Try to bring up a lab; nothing may be left of it."""
    name = f"test-{os.getpid()}-refused"
    done = ambit(
        "lab", "up", "--nodes", "1", "--name", name, "--dir", str(directory), *arguments,
        under=under,
    )  # fmt: skip
    assert not LabClient(name).is_up()
    assert done.stdout == ""
    return Refused(done.returncode, done.stderr)


DIRECTORY = "hint: give the directory that holds the Kubernetes YAML"


def test_no_directory(tmp_path: Path) -> None:
    missing, file, loop = tmp_path / "missing", tmp_path / "file", tmp_path / "loop"
    file.touch()
    loop.symlink_to(loop)
    refused(missing).says(2, f"{missing}: no such directory", DIRECTORY)
    refused(file).says(2, f"{file}: not a directory", DIRECTORY)
    refused(loop).says(2, f"{loop}: too many levels of symbolic links", DIRECTORY)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    under = MAY_NOT_READ_ALL if IS_ROOT else []
    refused(closed, under=under).says(2, f"{closed}: permission denied", DIRECTORY)


def test_nothing_but_broken_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("kind: [\n")
    refused(tmp_path).says(
        2,
        f"{tmp_path}/a.yaml:2:1: not YAML: while parsing a flow node did not find expected "
        "node content",
        f"hint: {NOT_READ}",
        f"{tmp_path}: nothing to run: none of its files can be used",
        "hint: mend what is named above",
    )


def test_a_name_that_is_taken(bad: TestLab) -> None:
    name = bad.client.address.name
    done = ambit("lab", "up", "--name", name, "--dir", str(bad.directory))
    Refused(done.returncode, done.stderr).says(
        2,
        f"a lab named {name} is already up",
        f"hint: ambit lab down --lab {name}, or give this one another --name",
    )
    serves(bad)


@pytest.mark.parametrize(
    ("arguments", "code", "lines"),
    [
        (
            ["--replace", "ztunnel=/bin/false"],
            4,
            [
                "ztunnel@node1 ended with code 1 before it was ready",
                "hint: its command: /bin/false",
            ],
        ),
        (
            ["--replace", "istiod_lite=sh -c 'echo no luck today >&2; exit 3'"],
            4,
            [
                "istiod ended with code 3 before it was ready",
                "no luck today",
                "hint: its command: sh -c 'echo no luck today >&2; exit 3'",
            ],
        ),
        (
            ["--replace", "netconfig=/no/such/program"],
            4,
            [
                "netconfig@node1: command: cannot start /no/such/program: "
                "No such file or directory",
                "hint: the lab runs programs of this machine; is it installed and in PATH?",
            ],
        ),
        (
            ["--replace", "ztunnel=/bin/true", "--on", "node7"],
            2,
            [
                "there is no ztunnel@node7 to replace",
                "hint: daemons: istiod, netconfig, ztunnel; nodes: node1",
            ],
        ),
        (
            ["--replace", "kubelet=/bin/true"],
            2,
            [
                "--replace kubelet=/bin/true: not DAEMON=PROGRAM",
                "hint: daemons: istiod_lite, netconfig, ztunnel",
            ],
        ),
        (
            ["--replace", "ztunnel='open"],
            2,
            ["--replace ztunnel='open: no closing quotation"],
        ),
    ],
    ids=["dies", "last-words", "no-program", "no-node", "no-daemon", "quotes"],
)
def test_a_replaced_daemon_that_cannot_run(
    tmp_path: Path, arguments: list[str], code: int, lines: list[str]
) -> None:
    refused(tmp_path, *arguments).says(code, *lines)


# The limit is set in a user namespace of our own, where it hurts nobody else.
NO_NAMESPACES = ["unshare", "--user", "--map-root-user", "sh", "-c"]
NO_NAMESPACES += ['echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"', "sh"]
NO_NAMESPACES += ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"]


def test_no_privilege_and_user_namespaces_forbidden(tmp_path: Path) -> None:
    refused(tmp_path, under=NO_NAMESPACES).says(
        1,
        "this user may not make namespaces: Operation not permitted",
        "hint: user.max_user_namespaces is 0: sysctl user.max_user_namespaces=10000",
    )


@pytest.mark.skipif(not IS_ROOT, reason="only root can give up a capability to try this")
def test_root_that_may_not_configure_networks(tmp_path: Path) -> None:
    under = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]
    refused(tmp_path, under=under).says(
        1,
        "fabric: netlink: Operation not permitted",
        "hint: run it as root with all capabilities, or as an ordinary user",
    )


def test_an_old_kernel_as_told_by_its_personality(tmp_path: Path) -> None:
    under = ["setarch", os.uname().machine, "--uname-2.6"]
    release = subprocess.check_output([*under, "uname", "-r"], text=True).strip()
    refused(tmp_path, under=under).says(
        1, f"Linux {release} is too old for a lab", "hint: Linux 5.10 or newer is needed"
    )


def hidden(files: Sequence[str]) -> list[str]:
    """Run a command where these files are not what they were, in a mount namespace of its own."""
    script = "".join(f"mount --bind /dev/null {file} && " for file in files) + 'exec "$@"'
    user = [] if IS_ROOT else ["--user", "--map-root-user"]
    return ["unshare", "--mount", *user, "sh", "-c", script, "sh"]


def test_missing_nft(tmp_path: Path) -> None:
    places = [shutil.which("nft", path=path) for path in ("/usr/sbin", os.environ["PATH"])]
    under = hidden(sorted({os.path.realpath(place) for place in places if place}))
    refused(tmp_path, under=under).says(
        2, "the program nft is missing", "hint: apt-get install nftables"
    )


def test_missing_libnftables_ends_the_node_agent_with_its_words(tmp_path: Path) -> None:
    found = {os.path.realpath(path) for path in glob.glob("/usr/lib/*/libnftables.so.1")}
    done = refused(tmp_path, under=hidden(sorted(found)))
    assert done.code == 4
    assert "Traceback" not in done.said
    lines = done.said.splitlines()
    at = lines.index("ambit: netconfig@node1 ended with code 1 before it was ready")
    assert "libnftables.so.1 is missing" in lines[at + 1]
    assert lines[at + 2].endswith("hint: apt-get install libnftables1")
    # The lab's own rules failed too, and that was said once.
    assert sum("nft refused the Services' rules" in line for line in lines) <= 1


def test_a_detached_lab_lets_go_of_its_callers_output(tmp_path: Path) -> None:
    name = f"test-{os.getpid()}-detached"
    try:
        done = ambit("lab", "up", "--nodes", "1", "--name", name, "--dir", str(tmp_path), "-d")
        assert done.returncode == 0
        assert done.stderr == f"ambit: lab {name} is up: 1 nodes, 0 pods\n"
    finally:
        gone = ambit("lab", "down", "--lab", name)
    assert gone.returncode == 0
    gone = ambit("lab", "down", "--lab", name)
    assert gone.returncode == 4
    first, hint = gone.stderr.splitlines()
    assert first == f"ambit: no lab named {name} is up"
    assert hint.startswith(("ambit: hint: start one with: ambit lab up", "ambit: hint: up: "))


def test_a_daemon_whose_port_is_taken(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(Issuer().public_keys())
    variables = {
        "CLUSTER_DIR": str(tmp_path),
        "CA_DIR": str(tmp_path),
        "TOKEN_ISSUER_KEYS": str(tmp_path / "keys.json"),
        "XDS_PORT": "25012",
    }

    def istiod(**more: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "istiod_lite"],
            env={**os.environ, **variables, **more},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.returncode, done.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = istiod(MONITORING_PORT=str(port))
    assert code == 1, said
    assert said == (
        f"istiod: listen on 127.0.0.1:{port}: Address already in use\n"
        "istiod: hint: `ss -ltnp` shows who has the port; end that program or set another port\n"
    )
    assert istiod(XDS_PORT="first") == (2, "istiod: XDS_PORT: 'first' is not a whole number\n")


# -- last, because it takes the lab half a minute to say so ------------------------------


def test_pods_that_never_got_ready_are_named_with_the_reason(bad: TestLab) -> None:
    def said() -> None:
        mark = "ambit: not ready after 30 s: shop/"
        lines = sorted(each for each in bad.said().splitlines() if each.startswith(mark))
        assert len(lines) == 2, lines
        assert lines[0].startswith(f"{mark}program: command: cannot start no-such-program")
        assert lines[1].startswith(f"{mark}twins: ")
        assert "Address already in use" in lines[1]
        assert "ambit: hint: ambit lab logs shop/twins\n" in bad.said()

    eventually(said, seconds=40)
    assert bad.client.status()["phase"] == "ready"
    json.dumps(bad.client.status())
