"""The planners on the device against the policy objects, driven by the rule that the engine and the simulator share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_support import DEVICE

from moert.errors import ConfigError
from moert.kernels import plan_ema as plan_ema_module
from moert.kernels.plan_ema import new_ema, plan_ema
from moert.kernels.plan_lru import new_lru, plan_lru
from moert.kernels.planning import Plan, Reach, Residents
from moert.policies import make_policy
from moert.policies.base import Policy
from moert.turnover import PASSING, turn_over
from moert.types import ExpertId


class Host:
    """What a policy object decides."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.residents: set[ExpertId] = set()

    def step(self, ids: torch.Tensor) -> tuple[list[int], list[int]]:
        """The misses of an event and the victims."""
        event = [ExpertId(0, expert) for expert in sorted(set(ids.flatten().tolist()))]
        self.policy.access(event)
        misses = [expert for expert in event if expert not in self.residents]
        victims = turn_over(self.policy, self.residents, event, misses, self.policy.capacity)
        return [miss.expert for miss in misses], [victim.expert for victim in victims]


def planner(name: str, experts: int, slots: int, **tables: Any) -> tuple[Any, Any]:
    if name == "lru":
        return plan_lru, new_lru(experts, slots, DEVICE, **tables)
    parameters = {key: float(value) for key, _, value in (part.partition("=") for part in name.split(",")[1:])}
    return plan_ema, new_ema(experts, slots, DEVICE, **parameters, **tables)


def listed(plan: Plan) -> tuple[list[int], list[int], list[int]]:
    count = int(plan.count)
    return plan.experts[:count].tolist(), plan.slots[:count].tolist(), plan.victims[:count].tolist()


def check_tables(residents: Residents) -> None:
    """Each slot is owned by the expert that has it."""
    owners = residents.owner.tolist()
    table = residents.slot_of.tolist()
    assert all(table[expert] == slot for slot, expert in enumerate(owners) if expert >= 0)
    assert sum(slot >= 0 for slot in table) == sum(expert >= 0 for expert in owners)


@pytest.mark.parametrize("name", ["lru", "ema", "ema,alpha=0.5,burst=0"])
@pytest.mark.parametrize(("experts", "slots", "top_k"), [(13, 7, 3), (20, 20, 4), (40, 9, 2)])
def test_every_step_is_that_of_the_policy(name: str, experts: int, slots: int, top_k: int) -> None:
    torch.manual_seed(experts)
    host = Host(make_policy(name, slots))
    plan, state = planner(name, experts, slots)
    popular = torch.rand(experts) ** 3
    evictions = 0
    for step in range(36):
        if step % 12 == 0:
            popular = popular[torch.randperm(experts)]
        tokens = 1 + step % 2
        ids = torch.stack([torch.multinomial(popular + 0.01, top_k) for _ in range(tokens)])
        misses, victims = host.step(ids)
        came, slots_taken, left = listed(plan(state, ids.to(DEVICE)))
        assert came == misses, step
        assert [victim for victim in left if victim >= 0] == victims, step
        assert left == sorted(left, key=lambda victim: victim >= 0), "free slots come first"
        assert len(set(slots_taken)) == len(slots_taken)
        check_tables(state.residents)
        assert {e for e in state.residents.owner.tolist() if e >= 0} == {e.expert for e in host.residents}
        assert all(state.residents.slot_of[e] == s for e, s in zip(came, slots_taken, strict=True))
        evictions += len(victims)
    assert slots == experts or evictions > 10


def test_experts_of_the_same_events_leave_by_last_use_and_id() -> None:
    for name in ("lru", "ema"):
        host = Host(make_policy(name, 6))
        plan, state = planner(name, 12, 6)
        for event in ([5, 1, 3], [0, 2, 4], [1, 5, 3], [0, 4, 2], [7], [9, 8], [11, 10, 6]):
            ids = torch.tensor([event])
            misses, victims = host.step(ids)
            came, _, left = listed(plan(state, ids.to(DEVICE)))
            assert (came, [victim for victim in left if victim >= 0]) == (misses, victims), (name, event)


@pytest.mark.parametrize("name", ["lru", "ema"])
@pytest.mark.parametrize("passing", [False, True])
def test_slots_that_are_rows_of_a_bank_of_many(name: str, passing: bool) -> None:
    torch.manual_seed(3)
    experts, slots, rows = 14, 6, torch.tensor([9, 2, 30, 4, 17, 0], dtype=torch.int32, device=DEVICE)
    plan, plain = planner(name, experts, slots)
    _, state = planner(name, experts, slots, rows=rows, **({"n_rows": 31} if name == "lru" else {}))
    came_after_hits = 0
    for _ in range(24):
        ids = torch.randperm(experts)[: 10 if passing else 3].view(1, -1).to(DEVICE)
        wanted, got = plan(plain, ids, passing=passing), plan(state, ids, passing=passing)
        came, taken, left = listed(wanted)
        assert listed(got) == (came, [int(rows[slot]) for slot in taken], left)
        assert torch.equal(got.rounds[: len(came)], wanted.rounds[: len(came)]) if passing else got.rounds is None
        assert torch.equal(state.residents.owner, plain.residents.owner)
        for expert, slot in enumerate(plain.residents.slot_of.tolist()):
            assert int(state.residents.slot_of[expert]) == (-1 if slot < 0 else int(rows[slot]))
        came_after_hits += 0 < len(came) < ids.numel()
    assert came_after_hits > 5


