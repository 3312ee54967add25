"""What of a device's memory experts may take: what is left beside everything else that a run needs there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moert.config import Budget, format_at_most, format_bytes
from moert.device.base import DeviceMemory
from moert.errors import CapacityError
from moert.plan import LayerNeed, least_bytes, plan_slots

HEADROOM_BYTES = 256 << 20
"""For what torch keeps for itself, and the activations of the model's own layers."""

GRAPH_BYTES = 96 << 20
"""For a token's pass as a graph: the allocator keeps its tensors apart from all others, with a workspace for products
of 32 MiB on some GPUs, and the driver what it knows of some thousand kernels. Reckoned, not measured."""

FREE_SHARE = 0.9
"""Of what is left, how much experts take if nobody says: others may want some."""


@dataclass(frozen=True)
class Besides:
    """What a device must hold besides experts, in bytes."""

    dense_bytes: int = 0
    """The model's dense weights that are still to come there; those that are there are not free any more."""
    cache_bytes: int = 0
    """The KV cache at the context that was asked for."""
    staging_bytes: int = 0
    """Rows that experts come up in."""
    workspace_bytes: int = 0
    """Of the largest step."""
    graph_bytes: int = 0
    """Of a token's pass, where that may become one."""
    headroom_bytes: int = HEADROOM_BYTES

    @property
    def nbytes(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = {
            "dense weights": self.dense_bytes,
            "KV cache": self.cache_bytes,
            "rows to come up in": self.staging_bytes,
            "workspace": self.workspace_bytes,
            "graph": self.graph_bytes,
            "headroom": self.headroom_bytes,
        }
        return ", ".join(f"{format_bytes(nbytes)} {name}" for name, nbytes in parts.items() if nbytes)


def device_slots(needs: Sequence[LayerNeed], asked: Budget | None, memory: DeviceMemory, besides: Besides) -> list[int]:
    """Slots of each layer on the device.

    Args:
        needs: `slot_bytes` are those of a row there.
        asked: `device_memory`; None: as much as there is room for.
        memory: what the driver says is free now.

    Raises:
        CapacityError: it is too little for one token's experts, or there is less than was asked for; the message has
            all the parts, and what would work.
    """
    room = memory.free_bytes - besides.nbytes
    least = least_bytes(needs)
    if room < least:
        raise CapacityError(
            f"the device has {format_bytes(memory.free_bytes)} of {format_bytes(memory.total_bytes)} free, and "
            f"{format_bytes(besides.nbytes + least)} are needed ({besides}, {format_bytes(least)} for one token's "
            "experts); end what else uses it, ask for a shorter context, or leave device_memory out"
        )
    whole = sum(need.slot_bytes * need.num_experts for need in needs)
    if asked is None:
        return plan_slots(needs, Budget(nbytes=max(least, min(whole, int(room * FREE_SHARE)))), "device_memory")
    slots = plan_slots(needs, asked, "device_memory")
    taken = sum(need.slot_bytes * n for need, n in zip(needs, slots, strict=True))
    if taken > room:
        raise CapacityError(
            f"device_memory={asked} takes {format_bytes(taken)}, and of {format_bytes(memory.total_bytes)} there are "
            f"{format_bytes(memory.free_bytes)} free, of which {format_bytes(besides.nbytes)} are for other things "
            f"({besides}); end what else uses the device, or give device_memory at most {format_at_most(room)}"
        )
    return slots
