"""What is timed over a layer's experts, and that it is right before it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from gpu_layers import TOLERANCE, Routing, Setting, error, exact, few_of, transformers_experts
from gpu_results import Rows
from gpu_timing import Call

from moert.kernels.bank import Bank
from moert.kernels.device_experts import device_experts

Step = Callable[[Routing], torch.Tensor]


def kernels(bank: Bank, slot_of: torch.Tensor) -> Step:
    return lambda routing: device_experts(bank, routing.x, routing.ids, routing.weights, slot_of)


def transformers(bank: Bank, name: str, setting: Setting) -> Step:
    """By the experts implementation of that name."""
    module = transformers_experts(bank, name, setting)

    def step(routing: Routing) -> torch.Tensor:
        with torch.inference_mode():
            out: torch.Tensor = module(routing.x, routing.ids, routing.weights.to(routing.x.dtype))
        return out

    return step


def right_ones(
    steps: Mapping[str, Step],
    routings: Sequence[Routing],
    bank: Bank,
    slot_of: torch.Tensor,
    rows: Rows,
    what: str,
    unit: str,
) -> dict[str, list[Call]]:
    """The calls of those whose first result is that of double precision; the others become rows that are wrong."""
    calls: dict[str, list[Call]] = {}
    places, few = few_of(routings[0])
    right = exact(bank, few, slot_of)
    for name, step in steps.items():
        off = error(step(routings[0])[places], right)
        if off <= TOLERANCE:
            calls[name] = [lambda step=step, routing=routing: step(routing) for routing in routings]  # type: ignore[misc]
        else:
            rows.add(f"{name}, {what}", None, unit, goal="", error=off, wrong=True)
    return calls
