"""What the demo looks at, step by step: requests between pods, a packet tap, proxies' records.

Each step returns what a person is told, or raises `Failed` with what it saw instead.
The names of the steps are a contract of `ambit lab demo -o json`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import trio

from mesh.lab.control import LabClient

in_thread = trio.to_thread.run_sync  # the client is synchronous

GREETING = b"hello from the shop"
NODES = 2
SETTLE_SECONDS = 15.0
POLL_SECONDS = 0.05

DENY_STRANGER = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: readers-only
  namespace: shop
spec:
  selector:
    matchLabels: {app: web}
  action: ALLOW
  rules:
    - from:
        - source:
            principals: [cluster.local/ns/shop/sa/reader]
"""

STRICT = """\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: default
  namespace: shop
spec:
  mtls:
    mode: STRICT
"""


class Failed(Exception):
    """A step saw something other than it must."""


def expect(claim: bool, detail: str) -> None:
    """Fail the step with `detail` unless the claim holds."""
    if not claim:
        raise Failed(detail)


class Story:
    """The running demo: a lab of its own, a copy of the example, and the steps."""

    def __init__(self, client: LabClient, directory: Path) -> None:
        self.client = client
        self.directory = directory
        self.held: Held | None = None

    async def get(self, pod: str, url: str) -> dict[str, Any]:
        """One GET from a pod; {"status", "body", "local", "remote"} or {"error"}."""
        namespace, _, name = pod.partition("/")
        argv = ["python3", "/app/get.py", url]
        done = await in_thread(self.client.run, namespace, name, argv)
        try:
            return dict(json.loads(done.stdout.splitlines()[-1]))
        except (IndexError, ValueError):
            return {"error": done.stderr.decode(errors="replace").strip() or f"exit {done.code}"}

    async def get_ok(self, pod: str, url: str) -> dict[str, Any]:
        """A GET that must answer 200; the server's own JSON is under "who"."""
        answer = await self.get(pod, url)
        expect(answer.get("status") == 200, f"GET {url} from {pod}: {answer}")
        answer["who"] = json.loads(answer["body"])
        return answer

    async def pods(self, **labels: str) -> list[dict[str, Any]]:
        """The pods of the shop with these labels."""
        listed = await in_thread(self.client.get, "Pod")
        return [
            pod
            for pod in listed
            if pod["metadata"]["namespace"] == "shop"
            and labels.items() <= pod["metadata"].get("labels", {}).items()
        ]

    async def until(
        self, what: str, probe: Callable[[], Awaitable[str | None]], seconds: float = SETTLE_SECONDS
    ) -> float:
        """Poll until `probe` returns None (it returns what is still missing). Seconds taken."""
        started = trio.current_time()
        missing: str | None = "nothing seen"
        with trio.move_on_after(seconds):
            # The lab is another process: there is no event to wait for.
            while (missing := await probe()) is not None:  # noqa: ASYNC110
                await trio.sleep(POLL_SECONDS)
        expect(missing is None, f"{what}: {missing} after {seconds:.0f} s")
        return trio.current_time() - started

    # The steps, in order. Each returns what a person is told.

    async def lab_up(self) -> str:
        """Every daemon answers and every pod is ready."""
        status = await in_thread(self.client.wait_ready)
        running = sorted({name for node in status["nodes"] for name in node["daemons"]})
        running += sorted(status["control_plane"]["daemons"])
        pods = len(status["pods"])
        expect(bool(pods) and not status["faults"], f"{pods} pods, faults: {status['faults']}")
        return f"{len(status['nodes'])} nodes, {pods} pods ready; daemons: {', '.join(running)}"

    async def plaintext_before_enroll(self) -> str:
        """Outside the mesh the request can be read on the wire."""
        remote = await self.web_pod_on(other_than="node1")
        tap = await in_thread(self.client.tap_start)
        await self.get_ok("shop/reader", f"http://{ip_of(remote)}:8080/before")
        report = await in_thread(self.client.tap_stop, tap, [GREETING])
        expect(report.seen[GREETING], f"the tap did not see the body in clear: {report.flows}")
        return "the tap between the nodes reads the response body in clear"

    async def live_connection_opens(self) -> None:
        """Open the connection that must live through everything that follows."""
        remote = await self.web_pod_on(other_than="node1")
        self.held = await Held.open(self.client.address.name, "shop/reader", ip_of(remote), 9000)
        await self.held.echo("before enrolment")

    async def enroll(self) -> str:
        """One label captures every pod of the namespace, while they run."""
        await self.live_connection_opens()
        patch = {"metadata": {"labels": {"istio.io/dataplane-mode": "ambient"}}}
        started = trio.current_time()
        await in_thread(self.client.patch, "Namespace", "", "shop", patch)

        async def enrolled() -> str | None:
            waiting = [
                pod["metadata"]["name"]
                for pod in await self.pods()
                if pod["metadata"].get("annotations", {}).get("ambient.istio.io/redirection")
                != "enabled"
            ]
            return f"not captured: {', '.join(waiting)}" if waiting else None

        await self.until("enrolment", enrolled)
        await self.until("tunnels", self.tunnelled)
        count = len(await self.pods())
        seconds = trio.current_time() - started
        return f"{count} running pods captured in {seconds:.1f} s, none restarted"

    async def tunnelled(self) -> str | None:
        """Whether every node's proxy knows every shop pod as HBONE."""
        addresses = {ip for pod in await self.pods() for ip in ips_of(pod)}
        for node in range(1, NODES + 1):
            dump = await self.dump(f"node{node}")
            hbone = {
                ip
                for workload in dump["workloads"]
                if workload["protocol"] == "HBONE"
                for ip in (address.rpartition("/")[2] for address in workload["workloadIps"])
            }
            if missing := addresses - hbone:
                return f"node{node} does not know as HBONE: {', '.join(sorted(missing))}"
        return None

    async def dump(self, node: str) -> dict[str, Any]:
        """A node proxy's config_dump."""
        status, body = await in_thread(self.client.http_get, node, "/config_dump")
        expect(status == 200, f"config_dump of {node}: HTTP {status}")
        return dict(json.loads(body))

    async def only_hbone_on_the_wire(self) -> str:
        """Between enrolled pods the tap sees port 15008 and nothing readable."""
        remote = await self.web_pod_on(other_than="node1")
        meshed = {ip for pod in await self.pods() for ip in ips_of(pod)}
        tap = await in_thread(self.client.tap_start)
        for _ in range(3):
            await self.get_ok("shop/reader", f"http://{ip_of(remote)}:8080/secret")
        report = await in_thread(self.client.tap_stop, tap, [GREETING, b"/secret"])
        between = [f for f in report.flows if {f.source, f.destination} <= meshed]
        # The connection opened before enrolment is deliberately left alone, on its own port.
        other = [f for f in between if f.port not in {15008, 9000}]
        expect(bool(between), "the tap saw no packet between enrolled pods")
        expect(not other, f"other traffic between enrolled pods: {other}")
        expect(not any(report.seen.values()), "the tap could read the request or the response")
        packets = sum(f.packets for f in between if f.port == 15008)
        return f"{packets} packets between the pods, all to port 15008, the body in none of them"

    async def pod_ip(self) -> str:
        """By pod address."""
        remote = await self.web_pod_on(other_than="node1")
        answer = await self.get_ok("shop/reader", f"http://{ip_of(remote)}:8080/")
        expect(answer["who"]["pod"] == remote["metadata"]["name"], f"wrong pod: {answer}")
        return f"{ip_of(remote)}:8080 answered by {answer['who']['pod']}"

    async def service_vip(self) -> str:
        """By cluster IP; both replicas take their share."""
        service = await self.web_service()
        vip = service["spec"]["clusterIPs"][0]
        answered: set[str] = set()
        for _ in range(40):
            answer = await self.get_ok("shop/reader", f"http://{vip}/")
            answered.add(answer["who"]["pod"])
            expect(answer["remote"] == vip, f"the client sees {answer['remote']}, dialled {vip}")
            if len(answered) > 1:
                break
        expect(len(answered) == 2, f"only {answered} ever answered at {vip}")
        return f"{vip}:80 reaches {', '.join(sorted(answered))}"

    async def dns_name(self) -> str:
        """By name, short and full."""
        for name in ("web", "web.shop", "web.shop.svc.cluster.local"):
            await self.get_ok("shop/reader", f"http://{name}/")
        return "web, web.shop and web.shop.svc.cluster.local resolve and answer"

    async def ipv6(self) -> str:
        """By IPv6 pod address and cluster IP."""
        remote = await self.web_pod_on(other_than="node1")
        service = await self.web_service()
        pod6 = next(ip for ip in ips_of(remote) if ":" in ip)
        vip6 = next(ip for ip in service["spec"]["clusterIPs"] if ":" in ip)
        answer = await self.get_ok("shop/reader", f"http://[{pod6}]:8080/")
        await self.get_ok("shop/reader", f"http://[{vip6}]/")
        expect(":" in answer["who"]["sees"], f"the server saw {answer['who']['sees']}")
        return f"[{pod6}]:8080 and [{vip6}]:80 answer; the server sees {answer['who']['sees']}"

    async def same_node(self) -> str:
        """Pods of one node talk through the tunnel as well."""
        local = await self.web_pod_on(same_as="node1")
        answer = await self.get_ok("shop/reader", f"http://{ip_of(local)}:8080/")
        expect(answer["who"]["pod"] == local["metadata"]["name"], f"wrong pod: {answer}")
        record = await self.access(
            "node1",
            lambda r: (
                r.get("direction") == "inbound"
                and r.get("dst.workload") == local["metadata"]["name"]
                and bool(r.get("src.identity"))
            ),
        )
        return (
            f"{local['metadata']['name']} on the same node, by mTLS from {record['src.identity']}"
        )

    async def source_address_kept(self) -> str:
        """The server sees the client pod's own address."""
        reader = next(p for p in await self.pods(app="reader"))
        remote = await self.web_pod_on(other_than="node1")
        for url in ("http://web/", f"http://{ip_of(remote)}:8080/"):
            answer = await self.get_ok("shop/reader", url)
            sees = answer["who"]["sees"]
            expect(sees in ips_of(reader), f"{url}: the server saw {sees}, not {ips_of(reader)}")
        return f"the server sees {sees}, the reader's own address"

    async def identities(self) -> str:
        """Each side's proxy wrote down whom it verified."""
        remote = await self.web_pod_on(other_than="node1")
        name, node = remote["metadata"]["name"], remote["spec"]["nodeName"]
        await self.get_ok("shop/reader", f"http://{ip_of(remote)}:8080/identities")
        outbound = await self.access(
            "node1",
            lambda r: r.get("direction") == "outbound" and r.get("dst.workload") == name,
        )
        inbound = await self.access(
            node,
            lambda r: (
                r.get("direction") == "inbound"
                and r.get("dst.workload") == name
                and r.get("src.workload") == "reader"
            ),
        )
        verified = outbound.get("dst.identity"), inbound.get("src.identity")
        expect(
            verified
            == (
                "spiffe://cluster.local/ns/shop/sa/web",
                "spiffe://cluster.local/ns/shop/sa/reader",
            ),
            f"verified {verified}",
        )
        return f"the client side verified {verified[0]}, the server side {verified[1]}"

    async def deny_by_identity(self) -> str:
        """A policy dropped into the directory cuts the stranger and not the reader."""
        remote = await self.web_pod_on(other_than="node1")
        url = f"http://{ip_of(remote)}:8080/"
        await self.get_ok("shop/stranger", url)
        (self.directory / "50-policy.yaml").write_text(DENY_STRANGER)

        async def refused() -> str | None:
            answer = await self.get("shop/stranger", url)
            return "the stranger is still served" if answer.get("status") == 200 else None

        took = await self.until("policy", refused)
        await self.get_ok("shop/reader", url)
        record = await self.access(
            remote["spec"]["nodeName"],
            lambda r: r.get("response_flags") == "DENY" and r.get("src.workload") == "stranger",
        )
        (self.directory / "50-policy.yaml").unlink()

        async def served() -> str | None:
            answer = await self.get("shop/stranger", url)
            return None if answer.get("status") == 200 else f"still cut: {answer}"

        await self.until("policy removal", served)
        return f"in force after {took:.1f} s; stranger cut by {record.get('policy')}, reader served"

    async def strict(self) -> str:
        """PeerAuthentication STRICT refuses a client outside the mesh."""
        remote = await self.web_pod_on(other_than="node1")
        url = f"http://{ip_of(remote)}:8080/"
        await self.get_ok("outside/visitor", url)
        (self.directory / "60-strict.yaml").write_text(STRICT)

        async def refused() -> str | None:
            answer = await self.get("outside/visitor", url)
            return "the visitor is still served" if answer.get("status") == 200 else None

        await self.until("STRICT", refused)
        await self.get_ok("shop/reader", url)
        (self.directory / "60-strict.yaml").unlink()

        async def served() -> str | None:
            answer = await self.get("outside/visitor", url)
            return None if answer.get("status") == 200 else f"still refused: {answer}"

        await self.until("permissive again", served)
        return "the visitor in plaintext is refused, the reader is served"

    async def live_connection_survives_enroll(self) -> str:
        """The connection from before enrolment still answers."""
        expect(self.held is not None, "no connection was opened before enrolment")
        assert self.held is not None  # noqa: S101 - for the type checker; expect() has judged
        await self.held.echo("after enrolment")
        return "a connection opened before enrolment still echoes"

    async def unenroll(self) -> str:
        """The label goes, capture goes, the connection and the service stay."""
        patch = {"metadata": {"labels": {"istio.io/dataplane-mode": None}}}
        await in_thread(self.client.patch, "Namespace", "", "shop", patch)

        async def released() -> str | None:
            waiting = [
                pod["metadata"]["name"]
                for pod in await self.pods()
                if "ambient.istio.io/redirection" in pod["metadata"].get("annotations", {})
            ]
            return f"still captured: {', '.join(waiting)}" if waiting else None

        await self.until("un-enrolment", released)
        remote = await self.web_pod_on(other_than="node1")

        async def in_clear() -> str | None:
            tap = await in_thread(self.client.tap_start)
            await self.get_ok("shop/reader", f"http://{ip_of(remote)}:8080/after")
            report = await in_thread(self.client.tap_stop, tap, [GREETING])
            return None if report.seen[GREETING] else f"not in clear: {report.flows}"

        await self.until("plaintext", in_clear)
        if self.held is not None:
            await self.held.echo("after un-enrolment")
        return "requests travel in clear again; the old connection still echoes"

    # Lookups.

    async def web_pod_on(self, *, same_as: str = "", other_than: str = "") -> dict[str, Any]:
        """A ready replica of `web` on (or not on) a node."""
        for pod in await self.pods(app="web"):
            node = pod["spec"].get("nodeName")
            if (same_as and node == same_as) or (other_than and node != other_than):
                return pod
        raise Failed(f"no replica of web {'on' if same_as else 'off'} {same_as or other_than}")

    async def web_service(self) -> dict[str, Any]:
        """The Service `web` as the lab completed it."""
        listed = await in_thread(self.client.get, "Service")
        for service in listed:
            if (service["metadata"]["namespace"], service["metadata"]["name"]) == ("shop", "web"):
                return dict(service)
        raise Failed("the lab has no Service shop/web")

    async def access(
        self, node: str, wanted: Callable[[Mapping[str, Any]], bool]
    ) -> dict[str, Any]:
        """The newest access record of a node's proxy that fits."""
        found: dict[str, Any] = {}

        async def look() -> str | None:
            chunks = await in_thread(
                lambda: list(self.client.logs(daemon=f"ztunnel@{node}", tail=2000))
            )
            for line in reversed(b"".join(chunks).splitlines()):
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and wanted(record):
                    found.update(record)
                    return None
            return "no such record"

        await self.until(f"access log of {node}", look, 5)
        return found


