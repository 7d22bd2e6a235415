"""ZDS sessions as transcripts: message in, commands out."""

from __future__ import annotations

from mesh.zds import Add, Del, Keep, SnapshotSent
from ztunnel.workloads import (
    DRAINING,
    Ack,
    CloseDescriptor,
    EndSession,
    NamespaceId,
    Pod,
    StartProxy,
    StopProxy,
    Workloads,
)

NETNS1, NETNS2 = NamespaceId((4, 1)), NamespaceId((4, 2))


def add(uid: str, fd: int) -> Add:
    return Add(uid, f"name-{uid}", "shop", "default", (fd,))


def pod(uid: str) -> Pod:
    return Pod(uid, f"name-{uid}", "shop", "default")


def running(*uids: str) -> Workloads:
    """A machine whose first session ended its snapshot with these pods, all up."""
    machine = Workloads()
    machine.connected()
    for number, uid in enumerate(uids):
        namespace = NamespaceId((9, number))
        assert machine.receive(add(uid, 100 + number), namespace) == [
            StartProxy(pod(uid), 100 + number)
        ]
        assert machine.started(uid) == [Ack()]
    assert machine.receive(SnapshotSent()) == [Ack()]
    assert machine.is_ready
    return machine


def test_a_pod_is_started_before_it_is_acknowledged() -> None:
    machine = Workloads()
    machine.connected()
    assert machine.receive(add("a", 7), NETNS1) == [StartProxy(pod("a"), 7)]
    assert [state for _, state, _ in machine.states()] == ["Pending"]
    assert machine.started("a") == [Ack()]
    assert not machine.is_ready
    assert machine.receive(SnapshotSent()) == [Ack()]
    assert machine.is_ready
    assert [state for _, state, _ in machine.states()] == ["Up"]


def test_an_empty_snapshot_is_ready() -> None:
    machine = Workloads()
    assert not machine.is_ready
    machine.connected()
    machine.receive(SnapshotSent())
    assert machine.is_ready


def test_the_same_pod_in_the_same_namespace_is_left_alone() -> None:
    machine = running("a")
    assert machine.receive(add("a", 55), NamespaceId((9, 0))) == [CloseDescriptor(55), Ack()]


def test_a_new_namespace_restarts_the_proxy() -> None:
    machine = running("a")
    assert machine.receive(add("a", 55), NETNS2) == [
        StopProxy("a", 100),
        StartProxy(pod("a"), 55),
    ]
    assert machine.started("a") == [Ack()]


def test_another_service_account_restarts_the_proxy() -> None:
    machine = running("a")
    changed = Add("a", "name-a", "shop", "other", (55,))
    commands = machine.receive(changed, NamespaceId((9, 0)))
    assert commands == [StopProxy("a", 100), StartProxy(Pod("a", "name-a", "shop", "other"), 55)]


def test_deletion_stops_at_once_and_repeating_it_is_fine() -> None:
    machine = running("a")
    assert machine.receive(Del("a")) == [StopProxy("a", 100), Ack()]
    assert machine.receive(Del("a")) == [Ack()]
    assert machine.is_ready


def test_what_a_new_snapshot_does_not_name_is_stopped() -> None:
    machine = running("a", "b", "c")
    machine.disconnected()
    assert not machine.is_ready
    machine.connected()
    assert machine.receive(Keep("a")) == [Ack()]
    assert machine.receive(add("b", 60), NamespaceId((9, 1))) == [CloseDescriptor(60), Ack()]
    assert machine.receive(SnapshotSent()) == [StopProxy("c", 102), Ack()]
    assert machine.is_ready


def test_keep_of_an_unknown_pod_is_acknowledged() -> None:
    machine = Workloads()
    machine.connected()
    assert machine.receive(Keep("ghost")) == [Ack()]
    machine.receive(SnapshotSent())
    assert machine.is_ready


def test_an_interrupted_snapshot_stops_nothing() -> None:
    machine = running("a", "b")
    machine.disconnected()
    machine.connected()
    machine.receive(Keep("a"))
    machine.disconnected()
    assert [each.uid for each, _, _ in machine.states()] == ["a", "b"]


def test_a_failed_start_is_told_and_tried_again() -> None:
    machine = Workloads(retry_seconds=5.0)
    machine.connected()
    machine.receive(add("a", 7), NETNS1)
    assert machine.failed("a", "address in use", 10.0) == [Ack("address in use")]
    assert machine.receive(SnapshotSent()) == [Ack()]
    assert not machine.is_ready
    assert machine.next_deadline() == 15.0
    assert list(machine.states()) == [(pod("a"), "Pending", "address in use")]
    assert machine.receive_timeout(14.9) == []
    assert machine.receive_timeout(15.0) == [StartProxy(pod("a"), 7)]
    # A retry answers no message.
    assert machine.failed("a", "again", 15.0) == []
    assert machine.receive_timeout(20.0) == [StartProxy(pod("a"), 7)]
    assert machine.started("a") == []
    assert machine.next_deadline() is None
    assert machine.is_ready


