"""What an expert is measured to cost: copied, computed here and there, and both at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from device_support import NumberTier, compute

from moert.device.simulated import Machine
from moert.runtime.compute import Compute, ExpertCompute
from moert.runtime.device_costs import Contention, Measured, measure_costs
from moert.runtime.routing import Group
from moert.schedule import Costs, Curve, Item


class Cpu:
    """Takes a millisecond for a call, more while something is copied, and holds that up."""

    def __init__(self, tier: NumberTier, slower: float, holds_up_s: float) -> None:
        self.tier, self.slower, self.holds_up_s = tier, slower, holds_up_s

    def outputs(self, groups: Sequence[object], hidden: torch.Tensor) -> list[torch.Tensor]:
        device = self.tier.device
        is_beside = device.up.is_busy
        for lane in device._engine._lanes:
            if lane.queue and lane.queue[0].end_s is not None:
                lane.queue[0].end_s += self.holds_up_s
        device.sleep(1e-3 * (self.slower if is_beside else 1.0))
        return []


def measured(slower: float, holds_up_s: float) -> Measured:
    tier = NumberTier(host_slots=6, machine=Machine(latency_s=1e-3, launch_s=1e-4))
    tier.step(0, [[0, 1]])
    tier.settle()
    cpu = Cpu(tier, slower, holds_up_s)
    cache, kernels, pinned = tier.caches[0], tier.tier.kernels[0], tier.tier.pinned
    n_free = tier.bank.n_free
    found = measure_costs(tier.device, cache, kernels, cpu, pinned, compute, 1, torch.float32)  # type: ignore[arg-type]
    assert found is not None and tier.bank.n_free == n_free
    tier.check()
    return found


def test_a_machine_on_which_neither_disturbs_the_other() -> None:
    found = measured(1.0, 0.0)
    assert found.contention.cpu == pytest.approx(1.0)
    assert found.contention.move == pytest.approx(1.0, abs=0.15)
    assert found.costs.move_s == pytest.approx(1e-3 * found.contention.move)
    assert found.costs.cpu_s(1) == pytest.approx(1e-3)


def test_costs_are_those_of_the_link_and_the_cpu_side_by_side() -> None:
    found = measured(1.5, 5e-4)
    # Every call of 1.5 ms holds the link up for a third of that; nobody sees when within a call the last copy is over.
    assert found.contention.cpu == pytest.approx(1.5)
    assert 1.2 < found.contention.move < 1.6
    assert found.costs.cpu_s(1) == pytest.approx(1.5e-3)
    assert found.costs.move_s == pytest.approx(1e-3 * found.contention.move)


def test_a_link_that_takes_no_time_is_disturbed_by_nothing() -> None:
    tier = NumberTier(costs=None, host_slots=6)
    tier.step(0, [[0, 1]])
    tier.step(0, [[0, 1]])
    assert tier.tier.hosted.contention == Contention(1.0, 1.0)


class Drifting:
    """A tier whose CPU computes all that is missing, and takes as long for an expert as is said."""

    def __init__(self, costs: Costs | None) -> None:
        self.tier = NumberTier(costs=costs, schedule="cpu_all", promoting=False, layers=1)
        self.seconds = 1e-3
        hosted = self.tier.tier.hosted
        on_cpu = hosted._on_cpu

        def slow(layer: int, compute: Compute) -> ExpertCompute:
            inner = on_cpu(layer, compute)
            outputs = inner.outputs

            def sleeping(groups: Sequence[Group], hidden: torch.Tensor) -> list[torch.Tensor]:
                self.tier.device.sleep(self.seconds * len(groups))
                return outputs(groups, hidden)

            inner.outputs = sleeping  # type: ignore[method-assign]
            return inner

        hosted._on_cpu = slow  # type: ignore[method-assign]

    def steps(self, count: int) -> None:
        for _ in range(count):
            assert self.tier.step(0, [[0, 1, 2]]) == self.tier.right(0, [[0, 1, 2]])
        self.tier.check()

    @property
    def cpu_s(self) -> float:
        known = self.tier.tier.hosted.known_costs
        assert known is not None
        return known.cpu_s(1)


def test_costs_follow_a_cpu_that_becomes_slower_and_faster_again() -> None:
    drifting = Drifting(None)
    drifting.steps(60)
    link_s = drifting.tier.tier.hosted.known_costs.move_s  # type: ignore[union-attr]
    before_s = drifting.cpu_s
    assert before_s == pytest.approx(1e-3, rel=0.05)
    drifting.seconds = 3e-3
    drifting.steps(60)
    assert drifting.cpu_s == pytest.approx(3e-3, rel=0.05)
    drifting.seconds = 1e-3
    drifting.steps(60)
    assert drifting.cpu_s == pytest.approx(1e-3, rel=0.08)
    assert drifting.tier.tier.hosted.known_costs.move_s == link_s  # type: ignore[union-attr]


def test_costs_that_are_given_stay_as_they_are() -> None:
    given = Costs(Curve.proportional(5e-4), Curve.constant(1e-4), move_s=1e-3)
    drifting = Drifting(given)
    drifting.steps(20)
    assert drifting.tier.tier.hosted.known_costs is given


def test_the_scheduler_goes_by_costs_as_they_are_now() -> None:
    drifting = Drifting(None)
    drifting.steps(40)
    seen: list[float] = []
    ways = drifting.tier.tier.hosted.ways
    plan = ways.scheduler.plan

    def watch(items: Sequence[Item], costs: Costs) -> object:
        seen.append(costs.cpu_s(1))
        return plan(items, costs)

    ways.scheduler.plan = watch  # type: ignore[method-assign, assignment]
    drifting.seconds = 3e-3
    drifting.steps(40)
    assert seen[0] == pytest.approx(1e-3, rel=0.05) and seen[-1] == pytest.approx(3e-3, rel=0.15)
