"""What a reading of the memory calls for, in numbers alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moert.plan import LayerNeed, default_budget
from moert.pressure import (
    EPISODE_S,
    NEAR_FLOOR,
    STALL_WAIT_S,
    STALLED_SHARE,
    PressureGovernor,
    Relief,
    describe,
    floor_bytes,
    room_to_grow,
)
from moert.tiers.memory import MemoryLimit, MemoryReport

MIB, GIB = 1 << 20, 1 << 30
FLOOR = 256 * MIB
"""Of a bound of 64 GiB."""


def bound(available: int, *, limit: int = 64 * GIB, stalled: float | None = None, name: str = "bound") -> MemoryLimit:
    return MemoryLimit(name, limit, limit - available, 0, stalled)


def decide(*bounds: MemoryLimit, slots: int = 8 * GIB, least: int = GIB, now_s: float = 0.0) -> Relief | None:
    return PressureGovernor().decide(MemoryReport(bounds), slots, least, now_s)


@pytest.mark.parametrize(
    ("limit", "floor"),
    [(0, 64 * MIB), (GIB, 64 * MIB), (2 * GIB, 2 * GIB // 20), (5 * GIB, 256 * MIB), (1 << 45, 256 * MIB)],
)
def test_floor_is_a_share_within_limits(limit: int, floor: int) -> None:
    assert floor_bytes(limit) == floor


@given(limit=st.integers(1 * GIB, 1 << 42), used_share=st.floats(0, 1))
def test_the_default_budget_is_not_short_from_the_start(limit: int, used_share: float) -> None:
    available = int(limit * (1 - used_share))
    needs = [LayerNeed("layer", 1 << 20, MIB, MIB, 1)]
    taken = default_budget(needs, available).nbytes
    assert taken is not None
    if taken > 1:  # else there was nothing to take
        assert decide(bound(available - taken, limit=limit), slots=taken, least=MIB) is None


def test_short_is_below_the_floor_of_any_bound() -> None:
    assert decide(bound(FLOOR)) is None
    assert decide(bound(FLOOR - 1)) is not None
    assert decide(bound(40 * GIB), bound(30 * MIB, limit=GIB)) is not None
    relief = decide(bound(200 * MIB, name="little"), bound(100 * MIB, name="less"))
    assert relief is not None
    assert relief.limit.source == "less"


def test_stalls_count_only_near_the_floor() -> None:
    """A neighbour that stalls in a group of its own shows on the whole machine too, and no memory of ours helps it."""
    assert decide(bound(NEAR_FLOOR * FLOOR - 1, stalled=STALLED_SHARE)) is not None
    assert decide(bound(NEAR_FLOOR * FLOOR - 1, stalled=STALLED_SHARE - 0.001)) is None
    assert decide(bound(NEAR_FLOOR * FLOOR, stalled=1.0)) is None
    assert decide(bound(NEAR_FLOOR * FLOOR - 1, stalled=None)) is None
    assert decide(bound(40 * GIB, stalled=1.0), bound(NEAR_FLOOR * FLOOR - 1)) is None, "the stalls of another bound"


def test_a_step_brings_back_twice_the_floor_or_an_eighth() -> None:
    for available in (0, 100 * MIB, FLOOR - 1):
        relief = decide(bound(available), slots=2 * GIB)
        assert relief is not None
        assert relief.target_bytes == 2 * GIB - (2 * FLOOR - available)
    relief = decide(bound(FLOOR - 1), slots=80 * GIB)
    assert relief is not None
    assert relief.target_bytes == 70 * GIB


@given(
    available=st.integers(0, 2 * GIB),
    slots=st.integers(0, 64 * GIB),
    least=st.integers(0, 8 * GIB),
    stalled=st.none() | st.floats(0, 1),
)
def test_a_target_is_never_below_the_least_nor_above_what_there_is(
    available: int, slots: int, least: int, stalled: float | None
) -> None:
    relief = decide(bound(available, stalled=stalled), slots=slots, least=min(slots, least))
    if available >= NEAR_FLOOR * FLOOR:
        assert relief is None
    if relief is not None:
        assert min(slots, least) <= relief.target_bytes <= slots
        freed = slots - relief.target_bytes
        assert relief.target_bytes == min(slots, least) or available + freed >= 2 * FLOOR


def test_readings_that_go_on_are_one_episode() -> None:
    governor = PressureGovernor()
    short, enough = MemoryReport((bound(0),)), MemoryReport((bound(GIB),))
    first = governor.decide(short, 8 * GIB, GIB, 0.0)
    second = governor.decide(short, 7 * GIB, GIB, 0.5)
    assert first is not None
    assert second is not None
    assert (first.is_new, second.is_new) == (True, False)
    assert governor.decide(enough, 6 * GIB, GIB, 10.0) is None
    again = governor.decide(short, 6 * GIB, GIB, 0.5 + EPISODE_S - 0.1)
    assert again is not None
    assert not again.is_new, "a moment of quiet does not end it"
    later = governor.decide(short, 5 * GIB, GIB, 0.5 + 2 * EPISODE_S)
    assert later is not None
    assert later.is_new


def test_at_the_least_it_speaks_once_an_episode() -> None:
    governor = PressureGovernor()
    short = MemoryReport((bound(0),))
    relief = governor.decide(short, GIB, GIB, 0.0)
    assert relief is not None
    assert relief.is_new
    assert relief.target_bytes == GIB
    assert governor.decide(short, GIB, GIB, 1.0) is None
    assert governor.decide(short, GIB, GIB, 1.0 + EPISODE_S) is not None


def test_old_stalls_do_not_count_twice() -> None:
    """The mean over 10 s still tells of the time before memory was given back."""
    governor = PressureGovernor()
    stalling = MemoryReport((bound(2 * FLOOR, stalled=0.5),))
    assert governor.decide(stalling, 8 * GIB, GIB, 0.0) is not None
    assert governor.decide(stalling, 7 * GIB, GIB, STALL_WAIT_S - 0.1) is None
    assert governor.decide(MemoryReport((bound(0, stalled=0.5),)), 7 * GIB, GIB, STALL_WAIT_S - 0.1) is not None
    assert governor.decide(stalling, 6 * GIB, GIB, STALL_WAIT_S + 1) is None, "the wait begins anew"
    assert governor.decide(stalling, 6 * GIB, GIB, 2 * STALL_WAIT_S + 1) is not None


def test_nothing_is_asked_for_twice_if_the_first_time_helped() -> None:
    """A machine whose memory is what the tier and the others leave: the tier settles, whatever the others take."""
    governor = PressureGovernor()
    slots, total, now_s = 40 * GIB, 64 * GIB, 0.0
    sizes = []
    for others in (20 * GIB, 24 * GIB, 24 * GIB, 24 * GIB, 29 * GIB, 29 * GIB, 29 * GIB, 10 * GIB, 10 * GIB):
        relief = governor.decide(MemoryReport((bound(total - others - slots),)), slots, GIB, now_s)
        slots, now_s = slots if relief is None else relief.target_bytes, now_s + 0.5
        sizes.append(slots)
    assert sizes[0] == 40 * GIB
    assert sizes[1] == sizes[2] == sizes[3] == 35 * GIB
    assert sizes[4] == sizes[5] == sizes[6] == 35 * GIB * 7 // 8
    assert sizes[7] == sizes[8] == sizes[6], "it does not grow by itself"


def test_room_to_grow_keeps_every_floor() -> None:
    room, limit = room_to_grow(MemoryReport((bound(10 * GIB), bound(3 * GIB, limit=4 * GIB, name="group"))))
    assert room == 3 * GIB - floor_bytes(4 * GIB)
    assert limit.source == "group"
    assert room_to_grow(MemoryReport((bound(0),)))[0] == -FLOOR


def test_the_words_have_the_numbers_and_the_advice() -> None:
    short = decide(bound(100 * MIB, name="/sys/group/memory.max"), slots=2 * GIB)
    assert short is not None
    text = describe(short, 2 * GIB, GIB)
    for part in ("100.0 MiB available: /sys/group/memory.max", "256.0 MiB", "from 2.0 GiB to 1.0 GiB", "moert.resize"):
        assert part in text
    assert "shrink_on_pressure=False" in text
    stalled = decide(bound(2 * FLOOR, stalled=0.25))
    assert stalled is not None
    assert "tasks wait for it 25% of the time" in describe(stalled, 2 * GIB, GIB)
    assert "at its least already, 1.0 GiB" in describe(short, GIB, GIB)
