"""Captured pods end to end, in one process: applications, kernel, proxies, mutual TLS."""

from __future__ import annotations

import socket
import struct
from dataclasses import replace

import pytest
import trio
from dnslib import QTYPE, RCODE, RR, A, DNSRecord
from dnslib.server import BaseResolver, DNSServer

from mesh import netns
from mesh.hbone.connection import Tunnel, TunnelConnection
from mesh.model.authorization import (
    Action,
    Authorization,
    Clause,
    Match,
    PolicyScope,
    Rule,
    StringKind,
    StringMatch,
)
from mesh.model.service import Service, ServicePort
from mesh.model.workload import NetworkAddress, TunnelProtocol
from mesh.sockets import SocketAddress
from mesh.tls.context import server_context, verify_client_peer
from tests.support.applications import ask, echo, is_refused, is_reset, read_line, read_to_end
from tests.support.captured import GATEWAY, can_make_namespaces, captured_mesh

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(not can_make_namespaces(), reason="no permission for namespaces"),
]

VIP = "10.96.0.77"
WEB_KEY = "shop/web.shop.svc.cluster.local"
WEB = Service(
    "web",
    "shop",
    "web.shop.svc.cluster.local",
    (NetworkAddress("", VIP),),
    ports={80: ServicePort(80, 8080)},
)
PRESENT = StringMatch(StringKind.PRESENCE)
STRICT = Authorization(
    "strict",
    "shop",
    PolicyScope.NAMESPACE,
    Action.DENY,
    (Rule((Clause((Match(not_principals=(PRESENT,)),)),)),),
)


def allow(account: str) -> Authorization:
    match = Match(
        principals=(StringMatch(StringKind.EXACT, f"cluster.local/ns/shop/sa/{account}"),)
    )
    rule = Rule((Clause((match,)),))
    return Authorization("allow", "shop", PolicyScope.NAMESPACE, Action.ALLOW, (rule,))


@pytest.mark.parametrize("family", ["ip", "ip6"])
async def test_two_pods_by_address(family: str) -> None:
    async with captured_mesh() as mesh:
        curl, web = mesh.add("curl"), mesh.add("web")
        mesh.know(curl.workload(), web.workload())
        mesh.nursery.start_soon(trio.serve_listeners, echo, [web.listen(8080)])
        payload = bytes(range(256)) * 2000
        target = getattr(web, family)
        seen, heard = await ask(await curl.connect(target, 8080), payload)
        assert heard == payload
        # The application sees its caller, not the proxy.
        assert seen == getattr(curl, family)
        shown = f"[{target}]" if family == "ip6" else target
        out = await mesh.notes.wait(direction="outbound")
        assert out["dst.addr"] == f"{shown}:15008"
        assert out["dst.hbone_addr"] == f"{shown}:8080"
        assert out["src.identity"] == "spiffe://cluster.local/ns/shop/sa/curl"
        assert out["dst.identity"] == "spiffe://cluster.local/ns/shop/sa/web"
        assert (out["bytes_sent"], out["response_flags"]) == (len(payload), "-")
        into = await mesh.notes.wait(direction="inbound")
        assert into["src.identity"] == "spiffe://cluster.local/ns/shop/sa/curl"
        assert (into["src.workload"], into["dst.workload"]) == ("curl", "web")
        assert into["bytes_recv"] == len(payload)
        assert into["id"] == out["id"]
        assert into["connection.id"] == out["connection.id"] == out["id"]
        assert "error" not in out
        assert "error" not in into
        assert len(mesh.notes.lines) == 2


