"""Replay in time, and the bound on it: against small machines done by hand, brute force, and linear programs."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from simulate_support import random_traces, trace_of
from trace_support import ROOT, real_trace

from moert.errors import CapacityError, ConfigError
from moert.policies.min_bypass import MinBypass
from moert.schedule import Costs, Curve, Promotion, scheduler_names
from moert.simulate import simulate
from moert.simulate.bound import least_seconds
from moert.simulate.link import Link
from moert.simulate.steps import first_tokens
from moert.simulate.timed import simulate_time
from moert.trace import Phase
from moert.types import ExpertId

sys.path.insert(0, str(ROOT / "bench"))
import schedules

# One process compiles the replays.
pytestmark = pytest.mark.xdist_group("compiled")

seconds = st.floats(0, 10).map(lambda x: round(x, 3))
devices = st.builds(
    lambda cpu, device, move, start, merge: Costs(
        Curve.proportional(cpu), Curve.constant(device), move_s=move, cpu_start_s=start, merge_s=merge
    ),
    *[seconds] * 5,
)
POLICIES = ("lru", "ema", "lfu", "belady", "min_bypass")


@given(accesses=st.integers(0, 30), share=st.floats(0, 1), other_s=seconds, costs=devices)
def test_the_bound_is_the_linear_program(accesses: int, share: float, other_s: float, costs: Costs) -> None:
    misses = int(share * accesses)
    found = least_seconds(accesses=accesses, misses=misses, other_s=other_s, costs=costs)
    device_s, cpu_s = costs.device_s(1), costs.cpu_s(1)
    # Variables: the time, transfers x, uses on the CPU y.
    rows = [[-1, 0, -device_s], [-1, costs.move_s, 0], [-1, 0, cpu_s], [0, -1, -1]]
    limits = [-other_s - device_s * accesses, 0, -other_s, -misses]
    program = linprog([1, 0, 0], rows, limits, bounds=[(0, None), (0, None), (0, accesses)])
    assert found == pytest.approx(program.fun, rel=1e-6, abs=1e-6)


def test_the_bound_without_a_device_is_the_disk_or_the_cpu() -> None:
    costs = Costs(Curve.constant(2.0), read_s=5.0)
    assert least_seconds(accesses=10, misses=3, other_s=1.0, costs=costs) == 21
    assert least_seconds(accesses=10, misses=9, other_s=1.0, costs=costs) == 45
    with pytest.raises(ConfigError, match="no bound for 11 misses of 10"):
        least_seconds(accesses=10, misses=11, other_s=0, costs=costs)


def least_work(picks: list[list[int]], n_experts: int, slots: int, costs: Costs, other_s: float) -> float:
    """The least of the largest of the device's, the link's and the CPU's work over every way to run these events.

    Before each event anything may be moved; what is on the device afterwards is any set that fits. Nothing waits for
    anything else, so no real schedule takes less.
    """
    experts = range(n_experts)
    sets = [frozenset(some) for n in range(slots + 1) for some in itertools.combinations(experts, n)]
    # What was cached -> the (transfers, uses on the CPU) that it can have taken so far.
    states: dict[frozenset[int], set[tuple[int, int]]] = {frozenset(): {(0, 0)}}
    for event in picks:
        after: dict[frozenset[int], set[tuple[int, int]]] = {}
        for held, costs_so_far in states.items():
            for n in range(len(event) + 1):
                for on_cpu in itertools.combinations(event, n):
                    needed = {*event}.difference(on_cpu) - held
                    for kept in sets:
                        moved = len(needed | (kept - held))
                        found = after.setdefault(kept, set())
                        found.update((x + moved, y + len(on_cpu)) for x, y in costs_so_far)
        states = after
    accesses = sum(map(len, picks))
    other = other_s * len(picks)
    return min(
        max(other + costs.device_s(1) * (accesses - y), costs.move_s * x, other + costs.cpu_s(1) * y)
        for found in states.values()
        for x, y in found
    )


@settings(max_examples=25, deadline=None)
@given(
    picks=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=2, unique=True), min_size=1, max_size=5),
    slots=st.integers(1, 2),
    costs=devices,
    other_s=seconds,
)
def test_nothing_passes_the_bound_whatever_it_does(
    picks: list[list[int]], slots: int, costs: Costs, other_s: float
) -> None:
    trace = trace_of([4], [[sorted(event)] for event in picks], top_k=2)
    found = simulate_time(trace, "lru", slots, costs, layer_s=other_s)
    least = least_work(picks, 4, slots, costs, other_s)
    assert found.bound_s <= least + 1e-9
    # What is between is that experts cannot be divided.
    assert least <= found.bound_s + max(costs.cpu_s(1), costs.device_s(1), costs.move_s) + 1e-9


@settings(max_examples=60, deadline=None)
@given(
    trace=random_traces(max_experts=8, max_tokens=12),
    policy=st.sampled_from(POLICIES),
    scheduler=st.sampled_from(scheduler_names()),
    costs=devices,
    layer_s=seconds,
    promotes=st.booleans(),
    capacity=st.sampled_from([1, 3, "50%"]),
)
def test_every_replay_takes_its_bound_at_least(  # type: ignore[no-untyped-def]
    trace, policy, scheduler, costs, layer_s, promotes, capacity
) -> None:
    promotion = Promotion(hysteresis=0.0) if promotes else None
    found = simulate_time(trace, policy, capacity, costs, layer_s=layer_s, scheduler=scheduler, promotion=promotion)
    assert found.bound_s <= found.own_bound_s + 1e-9
    assert found.own_bound_s <= found.seconds + 1e-9
    assert found.bound_s <= found.seconds + 1e-9
    assert sum(1 for _ in found.event_hits) >= 1
    assert found.hits == sum(found.event_hits)
    assert found.on_cpu <= found.accesses


@settings(max_examples=30, deadline=None)
@given(trace=random_traces(max_experts=8, max_tokens=12), policy=st.sampled_from(["lru", "ema", "lfu", "belady"]))
def test_without_a_device_the_hits_are_those_of_the_simulator(trace, policy) -> None:  # type: ignore[no-untyped-def]
    costs = Costs(Curve.constant(1.0), read_s=3.0)
    timed = simulate_time(trace, policy, 3, costs)
    same = simulate(trace, policy, 3, keep_events=True)
    assert (timed.hits, timed.accesses, timed.tokens) == (same.hits, same.accesses, same.tokens)
    assert timed.fetched == same.misses
    assert timed.link_s == pytest.approx(3.0 * same.misses)


@settings(max_examples=30, deadline=None)
@given(trace=random_traces(max_experts=8, max_tokens=12))
def test_fetching_every_miss_for_an_event_that_fits_is_the_engine_s_own_rule(trace) -> None:  # type: ignore[no-untyped-def]
    costs = Costs(Curve.constant(1.0), Curve.constant(1.0), move_s=1.0)
    timed = simulate_time(trace, "lru", "100%", costs, scheduler="fetch_all")
    assert timed.hits == simulate(trace, "lru", "100%").hits


def test_a_replay_by_hand() -> None:
    """CPU 4, device 1, link 6, other work 2; one layer, one slot that holds expert 0."""
    costs = Costs(Curve.constant(4), Curve.constant(1), move_s=6)
    trace = trace_of([3], [[[0]], [[0, 1]], [[1]], [[0, 1, 2]]], top_k=3)
    zero = [ExpertId(0, 0)]
    frozen = simulate_time(trace, "ema", 1, costs, layer_s=2, scheduler="static_split", residents=zero)
    assert frozen.seconds == 4 * 2 + 1 + 4 + 4 + 8
    assert frozen.event_hits == (1, 1, 0, 1)
    assert (frozen.hits, frozen.fetched, frozen.on_cpu) == (3, 0, 4)
    fetching = simulate_time(trace, "lru", 1, costs, layer_s=2, scheduler="fetch_all", residents=zero)
    # 3; the fetch of 1 (6) and its run; a hit; then two moves and a run.
    assert fetching.seconds == 4 * 2 + 1 + 7 + 1 + 13
    assert fetching.event_hits == (1, 1, 1, 1)
    # Two of the last three: hybrid moves one (7) while the CPU has the other (4).
    exact = simulate_time(trace, "lru", 1, costs, layer_s=2, residents=zero)
    assert exact.seconds == 4 * 2 + 1 + 4 + 4 + 7


def test_a_fetch_waits_for_the_chunk_that_is_on_its_way() -> None:
    """Link 6 in 2 chunks of 3; the first event misses 1 on the CPU (4), and promotes it."""
    costs = Costs(Curve((1, 2), (4, 100)), Curve.constant(1), move_s=6)
    trace = trace_of([4], [[[1]], [[2, 3]]], top_k=2)
    promotion = Promotion(chunks=2, hysteresis=0.0)
    found = simulate_time(trace, "ema", 2, costs, layer_s=1, promotion=promotion)
    # Other work 0..1; CPU 1..5; chunks 1..4 and 4..7. Event 2 at 6: the CPU has one (4); the other is fetched from 7 on
    # and run, 6 + max(4, 1 + 6 + 1).
    assert found.seconds == 14
    assert found.promoted == 1
    without = simulate_time(trace, "ema", 2, costs, layer_s=1)
    assert without.seconds == 13


def test_what_arrives_while_the_cpu_computes_is_there_for_the_next_event() -> None:
    """The CPU has 1 from 1 to 7; the link, which is free meanwhile, brings it."""
    costs = Costs(Curve.constant(6), Curve.constant(1), move_s=6)
    found = simulate_time(trace_of([4], [[[1]], [[1]]], top_k=1), "ema", 1, costs, layer_s=1, promotion=Promotion())
    assert (found.event_hits, found.promoted, found.seconds) == ((0, 1), 1, 1 + 6 + 1 + 1)


@pytest.mark.parametrize(
    ("cpu_s", "seconds"),
    [
        # Chunks from .5 to 6.5; the second event begins at 6, waits for the last one and runs it; the third one hits.
        (5, 0.5 + 5 + 0.5 + (0.5 + 1) + 0.5 + 1),
        # Two chunks from .5 to 4.5; the second event begins at 4 and has the last one follow them, for itself.
        (3, 0.5 + 3 + 0.5 + (0.5 + 2 + 1) + 0.5 + 1),
        # At 2.5 the second chunk begins to move, and with it the second event.
        (1.5, 0.5 + 1.5 + 0.5 + (2 + 2 + 1) + 0.5 + 1),
    ],
)
def test_an_event_takes_over_what_is_being_promoted_and_waits_for_the_rest(cpu_s: float, seconds: float) -> None:
    """Link 6 in 3 chunks of 2; what is under way is no hit, is not computed by the CPU, and becomes resident."""
    costs = Costs(Curve.constant(cpu_s), Curve.constant(1), move_s=6)
    trace = trace_of([4], [[[1]]] * 3, top_k=1)
    found = simulate_time(trace, "ema", 1, costs, layer_s=0.5, promotion=Promotion(chunks=3))
    assert found.seconds == seconds
    assert (found.event_hits, found.forwarded, found.fetched, found.promoted) == ((0, 0, 1), 1, 0, 0)
    assert (found.on_cpu, found.link_s) == (1, 6)


def test_what_has_arrived_and_waits_for_its_place_is_there_at_once() -> None:
    """Chunks from 1 to 7; the second event begins at 7, and its expert is no resident until an event has ended."""
    costs = Costs(Curve.constant(5), Curve.constant(1), move_s=6)
    trace = trace_of([4], [[[1]]] * 3, top_k=1)
    found = simulate_time(trace, "ema", 1, costs, layer_s=1, promotion=Promotion(chunks=3))
    assert (found.event_hits, found.forwarded, found.promoted) == ((0, 0, 1), 1, 0)
    assert (found.seconds, found.link_s) == (1 + 5 + 1 + 1 + 1 + 1, 6)


def test_fetches_of_an_event_come_behind_what_it_takes_over() -> None:
    """Chunks of 2 from .5 to 4.5, the event begins at 4: the third until 6.5, a fetch until 12.5, a run."""
    costs = Costs(Curve.constant(3), Curve.constant(1), move_s=6)
    trace = trace_of([5], [[[1]], [[1, 2, 3, 4]]], top_k=4)
    found = simulate_time(trace, "ema", 4, costs, layer_s=0.5, promotion=Promotion(chunks=3))
    # The CPU would take 9 for three experts, and takes 6 for two.
    assert (found.on_cpu, found.forwarded, found.fetched) == (1 + 2, 1, 1)
    assert found.seconds == 0.5 + 3 + 0.5 + (2.5 + 6 + 1)
    assert found.link_s == 12 + 2, "and a chunk of another"


def test_the_cpu_computes_residents_but_nothing_that_is_being_promoted() -> None:
    """The device takes 3 for each: of one that is there and one that comes the CPU has the first, as of two."""
    costs = Costs(Curve.constant(1), Curve.constant(3), move_s=2)
    trace = trace_of([4], [[[1]], [[0, 1]]], top_k=2)
    zero = [ExpertId(0, 0)]
    found = simulate_time(trace, "ema", 2, costs, residents=zero, promotion=Promotion(chunks=4))
    # Two chunks of .5 until 1, when the second event begins and the others move; 1 runs from 2 to 5.
    assert (found.forwarded, found.fetched) == (1, 0)
    assert (found.on_cpu, found.seconds) == (1 + 1, 1 + 1 + 3)


def test_what_comes_is_taken_over_the_oldest_first_and_is_no_promotion_any_more() -> None:
    """Link 6 in 3 chunks of 2. Expert 3 has arrived, one chunk of 1 has moved and the next is under way at 10."""
    one, two, three = (ExpertId(0, expert) for expert in (1, 2, 3))
    promotion = Promotion()
    link = Link([Costs(Curve.constant(1), Curve.constant(1), move_s=6)], promotion)
    promotion.observe([one, two, three])
    promotion.offer(0, [three], None)
    link.promote_until(7)
    promotion.offer(0, [one], None)
    link.promote_until(10)
    assert promotion.coming == {three: 0, one: 2}
    assert link.free_s == 11
    assert link.take_over([one, two, three], 10) == [10, 13]
    assert (link.free_s, link.busy_s, promotion.coming) == (13, 12, {})
    promotion.offer(0, [two], None)
    link.promote_until(16)
    assert promotion.coming == {two: 2}
    assert list(promotion.install(lambda _: None)) == []


class WithoutWorth(MinBypass):
    """Promotions go by averages, which promise more for expert 1."""

    def worth(self, expert: ExpertId) -> None:
        return None


def test_what_the_policy_refuses_begins_anew_as_a_promotion() -> None:
    """Bélády's rule has no place for 1 beside 0; two of its three chunks had moved when an event took it over."""
    costs = Costs(Curve.constant(3), Curve.constant(1), move_s=6)
    trace = trace_of([4], [[[1]], [[1]], [[0]]], top_k=1)
    promotion = Promotion(hysteresis=0.0)
    zero = [ExpertId(0, 0)]
    policy = f"{__name__}:WithoutWorth"
    found = simulate_time(trace, policy, 1, costs, layer_s=0.5, residents=zero, promotion=promotion)
    # The chunks until 6.5 were for the event; its run ends at 7.5, and the first of three others has moved at 8.5.
    assert (found.event_hits, found.forwarded) == ((0, 0, 1), 1)
    assert found.seconds == 0.5 + 3 + 0.5 + 3.5 + 0.5 + 1
    assert found.promoted == 0
    assert promotion.coming == {ExpertId(0, 1): 2}
    assert found.link_s == 6 + 2 * 2
    knowing = Promotion(hysteresis=0.0)
    simulate_time(trace, "min_bypass", 1, costs, layer_s=0.5, residents=zero, promotion=knowing)
    assert knowing.coming == {}, "0 is needed next and 1 never again"


