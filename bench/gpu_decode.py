"""G1 to G4: a layer's experts for a few tokens, by the kernels and by transformers, every expert in its slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from gpu_layers import (
    FORMATS,
    TOLERANCE,
    Routing,
    Setting,
    error,
    exact,
    expert_bytes,
    few_of,
    make_bank,
    make_routing,
    slot_table,
    transformers_experts,
)
from gpu_results import Rows, Target
from gpu_timing import Call, race

from moert.kernels.bank import Bank
from moert.kernels.copy_rows import copy_rows, row_table
from moert.kernels.device_experts import device_experts
from moert.kernels.plan_lru import new_lru, plan_lru

Step = Callable[[Routing], torch.Tensor]

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
            steps: dict[str, Step] = {"moert": _kernels(bank, slot_of)}
            if choice == "bf16":
                steps["moert, four launches"] = _four_launches(bank, slot_of, setting)
                for name in FASTER:
                    steps[name] = _transformers(bank, name, setting)
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
    calls: dict[str, list[Call]] = {}
    places, few = few_of(routings[0])
    right = exact(bank, few, slot_of)
    for name, step in steps.items():
        off = error(step(routings[0])[places], right)
        if off <= TOLERANCE:
            calls[name] = [lambda step=step, routing=routing: step(routing) for routing in routings]  # type: ignore[misc]
        else:
            rows.add(f"{name}, {what}", None, "us", goal="", error=off, wrong=True)
    taken = race(calls, setting.device)
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


def _kernels(bank: Bank, slot_of: torch.Tensor) -> Step:
    return lambda routing: device_experts(bank, routing.x, routing.ids, routing.weights, slot_of)


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


def _transformers(bank: Bank, name: str, setting: Setting) -> Step:
    module = transformers_experts(bank, name, setting)

    def step(routing: Routing) -> torch.Tensor:
        with torch.inference_mode():
            out: torch.Tensor = module(routing.x, routing.ids, routing.weights.to(routing.x.dtype))
        return out

    return step