async def test_service_address_and_connection_reuse() -> None:
    async with captured_mesh() as mesh:
        curl, web = mesh.add("curl"), mesh.add("web")
        mesh.know(curl.workload(), web.workload(services={WEB_KEY: {80: 8080}}), WEB)
        mesh.nursery.start_soon(trio.serve_listeners, echo, [web.listen(8080)])
        for _ in range(5):
            assert await ask(await curl.connect(VIP, 80), b"hello") == (curl.ip, b"hello")
        assert (await mesh.notes.wait(direction="outbound"))["dst.service"] == WEB.hostname
        assert (await mesh.notes.wait(direction="inbound"))["dst.service"] == WEB.hostname
        assert curl.proxy is not None
        assert len(curl.proxy.pool.connections) == 1
        assert sorted(map(str, mesh.issued)) == [
            "spiffe://cluster.local/ns/shop/sa/curl",
            "spiffe://cluster.local/ns/shop/sa/web",
        ]


async def test_policy_decides_and_the_caller_sees_a_reset() -> None:
    async with captured_mesh() as mesh:
        curl, web = mesh.add("curl"), mesh.add("web")
        mesh.know(curl.workload(), web.workload())
        mesh.nursery.start_soon(trio.serve_listeners, echo, [web.listen(8080)])
        mesh.judge_by(allow("somebody-else"))
        assert await is_refused(curl.connect(web.ip, 8080))
        into = await mesh.notes.wait(direction="inbound")
        assert (into["response_flags"], into["policy"]) == ("DENY", "shop/allow")
        out = await mesh.notes.wait(direction="outbound")
        assert out["response_flags"] == "DENY"
        assert "401" in str(out["error"])
        mesh.judge_by(allow("curl"))
        assert await ask(await curl.connect(web.ip, 8080), b"x") == (curl.ip, b"x")
        assert (await mesh.notes.wait(direction="inbound", message="connection complete"))[
            "policy"
        ] == "shop/allow"


async def test_a_policy_change_cuts_what_it_no_longer_permits() -> None:
    async with captured_mesh() as mesh:
        curl, friend, web = mesh.add("curl"), mesh.add("friend"), mesh.add("web")
        mesh.know(curl.workload(), friend.workload(), web.workload())
        mesh.nursery.start_soon(trio.serve_listeners, echo, [web.listen(8080)])
        mine, theirs = await curl.connect(web.ip, 8080), await friend.connect(web.ip, 8080)
        await read_line(mine)
        await read_line(theirs)
        mesh.judge_by(allow("friend"))
        assert await is_reset(mine)
        await theirs.send_all(b"still here")
        assert await theirs.receive_some(100) == b"still here"
        into = await mesh.notes.wait(direction="inbound")
        assert (into["response_flags"], into["policy"]) == ("DENY", "shop/allow")
        assert str(into["error"]).startswith("closed due to policy change")
        # Changing what the workload names counts as well.
        selector = replace(STRICT, name="sel", scope=PolicyScope.WORKLOAD_SELECTOR, rules=(Rule(),))
        mesh.judge_by(selector)
        mesh.know(web.workload(authorization_policies=("shop/sel",)))
        assert await is_reset(theirs)


async def test_a_changed_identity_cuts_both_directions() -> None:
    async with captured_mesh() as mesh:
        curl, web = mesh.add("curl"), mesh.add("web")
        mesh.know(curl.workload(), web.workload())
        mesh.nursery.start_soon(trio.serve_listeners, echo, [web.listen(8080)])
        stream = await curl.connect(web.ip, 8080)
        await read_line(stream)
        mesh.know(curl.workload(trust_domain="elsewhere"))
        assert await is_reset(stream)
        out = await mesh.notes.wait(direction="outbound")
        assert out["response_flags"] == "IDENTITY_ERROR"


async def test_plaintext_is_judged_without_an_identity() -> None:
    async with captured_mesh() as mesh:
        outsider, web = mesh.add("outsider", enrolled=False), mesh.add("web")
        mesh.know(outsider.workload(), web.workload())
        mesh.nursery.start_soon(trio.serve_listeners, echo, [web.listen(8080)])
        assert await ask(await outsider.connect(web.ip, 8080), b"x") == (outsider.ip, b"x")
        line = await mesh.notes.wait(direction="inbound")
        assert (line["src.workload"], line.get("src.identity")) == ("outsider", None)
        mesh.judge_by(STRICT)
        assert await is_refused(outsider.connect(web.ip, 8080))
        denied = await mesh.notes.wait(response_flags="DENY")
        assert denied["policy"] == "shop/strict"


