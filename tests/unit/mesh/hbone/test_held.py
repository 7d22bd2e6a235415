"""What stalled readers may hold together, and who is cut when that is too much."""

from __future__ import annotations

from mesh.hbone.held import HeldBytes


def test_a_part_that_holds_little_is_spared_under_pressure() -> None:
    node = HeldBytes(800)
    greedy, modest = HeldBytes(whole=node), HeldBytes(whole=node)
    assert greedy.hold(790)
    assert not greedy.hold(20)
    assert modest.hold(100)
    assert not modest.hold(1)
    modest.release(101)
    greedy.release(20)
    assert node.used == 790
    assert greedy.hold(10)
    greedy.release(800)
    assert (node.used, greedy.used, modest.used) == (0, 0, 0)
