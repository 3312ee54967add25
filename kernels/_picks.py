"""On the device: which slot a pick of the router is computed from."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slots_of_picks(
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    slot_of_ptr: tl.tensor,
    picks: tl.tensor,
    mask: tl.tensor,
    experts: tl.tensor,
    slots: tl.tensor,
) -> tl.tensor:
    """int64 slots of `picks` (places in ids and weights), -1 where there is nothing to compute.

    That is: `mask` is false, the id names no expert, the expert has no slot in the bank, or the pick's weight is 0.
    """
    ids = tl.load(ids_ptr + picks, mask=mask, other=-1).to(tl.int64)
    slot = tl.load(slot_of_ptr + ids, mask=(ids >= 0) & (ids < experts), other=-1).to(tl.int64)
    weights = tl.load(weights_ptr + picks, mask=mask, other=0.0).to(tl.float32)
    return tl.where((slot < slots) & (weights != 0), slot, -1)
