"""How many slots each layer gets: pure arithmetic over sizes, checked before anything is allocated."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from moert.config import Budget, format_at_least, format_bytes
from moert.errors import CapacityError


@dataclass(frozen=True)
class LayerNeed:
    """What one layer's cache is made of: its experts, the bytes of a slot, and the picks of one token."""

    name: str
    num_experts: int
    slot_bytes: int
    expert_bytes: int
    """Bytes of one expert's tensors, without alignment."""
    top_k: int
    """Experts that one token needs at once; fewer slots are refused."""


WORKSPACE_BYTES = 256 << 20
"""Activations and what torch keeps for itself."""

FREE_SHARE = 0.8
"""Of what is available, the most that is taken where nobody says how much: others want to run too."""


def default_budget(needs: Sequence[LayerNeed], available_bytes: int, reserved_bytes: int = 0) -> Budget:
    """The budget when none is given: four fifths of what is available, less workspace and what is `reserved_bytes` for
    the KV cache and the like. No more than all experts take."""
    wanted = sum(need.slot_bytes * need.num_experts for need in needs)
    room = int(available_bytes * FREE_SHARE) - WORKSPACE_BYTES - reserved_bytes
    return Budget(nbytes=max(1, min(wanted, room)))


def plan_slots(needs: Sequence[LayerNeed], budget: Budget, option: str = "host_memory") -> list[int]:
    """Slots per layer, the same number for every layer as far as the budget goes.

    A share is a share of each layer's experts. A number of bytes counts slots as they are, alignment included; what
    is left when one more slot for every layer does not fit goes to the first layers.

    Raises:
        CapacityError: some layer would get fewer slots than one token needs; the smallest budget that works is named.
    """
    least = least_bytes(needs)
    if budget.share is not None:
        slots = [int(budget.share * need.num_experts + 1e-9) for need in needs]
        short = [need for need, n in zip(needs, slots, strict=True) if n < need.top_k]
        if short:
            need = short[0]
            raise CapacityError(
                f"{option}={budget.share:.4%} keeps {int(budget.share * need.num_experts + 1e-9)} of "
                f"{need.num_experts} experts in {need.name}, but one token needs {need.top_k}; "
                f'give at least "{_least_percent(needs)}" or {format_at_least(least)}'
            )
        return slots
    assert budget.nbytes is not None
    if budget.nbytes < least:
        picks = sorted({need.top_k for need in needs})
        experts = " to ".join(map(str, dict.fromkeys((picks[0], picks[-1]))))
        raise CapacityError(
            f"{option} is {format_bytes(budget.nbytes)} ({budget.nbytes} bytes), but {format_at_least(least)} "
            f"({least} bytes) are needed for one token's {experts} experts in each of {len(needs)} layers; "
            f"raise {option}"
        )
    slots = [need.top_k for need in needs]
    left = budget.nbytes - least
    while True:
        growing = [i for i, need in enumerate(needs) if slots[i] < need.num_experts]
        round_bytes = sum(needs[i].slot_bytes for i in growing)
        if not growing or round_bytes > left:
            break
        rounds = min(left // round_bytes, *(needs[i].num_experts - slots[i] for i in growing))
        for i in growing:
            slots[i] += rounds
        left -= rounds * round_bytes
    grown = True
    while grown:
        grown = False
        for i, need in enumerate(needs):
            if slots[i] < need.num_experts and need.slot_bytes <= left:
                slots[i] += 1
                left -= need.slot_bytes
                grown = True
    return slots


def least_bytes(needs: Sequence[LayerNeed]) -> int:
    """Bytes of the slots that one token needs, below which no budget works."""
    return sum(need.top_k * need.slot_bytes for need in needs)


def shrink_slots(needs: Sequence[LayerNeed], slots: Sequence[int], nbytes: int) -> list[int]:
    """The most of the present `slots` that fit in `nbytes`, no layer with more than now and each with its `top_k`.

    One slot after another is taken from the layer with the largest share of its experts in slots, so that all layers
    end at about the same share. Where `nbytes` is too few, each keeps its `top_k`.
    """
    left = list(slots)
    over = sum(n * need.slot_bytes for n, need in zip(slots, needs, strict=True)) - nbytes
    queue = [(-n / need.num_experts, i) for i, (n, need) in enumerate(zip(slots, needs, strict=True)) if n > need.top_k]
    heapq.heapify(queue)
    while over > 0 and queue:
        _, i = heapq.heappop(queue)
        left[i] -= 1
        over -= needs[i].slot_bytes
        if left[i] > needs[i].top_k:
            heapq.heappush(queue, (-left[i] / needs[i].num_experts, i))
    return left


def _least_percent(needs: Sequence[LayerNeed]) -> str:
    """The smallest whole share that works in every layer."""
    return f"{max(-(-100 * need.top_k // need.num_experts) for need in needs)}%"