def test_a_chunk_has_moved_when_its_time_is_over_and_counts_only_for_what_it_is_of() -> None:
    """Link 6 in 2 chunks of 3. One of expert 1, which comes another way meanwhile, then two of expert 2."""
    one, two = ExpertId(0, 1), ExpertId(0, 2)
    promotion = Promotion(chunks=2)
    link = Link([Costs(Curve.constant(1), Curve.constant(1), move_s=6)], promotion)
    promotion.observe([one, two])
    promotion.offer(0, [one], None)
    link.promote_until(1)
    assert link.free_s == 3
    link.drop([one])
    promotion.offer(0, [two], None)
    for now, finished, free_s in ((2, 0, 3), (3, 0, 3), (4, 0, 6), (6, 0, 6), (7, 0, 9), (8, 0, 9), (9, 1, 9)):
        link.promote_until(now)
        assert (promotion.finished, link.free_s) == (finished, free_s), now
    assert [swap.expert for swap in promotion.install(lambda _: None)] == [two]
    link.carry(5, 6)
    assert (link.free_s, link.busy_s) == (15, 15)


def test_the_most_valuable_is_fetched() -> None:
    """Of one miss the CPU has it (4); of two one is fetched (6.6): the one that was used before."""
    costs = Costs(Curve.constant(4), Curve.constant(0.5), move_s=6.6)
    for first in (1, 2):
        trace = trace_of([4], [[[first]], [[1, 2]], [[first]]], top_k=2)
        promotion = Promotion(hysteresis=0.99)
        found = simulate_time(trace, "ema", 1, costs, residents=[ExpertId(0, 0)], promotion=promotion)
        assert (found.fetched, found.forwarded, found.event_hits) == (1, 0, (0, 0, 1)), first


