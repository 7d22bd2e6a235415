"""Receive windows grow for readers that keep up, out of a budget that is shared fairly."""

from __future__ import annotations

import random

from mesh.http import h2_frames as h2
from mesh.http.h2_stream import Stream
from mesh.http.receive_windows import ReceiveWindows, WindowBudget

KIB = 1 << 10
SETTINGS = h2.LocalSettings(256 * KIB, 4 << 20)


def windows(
    budget: WindowBudget | None = None, settings: h2.LocalSettings = SETTINGS
) -> tuple[ReceiveWindows, Stream]:
    return ReceiveWindows(settings, budget), Stream(1, 0, settings.stream_window)


def consume(of: ReceiveWindows, stream: Stream, *, lagged: bool = False) -> int:
    """Half a window is consumed; the increment."""
    stream.uncredited = stream.credit_step
    stream.lagged = lagged
    return of.settle(stream)


def test_a_reader_that_keeps_up_gets_the_largest_window_in_a_few_steps() -> None:
    of, stream = windows(WindowBudget(1 << 30))
    increments = [consume(of, stream) for _ in range(6)]
    assert increments == [each * KIB for each in (384, 768, 1536, 3072, 2048, 2048)]
    assert stream.granted + 256 * KIB == 4 << 20


def test_a_reader_that_lags_keeps_what_it_has() -> None:
    of, stream = windows(WindowBudget(1 << 30))
    assert consume(of, stream, lagged=True) == 128 * KIB
    assert stream.granted == 0
    assert consume(of, stream) == 384 * KIB
    assert consume(of, stream, lagged=True) == 256 * KIB
    assert stream.granted == 256 * KIB


def test_settings_without_growth() -> None:
    of, stream = windows(WindowBudget(1 << 30), h2.LocalSettings(1000))
    assert [consume(of, stream) for _ in range(3)] == [500] * 3


def test_what_was_granted_returns_when_the_stream_ends() -> None:
    budget = WindowBudget(1 << 30)
    of, stream = windows(WindowBudget(parent=budget))
    consume(of, stream)
    assert budget.used == 256 * KIB
    of.forget(stream)
    of.forget(stream)
    assert budget.used == 0


def test_the_budget_is_never_exceeded_and_late_comers_get_something() -> None:
    process = WindowBudget(64 << 20)
    greedy = WindowBudget(parent=process)
    for _ in range(50):  # connections of a hundred streams that all keep up
        of = ReceiveWindows(SETTINGS, greedy)
        for _ in range(100):
            stream = Stream(1, 0, 256 * KIB)
            for _ in range(6):
                consume(of, stream)
    assert 16 << 20 <= process.used <= 32 << 20
    of, late = windows(WindowBudget(parent=process))
    for _ in range(6):
        consume(of, late)
    assert late.granted + 256 * KIB >= 2 << 20


def test_under_pressure_windows_shrink_as_they_are_used() -> None:
    process = WindowBudget(16 << 20)
    holders = []
    for _ in range(40):
        of, stream = windows(WindowBudget(parent=process))
        holders.append((of, stream))
        for _ in range(8):
            for each in holders:
                assert consume(*each) > 0
        assert process.used == sum(stream.granted for _, stream in holders) <= 16 << 20
    granted = [stream.granted for _, stream in holders]
    assert max(granted) <= 1 << 20
    assert sum(each > 0 for each in granted) > 20


def test_anything_goes_but_never_too_much_and_never_nothing() -> None:
    rng = random.Random(7)
    process = WindowBudget(8 << 20)
    pods = [WindowBudget(parent=process) for _ in range(3)]
    open_: list[tuple[ReceiveWindows, Stream, list[int]]] = []
    for _ in range(5000):
        if rng.random() < 0.05:
            of, stream = windows(rng.choice(pods))
            open_.append((of, stream, [256 * KIB]))
        elif open_ and rng.random() < 0.04:
            of, stream, _ = open_.pop(rng.randrange(len(open_)))
            of.forget(stream)
        elif open_:
            of, stream, window = rng.choice(open_)
            stream.uncredited += rng.randrange(max(1, window[0] - stream.uncredited))
            if stream.uncredited >= stream.credit_step:
                window[0] -= stream.uncredited
                stream.lagged = rng.random() < 0.3
                increment = of.settle(stream)
                assert increment > 0
                window[0] += increment
                assert window[0] == 256 * KIB + stream.granted
        granted = sum(stream.granted for _, stream, _ in open_)
        assert granted == process.used == sum(pod.used for pod in pods) <= 8 << 20
