"""What is worth reading ahead of time: the best choice by brute force, and what it is decided by."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.predictors.base import Prediction
from moert.runtime.expectations import START, Expectations, keys_of
from moert.runtime.link import IdleTimes, Link
from moert.schedule import Costs, Curve, Item, Place, make_scheduler, makespan
from moert.schedule._prefetch import Wanted, impacts, worth_reading
from moert.types import ExpertId


def e(expert: int, layer: int = 0) -> ExpertId:
    return ExpertId(layer, expert)


def sixteenths(most: int) -> st.SearchStrategy[float]:
    """Numbers between reads' ends as often as at them."""
    return st.integers(0, most).map(lambda n: n / 16)


def expected_gain(order: tuple[Wanted, ...], idle_s: float) -> float:
    """Seconds gained by reading these one after the other, from what happens to each read."""
    total = begin = 0.0
    for one in order:
        end = begin + one.read_s
        saved = max(0.0, min(end, idle_s) - begin)
        # Nothing more is begun once others are needed.
        delay = min(one.begun_s, max(0.0, end - max(begin, idle_s)))
        total += one.chance * saved - (1 - one.chance) * delay
        begin = end
    return total


@settings(max_examples=150, deadline=None)
@given(
    chances=st.lists(sixteenths(16), max_size=5),
    leaving=st.lists(sixteenths(4) | sixteenths(16), max_size=5).map(sorted),
    idle_s=sixteenths(40),
    begun_s=st.sampled_from([0.0, 0.25, math.inf]),
)
def test_no_other_choice_gains_more_where_experts_are_of_one_size(
    chances: list[float], leaving: list[float], idle_s: float, begun_s: float
) -> None:
    wanted = [Wanted(e(number), chance, 1.0, begun_s) for number, chance in enumerate(chances)]
    by_id = {one.expert: one for one in wanted}

    def gain(order: tuple[Wanted, ...]) -> float:
        return expected_gain(order, idle_s) - sum(leaving[: len(order)])

    chosen = tuple(by_id[expert] for expert in worth_reading(wanted, idle_s, leaving))
    most = min(len(wanted), len(leaving))
    best = max(gain(some) for n in range(most + 1) for some in permutations(wanted, n))
    assert gain(chosen) == pytest.approx(best, abs=1e-9)


def test_what_is_read_in_idle_time_costs_nothing_and_what_is_not_delays_others() -> None:
    assert worth_reading([Wanted(e(1), 0.01, 1.0)], 1.0) == [e(1)]
    assert worth_reading([Wanted(e(1), 0.01, 1.0)], 1.0, [0.5]) == []
    assert worth_reading([Wanted(e(1), 0.01, 1.0)], 1.0, []) == [], "there is no room"
    assert worth_reading([Wanted(e(1), 0.5, 1.0), Wanted(e(2), 0.4, 1.0)], 2.0, [0.0, 0.45]) == [e(1)]
    assert worth_reading([Wanted(e(1), 0.49, 1.0)], 0.5) == []
    assert worth_reading([Wanted(e(1), 0.51, 1.0)], 0.5) == [e(1)]
    assert worth_reading([Wanted(e(1), 0.35, 1.0, 0.25)], 0.5) == [e(1)], "a quarter of it delays others, not a half"
    assert worth_reading([Wanted(e(1), 0.33, 1.0, 0.25)], 0.5) == []
    assert worth_reading([Wanted(e(1), 1.0, 1.0)], 0.0) == []
    assert worth_reading([Wanted(e(1), 0.6, 1.0), Wanted(e(2), 0.9, 1.0), Wanted(e(3), 0.6, 1.0)], 1.5) == [e(2), e(1)]
    small_first = [Wanted(e(1), 0.6, 2.0), Wanted(e(2), 0.6, 0.5)]
    assert worth_reading(small_first, 1.0) == [e(2)]
    assert worth_reading([Wanted(e(1), 0.9, 2.0), Wanted(e(2), 1.0, 0.5)], 2.0) == [e(2), e(1)], "the most in a second"