def ip_of(pod: Mapping[str, Any]) -> str:
    """A pod's primary address."""
    return str(pod["status"]["podIP"])


def ips_of(pod: Mapping[str, Any]) -> list[str]:
    """All of a pod's addresses."""
    return [entry["ip"] for entry in pod.get("status", {}).get("podIPs", [])]


class Held:
    """One connection kept open by a program in a pod, driven line by line."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._rest = b""

    @classmethod
    async def open(cls, lab: str, pod: str, host: str, port: int) -> Held:
        """Start /app/hold.py in a pod and read the server's greeting."""
        argv = [sys.executable, "-m", "mesh.cli", "lab", "exec", "--name", lab, pod, "--"]
        argv += ["python3", "/app/hold.py", host, str(port)]
        process = await trio.lowlevel.open_process(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        held = cls(process)
        greeting = await held.line()
        expect(greeting.startswith("220 "), f"the echo server greeted with {greeting!r}")
        return held

    async def line(self) -> str:
        """The next line from the other side."""
        assert self._process.stdout is not None  # noqa: S101 - opened with a pipe above
        with trio.fail_after(10):
            while b"\n" not in self._rest:
                more = await self._process.stdout.receive_some(4096)
                expect(bool(more), "the held connection was closed")
                self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode().strip()

    async def echo(self, text: str) -> None:
        """Send a line and see it come back."""
        assert self._process.stdin is not None  # noqa: S101 - opened with a pipe above
        await self._process.stdin.send_all(text.encode() + b"\n")
        back = await self.line()
        expect(back == text, f"sent {text!r} on the held connection, got {back!r}")

    async def aclose(self) -> None:
        """End it."""
        self._process.terminate()
        await self._process.wait()


FIRST_STEPS: tuple[tuple[str, Callable[[Story], Awaitable[str]]], ...] = (
    ("lab-up", Story.lab_up),
    ("plaintext-before-enroll", Story.plaintext_before_enroll),
    ("enroll", Story.enroll),
    ("only-hbone-on-the-wire", Story.only_hbone_on_the_wire),
    ("pod-ip", Story.pod_ip),
    ("service-vip", Story.service_vip),
    ("dns-name", Story.dns_name),
    ("ipv6", Story.ipv6),
    ("same-node", Story.same_node),
    ("source-address-kept", Story.source_address_kept),
    ("identities", Story.identities),
    ("deny-by-identity", Story.deny_by_identity),
    ("strict", Story.strict),
)
LAST_STEPS: tuple[tuple[str, Callable[[Story], Awaitable[str]]], ...] = (
    ("live-connection-survives-enroll", Story.live_connection_survives_enroll),
    ("unenroll", Story.unenroll),
)
