"""ZDS over real SEQPACKET sockets: both ends, descriptors, and every way to break it."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from mesh import netns, sockets
from mesh.errors import ConfigError, KernelError, MeshError, RemoteProtocolError, Unavailable
from mesh.zds import Add, Del, Keep, Listener, Session, SnapshotSent, ZdsServer, connect
from mesh.zds.codec import encode_ack, encode_hello, encode_request

pytestmark = pytest.mark.usefixtures("no_fd_leak")

OnSession = Callable[[Session], Awaitable[None]]


@pytest.fixture(scope="module", autouse=True)
def way_home() -> None:
    """`netns.inside` keeps the thread's way home open from the first time on: no leak."""
    fd = netns.create()
    with netns.inside(fd):
        pass
    os.close(fd)


class Agent:
    """A running server on a socket in a temporary directory, with what went wrong."""

    def __init__(self, path: Path, nursery: trio.Nursery) -> None:
        self.path = path
        self.failures: list[MeshError] = []
        self._nursery = nursery

    async def failure(self) -> str:
        """The one thing that went wrong, as soon as it is told."""
        with trio.fail_after(30):
            while not self.failures:
                await trio.sleep(0.005)
        assert len(self.failures) == 1
        return str(self.failures[0])

    async def serve(self, on_session: OnSession, deadline: float = 5.0) -> None:
        server = ZdsServer(deadline_seconds=deadline, on_failure=self.failures.append)
        await self._nursery.start(server.serve, self.path, on_session)


@pytest.fixture
async def agent(tmp_path: Path, nursery: trio.Nursery) -> Agent:
    return Agent(tmp_path / "run" / "ztunnel.sock", nursery)


def raw_client(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(str(path))
    client.settimeout(5)
    return client


async def in_thread(work: Callable[..., object], *arguments: object) -> object:
    return await trio.to_thread.run_sync(work, *arguments)


async def test_a_pod_is_handed_over_with_its_namespace(agent: Agent) -> None:
    pod = netns.create()
    answers: list[str | None] = []
    done = trio.Event()

    async def on_session(session: Session) -> None:
        answers.append(await session.add(Add("u1", "web", "shop", "sa", (pod,))))
        answers.append(await session.keep("u2"))
        answers.append(await session.snapshot_sent())
        answers.append(await session.delete("u1"))
        done.set()
        await trio.sleep_forever()

    await agent.serve(on_session)
    with await connect(agent.path) as connection:
        added = await connection.receive()
        assert isinstance(added, Add)
        assert (added.uid, added.name, added.namespace, added.service_account) == (
            "u1",
            "web",
            "shop",
            "sa",
        )
        (fd,) = added.fds
        assert netns.identity(fd) == netns.identity(pod)
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        await connection.ack()
        assert await connection.receive() == Keep("u2")
        await connection.ack("no such pod")
        assert await connection.receive() == SnapshotSent()
        await connection.ack()
        assert await connection.receive() == Del("u1")
        await connection.ack()
        await done.wait()
        added.close()
    os.close(pod)
    assert answers == [None, "no such pod", None, None]


async def test_the_namespace_outlives_the_senders_copy_in_flight(agent: Agent) -> None:
    identity: list[tuple[int, int]] = []

    async def on_session(session: Session) -> None:
        pod = netns.create()
        identity.append(netns.identity(pod))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.add, Add("u", "n", "ns", "sa", (pod,)))
            await trio.testing.wait_all_tasks_blocked(0.01)
            os.close(pod)

    await agent.serve(on_session)
    with await connect(agent.path) as connection:
        await trio.sleep(0.1)
        added = await connection.receive()
        assert isinstance(added, Add)
        assert netns.identity(added.fds[0]) == identity[0]
        added.close()
        await connection.ack()


async def test_requests_queue_up_one_in_flight(agent: Agent) -> None:
    order: list[str] = []
    done = trio.Event()

    async def on_session(session: Session) -> None:
        async def ask(uid: str) -> None:
            await session.delete(uid)
            order.append(uid)

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(ask, f"u{number}")
        done.set()

    await agent.serve(on_session)
    with raw_client(agent.path) as client:
        client.send(encode_hello())
        seen = []
        for _ in range(5):
            seen.append(await in_thread(client.recv, 1024))
            client.settimeout(0.02)
            with pytest.raises(TimeoutError):
                await in_thread(client.recv, 1024)  # no second one before the answer
            client.settimeout(5)
            client.send(encode_ack())
        await done.wait()
    assert len(set(seen)) == 5
    assert sorted(order) == [f"u{number}" for number in range(5)]


