"""Planners that leave some of an event's misses to the CPU, against the policies with the same rule."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from test_triton_plan import check_tables, listed, planner
from triton_support import DEVICE

from moert.kernels.planning import Plan, Split
from moert.policies import make_policy
from moert.policies.ema import EMA
from moert.turnover import turn_over
from moert.types import ExpertId

TOP_K = 4
TABLES = {
    "all": [0, 1, 2, 3, 4],
    "none": [0, 0, 0, 0, 0],
    "half": [0, 0, 1, 1, 2],
    "one": [0, 1, 1, 1, 1],
    "odd": [0, 1, 0, 2, 1],
    "out of range": [3, -2, 9, -1, 2],
}


def split_of(table: Sequence[int]) -> Split:
    return Split(
        torch.tensor(table, dtype=torch.int32, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    )


def on_cpu(plan: Plan) -> list[int]:
    assert plan.on_cpu is not None and plan.on_cpu_count is not None
    return plan.on_cpu[: int(plan.on_cpu_count)].tolist()


class Host:
    """What a policy object decides where so many misses come."""

    def __init__(self, name: str, slots: int, table: Sequence[int]) -> None:
        self.policy = make_policy(name, slots)
        self.slots, self.table = slots, table
        self.residents: set[ExpertId] = set()

    def step(self, ids: torch.Tensor) -> tuple[list[int], list[int], list[int]]:
        """Who comes, who leaves and who is left to the CPU."""
        event = [ExpertId(0, expert) for expert in sorted(set(ids.flatten().tolist()))]
        self.policy.access(event)
        misses = [expert for expert in event if expert not in self.residents]
        number = min(max(self.table[len(misses)], 0), len(misses))
        best = misses
        if isinstance(self.policy, EMA):
            score = self.policy.score
            # Experts of the same events differ by rounding at most.
            best = sorted(misses, key=lambda expert: (-round(score(expert), 12), expert))
        come = sorted(best[:number])
        victims = turn_over(self.policy, self.residents, event, come, self.slots)
        left = [miss.expert for miss in misses if miss not in come]
        return [expert.expert for expert in come], [victim.expert for victim in victims], left


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("name", ["lru", "ema", "ema,alpha=0.5,burst=0"])
def test_the_worthiest_come_as_many_as_the_table_says(name: str, table: list[int]) -> None:
    experts, slots = 17, 7
    torch.manual_seed(7)
    host, split = Host(name, slots, table), split_of(table)
    plan, state = planner(name, experts, slots)
    popular = torch.rand(experts) ** 2 + 0.01
    left_so_far = misses_so_far = 0
    for step in range(24):
        if step % 8 == 7:
            popular = popular[torch.randperm(experts)]
        ids = torch.multinomial(popular, TOP_K).view(1, -1)
        come, victims, left = host.step(ids)
        found = plan(state, ids.to(DEVICE), split=split)
        came, slots_taken, gone = listed(found)
        assert (came, on_cpu(found)) == (come, left), step
        assert [victim for victim in gone if victim >= 0] == victims, step
        assert all(state.residents.slot_of[e] == s for e, s in zip(came, slots_taken, strict=True))
        check_tables(state.residents)
        assert {e for e in state.residents.owner.tolist() if e >= 0} == {e.expert for e in host.residents}
        left_so_far, misses_so_far = left_so_far + len(left), misses_so_far + len(left) + len(came)
        assert int(split.left) == left_so_far and state.residents.counters.tolist()[2] == misses_so_far
    assert (left_so_far > 0) == (table != TABLES["all"])
    assert (misses_so_far > left_so_far) == (table != TABLES["none"])


@pytest.mark.parametrize("name", ["lru", "ema"])
def test_where_all_come_nothing_is_different(name: str) -> None:
    torch.manual_seed(5)
    plan, plain = planner(name, 15, 6)
    _, state = planner(name, 15, 6)
    split = split_of(TABLES["all"])
    for _ in range(16):
        ids = torch.randperm(15)[:TOP_K].view(1, -1).to(DEVICE)
        wanted, found = plan(plain, ids), plan(state, ids, split=split)
        assert listed(found) == listed(wanted) and on_cpu(found) == [] and wanted.on_cpu is None
        for one, other in ((plain, state), (plain.residents, state.residents)):
            for key, tensor in vars(one).items():
                if isinstance(tensor, torch.Tensor):
                    assert torch.equal(tensor, vars(other)[key]), key
    assert int(split.left) == 0


@pytest.mark.parametrize("name", ["lru", "ema"])
def test_a_split_that_does_not_fit(name: str) -> None:
    plan, state = planner(name, 9, 6)
    ids = torch.tensor([[0, 1, 2]], device=DEVICE)
    for given, passing, message in (
        (TABLES["all"], False, "fetch_of has 5 numbers for 3 ids"),
        ([0, 1, 1, 1], True, "an event that passes through the slots cannot be split"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(state, ids, split=split_of(given), passing=passing)
    with pytest.raises(ValueError, match=r"left must be torch\.int64"):
        plan(state, ids, split=Split(split_of([0] * 4).fetch_of, torch.zeros(1, device=DEVICE)))
    assert state.residents.counters.tolist() == [0, 0, 0]
