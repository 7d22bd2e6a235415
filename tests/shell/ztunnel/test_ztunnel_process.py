"""`python -m ztunnel` as a process: start-up order, two pods, changes, drain, memory, imports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from mesh import netns
from mesh.model.authorization import Action, Authorization, PolicyScope, Rule
from mesh.model.service import Service, ServicePort
from mesh.model.workload import NetworkAddress, TunnelProtocol, Workload
from mesh.zds import Add, Session, ZdsServer
from netconfig import kernel
from netconfig.ruleset import Capture
from tests.support.applications import ask, echo, is_reset, read_line
from tests.support.captured import (
    CapturedMesh,
    CapturedPod,
    can_make_namespaces,
    captured_mesh,
)
from tests.support.control_plane import ControlPlane, write_secrets

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(not can_make_namespaces(), reason="no permission for namespaces"),
]

ROOT = Path(__file__).parents[3]
RESIDENT_LIMIT_KIB = 60 * 1024
FORBIDDEN = ("kubernetes", "grpc", "pyroute2", "pydantic", "asyncio", "rich")


def test_the_process_does_not_import_what_is_heavy() -> None:
    code = "import sys, ztunnel.app; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint(FORBIDDEN)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("XDS_ADDRESS", "http://plain:15010", "not an address: 'http://plain:15010'"),
        ("LOG_LEVEL", "nonsense", "'nonsense' is no log level (one of trace, debug, info, "),
        ("LOG_FORMAT", "xml", "'xml' is not one of json, plain"),
    ],
)
def test_a_bad_setting_is_one_line_and_exit_code_2(variable: str, value: str, said: str) -> None:
    environ = os.environ | {variable: value}
    done = subprocess.run(
        [sys.executable, "-m", "ztunnel"],
        capture_output=True,
        text=True,
        env=environ,
        cwd=ROOT,
        check=False,
        timeout=20,
    )
    assert done.returncode == 2
    assert f"ztunnel: {variable}: {said}" in done.stderr
    assert "Traceback" not in done.stderr


@dataclass
class Proxy:
    """A running process and what is around it."""

    mesh: CapturedMesh
    process: subprocess.Popen[bytes]
    control: ControlPlane
    sessions: trio.MemoryReceiveChannel[Session]
    out: Path

    async def get(self, port: int, path: str) -> tuple[int, bytes]:
        """Status and body of a GET in the proxy's namespace."""
        with netns.inside(self.mesh.bridge):
            sock = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            await sock.connect(("127.0.0.1", port))
        except OSError:
            sock.close()
            return 0, b""
        async with trio.SocketStream(sock) as stream:
            await stream.send_all(
                f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()
            )
            data = b""
            async for chunk in stream:
                data += chunk
        head, _, body = data.partition(b"\r\n\r\n")
        return int(head.split()[1]), body

    async def wait_ready(self, status: int, text: bytes) -> None:
        with trio.fail_after(30):
            while True:
                found = await self.get(15021, "/healthz/ready")
                if found[0] == status and text in found[1]:
                    return
                await trio.sleep(0.05)

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(each) for each in self.out.read_text().splitlines()]


@contextlib.asynccontextmanager
async def running(tmp_path: Path, control: ControlPlane) -> AsyncIterator[Proxy]:
    write_secrets(tmp_path, control.root_pem, "a.b.c")
    out = tmp_path / "access.log"
    async with captured_mesh() as mesh:
        send, sessions = trio.open_memory_channel[Session](5)

        async def on_session(session: Session) -> None:
            await send.send(session)
            await session.closed.wait()

        await mesh.nursery.start(ZdsServer().serve, tmp_path / "zds.sock", on_session)
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "XDS_ADDRESS": "https://127.0.0.1:15012",
            "CA_ADDRESS": "https://127.0.0.1:15012",
            "NODE_NAME": "n1",
            "INPOD_UDS": str(tmp_path / "zds.sock"),
            "LOG_LEVEL": "debug",
        }
        with out.open("wb") as stdout, netns.inside(mesh.bridge):
            process = subprocess.Popen(
                [sys.executable, "-m", "ztunnel"], cwd=tmp_path, env=environ, stdout=stdout
            )
        try:
            yield Proxy(mesh, process, control, sessions, out)
        finally:
            process.kill()
            process.wait()
            mesh.nursery.cancel_scope.cancel()


async def enrol(proxy: Proxy, session: Session, pod: CapturedPod) -> None:
    error = await session.add(Add(f"uid-{pod.name}", pod.name, "shop", pod.name, (pod.fd,)))
    assert error is None
    kernel.capture_pod(pod.fd, Capture())


def workload(pod: CapturedPod) -> Workload:
    return pod.workload(
        tunnel_protocol=TunnelProtocol.HBONE,
        services={"shop/web.shop.svc.cluster.local": {80: 8080}} if pod.name == "web" else {},
    )