async def test_a_late_answer_ends_the_session(agent: Agent) -> None:
    raised: list[BaseException] = []

    async def on_session(session: Session) -> None:
        for _ in range(2):
            try:
                await session.snapshot_sent()
            except Unavailable as exc:
                raised.append(exc)

    await agent.serve(on_session, deadline=0.1)
    with raw_client(agent.path) as client:
        client.send(encode_hello())
        assert await in_thread(client.recv, 1024) == b"\x1a\x00"
        assert await in_thread(client.recv, 1024) == b""
    assert "did not answer within 0.1 s" in str(raised[0])
    assert "gone" in str(raised[1])
    assert "did not answer" in await agent.failure()


async def test_a_cancelled_request_ends_the_session(agent: Agent) -> None:
    ended = trio.Event()

    async def on_session(session: Session) -> None:
        with trio.move_on_after(0.05):
            await session.snapshot_sent()
        assert session.closed.is_set()
        with pytest.raises(Unavailable):
            await session.delete("u")
        ended.set()

    await agent.serve(on_session)
    with await connect(agent.path) as connection:
        await connection.receive()
        await ended.wait()
        with pytest.raises(Unavailable):
            await connection.receive()


async def test_the_agent_notices_at_once_when_an_idle_proxy_leaves(agent: Agent) -> None:
    session_ended = trio.Event()
    session_began = trio.Event()

    async def on_session(session: Session) -> None:
        session_began.set()
        try:
            await trio.sleep_forever()
        finally:
            session_ended.set()

    await agent.serve(on_session)
    connection = await connect(agent.path)
    await session_began.wait()
    connection.close()
    with trio.fail_after(30):
        await session_ended.wait()
    assert agent.failures == []


async def test_a_proxy_that_leaves_in_the_middle_of_a_request(agent: Agent) -> None:
    raised = trio.Event()

    async def on_session(session: Session) -> None:
        with pytest.raises(Unavailable, match="gone"):
            await session.snapshot_sent()
        raised.set()

    await agent.serve(on_session)
    connection = await connect(agent.path)
    await connection.receive()
    connection.close()
    with trio.fail_after(30):
        await raised.wait()


@pytest.mark.parametrize(
    ("packets", "message"),
    [
        ([b"\x08\x02"], "version 2"),
        ([b"\xff\xff\xff"], "not readable"),
        ([encode_hello(), encode_ack()], "nobody asked for"),
        ([encode_hello(), b"x" * 2000], "longer than 1024"),
    ],
)
async def test_a_proxy_that_breaks_the_protocol_is_disconnected(
    agent: Agent, packets: list[bytes], message: str
) -> None:
    async def on_session(session: Session) -> None:
        await trio.sleep_forever()

    await agent.serve(on_session)
    with raw_client(agent.path) as client:
        for packet in packets:
            client.send(packet)
        assert await in_thread(client.recv, 1024) == b""
    assert message in await agent.failure()


async def test_descriptors_from_a_proxy_are_closed(agent: Agent) -> None:
    sessions: list[Session] = []

    async def on_session(session: Session) -> None:
        sessions.append(session)
        await session.snapshot_sent()

    await agent.serve(on_session)
    reader, writer = os.pipe()
    with raw_client(agent.path) as client:
        socket.send_fds(client, [encode_hello()], [writer])
        await in_thread(client.recv, 1024)
        os.close(writer)
        socket.send_fds(client, [encode_ack()], [reader])
        assert await in_thread(client.recv, 1024) == b""
    # The pipe's writing end would be kept open by a copy that nobody closed.
    assert os.read(reader, 1) == b""
    os.close(reader)


async def test_a_silent_client_is_not_kept(agent: Agent) -> None:
    async def on_session(session: Session) -> None:
        raise AssertionError("it never said hello")

    await agent.serve(on_session, deadline=0.1)
    with raw_client(agent.path) as client:
        assert await in_thread(client.recv, 1024) == b""
    assert "said nothing" in await agent.failure()


