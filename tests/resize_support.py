"""What the tests of a changing host tier share."""

from __future__ import annotations

from typing import Any

import torch
from pages import present_bytes

import moert
from moert.hf.model import runtime_of

IDS = torch.arange(3, 40).remainder(100)[None]


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def check(model: Any) -> None:
    """The books are in order, and exactly the slots have memory."""
    runtime = runtime_of(model)
    for layer in runtime.layers:
        layer.residency.check_integrity()
    tier = runtime._tier
    assert tier is not None
    assert tier.slots == tuple(layer.residency.capacity for layer in runtime.layers)
    assert present_bytes(tier.arena.address, tier.arena.nbytes) == moert.stats(model).slot_bytes
    residents = sum(len(layer.residency) for layer in runtime.layers)
    assert moert.stats(model).resident_bytes == residents * runtime.layers[0].spec.expert_bytes
