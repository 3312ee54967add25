"""Published schedulers against what the papers say, word for word, and how far from the best their schedules are."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_support import ROOT

from moert.schedule import Costs, Curve, Item, Place, make_scheduler
from moert.types import ExpertId

sys.path.insert(0, str(ROOT / "bench"))
import schedule_ratios

# Eighths, so that sums in any order are the same.
seconds = st.integers(0, 40).map(lambda n: n / 8)
costs_of_machines = st.builds(
    lambda cpu, more, device, move, start, merge: Costs(
        Curve((1, 2), (cpu, cpu + more)), Curve.constant(device), move_s=move, cpu_start_s=start, merge_s=merge
    ),
    *[seconds] * 6,
)
events = st.lists(st.tuples(st.sampled_from([Place.DEVICE, Place.HOST]), st.integers(1, 4)), max_size=10).map(
    lambda picks: [Item(ExpertId(0, n), tokens, place) for n, (place, tokens) in enumerate(picks)]
)


def on_cpu(name: str, items: Sequence[Item], costs: Costs) -> set[Item]:
    return set(make_scheduler(name).plan(items, costs).cpu)


@given(items=events, costs=costs_of_machines)
def test_hybrimoe(items: list[Item], costs: Costs) -> None:
    """Its pseudo-code: Q = [hits, most tokens first] + [misses, most tokens first]; the GPU pops the head, the CPU the
    tail, whichever would be done first; the CPU's first expert has an intercept."""
    hits = sorted((item for item in items if item.place is Place.DEVICE), key=lambda item: -item.tokens)
    misses = sorted((item for item in items if item.place is not Place.DEVICE), key=lambda item: -item.tokens)
    queue = hits + misses
    tg = tc = tm = 0.0
    expected: set[Item] = set()
    while queue:
        head, tail = queue[0], queue[-1]
        fg = (tg if head in hits else max(tg, tm + costs.move_s)) + costs.device_s(1)
        fc = tc + costs.cpu(tail.tokens) + (costs.cpu_start_s if not expected else 0)
        if fg <= fc:
            queue.pop(0)
            tg = fg
            if head in misses:
                tm += costs.move_s
        else:
            queue.pop()
            tc = fc
            expected.add(tail)
    assert on_cpu("hybrimoe", items, costs) == expected


@given(items=events, costs=costs_of_machines)
def test_dali(items: list[Item], costs: Costs) -> None:
    """Greedy by how far apart an expert's two times are, to the side whose sum is less with it."""
    pairs = []
    for item in items:
        run = costs.device_s(1)
        pairs.append((costs.cpu(item.tokens), run if item.place is Place.DEVICE else max(run, costs.move_s), item))
    cpu = device = 0.0
    expected: set[Item] = set()
    for cpu_s, device_s, item in sorted(pairs, key=lambda pair: -abs(pair[0] - pair[1])):
        if cpu + cpu_s < device + device_s:
            cpu += cpu_s
            expected.add(item)
        else:
            device += device_s
    assert on_cpu("dali", items, costs) == expected


@given(items=events.filter(lambda items: len(items) <= 7), costs=costs_of_machines)
def test_fiddler(items: list[Item], costs: Costs) -> None:
    """Of all assignments that leave hits on the device, the one of the least sum of times."""
    misses = [item for item in items if item.place is not Place.DEVICE]

    def total(places: Sequence[bool]) -> tuple[float, int]:
        times = (
            costs.cpu(item.tokens) if cpu else costs.move_s + costs.device_s(1)
            for item, cpu in zip(misses, places, strict=True)
        )
        return sum(times), -sum(places)

    best = min(product((False, True), repeat=len(misses)), key=total)
    assert on_cpu("fiddler", items, costs) == {item for item, cpu in zip(misses, best, strict=True) if cpu}


@given(items=events, costs=costs_of_machines.filter(lambda costs: costs.cpu(1) + costs.move_s > 0))
def test_freetoken(items: list[Item], costs: Costs) -> None:
    """At most q* = B_link / (B_link + B_CPU) of the misses are fetched, and no fewer than that allows."""
    misses = [item for item in items if item.place is not Place.DEVICE]
    schedule = make_scheduler("freetoken").plan(items, costs)
    # Rates are what one expert's bytes are divided by.
    q = costs.cpu(1) / (costs.move_s + costs.cpu(1))
    assert len(schedule.fetch) <= q * len(misses) < len(schedule.fetch) + 1
    assert set(schedule.cpu) == set(misses) - set(schedule.fetch)
    assert min((item.tokens for item in schedule.fetch), default=9) >= max(
        (item.tokens for item in schedule.cpu), default=0
    )


@pytest.fixture(scope="module")
def ratios() -> dict[tuple[str, int], dict[str, schedule_ratios.Ratios]]:
    return {
        (case.name, batch): schedule_ratios.ratios(
            list(schedule_ratios.events(case.experts, case.top_k, batch, 40)), case.costs
        )
        for case in schedule_ratios.CASES
        for batch in schedule_ratios.BATCHES
    }


@pytest.mark.parametrize(
    ("name", "batches", "low", "high", "worst"),
    [
        ("hybrimoe", (1, 4, 16, 64), 1.0, 1.006, 1.11),
        ("dali", (1, 4, 16, 64), 1.0, 1.27, 1.6),
        ("fiddler", (1, 4, 16, 64), 1.0, 1.76, 2.0),
        ("static_split", (1,), 1.0, 1.7, 2.5),
        ("static_split", (64,), 2.4, 8.0, 8.5),
        ("fetch_all", (1, 4, 16, 64), 1.15, 5.0, 5.3),
    ],
)
def test_as_far_from_the_best_as_published(
    ratios: dict[tuple[str, int], dict[str, schedule_ratios.Ratios]],
    name: str,
    batches: tuple[int, ...],
    low: float,
    high: float,
    worst: float,
) -> None:
    found = [one[name] for (_, batch), one in ratios.items() if batch in batches]
    assert low - 1e-9 <= min(one.mean for one in found)
    assert max(one.mean for one in found) <= high
    assert max(one.worst for one in found) <= worst
    assert max(one.worst for one in found) > 1.05, "they are not the best"
