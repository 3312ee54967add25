"""Schedulers: the exact one against every schedule there is, all of them against the rules."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.errors import ConfigError
from moert.schedule import (
    Costs,
    Curve,
    Item,
    Place,
    Schedule,
    make_scheduler,
    makespan,
    scheduler_names,
)
from moert.schedule.base import arrange
from moert.types import ExpertId

each = pytest.mark.parametrize("name", scheduler_names())


def items_of(places: Sequence[Place], tokens: Sequence[int]) -> list[Item]:
    return [Item(ExpertId(0, n), count, place) for n, (place, count) in enumerate(zip(places, tokens, strict=True))]


seconds = st.floats(0, 10).map(lambda x: round(x, 3))


@st.composite
def machines(draw: st.DrawFn, has_device: bool = True) -> Costs:
    ascending = sorted(draw(st.lists(seconds, min_size=4, max_size=4)))
    return Costs(
        cpu=Curve((1, 2, 3, 4), tuple(ascending)),
        device=Curve.constant(draw(seconds)) if has_device else None,
        move_s=draw(seconds),
        read_s=draw(seconds),
        cpu_start_s=draw(seconds),
        merge_s=draw(seconds),
    )


def events(places: Iterable[Place], most: int) -> st.SearchStrategy[list[Item]]:
    one = st.tuples(st.sampled_from(list(places)), st.integers(1, 4))
    return st.lists(one, min_size=1, max_size=most).map(lambda picks: items_of(*zip(*picks, strict=True)))


def least(items: list[Item], costs: Costs, *, orders: bool) -> float:
    """The least makespan of every assignment and, if asked for, every order of reading, moving and computing."""
    found = math.inf
    on_disk = [item for item in items if item.place is Place.DISK]
    for on_cpu in itertools.product((False, True), repeat=len(items)):
        chosen = {item.expert for item, cpu in zip(items, on_cpu, strict=True) if cpu}
        for order in itertools.permutations(items) if orders else [tuple(items)]:
            device = tuple(item for item in order if item.expert not in chosen)
            fetch = tuple(item for item in device if item.place is not Place.DEVICE)
            here = tuple(item for item in device if item.place is Place.DEVICE)
            cpu = tuple(item for item in order if item.expert in chosen)
            for read in itertools.permutations(on_disk):
                found = min(found, makespan(Schedule((*here, *fetch), fetch, cpu, read), costs).makespan_s)
    return found


@settings(max_examples=60, deadline=None)
@given(items=events((Place.DEVICE, Place.HOST), 10), costs=machines())
def test_exact_is_the_best_of_every_assignment(items: list[Item], costs: Costs) -> None:
    found = makespan(make_scheduler("exact").plan(items, costs), costs).makespan_s
    assert found == pytest.approx(least(items, costs, orders=False), rel=1e-9, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(items=events(Place, 4), costs=machines())
def test_exact_with_a_disk_is_the_best_of_every_order_too(items: list[Item], costs: Costs) -> None:
    found = makespan(make_scheduler("exact").plan(items, costs), costs).makespan_s
    assert found == pytest.approx(least(items, costs, orders=True), rel=1e-9, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(items=events(Place, 40), costs=machines())
def test_exact_is_the_best_of_all_numbers_of_each_place(items: list[Item], costs: Costs) -> None:
    """Events too large to try every assignment: the CPU takes the least loaded ones of each place."""
    places = [sorted((item for item in items if item.place is place), key=lambda item: item.tokens) for place in Place]
    least = math.inf
    for numbers in itertools.product(*(range(len(place) + 1) for place in places)):
        cpu = [item for place, n in zip(places, numbers, strict=True) for item in place[:n]]
        device = [item for place, n in zip(places, numbers, strict=True) for item in reversed(place[n:])]
        least = min(least, makespan(arrange(cpu, device, costs), costs).makespan_s)
    found = makespan(make_scheduler("exact").plan(items, costs), costs).makespan_s
    assert found == pytest.approx(least, rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(items=events((Place.HOST, Place.DISK), 5), costs=machines(has_device=False))
def test_without_a_device_reading_and_computing_overlap_as_well_as_they_can(items: list[Item], costs: Costs) -> None:
    found = makespan(make_scheduler("exact").plan(items, costs), costs)
    best = min(
        makespan(Schedule((), (), cpu, read), costs).makespan_s
        for cpu in itertools.permutations(items)
        for read in itertools.permutations(item for item in items if item.place is Place.DISK)
    )
    assert found.makespan_s == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert found.device_s == found.link_s == 0


@each
@settings(max_examples=60, deadline=None)
@given(items=events(Place, 12), costs=machines(), has_device=st.booleans())
def test_every_expert_is_somewhere_once(name: str, items: list[Item], costs: Costs, has_device: bool) -> None:
    if not has_device:
        costs = Costs(costs.cpu, read_s=costs.read_s)
    schedule = make_scheduler(name).plan(items, costs)
    assert sorted([*schedule.device, *schedule.cpu]) == sorted(items)
    assert sorted(schedule.read) == sorted(item for item in items if item.place is Place.DISK)
    assert sorted(schedule.fetch) == sorted(item for item in schedule.device if item.place is not Place.DEVICE)
    assert has_device or not schedule.device
    timing = makespan(schedule, costs)
    assert timing.makespan_s == max(timing.device_s, timing.cpu_s) >= 0
    if has_device and Place.DISK not in {item.place for item in items}:
        best = makespan(make_scheduler("exact").plan(items, costs), costs).makespan_s
        assert timing.makespan_s >= best - 1e-9


def test_a_schedule_is_followed_step_by_step() -> None:
    """By hand: read 2 each, move 3 each, run 1 each, CPU 5 for one token, 1 to start, .5 to merge."""
    costs = Costs(Curve.constant(5), Curve.constant(1), move_s=3, read_s=2, cpu_start_s=1, merge_s=0.5)
    here, host, disk, disk2 = items_of([Place.DEVICE, Place.HOST, Place.DISK, Place.DISK], [1, 1, 1, 1])
    timing = makespan(Schedule((here, host, disk), (host, disk), (disk2,), (disk2, disk)), costs)
    assert timing.disk_s == 4
    assert timing.link_s == 7  # the second move begins at 4
    assert timing.device_s == 8
    assert timing.cpu_s == 2 + 5 + 0.5
    assert timing.makespan_s == 8


def test_what_is_fetched_is_the_most_loaded_and_then_the_most_valuable() -> None:
    costs = Costs(Curve.proportional(1.0), Curve.constant(0.1), move_s=1.5)
    items = [
        Item(ExpertId(0, n), tokens, Place.HOST, value) for n, (tokens, value) in enumerate([(1, 5), (1, 9), (3, 0)])
    ]
    assert [item.expert.expert for item in make_scheduler("exact").plan(items, costs).fetch] == [2]
    even = [Item(ExpertId(0, n), 1, Place.HOST, value) for n, value in enumerate([5, 9, 7])]
    assert {item.expert.expert for item in make_scheduler("exact").plan(even, costs).fetch} == {1}


def test_published_schedulers_do_what_was_published() -> None:
    costs = Costs(Curve.constant(2), Curve.constant(1), move_s=6, cpu_start_s=0.5)
    hits = items_of([Place.DEVICE] * 2 + [Place.HOST] * 4, [3, 1, 1, 2, 4, 1])

    def on_cpu(name: str) -> list[int]:
        return sorted(item.expert.expert for item in make_scheduler(name).plan(hits, costs).cpu)

    assert on_cpu("static_split") == [2, 3, 4, 5]
    assert on_cpu("fetch_all") == []
    assert on_cpu("cpu_all") == [0, 1, 2, 3, 4, 5]
    assert on_cpu("fiddler") == [2, 3, 4, 5]
    # q* = 2 / (2 + 6) of 4 misses: the most loaded one is fetched.
    assert on_cpu("freetoken") == [2, 3, 5]
    # device 0 (1), cpu 5 (2.5), device 1 (2), cpu 2 (4.5), cpu 3 (6.5), then 7 on the device against 8.5.
    assert on_cpu("hybrimoe") == [2, 3, 5]
    # Misses differ by 4: cpu 2, cpu 4, then 6 is not less than 6 (device), cpu 6. Hits differ by 1: device 7, device 8.
    assert on_cpu("dali") == [2, 3, 5]


def python_s() -> float:
    """What some Python takes that does not depend on any of moert's."""
    begin = time.perf_counter()
    total = 0
    for n in range(400):
        total += n % 7
    return time.perf_counter() - begin


