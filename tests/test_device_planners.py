"""Planners on a device that go on where a policy on the host is."""

from __future__ import annotations

import pytest
import torch
from triton_support import DEVICE

from moert.policies import make_policy
from moert.runtime.device_planners import Slots, make_planner
from moert.turnover import turn_over
from moert.types import ExpertId

LAYER, EXPERTS, SLOTS, TOP_K = 3, 24, 9, 3


@pytest.mark.parametrize("name", ["lru", "ema,burst=0", "ema,alpha=0.2,burst=0"])
@pytest.mark.parametrize("before", [2, 40])
def test_it_decides_what_the_policy_would(name: str, before: int) -> None:
    torch.manual_seed(before)
    popular = torch.rand(EXPERTS) ** 3 + 0.02
    policy = make_policy(name, SLOTS)
    residents: set[ExpertId] = set()

    def step(chosen: torch.Tensor) -> tuple[list[int], list[int]]:
        """What the host makes of an event: who comes and who leaves."""
        event = [ExpertId(LAYER, int(expert)) for expert in sorted(chosen.tolist())]
        policy.access(event)
        misses = [expert for expert in event if expert not in residents]
        victims = turn_over(policy, residents, event, misses, SLOTS)
        return [miss.expert for miss in misses], [victim.expert for victim in victims]

    for _ in range(before):
        step(torch.multinomial(popular, TOP_K))
    rows = torch.zeros(SLOTS, dtype=torch.int32, device=DEVICE)
    log = torch.zeros(8, TOP_K, dtype=torch.int32, device=DEVICE)
    planner = make_planner(policy, Slots(LAYER, EXPERTS, rows, 40, log))
    row_of = {expert: 30 - place for place, expert in enumerate(sorted(residents))}
    free = list(range(SLOTS - len(residents)))
    assert bool(free) == (before == 2)
    # Of an LRU of thousands, asking who would leave after who else would take seconds.
    victim, policy.victim = policy.victim, None  # type: ignore[assignment, method-assign]
    copies = planner.begin(policy, row_of, free)
    policy.victim = victim  # type: ignore[method-assign]
    for there, here in copies:
        there.copy_(here)
    left = 0
    for _ in range(12):
        chosen = torch.multinomial(popular, TOP_K)
        came, victims = step(chosen)
        plan = planner.plan(chosen.view(1, -1).to(DEVICE))
        count = int(plan.count)
        assert plan.experts[:count].tolist() == came
        assert [victim for victim in plan.victims[:count].tolist() if victim >= 0] == victims
        assert set(plan.slots[:count].tolist()) <= {*row_of.values(), *free}
        left += len(victims)
    assert left > 3


def test_a_policy_without_one_is_named() -> None:
    rows = torch.zeros(SLOTS, dtype=torch.int32, device=DEVICE)
    log = torch.zeros(8, TOP_K, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="the policy sieve runs on the host only, unlike ema, lru"):
        make_planner(make_policy("sieve", SLOTS), Slots(LAYER, EXPERTS, rows, 40, log))
