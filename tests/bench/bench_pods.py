"""What captured pods cost a ztunnel before anybody connects: setting up, memory, descriptors.

    python tests/bench/bench_pods.py [--pods 10,100,1000] [-o json]

Each pod is a network namespace with a loopback; its proxy opens the seven listeners there and
starts the tasks that accept and answer DNS, as after an Add of the node agent. Namespaces are made
beforehand. A process of its own for each count, so that memory is theirs alone. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import trio
import trio.testing

from mesh import netns
from mesh.runtime import lifecycle, memory
from tests.support.captured import captured_mesh
from ztunnel.inpod import PodProxy
from ztunnel.workloads import Pod


def resident_kib() -> int:
    """This process's resident memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise SystemExit("no VmRSS")


async def one(count: int) -> dict[str, float]:
    """`count` pods on one node, then their end."""
    lifecycle.raise_file_limit()
    async with captured_mesh() as mesh:
        namespaces = [netns.create() for _ in range(count)]
        for fd in namespaces:
            with netns.inside(fd):
                subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        memory.settle()
        before, files = resident_kib(), len(os.listdir("/proc/self/fd"))
        longest = 0.0
        proxies = []
        began = time.perf_counter()
        for number, fd in enumerate(namespaces):
            started = time.perf_counter()
            proxy = PodProxy(mesh.node, Pod(f"uid-{number}", f"p{number}", "shop", "p"), fd)
            proxy.open()
            mesh.nursery.start_soon(proxy.run)
            proxies.append(proxy)
            longest = max(longest, time.perf_counter() - started)
        await trio.testing.wait_all_tasks_blocked()
        up = time.perf_counter() - began
        # What a second of nothing costs.
        used = time.process_time()
        await trio.sleep(2)
        idle = (time.process_time() - used) / 2
        figures = {
            "ms_a_pod": 1000 * up / count,
            "longest_ms": 1000 * longest,
            "kib_a_pod": (resident_kib() - before) / count,
            "descriptors_a_pod": (len(os.listdir("/proc/self/fd")) - files) / count,
            "idle_percent": 100 * idle,
        }
        began = time.perf_counter()
        for proxy in proxies:
            await proxy.stop()
        figures["end_ms_a_pod"] = 1000 * (time.perf_counter() - began) / count
        for fd in namespaces:
            os.close(fd)
    return figures


def main() -> None:
    """A table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", default="10,100,1000")
    parser.add_argument("-o", choices=["table", "json"], default="table")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(trio.run(one, options.one)))
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    found = {}
    for count in map(int, options.pods.split(",")):
        if count * 10 > hard:
            raise SystemExit(f"{count} pods need {count * 10} descriptors, the limit is {hard}")
        command = [sys.executable, __file__, "--one", str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        found[count] = json.loads(done.stdout)
    if options.o == "json":
        print(json.dumps(found))
        return
    print(f"{'pods':<20}{''.join(f'{count:>10}' for count in found)}")
    for name in next(iter(found.values())):
        print(f"{name:<20}{''.join(f'{each[name]:>10.2f}' for each in found.values())}")


if __name__ == "__main__":
    main()
