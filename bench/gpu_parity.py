"""Every kernel once, against what is right: before any time is taken, and for compute-sanitizer on tiny shapes."""

from __future__ import annotations

import torch
from gpu_layers import FORMATS, TOLERANCE, Setting, error, exact, few_of, make_bank, make_routing, slot_table
from gpu_results import Rows, Target

from moert.kernels.bank import Bank
from moert.kernels.copy_rows import copy_rows, row_table
from moert.kernels.device_experts import ArrivalGroup, device_experts, grouped_experts
from moert.kernels.dispatch import arrival_order
from moert.kernels.grouped_gate_up import Arrivals
from moert.kernels.plan_ema import new_ema, plan_ema
from moert.kernels.plan_lru import new_lru, plan_lru
from moert.kernels.router_rule import RouterRule
from moert.kernels.router_topk import router_topk


def run(setting: Setting, rows: Rows) -> None:
    """Raises AssertionError where a kernel is wrong."""
    wrong = []
    for choice in FORMATS if not setting.is_dry else ("bf16", "int4"):
        bank, slot_of = make_bank(choice, setting), slot_table(setting)
        # One kernel pair for few tokens, the other for many, in blocks of each size.
        for tokens in setting.of((1, 24, 2000), (1, 24)):
            routing = make_routing(setting, tokens)
            got = device_experts(bank, routing.x, routing.ids, routing.weights, slot_of)
            places, few = few_of(routing)
            off = error(got[places], exact(bank, few, slot_of))
            rows.add(f"error, {choice}, {tokens} tokens", off, "of its length", target=Target(TOLERANCE))
            if not off <= TOLERANCE:
                wrong.append(f"{choice} with {tokens} tokens is off by {off:.3g}")
        if choice == "int4":
            _absent(bank, setting)
            _arrivals(bank, setting)
    _copies(setting)
    _planners(setting)
    _router(setting)
    rows.add(
        "absent experts, arrivals, copies, planners and routers", float(not wrong), "right", target=Target(1, False)
    )
    assert not wrong, "; ".join(wrong)


def _absent(bank: Bank, setting: Setting) -> None:
    """Experts without a slot, and ids of none, add nothing."""
    slot_of = slot_table(setting)
    slot_of[::2] = -1
    for tokens in (1, 24):
        routing = make_routing(setting, tokens)
        routing.ids[:, 0] = setting.shape.experts
        got = device_experts(bank, routing.x, routing.ids, routing.weights, slot_of)
        places, few = few_of(routing)
        wanted = exact(bank, few, slot_of)
        assert (got[places].double().cpu() - wanted).norm() <= TOLERANCE * wanted.norm() + 1e-6, "absent experts"


def _arrivals(bank: Bank, setting: Setting) -> None:
    """In groups and behind epochs, to the last bit what comes of all at once."""
    routing, slot_of = make_routing(setting, 24), slot_table(setting)
    step = routing.x, routing.ids, routing.weights, slot_of
    wanted = grouped_experts(bank, *step)
    experts = setting.shape.experts
    order = arrival_order(slot_of, torch.arange(experts // 2, device=setting.device).flip(0))
    groups = [ArrivalGroup(experts // 2, None), ArrivalGroup(experts, None)]
    assert torch.equal(grouped_experts(bank, *step, order=order, groups=groups), wanted), "groups"
    ready = torch.full((experts,), 3, dtype=torch.int32, device=setting.device)
    arrivals = Arrivals(ready, torch.tensor([3], dtype=torch.int32, device=setting.device), most_polls=1000)
    assert torch.equal(grouped_experts(bank, *step, order=order, arrivals=arrivals), wanted), "arrivals"


def _copies(setting: Setting) -> None:
    source = torch.randint(0, 99, (6, 96), dtype=torch.int32)
    source = source if setting.is_dry else source.pin_memory()
    target = torch.zeros(4, 96, dtype=torch.int32, device=setting.device)

    def numbers(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=setting.device)

    copy_rows(row_table([(source, target)], setting.device), numbers(5, 2, 0), numbers(1, 3, 0), numbers(2))
    wanted = torch.zeros(4, 96, dtype=torch.int32)
    wanted[1], wanted[3] = source[5], source[2]
    assert torch.equal(target.cpu(), wanted), "copy_rows"


def _planners(setting: Setting) -> None:
    """Only misses come, each to a slot of its own."""
    for plan, state in ((plan_lru, new_lru(8, 4, setting.device)), (plan_ema, new_ema(8, 4, setting.device))):
        seen: set[int] = set()
        for event in ([0, 1], [2, 1], [3, 4], [0, 5]):
            before = {expert for expert in state.residents.owner.tolist() if expert >= 0}
            result = plan(state, torch.tensor([event], device=setting.device))
            count = int(result.count)
            assert result.experts[:count].tolist() == sorted(set(event) - before), "a planner's misses"
            assert set(event) <= set(state.residents.owner.tolist()), "a planner's residents"
            seen.update(result.slots[:count].tolist())
        assert seen == {0, 1, 2, 3}, "a planner's slots"


def _router(setting: Setting) -> None:
    shape = setting.shape
    logits = torch.randn(24, shape.experts, device=setting.device)
    ids, weights, _ = router_topk(logits, RouterRule(shape.top_k, normalise=True))
    wanted = logits.softmax(-1).topk(shape.top_k)
    assert torch.equal(ids.long(), wanted.indices), "the router's ids"
    share = wanted.values / wanted.values.sum(1, keepdim=True)
    assert torch.allclose(weights, share, rtol=1e-5), "the router's weights"
