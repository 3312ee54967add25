"""A disk and a CPU that hold each other up, and events larger than their cache: by hand, and tick by tick."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.errors import ConfigError
from moert.schedule import Costs, Curve, Item, Place, Schedule, Timing, make_scheduler, makespan
from moert.types import ExpertId

TICK_S = 1 / 64


def event(hits: int, misses: int) -> Schedule:
    """The hits are computed first, then the misses in the order in which they are read."""
    items = [Item(ExpertId(0, n), 1, Place.HOST if n < hits else Place.DISK) for n in range(hits + misses)]
    return Schedule((), (), tuple(items), tuple(items[hits:]))


def costs_of(cpu_s: float, read_s: float, **others: Any) -> Costs:
    return Costs(Curve.constant(cpu_s), read_s=read_s, **others)


def times(schedule: Schedule, costs: Costs, room: int | None = None) -> tuple[float, float]:
    """(the makespan, when the disk is done)"""
    found = makespan(schedule, costs, room)
    return found.makespan_s, found.disk_s


@pytest.mark.parametrize("misses", [1, 2, 5])
def test_the_first_byte_comes_once_an_event(misses: int) -> None:
    costs = costs_of(1, 3, read_start_s=0.5, merge_s=0.25)
    assert times(event(0, misses), costs) == (0.5 + 3 * misses + 1 + 0.25, 0.5 + 3 * misses)
    assert times(event(2, 0), costs) == (2 + 0.25, 0), "what reads nothing waits for no byte"
    cpu_bound = costs_of(5, 3, read_start_s=0.5)
    assert times(event(0, misses), cpu_bound) == (0.5 + 3 + 5 * misses, 0.5 + 3 * misses)


@pytest.mark.parametrize(("misses", "read_s"), [(1, 4.0), (3, 4.0), (4, 2.5), (7, 2.5)])
def test_many_reads_of_an_event_take_another_time_each(misses: int, read_s: float) -> None:
    costs = costs_of(1, 4, read_few=3, read_many_s=2.5, read_start_s=0.5)
    whole_s = 0.5 + misses * read_s
    assert times(event(0, misses), costs) == (whole_s + 1, whole_s)
    assert times(event(4, misses), costs)[1] == whole_s, "hits are no reads"
    never = replace(costs, read_few=None)
    assert times(event(0, misses), never)[1] == 0.5 + 4 * misses


@pytest.mark.parametrize("misses", [0, 1, 3, 4])
def test_what_a_miss_takes_the_cpu_comes_before_its_reads(misses: int) -> None:
    costs = costs_of(1, 4, miss_start_s=0.5, miss_s=0.25, read_few=3, read_many_s=2)
    lead_s = {0: 0, 1: 0.75, 3: 1.25, 4: 0}[misses]
    each_s = 2 if misses == 4 else 4
    assert times(event(2, misses), costs)[0] == (lead_s + misses * each_s + 1 if misses else 2)
    assert costs.lead_s(misses) == lead_s
    assert costs.lead_s(misses, 0) == min(lead_s, 0.5), "what was asked for before is no work of this event"


@pytest.mark.parametrize(
    ("cpu_s", "read_s", "cpu_slowdown", "read_slowdown"),
    [(2, 8, 1.5, 1), (2, 8, 1, 2), (2, 8, 1.5, 2), (8, 2, 1.5, 1), (8, 2, 1, 2), (8, 2, 1.5, 2), (3, 3, 1.25, 1.5)],
)
def test_disk_and_cpu_slow_each_other_down(
    cpu_s: float, read_s: float, cpu_slowdown: float, read_slowdown: float
) -> None:
    """One hit is computed while one miss is read; what remains of the longer one goes on alone."""
    costs = costs_of(cpu_s, read_s, cpu_slowdown=cpu_slowdown, read_slowdown=read_slowdown)
    slow_cpu_s, slow_read_s = cpu_s * cpu_slowdown, read_s * read_slowdown
    if slow_cpu_s <= slow_read_s:
        disk_s = slow_cpu_s + (read_s - slow_cpu_s / read_slowdown)
        done_s = disk_s
    else:
        disk_s = slow_read_s
        done_s = slow_read_s + (cpu_s - slow_read_s / cpu_slowdown)
    assert times(event(1, 1), costs) == pytest.approx((done_s + cpu_s, disk_s))


def test_only_what_works_slows_down() -> None:
    costs = costs_of(3, 2, cpu_slowdown=2, read_slowdown=4, cpu_start_s=2)
    assert times(event(1, 1), costs) == (2 + 3 + 3, 2), "the CPU is not at work before it has begun"
    assert times(event(3, 0), costs) == (2 + 9, 0)
    waiting = replace(costs, cpu_start_s=0.0)
    assert times(event(0, 1), waiting) == (2 + 3, 2), "nor while it waits for the read"
    assert times(event(1, 1), waiting, 0) == (3 + 2 + 3, 3 + 2), "nor is a disk that has to wait for room"


@pytest.mark.parametrize(("cpu_s", "read_s"), [(1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("misses", [2, 4, 7])
def test_events_larger_than_their_cache(misses: int, cpu_s: int, read_s: int) -> None:
    costs, misses_only = costs_of(cpu_s, read_s), event(0, misses)
    serial = misses * (read_s + cpu_s)
    assert times(misses_only, costs, 1) == (serial, serial - cpu_s), "one slot: a read, its expert, the next read"
    assert times(misses_only, costs, 0) == (serial, serial - cpu_s), "what is needed next is read whatever the room"
    both = read_s + (misses - 1) * max(read_s, cpu_s) + cpu_s
    # The next is read while one is computed; from the third on, short reads wait for a slot.
    last_read = misses * read_s if read_s >= cpu_s else both - 2 * cpu_s + read_s
    assert times(misses_only, costs, 2) == (both, last_read)
    assert times(misses_only, costs) == times(misses_only, costs, misses) == (both, misses * read_s)


def test_a_hit_that_has_been_computed_makes_room() -> None:
    """By hand: one hit and two misses; 2 to compute one, 3 to read one, and the other way round."""
    assert times(event(1, 2), costs_of(2, 3)) == (8, 6)
    assert times(event(1, 2), costs_of(2, 3), 1) == (8, 6), "the hit is done before its slot is needed"
    assert times(event(1, 2), costs_of(2, 3), 0) == (2 + 2 * (3 + 2), 10)
    assert times(event(1, 2), costs_of(3, 2)) == (9, 4)
    assert times(event(1, 2), costs_of(3, 2), 1) == (9, 3 + 2)
    assert times(event(1, 2), costs_of(3, 2), 0) == (3 + 2 * (2 + 3), 10)


@pytest.mark.parametrize("room", [0, 1, 2, None])
def test_what_is_computed_last_may_be_read_first(room: int | None) -> None:
    """It keeps its slot meanwhile, and the other one is read all the same."""
    first, second = event(0, 2).read
    assert times(Schedule((), (), (second, first), (first, second)), costs_of(5, 3), room) == (2 * 3 + 2 * 5, 2 * 3)


def test_room_says_nothing_with_a_device() -> None:
    costs = Costs(Curve.constant(2), Curve.constant(1), move_s=1, read_s=3)
    assert makespan(event(1, 2), costs, 0) == makespan(event(1, 2), costs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("read_start_s", "read_many_s", "miss_s", "miss_start_s")
            for value in (-1, math.nan, math.inf)
        ),
        *((name, value) for name in ("cpu_slowdown", "read_slowdown") for value in (0.99, 0, math.nan, math.inf)),
    ],
)
def test_costs_that_are_none(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value} must be finite and"):
        costs_of(1, 1, **{name: value})


def followed(schedule: Schedule, costs: Costs, room: int) -> Timing:
    """Every tick both do a little of what they are at; a slot is taken by what is read and left by what is computed."""
    reads = [costs.read_s] * len(schedule.read)
    if costs.read_few is not None and len(reads) > costs.read_few:
        reads = [costs.read_many_s] * len(reads)
    if reads:
        reads[0] += costs.read_start_s
    runs = [costs.cpu(item.tokens) for item in schedule.cpu]
    place_of = {item.expert: place for place, item in enumerate(schedule.read)}
    needs = [place_of.get(item.expert, -1) for item in schedule.cpu]
    start_s, tick, disk_tick, n_read, n_run = costs.cpu_start_s, 0, 0, 0, 0
    if reads and (costs.read_few is None or len(reads) <= costs.read_few):
        for _ in range(round((costs.miss_start_s + costs.miss_s * len(reads)) / TICK_S)):
            tick += 1
    while n_read < len(reads) or n_run < len(runs):
        has_work = n_run < len(runs) and needs[n_run] < n_read
        computes = has_work and start_s <= 0
        transfers = n_read < len(reads) and (n_read - n_run < room or not has_work)
        tick += 1
        if transfers:
            reads[n_read] -= TICK_S / (costs.read_slowdown if computes else 1)
        if computes:
            runs[n_run] -= TICK_S / (costs.cpu_slowdown if transfers else 1)
        start_s -= TICK_S
        if transfers and reads[n_read] <= 0:
            n_read, disk_tick = n_read + 1, tick
        if computes and runs[n_run] <= 0:
            n_run += 1
    return Timing(0.0, tick * TICK_S + costs.merge_s, 0.0, disk_tick * TICK_S)


whole_seconds = st.integers(1, 6).map(float)
slowdowns = st.sampled_from([1.0, 1.25, 1.5, 2.0, 3.0])
machines = st.builds(
    Costs,
    st.tuples(whole_seconds, whole_seconds).map(lambda pair: Curve((1, 4), (min(pair), max(pair)))),
    read_s=whole_seconds,
    cpu_start_s=st.sampled_from([0.0, 1.0, 2.5]),
    merge_s=st.sampled_from([0.0, 0.5]),
    read_start_s=st.sampled_from([0.0, 1.0, 4.0]),
    miss_start_s=st.sampled_from([0.0, 0.5, 2.0]),
    miss_s=st.sampled_from([0.0, 0.25, 1.5]),
    read_few=st.sampled_from([None, 0, 2, 4]),
    read_many_s=whole_seconds,
    cpu_slowdown=slowdowns,
    read_slowdown=slowdowns,
)
picks = st.lists(st.tuples(st.sampled_from([Place.HOST, Place.DISK]), st.integers(1, 4)), min_size=1, max_size=10)


@settings(max_examples=150, deadline=None)
@given(picks=picks, costs=machines, room=st.integers(0, 5), shuffled=st.booleans(), data=st.data())
def test_an_event_tick_by_tick(
    picks: list[tuple[Place, int]], costs: Costs, room: int, shuffled: bool, data: st.DataObject
) -> None:
    items = [Item(ExpertId(0, n), tokens, place) for n, (place, tokens) in enumerate(picks)]
    schedule = make_scheduler("cpu_all").plan(items, costs)
    if shuffled:
        on_cpu, read = (tuple(data.draw(st.permutations(part))) for part in (schedule.cpu, schedule.read))
        schedule = schedule._replace(cpu=on_cpu, read=read)
    found, expected = makespan(schedule, costs, room), followed(schedule, costs, room)
    # Whatever ends within a tick ends at its end, and may hold the other up for as long, three times slower.
    off = 4 * TICK_S * (len(schedule.read) + len(schedule.cpu) + 1)
    assert found == pytest.approx(expected, abs=off)
    unlimited = makespan(schedule, costs)
    assert unlimited == makespan(schedule, costs, len(schedule.read))
    assert unlimited == pytest.approx(followed(schedule, costs, len(schedule.read)), abs=off)
