from __future__ import annotations

import json
import os

import pytest
import trio

from mesh.runtime import log
from mesh.runtime.log import AccessLog

pytestmark = pytest.mark.usefixtures("no_fd_leak")


class Pipe:
    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def read(self) -> list[dict[str, object]]:
        os.close(self.writer)
        with os.fdopen(self.reader) as handle:
            return [json.loads(line) for line in handle]


async def test_records_become_lines_in_order() -> None:
    pipe = Pipe()
    access = AccessLog(pipe.writer, linger_seconds=0.001)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(access.run)
        for index in range(100):
            access.record({"message": "connection complete", "n": index, "dst.addr": "ü\n"})
            if index % 10 == 0:
                await trio.sleep(0.002)
        nursery.cancel_scope.cancel()
    lines = pipe.read()
    assert [line["n"] for line in lines] == list(range(100))
    assert lines[0]["scope"] == "access"
    assert lines[0]["dst.addr"] == "ü\n"
    assert str(lines[0]["time"]).endswith("Z")
    assert (access.recorded, access.dropped) == (100, 0)


async def test_recorded_before_the_writer_runs_and_flushed_when_cancelled() -> None:
    pipe = Pipe()
    access = AccessLog(pipe.writer, linger_seconds=60.0)
    access.record({"n": 1})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(access.run)
        await trio.testing.wait_all_tasks_blocked()
        access.record({"n": 2})
        nursery.cancel_scope.cancel()
    assert [line["n"] for line in pipe.read()] == [1, 2]


async def test_lines_of_connections_cancelled_together_with_the_log_are_kept() -> None:
    pipe = Pipe()
    access = AccessLog(pipe.writer)

    async def connection(number: int) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.001 * number)
            access.record({"n": number})

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(connection, number)
        nursery.start_soon(access.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert sorted(str(line["n"]) for line in pipe.read()) == [str(n) for n in range(10)]


async def test_reader_that_never_reads_blocks_nobody() -> None:
    pipe = Pipe()
    access = AccessLog(pipe.writer, limit_bytes=300_000, linger_seconds=0.0, flush_seconds=0.1)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(access.run)
            for _ in range(50):
                for _ in range(20):
                    access.record({"filler": "x" * 1000})
                await trio.sleep(0)
            assert access.dropped > 500
            nursery.cancel_scope.cancel()
    # The worker thread is still in its write; ending the pipe ends it.
    os.close(pipe.reader)
    await trio.sleep(0.1)
    os.close(pipe.writer)


async def test_reader_that_went_away_is_counted() -> None:
    pipe = Pipe()
    os.close(pipe.reader)
    access = AccessLog(pipe.writer, linger_seconds=0.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(access.run)
        access.record({"n": 1})
        await trio.sleep(0.05)
        access.record({"n": 2})
        await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    assert access.dropped == 2
    os.close(pipe.writer)


async def test_values_that_json_does_not_know_are_shown_as_text() -> None:
    pipe = Pipe()
    access = AccessLog(pipe.writer, linger_seconds=0.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(access.run)
        access.record({"value": {1, 2}.__class__, "lone": "\udcff"})
        nursery.cancel_scope.cancel()
    assert pipe.read()[0]["value"] == "<class 'set'>"


@pytest.mark.parametrize(
    ("levels", "written"),
    [("info", [1, 2]), ("warn", [1, 2]), ("info,access=warn", [2]), ("info,access=off", [])],
)
async def test_only_levels_that_name_the_access_log_hold_it_back(
    levels: str, written: list[int]
) -> None:
    pipe = Pipe()
    access = AccessLog(pipe.writer, linger_seconds=0.001)
    log.set_level(levels)
    try:
        access.record({"level": "info", "n": 1})
        access.record({"level": "error", "n": 2})
    finally:
        log.reset_level()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(access.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [line["n"] for line in pipe.read()] == written
