"""How long a lab of two nodes and fifty enrolled pods takes, what each part costs, and how much
memory each daemon holds idle. `make bench` runs it; the numbers stand in docs/performance.md.

    python tests/bench/bench_lab.py [--pods 50] [--nodes 2] [--repeat 3] [-o json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mesh.lab.control import LabClient

# Until what only the start needed was given back (mesh/runtime/memory.py).
IDLE_SECONDS = 8
NAMESPACE = """\
apiVersion: v1
kind: Namespace
metadata: {name: crowd, labels: {istio.io/dataplane-mode: ambient}}
"""

POD = """\
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: sa-{i}, namespace: crowd}}
---
apiVersion: v1
kind: Pod
metadata: {{name: pod-{i:03}, namespace: crowd, labels: {{app: crowd}}}}
spec:
  serviceAccountName: sa-{i}
  containers:
    - {{name: sleep, image: none, command: [sleep, infinity]}}
"""


def rss_mib(pid: int) -> float:
    """Resident memory of a process of this machine, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def daemon_memory(lab_pid: int) -> dict[str, float]:
    """RSS in MiB of every daemon below the lab's process."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found: dict[str, float] = {}
    queue = [lab_pid]
    while queue:
        pid = queue.pop()
        queue += children.get(pid, [])
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        for daemon in ("ztunnel", "netconfig", "istiod_lite", "mesh.lab.supervisor"):
            if daemon in words:
                found[daemon] = max(found.get(daemon, 0.0), round(rss_mib(pid), 1))
    return found


def once(pods: int, nodes: int) -> dict[str, object]:
    """One lab, from nothing to every pod captured and every certificate issued."""
    with tempfile.TemporaryDirectory(prefix="ambit-bench-") as temporary:
        directory = Path(temporary)
        text = NAMESPACE + "".join(POD.format(i=i) for i in range(pods))
        (directory / "crowd.yaml").write_text(text)
        name = f"bench-{os.getpid()}"
        argv = [sys.executable, "-m", "mesh.cli", "lab", "up", "--name", name]
        argv += ["--dir", temporary, "--nodes", str(nodes)]
        started = time.monotonic()
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        times: dict[str, float] = {}
        try:
            client = LabClient(name)
            while not client.is_up():
                if process.poll() is not None:
                    raise SystemExit(process.communicate()[1].decode())
                time.sleep(0.02)
            client.wait_ready(120)
            times["pods and daemons ready"] = time.monotonic() - started
            while not captured(client, pods):
                time.sleep(0.02)
            times["all pods captured"] = time.monotonic() - started
            while certificates(client, nodes) < pods:
                time.sleep(0.02)
            times["all certificates issued"] = time.monotonic() - started
            time.sleep(IDLE_SECONDS)
            memory = daemon_memory(process.pid)
            stopping = time.monotonic()
            process.terminate()
            process.wait(30)
            times["down"] = time.monotonic() - stopping
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    return {"seconds": {k: round(v, 2) for k, v in times.items()}, "rss_mib": memory}


def captured(client: LabClient, pods: int) -> bool:
    """Whether every pod carries the marker."""
    listed = client.get("Pod", "crowd")
    marked = [
        pod
        for pod in listed
        if pod["metadata"].get("annotations", {}).get("ambient.istio.io/redirection") == "enabled"
    ]
    return len(marked) == pods


def certificates(client: LabClient, nodes: int) -> int:
    """How many workload certificates the nodes' proxies hold."""
    count = 0
    for node in range(1, nodes + 1):
        _, body = client.http_get(f"node{node}", "/config_dump")
        held = json.loads(body)["certificates"]
        count += sum(1 for item in held if item.get("certChain"))
    return count


def main() -> None:
    """Run, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, default=50)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("-o", choices=["table", "json"], default="table")
    options = parser.parse_args()
    runs = [once(options.pods, options.nodes) for _ in range(options.repeat)]
    summary = {
        part: {
            key: statistics.median(run[part][key] for run in runs)  # type: ignore[index]
            for key in runs[0][part]  # type: ignore[attr-defined]
        }
        for part in ("seconds", "rss_mib")
    }
    if options.o == "json":
        print(json.dumps({"pods": options.pods, "nodes": options.nodes, "median": summary}))
        return
    print(f"{options.nodes} nodes, {options.pods} pods, median of {options.repeat}")
    for part, unit in (("seconds", "s"), ("rss_mib", "MiB")):
        for key, value in summary[part].items():
            print(f"  {key:<28}{value:8.2f} {unit}")


if __name__ == "__main__":
    main()
