"""SecretManager under a virtual clock: joining, priorities, renewal, back-off, forgetting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from mesh.errors import IdentityError, Unavailable
from mesh.identity import SpiffeId
from mesh.secrets import SecretManager, renewal_time
from mesh.tls.certificate import Certificate

EPOCH = 1_900_000_000.0
SLEEP = SpiffeId("cluster.local", "demo", "sleep")
HTTPBIN = SpiffeId("cluster.local", "demo", "httpbin")


class Middle:
    """Random numbers that are always in the middle."""

    def uniform(self, a: float, b: float, /) -> float:
        return (a + b) / 2


def wall() -> float:
    return EPOCH + trio.current_time()


class Authority:
    """Answers fetches after `delay` seconds, as long as it is not `broken`."""

    def __init__(self, *, delay: float = 1.0, ttl: float = 3600.0) -> None:
        self.delay = delay
        self.ttl = ttl
        self.broken = False
        self.started: list[tuple[float, SpiffeId]] = []
        self.running = 0
        self.most = 0

    async def fetch(self, identity: SpiffeId) -> Certificate:
        self.started.append((trio.current_time(), identity))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await trio.sleep(self.delay)
        finally:
            self.running -= 1
        if self.broken:
            raise Unavailable("the authority is away", hint="is istiod running?")
        serial = str(len(self.started))
        return Certificate(b"", b"", b"", identity, wall(), wall() + self.ttl, serial)

    def times(self) -> list[float]:
        begin = self.started[0][0]
        return [round(at - begin, 3) for at, _ in self.started]


def manager(authority: Authority, clock: Callable[[], float] = wall) -> SecretManager:
    return SecretManager(authority.fetch, clock=clock, rng=Middle())


@pytest.fixture
def authority() -> Authority:
    return Authority()


def test_renewal_is_at_half_of_what_is_left() -> None:
    assert renewal_time(1000.0, 0.0, Middle()) == 500.0
    assert renewal_time(1000.0, 900.0, Middle()) == 950.0
    assert renewal_time(1000.0, 2000.0, Middle()) == 2000.0


async def test_callers_join_one_fetch(
    authority: Authority, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    secrets = manager(authority)
    nursery.start_soon(secrets.run)
    found: list[Certificate] = []

    async def want() -> None:
        found.append(await secrets.get(SLEEP))

    async with trio.open_nursery() as callers:
        for _ in range(10):
            callers.start_soon(want)
    assert len(authority.started) == 1
    assert {certificate.serial for certificate in found} == {"1"}
    begin = trio.current_time()
    assert (await secrets.get(SLEEP)).serial == "1"
    assert trio.current_time() == begin


async def test_what_is_wanted_before_run_is_fetched_by_it(
    authority: Authority, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    secrets = manager(authority)
    secrets.prefetch(SLEEP)
    assert secrets.entries()[0].state == "Initializing"
    nursery.start_soon(secrets.run)
    assert (await secrets.get(SLEEP)).identity == SLEEP
    assert secrets.entries()[0].state == "Available"


async def test_a_cancelled_caller_leaves_the_fetch_to_others(
    authority: Authority, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    secrets = manager(authority)
    nursery.start_soon(secrets.run)
    with trio.move_on_after(0.5) as patience:
        await secrets.get(SLEEP)
    assert patience.cancelled_caught
    assert (await secrets.get(SLEEP)).serial == "1"
    assert len(authority.started) == 1


async def test_at_most_eight_fetch_at_once_and_the_urgent_go_first(
    authority: Authority, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    secrets = manager(authority)
    for number in range(20):
        secrets.prefetch(SpiffeId("cluster.local", "demo", f"sa{number:02}"))
    nursery.start_soon(secrets.run)
    await trio.sleep(0.5)
    begin = trio.current_time()
    await secrets.get(SLEEP)
    # The first eight were already under way; ours was in the next round, before four others.
    assert trio.current_time() - begin == pytest.approx(1.5)
    assert SLEEP in [identity for _, identity in authority.started[8:16]]
    await trio.sleep(10)
    assert authority.most == 8
    assert len(authority.started) == 21


async def test_a_certificate_is_renewed_at_half_life(
    authority: Authority, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    secrets = manager(authority)
    nursery.start_soon(secrets.run)
    assert (await secrets.get(SLEEP)).serial == "1"
    await trio.sleep(3600)
    assert (await secrets.get(SLEEP)).serial == "2"
    first, second = authority.times()[:2]
    assert second - first == pytest.approx(1 + 1800, abs=1)


async def test_a_failed_renewal_backs_off_and_the_old_certificate_serves(
    authority: Authority, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    authority.delay = 0
    secrets = manager(authority)
    nursery.start_soon(secrets.run)
    await secrets.get(SLEEP)
    authority.broken = True
    await trio.sleep(3590)
    assert (await secrets.get(SLEEP)).serial == "1"
    gaps = [b - a for a, b in zip(authority.times(), authority.times()[1:], strict=False)]
    assert gaps[1:10] == pytest.approx([1, 2, 4, 8, 16, 32, 64, 128, 150])
    assert "away" in secrets.entries()[0].error
    assert secrets.entries()[0].state == "Available"

    await trio.sleep(20)
    assert secrets.entries()[0].state == "Expired"
    with (
        pytest.raises(IdentityError, match="the authority is away") as refused,
        trio.move_on_after(5),
    ):
        await secrets.get(SLEEP)
    assert refused.value.hint == "is istiod running?"

    authority.broken = False
    with trio.fail_after(151):
        assert int((await secrets.get(SLEEP)).serial) > 1
    assert secrets.last_error(SLEEP) is None


async def test_one_failing_identity_does_not_delay_another(
    authority: Authority, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    authority.broken = True
    secrets = manager(authority)
    nursery.start_soon(secrets.run)
    secrets.prefetch(SLEEP)
    await trio.sleep(100)
    authority.broken = False
    begin = trio.current_time()
    await secrets.get(HTTPBIN)
    assert trio.current_time() - begin == pytest.approx(1.0)


async def test_a_caller_waits_for_a_retry_that_is_near_enough(
    authority: Authority, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    authority.broken = True
    secrets = manager(authority)
    nursery.start_soon(secrets.run)

    async def repair() -> None:
        await trio.sleep(2)
        authority.broken = False

    nursery.start_soon(repair)
    with trio.fail_after(30):
        assert (await secrets.get(SLEEP)).serial == "2"


async def test_a_forgotten_identity_is_fetched_no_more(
    authority: Authority, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    secrets = manager(authority)
    nursery.start_soon(secrets.run)

    async def forget_soon() -> None:
        await trio.sleep(0.5)
        secrets.forget(SLEEP)

    nursery.start_soon(forget_soon)
    with pytest.raises(IdentityError, match="left while"):
        await secrets.get(SLEEP)
    await trio.sleep(10_000)
    assert len(authority.started) == 1
    assert secrets.entries() == []
    secrets.forget(SLEEP)
    assert (await secrets.get(SLEEP)).serial == "2"


async def test_an_expired_answer_is_a_failure(
    authority: Authority, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    authority.ttl = -10
    secrets = manager(authority)
    nursery.start_soon(secrets.run)
    with pytest.raises(IdentityError, match="already expired"), trio.move_on_after(1.5):
        await secrets.get(SLEEP)
    await trio.sleep(100)
    assert len(authority.started) < 10


async def test_a_jump_of_the_wall_clock_is_noticed(
    authority: Authority, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    jump = 0.0
    secrets = manager(authority, lambda: wall() + jump)
    nursery.start_soon(secrets.run)
    await secrets.get(SLEEP)
    jump = 3000.0
    await trio.sleep(61)
    assert len(authority.started) == 2


async def test_bugs_are_not_swallowed(autojump_clock: trio.testing.MockClock) -> None:
    async def fetch(_identity: SpiffeId) -> Certificate:
        raise RuntimeError("a bug")

    secrets = SecretManager(fetch, clock=wall, rng=Middle())
    secrets.prefetch(SLEEP)
    with pytest.RaisesGroup(RuntimeError):
        await secrets.run()