def test_what_the_policy_does_not_want_passes_through() -> None:
    costs = Costs(Curve.constant(4), Curve.constant(1), move_s=6)
    trace = trace_of([3], [[[0]], [[1]], [[0]]], top_k=1)
    for policy, hits in (("min_bypass", (1, 0, 1)), ("lru", (1, 0, 0))):
        found = simulate_time(trace, policy, 1, costs, scheduler="fetch_all", residents=[ExpertId(0, 0)])
        assert found.event_hits == hits


def test_the_bounds_know_that_many_reads_may_take_less_each() -> None:
    """Events of 4 misses, and one of 1 miss: the disk is busy for 4 * 0.25 s in each, and 1 s in the last."""
    costs = Costs(Curve.constant(0.001), read_s=1.0, read_few=2, read_many_s=0.25)
    events = [[list(range(4 * step, 4 * step + 4))] for step in range(3)]
    found = simulate_time(trace_of([16], [*events, [[15]]], top_k=4), "lru", 4, costs, count="all")
    assert found.fetched == 13
    assert found.link_s == pytest.approx(3 * 4 * 0.25 + 1.0)
    assert found.bound_s <= found.own_bound_s == pytest.approx(13 * 0.25)
    assert found.own_bound_s <= found.seconds


def test_the_first_tokens_of_a_trace() -> None:
    trace = trace_of([3], [[[0]]] * 5, [[[1]]] * 5, top_k=1)
    for most, lengths in ((3, [3]), (5, [5]), (7, [5, 2]), (99, [5, 5])):
        found = first_tokens(trace, most)
        assert [len(sequence.steps) for sequence in found] == lengths
        assert all((sequence.phases == Phase.DECODE).all() for sequence in found)
    with pytest.raises(ConfigError, match="at least 1"):
        first_tokens(trace, 0)