async def test_several_proxies_are_served_at_once(agent: Agent) -> None:
    sessions: list[Session] = []

    async def on_session(session: Session) -> None:
        sessions.append(session)
        await trio.sleep_forever()

    await agent.serve(on_session)
    with await connect(agent.path) as old, await connect(agent.path) as new:
        with trio.fail_after(30):
            while len(sessions) < 2:
                await trio.sleep(0.01)
        for session, connection in zip(sessions, (old, new), strict=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.delete, "u")
                assert await connection.receive() == Del("u")
                await connection.ack()


async def test_an_error_of_the_session_is_told_and_ends_it(agent: Agent) -> None:
    async def on_session(session: Session) -> None:
        raise Unavailable("enough")

    await agent.serve(on_session)
    with await connect(agent.path) as connection, pytest.raises(Unavailable):
        await connection.receive()
    assert await agent.failure() == "enough"


# --- the proxy's end against a rude agent ---------------------------------------------------


def rude_agent(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def pipe_and_namespace() -> list[int]:
    reader, writer = os.pipe()
    os.close(writer)
    return [reader, netns.create()]


@pytest.mark.parametrize(
    ("packet", "fds", "message"),
    [
        (encode_request(Add("u", "n", "ns", "sa")), 0, "0 descriptors instead of one"),
        (encode_request(Add("u", "n", "ns", "sa")), 1, "no network namespace"),
        (encode_request(Add("u", "n", "ns", "sa")), 2, "2 descriptors instead of one"),
        (encode_request(Keep("u")), 2, "2 descriptors with"),
        (encode_request(Add("u", "n", "ns", "sa")), 40, "could not be received"),
        (b"\x0a" + b"x" * 1100, 1, "longer than 1024"),
        (b"\xff\xff", 0, "not readable"),
    ],
)
async def test_what_cannot_be_accepted_is_answered_with_the_reason(
    tmp_path: Path, packet: bytes, fds: int, message: str
) -> None:
    with rude_agent(tmp_path / "s") as listener:
        connection = await connect(tmp_path / "s")
        peer, _ = listener.accept()
        with peer, connection:
            assert peer.recv(1024) == encode_hello()
            own = pipe_and_namespace()
            socket.send_fds(peer, [packet], (own * 20)[:fds])
            with pytest.raises(RemoteProtocolError, match=message):
                await connection.receive()
            assert message.encode() in peer.recv(1024)
            for fd in own:
                os.close(fd)


async def test_an_empty_packet_and_a_closed_socket_are_the_end(tmp_path: Path) -> None:
    with rude_agent(tmp_path / "s") as listener:
        for ending in (lambda peer: peer.send(b""), lambda peer: peer.close()):
            connection = await connect(tmp_path / "s")
            peer, _ = listener.accept()
            with peer, connection:
                ending(peer)
                with pytest.raises(Unavailable):
                    await connection.receive()


async def test_dialling_nobody_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="No such file"):
        await connect(tmp_path / "nothing")
    rude_agent(tmp_path / "stale").close()
    with pytest.raises(Unavailable, match="refused"):
        await connect(tmp_path / "stale")


async def test_a_cancelled_receive_loses_nothing(tmp_path: Path) -> None:
    with rude_agent(tmp_path / "s") as listener:
        connection = await connect(tmp_path / "s")
        peer, _ = listener.accept()
        with peer, connection:
            with trio.move_on_after(0.01):
                await connection.receive()
            peer.send(encode_request(Keep("u")))
            assert await connection.receive() == Keep("u")


# --- the socket file ------------------------------------------------------------------------


async def idle(session: Session) -> None:
    await trio.sleep_forever()