async def test_unknown_and_unmeshed_destinations_are_passed_through() -> None:
    async with captured_mesh() as mesh:
        curl, legacy = mesh.add("curl"), mesh.add("legacy", enrolled=False)
        mesh.know(curl.workload())
        mesh.nursery.start_soon(trio.serve_listeners, echo, [legacy.listen(9000)])
        assert await ask(await curl.connect(legacy.ip, 9000), b"x") == (curl.ip, b"x")
        mesh.know(legacy.workload())
        assert await ask(await curl.connect(legacy.ip, 9000), b"y") == (curl.ip, b"y")
        assert (await mesh.notes.wait(**{"dst.workload": "legacy"}))["dst.addr"] == (
            f"{legacy.ip}:9000"
        )


async def test_failures_after_accept_are_resets() -> None:
    async with captured_mesh() as mesh:
        curl, web = mesh.add("curl"), mesh.add("web")
        mesh.know(curl.workload(), web.workload(), WEB)
        # Nothing listens; a service without endpoints; a passthrough that is refused.
        assert await is_refused(curl.connect(web.ip, 8080))
        refused = await mesh.notes.wait(direction="outbound")
        assert (refused["response_flags"], refused["dst.workload"]) == ("CONNECT", "web")
        assert "503" in str(refused["error"])
        assert await is_refused(curl.connect(VIP, 80))
        empty = await mesh.notes.wait(**{"dst.addr": f"{VIP}:80"})
        assert "no healthy endpoint" in str(empty["error"])
        assert await is_refused(curl.connect(GATEWAY, 1))
        gone = await mesh.notes.wait(**{"dst.addr": f"{GATEWAY}:1"})
        assert "connection refused" in str(gone["error"])


async def test_an_impostor_is_not_talked_to() -> None:
    async with captured_mesh() as mesh:
        curl, web = mesh.add("curl"), mesh.add("web")
        # The controller says that this address is somebody else's.
        mesh.know(curl.workload(), web.workload())
        mesh.nursery.start_soon(trio.serve_listeners, echo, [web.listen(8080)])
        bank = replace(web.workload(), uid="Kubernetes//Pod/shop/0bank", service_account="bank")
        mesh.know(bank)
        assert await is_refused(curl.connect(web.ip, 8080))
        line = await mesh.notes.wait(direction="outbound")
        assert line["response_flags"] == "IDENTITY_ERROR"
        assert "sa/bank" in str(line["error"])


async def test_a_connect_that_the_peer_refuses_to_look_at_is_sent_again() -> None:
    """The server goes away just when the CONNECT arrives, as one that is upgraded does."""
    async with captured_mesh() as mesh:
        curl, web = mesh.add("curl"), mesh.add("web", enrolled=False)
        mesh.know(curl.workload(), web.workload(tunnel_protocol=TunnelProtocol.HBONE))
        context = server_context(mesh.ca.issue(web.workload().identity).certificate())
        seen: list[str] = []

        def on_tunnel(tunnel: Tunnel) -> None:
            seen.append(tunnel.head.authority)
            if len(seen) == 1:
                tunnel.connection.core._last_peer_id = 0
                tunnel.connection.core.goaway()
                tunnel.connection.touch()
            else:
                tunnel.respond(200)
                tunnel.send(b"welcome\n")

        async def serve(stream: trio.SocketStream) -> None:
            sock = socket.socket(fileno=stream.socket.detach())
            connection = await TunnelConnection.accept(
                mesh.node.reactor,
                sock,
                context,
                verify=lambda leaf: verify_client_peer(leaf, "cluster.local"),
                on_tunnel=on_tunnel,
            )
            await connection.run()

        mesh.nursery.start_soon(trio.serve_listeners, serve, [web.listen(15008)])
        async with await curl.connect(web.ip, 8080) as stream:
            assert await read_line(stream) == "welcome"
        assert seen == [f"{web.ip}:8080"] * 2


