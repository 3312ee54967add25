"""G5: a layer's experts for many tokens, by the kernels, by transformers, and the bare products by torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from gpu_contenders import Step, kernels, right_ones, transformers
from gpu_layers import (
    Routing,
    Setting,
    make_bank,
    make_routing,
    slot_table,
)
from gpu_results import Rows, Target
from gpu_timing import Call, race

from moert.kernels.bank import Bank

AT = 8192
"""Tokens that the goals are for."""

PRODUCTS = "torch, products alone"


def run(setting: Setting, rows: Rows, peaks: Mapping[str, float]) -> None:
    for choice in ("bf16", "int4", "fp8", "mxfp4", "int8") if not setting.is_dry else ("bf16", "int4"):
        bank, slot_of = make_bank(choice, setting), slot_table(setting)
        for tokens in setting.of((AT, 4096, 1024, 256, 64, 32, 16) if choice == "bf16" else (AT, 256, 32), (24,)):
            steps: dict[str, Step] = {"moert": kernels(bank, slot_of)}
            if choice == "bf16":
                steps["grouped_mm"] = transformers(bank, "grouped_mm", setting)
            _cell(setting, rows, peaks, choice, tokens, bank, slot_of, steps)


def _cell(
    setting: Setting,
    rows: Rows,
    peaks: Mapping[str, float],
    choice: str,
    tokens: int,
    bank: Bank,
    slot_of: torch.Tensor,
    steps: dict[str, Step],
) -> None:
    # Up to a few hundred tokens the time is that of the weights, which must not be in the cache.
    routings = [make_routing(setting, tokens) for _ in range(1 if setting.is_dry or tokens > 1024 else 4)]
    what = f"{choice}, {tokens} tokens"
    calls = right_ones(steps, routings, bank, slot_of, rows, what, "TFLOP/s")
    if choice == "bf16":
        calls[PRODUCTS] = [_products(bank, routing) for routing in routings]
    taken = race(calls, setting.device, rounds=5, may_fail=("grouped_mm", PRODUCTS))
    operations = setting.shape.operations * tokens * setting.shape.top_k
    dense = peaks.get("dense")
    for name, time in taken.items():
        rate = operations / time.median / 1e12
        is_goal = (name, choice, tokens) == ("moert", "bf16", AT)
        rows.add(
            f"{name}, {what}",
            rate,
            "TFLOP/s",
            goal="G5" if is_goal else "",
            target=Target(0.55 * dense, at_most=False) if is_goal and dense else None,
            share_of_dense=rate / dense if dense else None,
            us=time.us,
            how=time.how,
            contender=name,
            format=choice,
            tokens=tokens,
        )
    if "moert" in taken and "grouped_mm" in taken:
        ratio = taken["grouped_mm"].median / taken["moert"].median
        target = Target(1.15, at_most=False) if tokens == AT else None
        rows.add(f"grouped_mm over moert, {what}", ratio, "x", goal="G5" if tokens == AT else "", target=target)


def _products(bank: Bank, routing: Routing) -> Call:
    """Both products over rows that lie sorted already, and nothing else."""
    picks = routing.ids.flatten()
    x = routing.x[picks.argsort() // routing.ids.shape[1]]
    ends = torch.bincount(picks, minlength=bank.slots).cumsum(0).to(torch.int32)
    h = torch.randn(picks.numel(), bank.width, dtype=x.dtype, device=x.device)
    up, down = bank.up.codes.transpose(1, 2), bank.down.codes.transpose(1, 2)
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

    def both() -> None:
        grouped_mm(x, up, offs=ends)
        grouped_mm(h, down, offs=ends)

    return both
