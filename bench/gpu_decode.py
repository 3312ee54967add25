"""G1 to G4: a layer's experts for a few tokens, by the kernels and by transformers, every expert in its slot."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from gpu_contenders import Step, kernels, right_ones, transformers
from gpu_layers import (
    FORMATS,
    Routing,
    Setting,
    expert_bytes,
    make_bank,
    make_routing,
    slot_table,
)
from gpu_results import Rows, Target
from gpu_timing import race

from moert.kernels.bank import Bank
from moert.kernels.copy_rows import copy_rows, row_table
from moert.kernels.device_experts import device_experts
from moert.kernels.plan_lru import new_lru, plan_lru

ROUTINGS = 16
"""Of other experts each, so that their weights are not in the cache: 16 tokens of 8 picks read all of 128 experts."""

GOALS = {
    ("bf16", 1): ("G1", Target(25)),
    ("bf16", 8): ("G2", Target(140)),
    ("int4", 1): ("G3", Target(12)),
    ("mxfp4", 1): ("G3", Target(12)),
}
FASTER = {"batched_mm": Target(3, at_most=False), "grouped_mm": Target(2, at_most=False)}


def run(setting: Setting, rows: Rows, peaks: Mapping[str, float]) -> None:
    for choice in FORMATS if not setting.is_dry else ("bf16", "int4"):
        bank, slot_of = make_bank(choice, setting), slot_table(setting)
        for tokens in setting.of((1, 2, 4, 8), (1, 2)):
            steps: dict[str, Step] = {"moert": kernels(bank, slot_of)}
            if choice == "bf16":
                steps["moert, four launches"] = _four_launches(bank, slot_of, setting)
                for name in FASTER:
                    steps[name] = transformers(bank, name, setting)
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
    routings = [make_routing(setting, tokens) for _ in range(1 if setting.is_dry else ROUTINGS)]
    what = f"{choice}, {tokens} tokens"
    calls = right_ones(steps, routings, bank, slot_of, rows, what, "us")
    taken = race(calls, setting.device, may_fail=FASTER)
    nbytes = expert_bytes(bank) * sum(routing.distinct for routing in routings) / len(routings)
    goal, target = GOALS.get((choice, tokens), ("", None))
    # With planner and copies where they are timed; four launches are what the goal is for.
    aimed = "moert, four launches" if "moert, four launches" in taken else "moert"
    for name, time in taken.items():
        share = nbytes / time.median / 1e9 / peaks["device_copy"] if peaks.get("device_copy") else None
        mine = name == aimed
        rows.add(
            f"{name}, {what}",
            time.us,
            "us",
            goal=goal if mine else "",
            target=target if mine else None,
            least=1e6 * time.least,
            how=time.how,
            share_of_copy_peak=share,
            contender=name,
            format=choice,
            tokens=tokens,
            bytes=nbytes,
        )
    for name, faster in FASTER.items():
        if "moert" in taken and name in taken:
            ratio = taken[name].median / taken["moert"].median
            rows.add(f"{name} over moert, {what}", ratio, "x", goal="G4", target=faster, how=taken[name].how)


def _four_launches(bank: Bank, slot_of: torch.Tensor, setting: Setting) -> Step:
    """As with a cache in which everything is: the planner looks, and there is nothing to copy."""
    state = new_lru(setting.shape.experts, setting.shape.experts, setting.device)
    state.residents.slot_of.copy_(slot_of)
    state.residents.owner.copy_(slot_of)
    pairs = []
    for matrix in (bank.up, bank.down):
        host = torch.empty_like(matrix.codes[:2], device="cpu", pin_memory=not setting.is_dry)
        pairs.append((host, matrix.codes))
    table = row_table(pairs, setting.device)

    def step(routing: Routing) -> torch.Tensor:
        plan = plan_lru(state, routing.ids)
        copy_rows(table, plan.experts, plan.slots, plan.count)
        return device_experts(bank, routing.x, routing.ids, routing.weights, state.residents.slot_of)

    return step