def test_impact_is_what_the_event_becomes_shorter_by() -> None:
    costs = Costs(Curve.constant(3.0), Curve.constant(1.0), move_s=10.0)
    items = [Item(e(0), 1, Place.DEVICE), Item(e(1), 1, Place.HOST), Item(e(2), 1, Place.HOST)]
    scheduler = make_scheduler("hybrimoe")
    found = impacts(items, {e(1), e(2)}, scheduler, costs)
    assert set(found) == {e(1), e(2)}
    before = makespan(scheduler.plan(items, costs), costs).makespan_s
    with_it = [items[0], items[1]._replace(place=Place.DEVICE), items[2]]
    assert found[e(1)] == before - makespan(scheduler.plan(with_it, costs), costs).makespan_s > 0


def test_a_link_is_as_fast_as_bytes_that_were_waited_for() -> None:
    link = Link()
    assert link.read_s(100) is None
    link.arrive(100, True, 5.0)
    assert link.read_s(100) is None, "nobody waited"
    link.demand(10.0)
    link.demand(11.0)
    link.arrive(100, False, 12.0)
    link.arrive(300, True, 14.0)
    assert link.read_s(200) == pytest.approx(2.0)
    assert link.drained == 14.0
    link.demand(20.0)
    link.forget()
    link.demand(30.0)
    link.arrive(400, True, 34.0)
    assert link.read_s(200) == pytest.approx(2.0)


def test_idle_time_is_from_the_last_read_to_the_next_event() -> None:
    idle = IdleTimes(2)
    assert idle.after(0, True) is None
    idle.begin(0, 10.0, 3.0)
    idle.begin(1, 12.0, 11.5)
    assert (idle.after(0, True), idle.after(0, False)) == (0.5, None)
    idle.begin(0, 15.0, 11.5)
    assert (idle.after(1, True), idle.after(1, False)) == (None, 3.0)
    idle.begin(0, 99.0, 11.5)
    assert idle.after(0, False) is None, "a layer was left out"
    idle.begin(1, 100.0, 99.5)
    assert idle.after(0, True) == 0.5
    now = 100.0
    for _ in range(200):
        idle.begin(0, now + 3, 0.0)
        idle.begin(1, now + 5, now + 4)
        now += 5
    assert idle.after(0, True) == pytest.approx(1.0, rel=1e-3)
    before = idle.after(1, False)
    assert before == pytest.approx(3.0, rel=1e-3)
    idle.begin(0, 1e6, 0.0)
    after = idle.after(1, False)
    assert after is not None
    assert before < after < 2 * before, "a pause of the user counts as idle time"
    assert idle.until(1) is None
    idle.enter(1, 1e6 + 1)
    idle.begin(1, 1e6 + 3, 0.0)
    assert idle.until(1) == 2.0


def test_chances_are_learned_for_ranks_or_for_levels_of_probability() -> None:
    assert keys_of(Prediction(0, [2, 0, 1], [0, 1, 1])) == [0, 1, 1]
    assert keys_of(Prediction(0, [2, 0, 1], [0, 1, 2], [1.0, 0.9, 0.2])) == [-8, -8, -2]
    known = Expectations()
    for step in range(300):
        needed = {e(0)} if step % 2 else set()
        found = known.expect(0, "look", {e(0): 1, e(1): 2})
        assert known.expect(0, "second", {e(0): -8 if needed else -2}).keys() == {e(0)}
        assert known.expected(0) == {e(0), e(1)}
        assert known.begin(0, needed) == {e(0), e(1)} - needed
        assert known.expected(0) == set()
    assert found[e(0)] == pytest.approx(0.5, abs=0.1)
    assert found[e(1)] < 0.02
    assert known.expect(0, "second", {e(0): -8})[e(0)] > 0.98
    assert known.expect(0, "second", {e(0): -2})[e(0)] < 0.02
    assert known.expect(0, "third", {e(0): -8})[e(0)] == START
    assert known.expect(1, "second", {e(0, 1): -8})[e(0, 1)] == START
