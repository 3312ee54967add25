from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from moert.tiers.depth import DEPTHS, DOWN_LOSS, START_DEPTH, UP_GAIN, DepthTuner

Disk = Callable[[int], float]
"""Bytes per second at a depth."""


def saturating(knee: int, noise: float = 0.0, seed: int = 0) -> Disk:
    """Bandwidth in proportion to the depth as far as `knee`, then no more."""
    chance = random.Random(seed)
    return lambda depth: min(depth, knee) / knee * 2e9 * math.exp(chance.gauss(0, noise))


def run(tuner: DepthTuner, disk: Disk, periods: int) -> list[int]:
    """The depths of the periods."""
    depths = []
    for _ in range(periods):
        depths.append(tuner.asked)
        assert tuner.observe(disk(tuner.asked) * 0.05, 0.05, tuner.asked) == tuner.asked
    return depths


@pytest.mark.parametrize("start", DEPTHS)
@pytest.mark.parametrize("knee", DEPTHS)
def test_the_least_depth_with_all_the_bandwidth_is_found(start: int, knee: int) -> None:
    tuner = DepthTuner(start)
    depths = run(tuner, saturating(knee), 120)
    assert tuner.depth == knee
    assert set(depths) <= set(DEPTHS)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("knee", [2, 4, 8, 16])
def test_noise_costs_a_step_at_most(knee: int, seed: int) -> None:
    """With a tenth of noise on each period; a step is worth a quarter or more below the knee, and nothing above."""
    tuner = DepthTuner()
    run(tuner, saturating(knee, 0.1, seed), 400)
    at_rest = run(tuner, saturating(knee, 0.1, seed + 100), 400)
    usual = DEPTHS.index(sorted(at_rest)[len(at_rest) // 2])
    assert abs(usual - DEPTHS.index(knee)) <= 1


def test_a_disk_that_suffers_from_depth_is_read_at_less() -> None:
    tuner = DepthTuner()
    run(tuner, lambda depth: 1e9 * 0.9**depth, 100)
    assert tuner.depth == min(DEPTHS)


def test_a_drift_is_not_taken_for_a_gain() -> None:
    """A disk that gets faster by 4 % with each period, whatever the depth."""
    tuner = DepthTuner()
    rate = 1e9

    def disk(_: int) -> float:
        nonlocal rate
        rate *= 1.04
        return rate

    run(tuner, disk, 60)
    assert tuner.depth <= START_DEPTH


def test_a_small_gain_is_not_worth_it_and_nothing_swings() -> None:
    gain = (UP_GAIN + DOWN_LOSS) / 2
    tuner = DepthTuner(4)
    run(tuner, lambda depth: 1e9 * math.exp(gain * DEPTHS.index(depth)), 500)
    assert tuner.depth == 4


def test_trials_become_rare() -> None:
    depths = run(DepthTuner(), saturating(4), 1000)
    late = depths[500:]
    assert late.count(4) > 0.9 * len(late)
    assert set(late) == {3, 4, 6}, "it never stops to look, for a disk may change"


def test_a_disk_that_changes_is_followed() -> None:
    tuner = DepthTuner()
    run(tuner, saturating(2), 200)
    assert tuner.depth == 2
    run(tuner, saturating(12), 600)
    assert tuner.depth == 12


def test_a_period_at_another_depth_tells_nothing() -> None:
    tuner = DepthTuner(4)
    for lanes in (1, 3, 8, 64):
        assert tuner.observe(1e12, 0.05, lanes) == 4
    depths = run(tuner, saturating(4), 3)
    assert depths == [4, 6, 4]
