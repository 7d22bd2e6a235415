"""waypoint.idle: what does not move for too long ends, once; what moves goes on."""

from __future__ import annotations

from collections.abc import Iterable

from waypoint.idle import Expirable, IdleWatch, Kind, Mark

KINDS: tuple[Kind, ...] = ("body", "unread", "left", "head", "idle")


class Connection:
    def __init__(self, *marks: Mark) -> None:
        self.now = list(marks)
        self.expired: list[Kind] = []

    def marks(self) -> Iterable[tuple[Expirable, Mark]]:
        return [(self, mark) for mark in self.now]

    def expire(self, kind: Kind) -> None:
        self.expired.append(kind)
        self.now = []


def watch() -> IdleWatch:
    return IdleWatch({"body": 10.0, "unread": 10.0, "left": 10.0, "head": 2.0, "idle": 100.0})


def test_each_kind_has_its_time() -> None:
    watched = {kind: Connection(Mark(kind)) for kind in KINDS}
    made, ended = watch(), dict[Kind, int]()
    for now in range(0, 130, 1):
        made.sweep(watched.values(), float(now))
        for kind, each in watched.items():
            if each.expired:
                ended.setdefault(kind, now)
    assert ended == {"head": 2, "body": 10, "unread": 10, "left": 10, "idle": 100}
    assert [len(each.expired) for each in watched.values()] == [1] * 5


def test_progress_and_another_kind_begin_anew() -> None:
    made, each = watch(), Connection(Mark("body", 0))
    for now in range(50):
        each.now = [Mark("body", now // 9)]
        made.sweep([each], float(now))
    assert each.expired == []
    each.now = [Mark("unread", 5)]
    made.sweep([each], 55.0)
    made.sweep([each], 64.0)
    assert each.expired == []
    made.sweep([each], 65.0)
    assert each.expired == ["unread"]


def test_who_has_left_or_waits_for_nothing_is_forgotten() -> None:
    made, each = watch(), Connection(Mark("head"))
    made.sweep([each], 0.0)
    made.sweep([], 1.0)
    made.sweep([each], 5.0)
    assert each.expired == []
    assert len(made._seen) == 1
    each.now = []
    made.sweep([each], 6.0)
    assert made._seen == {}