async def test_another_trust_domain_is_refused_inbound() -> None:
    async with captured_mesh() as mesh:
        curl, web = mesh.add("curl"), mesh.add("web")
        mesh.know(curl.workload(trust_domain="other.example"), web.workload())
        assert await is_refused(curl.connect(web.ip, 8080))
        line = await mesh.notes.wait(direction="inbound")
        assert "other.example" in str(line["error"])
        assert line["response_flags"] == "IDENTITY_ERROR"


@pytest.mark.parametrize("port", [15001, 15006, 15008])
async def test_the_proxys_own_ports_lead_nowhere(port: int) -> None:
    async with captured_mesh() as mesh:
        curl, web = mesh.add("curl"), mesh.add("web")
        mesh.know(curl.workload(), web.workload())
        outsider = mesh.add("outsider", enrolled=False)
        # From the pod itself, by loopback and by its own address; then at another pod.
        for host in ("127.0.0.1", curl.ip):
            if port == 15008:
                stream = await curl.connect(host, port)
                await stream.send_all(b"no TLS hello")
                assert len(await read_to_end(stream)) <= 7  # an alert, at most
            else:
                assert await is_refused(curl.connect(host, port))
        assert await is_refused(curl.connect(web.ip, port))
        if port != 15008:
            with pytest.raises(trio.TooSlowError):
                await outsider.connect(web.ip, port, seconds=0.5)
        assert len(mesh.notes.lines) < 10


async def test_a_pod_without_a_workload_waits_and_is_then_closed() -> None:
    async with captured_mesh() as mesh:
        curl, web = mesh.add("curl"), mesh.add("web", enrolled=False)
        mesh.nursery.start_soon(trio.serve_listeners, echo, [web.listen(8080)])
        stream = await curl.connect(web.ip, 8080)
        await trio.sleep(0.05)
        mesh.know(curl.workload())
        assert await ask(stream, b"x") == (curl.ip, b"x")


async def test_stopping_a_pod_cuts_its_connections() -> None:
    async with captured_mesh() as mesh:
        curl, web = mesh.add("curl"), mesh.add("web")
        mesh.know(curl.workload(), web.workload())
        mesh.nursery.start_soon(trio.serve_listeners, echo, [web.listen(8080)])
        stream = await curl.connect(web.ip, 8080)
        await read_line(stream)
        assert web.proxy is not None
        with trio.fail_after(30):
            await web.proxy.stop()
        assert await is_reset(stream)
        line = await mesh.notes.wait(direction="inbound")
        assert "stopped" in str(line["error"])


async def test_draining_lets_connections_finish() -> None:
    async with captured_mesh() as mesh:
        curl, web = mesh.add("curl"), mesh.add("web")
        mesh.know(curl.workload(), web.workload())
        mesh.nursery.start_soon(trio.serve_listeners, echo, [web.listen(8080)])
        stream = await curl.connect(web.ip, 8080)
        await read_line(stream)
        assert web.proxy is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(web.proxy.drain, 5.0)
            await trio.sleep(0.1)
            await stream.send_all(b"going on")
            assert await stream.receive_some(100) == b"going on"
            # New ones are refused, because nobody listens any more.
            assert await is_refused(curl.connect(web.ip, 8080))
            await stream.aclose()
        assert "error" not in await mesh.notes.wait(direction="inbound")


# -- DNS