@pytest.mark.parametrize("name", ["lru", "ema"])
def test_the_last_events_are_logged_and_misses_counted(name: str) -> None:
    log = torch.full((4, 6), -9, dtype=torch.int32, device=DEVICE)
    plan, state = planner(name, 8, 8, log=log)
    events, misses = [], 0
    for number in range(1, 11):
        ids = torch.randint(-1, 9, (2, 3), generator=torch.Generator().manual_seed(number), dtype=torch.int64)
        misses += int(plan(state, ids.to(DEVICE)).count)
        events.append(ids)
        for back, event in enumerate(reversed(events[-4:])):
            assert log[(number - back) % 4].tolist() == event.flatten().tolist()
    uses = sum(len({e for e in event.flatten().tolist() if 0 <= e < 8}) for event in events)
    assert state.residents.counters.tolist() == [10, uses, misses]
    with pytest.raises(ValueError, match=r"ids \[1, 3\] do not fit into a log of 6"):
        plan(state, torch.zeros(1, 3, dtype=torch.int64, device=DEVICE))


def check_rounds(
    event: set[int], before: list[int], came: list[int], slots: list[int], left: list[int], rounds: list[int]
) -> None:
    """Work a plan off as `Plan` says, on slots that had `before`: every expert of the event is computed once."""
    held = dict(enumerate(before))
    computed: set[int] = set()
    for turn in range(max(rounds, default=-1) + 1):
        entries = [place for place, of in enumerate(rounds) if of == turn]
        assert entries or not turn, "no round is empty but that of hits"
        targets = [slots[place] for place in entries]
        assert len(set(targets)) == len(targets)
        for place in entries:
            assert held[slots[place]] == left[place]
            assert left[place] not in event or left[place] in computed, "it was overwritten before it was computed"
            held[slots[place]] = came[place]
        if not turn:
            computed.update(event.intersection(before))
        computed.update(came[place] for place in entries)
    computed.update(event.intersection(before))
    assert computed == event


@pytest.mark.parametrize("name", ["lru", "ema", "ema,alpha=0.5,burst=0"])
@pytest.mark.parametrize(
    ("experts", "slots", "largest"), [(40, 12, 40), (60, 14, 26), (24, 5, 20), (9, 1, 5), (30, 30, 30)]
)
def test_events_larger_than_the_cache_pass_through_it(name: str, experts: int, slots: int, largest: int) -> None:
    torch.manual_seed(slots)
    host = Host(make_policy(name, slots))
    plan, state = planner(name, experts, slots)
    larger = 0
    popular = torch.rand(experts) ** 3 + 0.01
    for step in range(16):
        size = largest if step % 3 == 1 else int(torch.randint(1, largest + 1, ()))
        ids = torch.multinomial(popular, size).view(-1, 1)
        before = state.residents.owner.tolist()
        misses, victims = host.step(ids)
        result = plan(state, ids.to(DEVICE), passing=True)
        came, slots_taken, left = listed(result)
        assert came == misses, step
        assert [victim for victim in left if victim >= 0] == victims, step
        assert result.rounds is not None
        rounds = result.rounds[: len(came)].tolist()
        check_rounds(set(ids.flatten().tolist()), before, came, slots_taken, left, rounds)
        assert size > slots or not any(rounds)
        assert {e for e in state.residents.owner.tolist() if e >= 0} == {e.expert for e in host.residents}
        check_tables(state.residents)
        larger += size > slots
    assert larger > 4 or slots == experts