@pytest.mark.parametrize("places", [(Place.DEVICE, Place.HOST), tuple(Place), (Place.HOST, Place.DISK), (Place.HOST,)])
@pytest.mark.parametrize("batch", [1, 4])
def test_exact_takes_50_us_for_ten_experts_a_token_and_four_tokens(places: Sequence[Place], batch: int) -> None:
    """At most, where `python_s` is 12 us, and as much longer as that is; the least of many times of each."""
    has_device = places != (Place.HOST, Place.DISK)
    device = Curve.constant(1e-4) if has_device else None
    costs = Costs(Curve((1, 4), (2e-4, 5e-4)), device, move_s=4e-4, read_s=3e-4, cpu_start_s=1e-5, merge_s=1e-5)
    n = 10 * batch
    items = items_of([places[i % len(places)] for i in range(n)], [1 + i // 3 % batch for i in range(n)])
    scheduler = make_scheduler("exact")
    taken = loop = math.inf
    for _ in range(1000):
        begin = time.perf_counter()
        scheduler.plan(items, costs)
        taken = min(taken, time.perf_counter() - begin)
        loop = min(loop, python_s())
    assert taken < 50e-6 * max(1, loop / 12e-6)


def test_curves_go_through_their_points_and_on() -> None:
    curve = Curve((1, 4, 8), (1.0, 2.5, 2.5))
    assert [curve(n) for n in (1, 2, 4, 6, 8, 100)] == [1.0, 1.5, 2.5, 2.5, 2.5, 2.5]
    assert Curve.proportional(0.5)(7) == pytest.approx(3.5)
    assert Curve.constant(3.0)(1000) == 3.0
    assert Curve((4, 8), (1.0, 2.0))(1) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Curve((), ()), "as many times as token counts"),
        (lambda: Curve((1, 2), (1.0,)), "as many times as token counts"),
        (lambda: Curve((2, 2), (1.0, 1.0)), "must ascend"),
        (lambda: Curve((0, 2), (1.0, 1.0)), "must ascend from 1"),
        (lambda: Curve((1, 2), (2.0, 1.0)), "cannot take less time"),
        (lambda: Curve((1,), (math.nan,)), "finite"),
        (lambda: Curve((1,), (-1.0,)), "not negative"),
        (lambda: Costs(Curve.constant(1), move_s=-1), "move_s=-1"),
        (lambda: Costs(Curve.constant(1), read_s=math.inf), "read_s=inf"),
        (lambda: Costs(Curve.constant(1), merge_s=math.nan), "merge_s=nan"),
        (lambda: make_scheduler("best"), "no scheduler named 'best'; there are cpu_all, dali, exact"),
    ],
)
def test_bad_costs_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=message):
        make()
