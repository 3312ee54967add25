"""Every kernel on tensors with no access beside them: what reads or writes past an end kills the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_triton_decode import guarded_bank, make_bank
from triton_support import INTERPRETED, guarded, survives

from moert.kernels import reference
from moert.kernels.copy_rows import copy_rows, row_table, scattered_table
from moert.kernels.device_experts import grouped_experts
from moert.kernels.dispatch import Counts
from moert.kernels.gate import Gate
from moert.kernels.grouped_gate_up import Arrivals
from moert.kernels.plan_ema import new_ema, plan_ema
from moert.kernels.plan_lru import new_lru, plan_lru
from moert.kernels.router_rule import RouterRule
from moert.kernels.router_topk import router_topk

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="pages of the host")


def _guard_all(at_end: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Have torch give guarded memory to whatever asks for some from here on, in a process that ends after it."""

    def of(tensor: torch.Tensor) -> torch.Tensor:
        return guarded(tensor, at_end=at_end) if tensor.numel() and tensor.device.type == "cpu" else tensor

    def giving(make: Any) -> Any:
        return lambda *arguments, **named: of(make(*arguments, **named))

    for name in ("empty", "zeros", "full"):
        setattr(torch, name, giving(getattr(torch, name)))
    return of


def run_many_tokens(at_end: bool) -> None:
    """Blocks are larger than the work wherever they can be, and so are the lists of picks, experts and slots."""
    ways = (
        ("plain", Gate(), 33, 37, False),
        ("plain", Gate(interleaved=True), 33, 37, True),
        ("plain", Gate(), 35, 21, True),
        ("int4,symmetric=false", Gate(gated=False), 96, 96, False),
        ("int8", Gate(interleaved=True), 96, 96, False),
        ("mxfp4", Gate(), 96, 32, False),
        ("fp8", Gate(), 140, 150, False),
    )
    banks = [(make_bank(*way[:4], transposed=way[4], bias=torch.float32)) for way in ways]
    of = _guard_all(at_end)
    torch.manual_seed(0)
    tokens, top_k, experts = 13, 3, 6
    ids = torch.randint(-2, experts + 2, (tokens, top_k))
    ids[:3] = torch.tensor([[0, 2, 4], [0, 2**40, 2], [4, -(2**40), 0]])
    ids[-2:] = torch.tensor([[5, 1, 5], [4, 2, 0]])
    weights = torch.rand(tokens, top_k)
    step = of(ids), of(weights), of(torch.tensor([4, -1, 0, -1, 2, 99], dtype=torch.int32))
    order = of(torch.tensor([4, 0, 9, 2, 1], dtype=torch.int32))
    for number, plain in enumerate(banks):
        bank = guarded_bank(plain, at_end)
        x = of(torch.randn(tokens, bank.hidden).to(torch.float32 if number == 1 else torch.bfloat16))
        arrivals = Arrivals(torch.zeros(bank.slots, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
        got = grouped_experts(bank, x, *step, order=order if number else None, arrivals=arrivals)
        wanted = reference.decode_down(bank, reference.decode_gate_up(bank, x, *step), *step)
        assert (got.double() - wanted).norm() < 8e-3 * wanted.norm()


def run_others(at_end: bool) -> None:
    of = _guard_all(at_end)
    torch.manual_seed(1)
    for rule, experts, biased in (
        (RouterRule(3, normalise=True), 21, False),
        (RouterRule(3, "sigmoid", groups=3, kept_groups=2, group_score="top2"), 21, True),
    ):
        logits = of(torch.randn(11, experts))
        bias = of(torch.randn(experts) / 8) if biased else None
        ids, weights, counts = router_topk(logits, rule, bias=bias)
        wanted = reference_router(logits, rule, bias)
        assert torch.equal(ids, wanted) and isinstance(counts, Counts) and weights.isfinite().all()

    source, target = of(torch.arange(36, dtype=torch.int32).view(3, 12)), torch.zeros(2, 12, dtype=torch.int32)
    rows = [of(row.clone()) for row in source]
    scattered = scattered_table([rows], [target], "cpu")
    lists = (of(torch.tensor(numbers, dtype=torch.int32)) for numbers in ([2, 3, 0, -1], [1, 0, 0, 1], [4]))
    sources, destinations, count = lists
    for table in (row_table([(source, target)], "cpu"), scattered):
        target.zero_()
        copy_rows(table, sources, destinations, count)
        assert torch.equal(target, source[[0, 2]])

    for plan, state in ((plan_lru, new_lru(7, 5, "cpu")), (plan_ema, new_ema(7, 5, "cpu"))):
        for event in ([[0, 6, 3]], [[-1, 7, 2]], [[5, 1, 4]], [[0, 1, 6]], [[0, 1, 2, 3, 4, 5, 6]]):
            plan(state, of(torch.tensor(event)), passing=len(event[0]) > 5)  # type: ignore[operator]
            assert {e for e in event[0] if 0 <= e < 7} & set(state.residents.owner.tolist())


def reference_router(logits: torch.Tensor, rule: RouterRule, bias: torch.Tensor | None) -> torch.Tensor:
    from moert.kernels.reference_grouped import router_topk as by_torch

    return by_torch(logits, rule, bias)[0]


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("work", [run_many_tokens, run_others])
def test_nothing_beside_the_tensors_is_touched(work: Callable[[bool], None], at_end: bool) -> None:
    assert survives(work, at_end)
