"""The rules in real namespaces: what they catch, what they spare, and what they survive."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from mesh import netns, sockets
from mesh.errors import KernelError
from netconfig import kernel, nft, ruleset
from netconfig.ruleset import Capture
from tests.support.pairs import OUTSIDE_IPS, POD_IPS, Pair, alive, dial, joined, listen

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("no_fd_leak")]

ALL = Capture()
FAMILIES = pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])


@pytest.fixture
def pair() -> Iterator[Pair]:
    try:
        with joined() as made:
            yield made
    except KernelError as exc:
        if exc.errno != errno.EPERM:
            raise
        pytest.skip(f"network namespaces cannot be made here: {exc}")


@contextlib.contextmanager
def proxy(pair: Pair) -> Iterator[dict[int, socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield {
            port: stack.enter_context(listen(pair.pod, port))
            for port in (sockets.OUTBOUND_PORT, sockets.INBOUND_PLAINTEXT_PORT, sockets.HBONE_PORT)
        }


def accepted(listener: socket.socket) -> socket.socket:
    sock, _ = listener.accept()
    sock.settimeout(2)
    return sock


# --- programming ----------------------------------------------------------------------------


def routing(fd: int) -> list[tuple[int, int]]:
    """(family, kind) of everything of ours: kind 0 for a rule, 1 for a route."""
    with netns.inside(fd):
        netlink = IPRoute()
    with contextlib.closing(netlink):
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for rule in netlink.get_rules(family=family):
                if rule.get("FRA_PRIORITY") == 32764:
                    assert rule.get("FRA_FWMARK") == 0x111
                    assert rule.get("FRA_FWMASK") == 0xFFF
                    assert rule.get("FRA_TABLE") == 100
                    found.append((int(family), 0))
            found += [(int(family), 1) for _ in netlink.get_routes(family=family, table=100)]
        return found


def test_every_step_may_be_repeated(pair: Pair) -> None:
    both = [(2, 0), (2, 1), (10, 0), (10, 1)]
    kernel.release_pod(pair.pod)
    for _ in range(2):
        kernel.capture_pod(pair.pod, ALL)
        assert kernel.is_intact(pair.pod, ALL)
        assert routing(pair.pod) == both
    for _ in range(2):
        kernel.drain_pod(pair.pod, ALL)
        assert not kernel.is_intact(pair.pod, ALL)
        assert routing(pair.pod) == both
    kernel.capture_pod(pair.pod, ALL)
    assert kernel.is_intact(pair.pod, ALL)
    for _ in range(2):
        kernel.release_pod(pair.pod)
        assert kernel.rules_hash(pair.pod) is None
        assert routing(pair.pod) == []
        with netns.inside(pair.pod):
            assert nft.list_json("tables") == []


def test_only_the_ipv4_half_without_ipv6(pair: Pair) -> None:
    without = Capture(ipv6=False)
    kernel.capture_pod(pair.pod, without)
    assert kernel.is_intact(pair.pod, without)
    assert routing(pair.pod) == [(2, 0), (2, 1)]


def test_a_pod_whose_runtime_turned_ipv6_off_is_captured(pair: Pair) -> None:
    with netns.inside(pair.pod):
        for name in ("all", "lo"):
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
    kernel.capture_pod(pair.pod, ALL)
    assert kernel.is_intact(pair.pod, ALL)
    assert routing(pair.pod) == [(2, 0), (2, 1)]
    with proxy(pair) as at, dial(pair.pod, OUTSIDE_IPS[0], 9) as app, accepted(at[15001]) as caught:
        assert alive(app, caught)
    kernel.release_pod(pair.pod)
    assert routing(pair.pod) == []


def test_the_loopback_interface_is_brought_up_first() -> None:
    bare = netns.create()
    try:
        kernel.capture_pod(bare, ALL)
        assert kernel.is_intact(bare, ALL)
        assert "127.0.0.1" in kernel.addresses(bare)
    finally:
        os.close(bare)


def test_a_failing_transaction_changes_nothing(pair: Pair) -> None:
    kernel.capture_pod(pair.pod, ALL)
    before = kernel.rules_hash(pair.pod)
    broken = [
        ruleset.for_pod(ALL) + "nonsense\n",
        ruleset.for_pod(ALL) + "add rule inet ambient nowhere accept\n",
        # Refused only when it is committed: there is no such hook for nat.
        ruleset.DELETE + "table inet x {\nchain y {\ntype nat hook forward priority 0;\n}\n}\n",
    ]
    for text in broken:
        with netns.inside(pair.pod), pytest.raises(KernelError, match="nft: Error"):
            nft.run(text)
        assert kernel.rules_hash(pair.pod) == before
    assert kernel.is_intact(pair.pod, ALL)


def test_the_nodes_own_namespace_is_never_programmed() -> None:
    here = netns.current()
    try:
        for change in (kernel.capture_pod, kernel.drain_pod):
            with pytest.raises(KernelError, match="the node's own"):
                change(here, ALL)
        with pytest.raises(KernelError, match="the node's own"):
            kernel.release_pod(here)
    finally:
        os.close(here)


def test_a_descriptor_that_is_no_namespace_is_refused() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(KernelError, match="setns"):
            kernel.capture_pod(reader, ALL)
    finally:
        os.close(reader)
        os.close(writer)


def test_tampering_shows_and_traffic_does_not(pair: Pair) -> None:
    kernel.capture_pod(pair.pod, ALL)
    quiet = kernel.generation(pair.pod)
    with proxy(pair) as at, dial(pair.pod, OUTSIDE_IPS[0], 9), accepted(at[15001]):
        assert kernel.generation(pair.pod) == quiet
        assert kernel.is_intact(pair.pod, ALL)
    with netns.inside(pair.pod):
        nft.run("table inet other { }")
    assert kernel.is_intact(pair.pod, ALL)
    with netns.inside(pair.pod):
        nft.run("insert rule inet ambient out_nat accept")
    loud = kernel.generation(pair.pod)
    assert loud.number > quiet.number
    assert loud.pid > 0
    assert loud.program
    assert not kernel.is_intact(pair.pod, ALL)
    kernel.capture_pod(pair.pod, ALL)
    assert kernel.is_intact(pair.pod, ALL)


def test_a_routing_rule_taken_away_shows(pair: Pair) -> None:
    kernel.capture_pod(pair.pod, ALL)
    with netns.inside(pair.pod):
        netlink = IPRoute()
    with contextlib.closing(netlink):
        netlink.rule("del", family=socket.AF_INET6, priority=32764)
    assert not kernel.is_intact(pair.pod, ALL)


def test_a_foreign_nat_chain_is_found(pair: Pair) -> None:
    kernel.capture_pod(pair.pod, ALL)
    assert kernel.foreign_nat_chains(pair.pod) == []
    with netns.inside(pair.pod):
        nft.run("table ip mine {\nchain c {\ntype nat hook output priority -150;\naccept\n}\n}\n")
    assert kernel.foreign_nat_chains(pair.pod) == ["ip mine c"]


# --- what is captured -----------------------------------------------------------------------


@FAMILIES
def test_outbound_is_captured_with_its_original_destination(pair: Pair, family: int) -> None:
    kernel.capture_pod(pair.pod, ALL)
    with (
        proxy(pair) as at,
        dial(pair.pod, OUTSIDE_IPS[family], 9000) as app,
        accepted(at[15001]) as caught,
    ):
        peer = sockets.from_sockaddr(caught.getpeername())
        assert sockets.original_destination(caught, peer) == (OUTSIDE_IPS[family], 9000)
        assert alive(app, caught)


@FAMILIES
def test_inbound_is_captured_with_its_original_destination(pair: Pair, family: int) -> None:
    kernel.capture_pod(pair.pod, ALL)
    with (
        proxy(pair) as at,
        dial(pair.outside, POD_IPS[family], 8080) as client,
        accepted(at[15006]) as caught,
    ):
        peer = sockets.from_sockaddr(caught.getpeername())
        assert sockets.original_destination(caught, peer) == (POD_IPS[family], 8080)
        assert peer.ip == OUTSIDE_IPS[family]
        assert alive(client, caught)


@FAMILIES
def test_a_tunnel_reaches_the_proxy_untouched(pair: Pair, family: int) -> None:
    kernel.capture_pod(pair.pod, ALL)
    with (
        proxy(pair) as at,
        dial(pair.outside, POD_IPS[family], 15008) as client,
        accepted(at[15008]) as tunnel,
    ):
        local = sockets.from_sockaddr(tunnel.getsockname())
        assert local == (POD_IPS[family], 15008)
        assert alive(client, tunnel)


@FAMILIES
def test_nobody_outside_reaches_the_private_ports(pair: Pair, family: int) -> None:
    kernel.capture_pod(pair.pod, ALL)
    with proxy(pair), listen(pair.pod, 15053):
        for port in (15001, 15006, 15053):
            with pytest.raises(TimeoutError):
                dial(pair.outside, POD_IPS[family], port, timeout=0.3)


@FAMILIES
def test_a_probe_reaches_the_application(pair: Pair, family: int) -> None:
    kernel.capture_pod(pair.pod, Capture(exempt=OUTSIDE_IPS))
    with (
        proxy(pair),
        listen(pair.pod, 8080) as server,
        dial(pair.outside, POD_IPS[family], 8080) as probe,
        accepted(server) as app,
    ):
        assert alive(probe, app)


@FAMILIES
def test_a_pod_talking_to_itself_is_left_alone(pair: Pair, family: int) -> None:
    kernel.capture_pod(pair.pod, ALL)
    for host in (POD_IPS[family], ("127.0.0.1", "::1")[family]):
        with (
            listen(pair.pod, 8080) as server,
            dial(pair.pod, host, 8080) as client,
            accepted(server) as app,
        ):
            assert alive(client, app)


@FAMILIES
def test_the_proxys_own_connections_go_out(pair: Pair, family: int) -> None:
    kernel.capture_pod(pair.pod, ALL)
    with listen(pair.outside, 9000) as server:
        outgoing = sockets.open_outgoing(OUTSIDE_IPS[family], namespace=pair.pod)
        with outgoing:
            outgoing.settimeout(2)
            outgoing.connect((OUTSIDE_IPS[family], 9000))
            with accepted(server) as arrived:
                assert alive(outgoing, arrived)


@FAMILIES
def test_the_proxy_may_speak_as_the_client(pair: Pair, family: int) -> None:
    kernel.capture_pod(pair.pod, ALL)
    with listen(pair.pod, 8080) as server:
        spoofing = sockets.open_outgoing(
            POD_IPS[family], namespace=pair.pod, source=OUTSIDE_IPS[family]
        )
        with spoofing:
            spoofing.settimeout(2)
            spoofing.connect((POD_IPS[family], 8080))
            with accepted(server) as app:
                peer = sockets.from_sockaddr(app.getpeername())
                assert peer.ip == OUTSIDE_IPS[family]
                assert alive(spoofing, app)
                own = kernel.addresses(pair.pod)
                assert kernel.proxied_connections(pair.pod, own) == 1
    assert kernel.proxied_connections(pair.pod, kernel.addresses(pair.pod)) == 0


@FAMILIES
def test_names_are_asked_of_the_proxy(pair: Pair, family: int) -> None:
    kernel.capture_pod(pair.pod, ALL)
    resolver = sockets.open_udp(("127.0.0.1", "::1")[family], 15053, namespace=pair.pod)
    with resolver, contextlib.closing(_udp(pair.pod, family)) as app:
        resolver.settimeout(2)
        app.sendto(b"question", (OUTSIDE_IPS[family], 53))
        question, address = resolver.recvfrom(100)
        resolver.sendto(b"answer to " + question, address)
        answer, came_from = app.recvfrom(100)
        assert answer == b"answer to question"
        assert came_from[:2] == (OUTSIDE_IPS[family], 53)


def _udp(fd: int, family: int) -> socket.socket:
    with netns.inside(fd):
        sock = socket.socket((socket.AF_INET, socket.AF_INET6)[family], socket.SOCK_DGRAM)
    sock.settimeout(2)
    return sock


def test_without_dns_capture_questions_go_out(pair: Pair) -> None:
    kernel.capture_pod(pair.pod, Capture(dns=False))
    with (
        sockets.open_udp(OUTSIDE_IPS[0], 53, namespace=pair.outside) as resolver,
        _udp(pair.pod, 0) as app,
    ):
        resolver.settimeout(2)
        app.sendto(b"question", (OUTSIDE_IPS[0], 53))
        assert resolver.recvfrom(100)[0] == b"question"


def test_without_ipv6_it_is_left_alone_both_ways(pair: Pair) -> None:
    kernel.capture_pod(pair.pod, Capture(ipv6=False))
    with (
        proxy(pair) as at,
        listen(pair.outside, 9000) as outside,
        listen(pair.pod, 8080) as inside,
        dial(pair.pod, OUTSIDE_IPS[1], 9000) as out,
        accepted(outside) as arrived,
        dial(pair.outside, POD_IPS[1], 8080) as client,
        accepted(inside) as app,
        dial(pair.pod, OUTSIDE_IPS[0], 9000),
        accepted(at[15001]),
    ):
        assert alive(out, arrived)
        assert alive(client, app)


def test_inbound_may_be_left_alone(pair: Pair) -> None:
    kernel.capture_pod(pair.pod, Capture(inbound=False))
    with (
        proxy(pair),
        listen(pair.pod, 8080) as server,
        dial(pair.outside, POD_IPS[0], 8080) as client,
        accepted(server) as app,
    ):
        assert alive(client, app)


# --- what lives through it ------------------------------------------------------------------


@FAMILIES
def test_an_open_connection_lives_through_capture_drain_and_release(
    pair: Pair, family: int
) -> None:
    with (
        listen(pair.outside, 9000) as outside,
        listen(pair.pod, 8080) as inside,
        dial(pair.pod, OUTSIDE_IPS[family], 9000) as out,
        accepted(outside) as arrived,
        dial(pair.outside, POD_IPS[family], 8080) as client,
        accepted(inside) as app,
    ):
        steps = (
            lambda: kernel.capture_pod(pair.pod, ALL),
            lambda: kernel.capture_pod(pair.pod, ALL),
            lambda: kernel.drain_pod(pair.pod, ALL),
            lambda: kernel.release_pod(pair.pod),
        )
        for step in steps:
            step()
            assert alive(out, arrived)
            assert alive(client, app)


@FAMILIES
def test_a_captured_connection_lives_through_replacement_and_drain(pair: Pair, family: int) -> None:
    kernel.capture_pod(pair.pod, ALL)
    own = kernel.addresses(pair.pod)
    with (
        proxy(pair) as at,
        dial(pair.pod, OUTSIDE_IPS[family], 9000) as out,
        accepted(at[15001]) as outbound,
        dial(pair.outside, POD_IPS[family], 8080) as client,
        accepted(at[15006]) as inbound,
    ):
        kernel.capture_pod(pair.pod, Capture(exempt=OUTSIDE_IPS))
        assert alive(out, outbound)
        assert alive(client, inbound)
        kernel.drain_pod(pair.pod, ALL)
        assert alive(out, outbound)
        assert alive(client, inbound)
        assert kernel.proxied_connections(pair.pod, own) == 2
        # New ones go direct, while the proxy's listeners are still there.
        with (
            listen(pair.outside, 9000) as direct,
            dial(pair.pod, OUTSIDE_IPS[family], 9000) as app,
            accepted(direct) as arrived,
        ):
            assert alive(app, arrived)
        with pytest.raises(TimeoutError):
            dial(pair.outside, POD_IPS[family], 15001, timeout=0.2)
        kernel.capture_pod(pair.pod, ALL)
        assert alive(out, outbound)
        assert alive(client, inbound)
    assert kernel.proxied_connections(pair.pod, own) == 0


def test_no_connection_slips_through_while_rules_are_replaced(pair: Pair) -> None:
    kernel.capture_pod(pair.pod, ALL)
    with proxy(pair) as at, listen(pair.outside, 9000) as outside:
        outside.setblocking(False)
        for number in range(60):
            if number % 6 == 0:
                kernel.capture_pod(pair.pod, ALL)
            with dial(pair.pod, OUTSIDE_IPS[0], 9000), accepted(at[15001]):
                pass
        with pytest.raises(BlockingIOError):
            outside.accept()


def test_with_nobody_listening_a_captured_pod_is_refused_not_let_through(pair: Pair) -> None:
    kernel.capture_pod(pair.pod, ALL)
    with listen(pair.outside, 9000), pytest.raises(ConnectionRefusedError):
        dial(pair.pod, OUTSIDE_IPS[0], 9000)