class Upstream(BaseResolver):
    """Knows one name; says NXDOMAIN to everything else."""

    def resolve(self, request: DNSRecord, handler: object) -> DNSRecord:
        reply = request.reply()
        if str(request.q.qname).lower() == "example.org.":
            reply.add_answer(RR("example.org", QTYPE.A, rdata=A("93.184.216.34")))
        else:
            reply.header.rcode = RCODE.NXDOMAIN
        return reply


async def test_dns_answers_and_forwards() -> None:
    servers = (SocketAddress(GATEWAY, 53),)
    async with captured_mesh(dns_servers=servers) as mesh:
        curl = mesh.add("curl")
        mesh.know(curl.workload(), WEB)
        with netns.inside(mesh.bridge):
            udp = DNSServer(Upstream(), port=53, address=GATEWAY)
            tcp = DNSServer(Upstream(), port=53, address=GATEWAY, tcp=True)
        udp.start_thread()
        tcp.start_thread()
        try:

            async def query(name: str, kind: str = "A") -> DNSRecord:
                question = DNSRecord.question(name, kind)
                with curl.udp("10.96.0.10", 53) as sock, trio.fail_after(30):
                    await sock.send(bytes(question.pack()))
                    answer = DNSRecord.parse(await sock.recv(4096))
                assert answer.header.id == question.header.id
                return answer

            async def query_tcp(name: str) -> DNSRecord:
                question = bytes(DNSRecord.question(name).pack())
                async with await curl.connect("10.96.0.10", 53) as stream:
                    with trio.fail_after(30):
                        await stream.send_all(struct.pack("!H", len(question)) + question)
                        data = b""
                        while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
                            data += await stream.receive_some(4096)
                return DNSRecord.parse(data[2:])

            assert [str(each.rdata) for each in (await query("web")).rr] == [VIP]
            assert (await query("web", "AAAA")).rr == []
            assert [str(each.rdata) for each in (await query("example.org")).rr] == [
                "93.184.216.34"
            ]
            assert (await query("nowhere.example")).header.rcode == RCODE.NXDOMAIN
            assert [str(each.rdata) for each in (await query_tcp("web.shop")).rr] == [VIP]
            assert [str(each.rdata) for each in (await query_tcp("example.org")).rr] == [
                "93.184.216.34"
            ]
        finally:
            for server in (udp, tcp):
                await trio.to_thread.run_sync(server.stop)
                server.server.server_close()
        assert (await query("example.org")).header.rcode == RCODE.SERVFAIL


async def test_an_endpoint_known_by_name_is_resolved_in_the_pod() -> None:
    servers = (SocketAddress(GATEWAY, 53),)
    async with captured_mesh(dns_servers=servers) as mesh:
        curl, legacy = mesh.add("curl"), mesh.add("legacy", enrolled=False)

        class Named(BaseResolver):
            def resolve(self, request: DNSRecord, handler: object) -> DNSRecord:
                reply = request.reply()
                if request.q.qtype == QTYPE.A:
                    reply.add_answer(RR("api.example", QTYPE.A, rdata=A(legacy.ip)))
                return reply

        mesh.know(
            curl.workload(),
            replace(
                legacy.workload(services={WEB_KEY: {80: 8080}}),
                addresses=(),
                hostname="api.example",
            ),
            WEB,
        )
        mesh.nursery.start_soon(trio.serve_listeners, echo, [legacy.listen(8080)])
        with netns.inside(mesh.bridge):
            udp = DNSServer(Named(), port=53, address=GATEWAY)
        udp.start_thread()
        try:
            assert await ask(await curl.connect(VIP, 80), b"x") == (curl.ip, b"x")
            assert [
                (sample.labels["source_canonical_service"], sample.value)
                for metric in mesh.registry.collect()
                for sample in metric.samples
                if sample.name == "istio_on_demand_dns_total"
            ] == [("curl", 1.0)]
        finally:
            await trio.to_thread.run_sync(udp.stop)
            udp.server.server_close()
