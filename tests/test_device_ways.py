"""Which way passes go: what the guard is told of those that the device runs by itself, and of those run once more."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from moert.runtime.device_ways import PLANNED, Ways


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(ways: Ways, clock: Clock, passes: int, planned: Callable[[], float], hosted_s: float = 0.01) -> list[str]:
    used = []
    for _ in range(passes):
        ways.begin(1, may_miss=True)
        used.append(ways.way)
        if ways.way != PLANNED:
            ways.do_not_plan()  # as every step that the host decides about does
            clock.now += hosted_s
            continue
        took_s = planned()
        if took_s > hosted_s:
            ways.go_on()
            assert ways.way == "exact"
        clock.now += took_s
    return used


@pytest.mark.parametrize(("share", "is_worth_it"), [(0.0, True), (0.1, True), (0.3, False), (0.9, False)])
def test_passes_that_are_run_again_count_with_both_runs(share: float, is_worth_it: bool) -> None:
    # The median of passes of which three in ten are void is that of the others.
    draw, clock = random.Random(5), Clock()
    used = run(Ways("exact", clock), clock, 4000, lambda: 0.007 + 0.0125 * (draw.random() < share))
    assert PLANNED in used
    assert (used[-2000:].count(PLANNED) > 1500) == is_worth_it
    assert is_worth_it or used[-2000:].count(PLANNED) < 200
    # And not much is lost by trying.
    assert clock.now < 4000 * min(0.01, 0.007 + share * 0.0125) * 1.05


def test_passes_that_the_host_decides_about_are_looked_at_where_the_device_could_run_them() -> None:
    clock = Clock()
    assert PLANNED in run(Ways("exact", clock), clock, 60, lambda: 0.02)


def test_what_the_device_may_not_run_says_nothing_of_what_it_may() -> None:
    clock = Clock()
    ways = Ways("exact", clock)
    for _ in range(400):
        ways.begin(1, may_plan=False)
        assert ways.way != PLANNED
        clock.now += 0.01 if ways.way == "cpu_all" else 0.02
    assert ways.way == "cpu_all"
    ways.begin(1, may_miss=True)
    assert ways.way == "exact"


@pytest.mark.parametrize("fastest", ["cpu_all", "fetch_all", "exact"])
def test_a_pass_that_is_run_again_goes_the_way_that_is_fastest_on_the_host(fastest: str) -> None:
    clock = Clock()
    ways = Ways("exact", clock)
    again = []
    for number in range(3000):
        ways.begin(1, may_miss=True)
        if ways.way == PLANNED:
            # One in eight is void; it is the fastest of all for all that.
            clock.now += 0.001
            if number % 8 == 0:
                ways.go_on()
                again.append(ways.way)
                clock.now += 0.01
        else:
            clock.now += 0.01 if ways.way == fastest else 0.02
    assert len(again) > 200
    assert set(again[-100:]) == {fastest}