WEB = Service(
    "web",
    "shop",
    "web.shop.svc.cluster.local",
    (NetworkAddress("", "10.96.0.77"),),
    ports={80: ServicePort(80, 8080)},
)
DENY_ALL = Authorization("deny", "shop", PolicyScope.NAMESPACE, Action.DENY, (Rule(),))


async def test_from_start_to_drain(tmp_path: Path) -> None:
    control = ControlPlane([WEB])
    async with running(tmp_path, control) as proxy:
        mesh = proxy.mesh
        curl, web = mesh.add("curl", enrolled=False), mesh.add("web", enrolled=False)
        mesh.nursery.start_soon(trio.serve_listeners, echo, [web.listen(8080)])
        # Ready comes in order: state first, and only then is the node agent dialled.
        await proxy.wait_ready(500, b"pending: state manager, workload proxy manager")
        with pytest.raises(trio.WouldBlock):
            proxy.sessions.receive_nowait()
        await mesh.nursery.start(control.serve, mesh.bridge)
        with trio.fail_after(30):
            session = await proxy.sessions.receive()
        await proxy.wait_ready(500, b"pending: workload proxy manager")
        await control.push(workload(curl), workload(web))
        await enrol(proxy, session, curl)
        await enrol(proxy, session, web)
        assert await session.snapshot_sent() is None
        await proxy.wait_ready(200, b"ready")
        assert control.tokens == {"Bearer a.b.c"}

        payload = b"x" * 1_000_000
        assert await ask(await curl.connect("10.96.0.77", 80), payload) == (curl.ip, payload)
        assert sorted(control.issued) == [
            "spiffe://cluster.local/ns/shop/sa/curl",
            "spiffe://cluster.local/ns/shop/sa/web",
        ]
        status, body = await proxy.get(15000, "/config_dump")
        dump = json.loads(body)
        assert status == 200
        assert {each["name"] for each in dump["workloads"]} == {"curl", "web"}
        assert {each["state"] for each in dump["certificates"]} == {"Available"}
        assert dump["workloadState"]["uid-web"]["state"] == "Up"
        assert b"PRIVATE" not in body
        status, body = await proxy.get(15020, "/metrics")
        assert b"istio_tcp_connections_opened_total{" in body
        assert b'destination_service="web.shop.svc.cluster.local"' in body

        # A policy pushed while a connection is open cuts it.
        stream = await curl.connect("10.96.0.77", 80)
        await read_line(stream)
        await control.push(DENY_ALL)
        assert await is_reset(stream)
        await control.push(removed_policies=["shop/deny"])
        await trio.sleep(0.2)

        for _ in range(50):
            assert (await ask(await curl.connect(web.ip, 8080), b"y"))[1] == b"y"
        status_text = Path(f"/proc/{proxy.process.pid}/status").read_text()
        resident = int(status_text.split("VmRSS:")[1].split()[0])
        assert resident < RESIDENT_LIMIT_KIB

        # SIGTERM: what is open may finish, then the exit code says that all is well.
        stream = await curl.connect(web.ip, 8080)
        await read_line(stream)
        proxy.process.send_signal(signal.SIGTERM)
        await trio.sleep(0.5)
        await stream.send_all(b"still")
        assert await stream.receive_some(10) == b"still"
        await stream.aclose()
        with trio.fail_after(30):
            assert await trio.to_thread.run_sync(proxy.process.wait) == 0
        records = proxy.lines()
        assert {each["direction"] for each in records} == {"inbound", "outbound"}
        cut = [each for each in records if each.get("response_flags") == "DENY"]
        assert cut
        assert all(each["policy"] == "shop/deny" for each in cut if each["direction"] == "inbound")


async def test_a_lost_session_keeps_pods_and_a_new_snapshot_removes_them(tmp_path: Path) -> None:
    async with running(tmp_path, ControlPlane()) as proxy:
        mesh = proxy.mesh
        curl, web = mesh.add("curl", enrolled=False), mesh.add("web", enrolled=False)
        await mesh.nursery.start(proxy.control.serve, mesh.bridge)
        with trio.fail_after(30):
            session = await proxy.sessions.receive()
        await enrol(proxy, session, curl)
        await enrol(proxy, session, web)
        await session.snapshot_sent()
        await proxy.wait_ready(200, b"ready")
        session.close()
        await proxy.wait_ready(500, b"pending: workload proxy manager")
        with trio.fail_after(30):
            session = await proxy.sessions.receive()
        dump = json.loads((await proxy.get(15000, "/config_dump"))[1])
        assert set(dump["workloadState"]) == {"uid-curl", "uid-web"}
        assert await session.keep("uid-curl") is None
        assert await session.snapshot_sent() is None
        await proxy.wait_ready(200, b"ready")
        dump = json.loads((await proxy.get(15000, "/config_dump"))[1])
        assert set(dump["workloadState"]) == {"uid-curl"}
        assert await session.delete("uid-curl") is None
        # Nothing of the proxy is left in the pod.
        for pod in (curl, web):
            with netns.inside(pod.fd):
                tables = Path("/proc/thread-self/net/tcp6").read_text()
            assert ":3A98 " not in tables