def test_a_pending_pod_that_is_added_again_is_tried_at_once() -> None:
    machine = Workloads()
    machine.connected()
    machine.receive(add("a", 7), NETNS1)
    machine.failed("a", "no", 0.0)
    assert machine.receive(add("a", 8), NETNS1) == [CloseDescriptor(8), StartProxy(pod("a"), 7)]
    assert machine.started("a") == [Ack()]
    assert machine.next_deadline() is None


def test_a_failed_pod_that_is_deleted_is_not_retried() -> None:
    machine = Workloads()
    machine.connected()
    machine.receive(add("a", 7), NETNS1)
    machine.failed("a", "no", 0.0)
    assert machine.receive(Del("a")) == [StopProxy("a", 7), Ack()]
    assert machine.next_deadline() is None


def test_keep_after_the_snapshot_ends_the_session() -> None:
    machine = running("a")
    assert machine.receive(Keep("a")) == [
        Ack("Keep after the snapshot"),
        EndSession("Keep after the snapshot"),
    ]


def test_a_second_snapshot_ends_the_session() -> None:
    machine = running("a")
    assert EndSession("second SnapshotSent in one session") in machine.receive(SnapshotSent())
    assert [each.uid for each, _, _ in machine.states()] == ["a"]


def test_add_without_a_namespace_is_refused_and_its_descriptor_closed() -> None:
    machine = Workloads()
    machine.connected()
    commands = machine.receive(add("a", 7), None)
    assert commands[0] == CloseDescriptor(7)
    assert isinstance(commands[-1], EndSession)
    assert list(machine.states()) == []


# ---- listeners that the node agent keeps


def add_with(uid: str, *fds: int) -> Add:
    """An Add of an agent that keeps listeners; it has one for each descriptor after the first."""
    return Add(uid, f"name-{uid}", "shop", "default", fds, tuple(range(1, len(fds))))


def test_a_pod_starts_on_the_listeners_that_came_with_it() -> None:
    machine = Workloads()
    machine.connected()
    start = StartProxy(pod("a"), 7, {1: 8, 2: 9}, is_kept=True)
    assert machine.receive(add_with("a", 7, 8, 9), NETNS1) == [start]
    # The proxy has duplicates by now; the agent gets everything back.
    assert machine.started("a") == [
        CloseDescriptor(8),
        CloseDescriptor(9),
        Ack(listeners_of="a"),
    ]
    assert machine.release() == [7]


def test_listeners_are_kept_for_the_next_attempt() -> None:
    machine = Workloads()
    machine.connected()
    start = StartProxy(pod("a"), 7, {1: 8}, is_kept=True)
    assert machine.receive(add_with("a", 7, 8), NETNS1) == [start]
    assert machine.failed("a", "no memory", 0.0) == [Ack("no memory")]
    assert machine.receive_timeout(10.0) == [start]
    assert machine.failed("a", "no memory", 10.0) == []
    # The agent asks again, with what it has now.
    assert machine.receive(add_with("a", 17, 18), NETNS1) == [
        CloseDescriptor(8),
        CloseDescriptor(17),
        StartProxy(pod("a"), 7, {1: 18}, is_kept=True),
    ]
    assert machine.receive(Del("a")) == [StopProxy("a", 7), CloseDescriptor(18), Ack()]


def test_an_agent_that_lost_its_duplicates_gets_them_again() -> None:
    machine = running("a")
    machine.disconnected()
    machine.connected()
    assert machine.receive(add_with("a", 55), NamespaceId((9, 0))) == [
        CloseDescriptor(55),
        Ack(listeners_of="a"),
    ]


def test_who_drains_takes_no_pod_but_lets_go_of_those_it_has() -> None:
    machine = running("a")
    machine.receive(add("late", 60), NETNS1)
    machine.failed("late", "no memory", 0.0)
    machine.drain()
    assert machine.receive(add_with("b", 70, 71), NETNS2) == [
        CloseDescriptor(70),
        CloseDescriptor(71),
        Ack(DRAINING),
    ]
    assert machine.next_deadline() is None
    assert machine.receive_timeout(100.0) == []
    assert machine.receive(Del("a")) == [StopProxy("a", 100), Ack()]


def test_what_was_handed_over_is_released_with_the_rest() -> None:
    machine = Workloads()
    machine.connected()
    machine.receive(add_with("a", 7, 8, 9), NETNS1)
    assert machine.release() == [7, 8, 9]