async def test_the_socket_is_the_owners_alone(agent: Agent) -> None:
    await agent.serve(idle)
    assert stat.S_IMODE(agent.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(agent.path.parent.stat().st_mode) == 0o700


async def test_a_stale_socket_is_replaced(agent: Agent) -> None:
    agent.path.parent.mkdir()
    rude_agent(agent.path).close()
    await agent.serve(idle)
    (await connect(agent.path)).close()


async def test_a_living_agents_socket_is_left_alone(agent: Agent) -> None:
    agent.path.parent.mkdir()
    with rude_agent(agent.path):
        before = agent.path.stat().st_ino
        with pytest.raises(ConfigError, match="another node agent"):
            await ZdsServer().serve(agent.path, idle)
        assert agent.path.stat().st_ino == before


async def test_a_file_that_is_no_socket_is_left_alone(agent: Agent) -> None:
    agent.path.parent.mkdir()
    agent.path.write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        await ZdsServer().serve(agent.path, idle)
    assert agent.path.read_text() == "precious"


async def test_a_path_that_is_too_long_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        await ZdsServer().serve(tmp_path / ("x" * 120), idle)


async def test_ending_removes_the_socket_but_not_a_successors(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with trio.open_nursery() as nursery:
        await nursery.start(ZdsServer().serve, path, idle)
        nursery.cancel_scope.cancel()
    assert not path.exists()
    async with trio.open_nursery() as nursery:
        await nursery.start(ZdsServer().serve, path, idle)
        path.rename(tmp_path / "old")
        with rude_agent(path):
            nursery.cancel_scope.cancel()
    assert path.exists()


def test_the_kernel_marks_received_descriptors_as_expected() -> None:
    # The assumption behind MSG_CMSG_CLOEXEC, on this very kernel.
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        socket.send_fds(one, [b"x"], [one.fileno()])
        _, ancillary, _, _ = other.recvmsg(10, 100, socket.MSG_CMSG_CLOEXEC)
        (fd,) = struct.unpack("i", ancillary[0][2][:4])
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        os.close(fd)


# ---- listeners


async def test_listeners_go_both_ways(agent: Agent) -> None:
    pod = netns.create()
    mine = sockets.open_listener(15001, namespace=pod)
    taken: dict[int, int] = {}
    done = trio.Event()

    async def on_session(session: Session) -> None:
        assert session.takes_listeners
        message = Add("u", "n", "ns", "sa", (pod, mine.fileno()), (Listener.OUTBOUND,))
        assert await session.add(message, taken.update) is None
        done.set()
        await trio.sleep_forever()

    await agent.serve(on_session)
    with await connect(agent.path, takes_listeners=True) as connection:
        added = await connection.receive()
        assert isinstance(added, Add)
        (fd,) = added.listener_fds().values()
        with sockets.adopt_listener(fd, 15001, namespace=added.fds[0]) as adopted:
            assert os.fstat(adopted.fileno()).st_ino == os.fstat(mine.fileno()).st_ino
            await connection.ack("", {Listener.OUTBOUND: adopted.fileno()})
        added.close()
        await done.wait()
    (back,) = taken.values()
    assert os.fstat(back).st_ino == os.fstat(mine.fileno()).st_ino
    assert fcntl.fcntl(back, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(back)
    mine.close()
    os.close(pod)


async def test_listeners_that_nobody_asked_for_end_the_session(agent: Agent) -> None:
    pod = netns.create()

    async def on_session(session: Session) -> None:
        assert not session.takes_listeners
        with pytest.raises(Unavailable):
            await session.add(Add("u", "n", "ns", "sa", (pod,)))

    await agent.serve(on_session)
    with await connect(agent.path) as connection:
        added = await connection.receive()
        assert isinstance(added, Add)
        await connection.ack("", {Listener.OUTBOUND: added.fds[0]})
        added.close()
        assert "nobody asked for" in await agent.failure()
    os.close(pod)


def test_only_what_serves_the_port_in_the_pod_is_adopted() -> None:
    pod, other = netns.create(), netns.create()
    with (
        sockets.open_listener(15001, namespace=pod) as good,
        sockets.open_listener(15001, namespace=other) as foreign,
        sockets.open_listener(15006, namespace=pod) as elsewhere,
        sockets.open_socket(socket.AF_INET, namespace=pod) as idle,
    ):
        sockets.adopt_listener(good.fileno(), 15001, namespace=pod).close()
        for bad, reason in (
            (foreign.fileno(), "another pod"),
            (elsewhere.fileno(), "does not serve"),
            (idle.fileno(), "does not serve"),
            (pod, "handed over for port 15001"),
        ):
            with pytest.raises(KernelError, match=reason):
                sockets.adopt_listener(bad, 15001, namespace=pod)
    os.close(pod)
    os.close(other)