@pytest.mark.parametrize("name", ["lru", "ema"])
def test_an_event_that_may_be_larger_than_the_cache_is_refused_unless_it_may_pass(name: str) -> None:
    plan, state = planner(name, 8, 3)
    plan(state, torch.tensor([[0, 1]], device=DEVICE))
    tensors = [v for v in (*vars(state.residents).values(), *vars(state).values()) if isinstance(v, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(ValueError, match=r"ids \[2, 2\] may be of 4 of 8 experts, and there are 3 slots"):
        plan(state, torch.tensor([[0, 5], [5, 7]], device=DEVICE))
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(tensors, before, strict=True))
    result = plan(state, torch.tensor([[0, 5], [5, 7]], device=DEVICE), passing=True)
    assert listed(result) == ([5, 7], [2, 1], [-1, 1])
    assert plan(state, torch.tensor([[0, 5, 7]], device=DEVICE)).rounds is None


def test_so_many_pass_as_the_engine_lets_pass() -> None:
    assert plan_ema_module.PASSING == PASSING


@pytest.mark.parametrize("name", ["lru", "ema"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_numbers_that_are_no_experts(name: str, dtype: torch.dtype) -> None:
    plan, state = planner(name, 5, 4)
    result = plan(state, torch.tensor([[-1, 5, 3, 2**31 - 1]], dtype=dtype, device=DEVICE))
    assert listed(result) == ([3], [0], [-1])
    assert listed(plan(state, torch.full((2, 2), 5, dtype=dtype, device=DEVICE))) == ([], [], [])
    assert listed(plan(state, torch.empty(0, 2, dtype=dtype, device=DEVICE))) == ([], [], [])


def test_bad_input() -> None:
    state = new_lru(5, 4, DEVICE)
    for ids, message in (
        (torch.zeros(1, 2, device=DEVICE), "float32"),
        (torch.zeros(4, dtype=torch.int64, device=DEVICE), r"\[4\]"),
        (torch.zeros(2, 4, dtype=torch.int64, device=DEVICE).T, "contiguous"),
        (torch.zeros(1, 2, dtype=torch.int64, device="meta"), "meta"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_lru(state, ids)
    with pytest.raises(ValueError, match="3 rows for 4 slots"):
        new_lru(5, 4, DEVICE, rows=torch.zeros(3, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ValueError, match=r"log must be torch\.int32"):
        new_ema(5, 4, DEVICE, log=torch.zeros(3, 2, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match="0 slots"):
        new_lru(4, 0, DEVICE)
    with pytest.raises(ConfigError, match="alpha=1"):
        new_ema(4, 2, DEVICE, 1.0)
    with pytest.raises(ConfigError, match="burst=1"):
        new_ema(4, 2, DEVICE, burst=1.0)


def tables_of(state: Any) -> list[torch.Tensor]:
    return [v for v in (*vars(state.residents).values(), *vars(state).values()) if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("name", ["lru", "ema"])
def test_an_event_that_needs_what_is_out_of_reach_changes_nothing(name: str) -> None:
    torch.manual_seed(5)
    experts, slots, top_k = 16, 6, 3
    log = torch.full((8, top_k), -9, dtype=torch.int32, device=DEVICE)
    plan, state = planner(name, experts, slots, log=log.clone())
    _, plain = planner(name, experts, slots, log=log.clone())
    reach = Reach(
        torch.ones(experts, dtype=torch.int64, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    )
    voided = resident_but_gone = 0
    for _ in range(40):
        present = torch.rand(experts) < 0.8
        reach.addresses.copy_(present * 4096)
        ids = torch.randperm(experts)[:top_k].view(1, -1)
        ids[0, 0] = experts if torch.rand(()) < 0.2 else ids[0, 0]
        needed = {e for e in ids.flatten().tolist() if e < experts}
        held = {e for e in state.residents.owner.tolist() if e >= 0}
        before = [tensor.clone() for tensor in tables_of(state)]
        got = plan(state, ids.to(DEVICE), reach=reach)
        is_void = any(not present[e] for e in needed - held)
        assert bool(reach.void.item()) == is_void
        if is_void:
            assert listed(got) == ([], [], [])
            # An event later in the same pass, all of whose experts are there.
            assert listed(plan(state, torch.tensor([sorted(held)[:1] * top_k], device=DEVICE), reach=reach))[0] == []
            assert reach.void.item() == 1
            assert all(torch.equal(now, kept) for now, kept in zip(tables_of(state), before, strict=True))
            reach.void.zero_()
            voided += 1
        else:
            assert listed(got) == listed(plan(plain, ids.to(DEVICE)))
            assert all(torch.equal(now, right) for now, right in zip(tables_of(state), tables_of(plain), strict=True))
            resident_but_gone += any(not present[e] for e in needed & held)
    assert voided > 5 and resident_but_gone > 3


def test_reach_that_does_not_fit() -> None:
    state, ids = new_lru(5, 4, DEVICE), torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    addresses, void = torch.ones(5, dtype=torch.int64, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for reach, message in (
        (Reach(addresses[:4], void), "4 addresses and 1 flags"),
        (Reach(addresses, void.long()), r"void must be torch\.int32"),
        (Reach(addresses.int(), void), r"addresses must be torch\.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_lru(state, ids, reach=reach)


def test_an_event_without_experts_is_none_for_the_scores() -> None:
    state = new_ema(5, 4, DEVICE)
    plan_ema(state, torch.tensor([[0, 3]], device=DEVICE))
    before = state.scores.clone(), state.bursts.clone(), state.last_uses.clone()
    plan_ema(state, torch.tensor([[-1, 5]], device=DEVICE))
    assert before[0].any()
    assert all(map(torch.equal, (state.scores, state.bursts, state.last_uses), before))
