"""What of a wait for a record is the disk's, and what the CPU's."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from moert.calibration._solving import solve
from moert.schedule import Costs, Curve, Item, Place, make_scheduler, makespan
from moert.types import ExpertId

TOP_K = 4
reads = st.integers(5, 40).map(lambda n: n / 10)
small = st.sampled_from([0.0, 0.3, 1.0])


def event(costs: Costs, misses: int) -> tuple[float, float]:
    """(what it takes, how long the disk is at work in it)"""
    items = [Item(ExpertId(0, e), 1, Place.DISK if e < misses else Place.HOST) for e in range(TOP_K)]
    timing = makespan(make_scheduler("cpu_all").plan(items, costs), costs)
    return timing.makespan_s, timing.disk_s - costs.lead_s(misses) if misses else 0.0


@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(cpu=reads, read=reads, start=small, first=small, each=small, slow=st.sampled_from([1.0, 1.25]))
def test_what_a_machine_takes_is_found_out(
    cpu: float, read: float, start: float, first: float, each: float, slow: float
) -> None:
    true = Costs(
        Curve.constant(cpu),
        read_s=read,
        read_start_s=start,
        miss_start_s=first,
        miss_s=each,
        cpu_slowdown=slow,
        read_slowdown=slow,
    )
    seen = {n: event(true, n) for n in (1, TOP_K)}
    none_s = event(true, 0)[0]
    found = solve(
        replace(true, read_s=2.0, read_start_s=0.0, miss_start_s=0.0, miss_s=0.0),
        TOP_K,
        {n: whole_s - none_s for n, (whole_s, _) in seen.items()},
        {n: disk_s for n, (_, disk_s) in seen.items()},
    )
    again = replace(true, **found._asdict())
    for n in (1, TOP_K):
        assert event(again, n) == pytest.approx(seen[n], abs=1e-2)
    assert found == pytest.approx((read, start, each, first), abs=1e-2)


def test_measured_on_a_machine() -> None:
    """Milliseconds of one, by hand: 3.06 of the disk for each record and 0.43 more for the first."""
    costs = Costs(Curve.constant(0.2575), read_s=3.0)
    found = solve(costs, TOP_K, {1: 3.188, TOP_K: 13.137}, {1: 3.485, TOP_K: 12.651})
    assert found == pytest.approx((9.166 / 3, 3.485 - 9.166 / 3, 0.261, 0.215), abs=1e-3)


def test_a_wait_shorter_than_the_disk_is_at_work_is_all_the_disks() -> None:
    costs = Costs(Curve.constant(0.1), read_s=3.0)
    found = solve(costs, TOP_K, {1: 2.7, TOP_K: 11.7}, {1: 3.5, TOP_K: 12.5})
    assert (found.miss_s, found.miss_start_s) == (0, 0)
    assert (found.read_s, found.read_start_s) == pytest.approx((3.0, 0.0), abs=1e-3)


def test_with_one_number_of_misses_all_that_is_left_is_each_miss_s_own() -> None:
    found = solve(Costs(Curve.constant(0.5), read_s=3.0), 1, {1: 3.4}, {1: 3.0})
    assert found == pytest.approx((3.0, 0.0, 0.4, 0.0), abs=1e-3)