def test_what_makes_no_sense_is_refused() -> None:
    costs = Costs(Curve.constant(1), Curve.constant(1), move_s=1)
    trace = trace_of([3, 3], [[[0], [1]]] * 2, top_k=1)
    for layer_s in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="layer_s"):
            simulate_time(trace, "lru", 1, costs, layer_s=layer_s)
    with pytest.raises(ConfigError, match="3 costs do not fit 2 layers"):
        simulate_time(trace, "lru", 1, [costs] * 3)
    with pytest.raises(CapacityError, match="layer 1 has 1 slots"):
        simulate_time(trace, "lru", 1, costs, residents=[ExpertId(1, 0), ExpertId(1, 1)])
    with pytest.raises(ConfigError, match="no scheduler named"):
        simulate_time(trace, "lru", 1, costs, scheduler="nobody")


@pytest.fixture(scope="module")
def cells() -> list[dict[str, dict[str, float]]]:
    """Rows by name, for each machine."""
    found = []
    for column in schedules.COLUMNS[:1], schedules.COLUMNS[1:2]:
        path = real_trace(*Path(column[0].file).parts)
        case = schedules.cut(path, column[0].experts, warm_up=300, measured=150, sample=schedules.SAMPLE)
        layer_s = 1.5e-4
        ways = [way for way in schedules.WAYS if way.policy != "min_bypass"]
        rows = {way.name: schedules.timed(way, column[0], case, layer_s) for way in ways}
        found.append({name: {"s": row.seconds_per_token, "hits": row.hit_rate} for name, row in rows.items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("given", schedules.COLUMNS[:2], ids=lambda column: column.name)
def test_what_others_found_for_the_same_machine_comes_out(given: schedules.Column) -> None:
    path = real_trace(*Path(given.file).parts)
    case = schedules.cut(path, given.experts, warm_up=schedules.SAMPLE // 2, measured=600, sample=schedules.SAMPLE)
    column, layer_s = schedules.fit(given, case)
    for way in schedules.WAYS:
        known = given.reference.get(way.name)
        if known is not None and way.policy != "min_bypass":
            found = schedules.timed(way, column, case, layer_s)
            assert 1e3 * found.seconds_per_token < 1.02 * known, way
            if way.name == schedules.FITTED:
                assert found.hit_rate == pytest.approx(0.392, abs=0.001)


def test_exact_with_promotion_is_never_behind(cells: list[dict[str, dict[str, float]]]) -> None:
    for rows in cells:
        for other in ("HybriMoE, MRS", "DALI, LFU", "fetch, LRU", "frozen hot set + CPU", "exact, no promotion"):
            assert rows["exact + promotion"]["s"] <= rows[other]["s"]


def test_without_promotion_a_poor_link_freezes_the_cache(cells: list[dict[str, dict[str, float]]]) -> None:
    good, poor = cells
    assert poor["exact, no promotion"] == poor["frozen hot set + CPU"]
    assert good["exact, no promotion"]["hits"] > good["frozen hot set + CPU"]["hits"] + 0.05
    assert poor["exact + promotion"]["hits"] > poor["exact, no promotion"]["hits"] + 0.15
