"""On the device: where the parts of messages to the CPU are; see `mailbox.Letters`."""

from __future__ import annotations

import triton
import triton.language as tl

NUMBER: tl.constexpr = tl.constexpr(0)
POSTED: tl.constexpr = tl.constexpr(1)
ANSWERED: tl.constexpr = tl.constexpr(2)
FAILED: tl.constexpr = tl.constexpr(3)
HEADER: tl.constexpr = tl.constexpr(4)
IDS: tl.constexpr = tl.constexpr(5)
WEIGHTS: tl.constexpr = tl.constexpr(6)
HIDDEN: tl.constexpr = tl.constexpr(7)
SUMS: tl.constexpr = tl.constexpr(8)


@triton.jit
def part(addresses_ptr: tl.tensor, which: tl.constexpr, kind: tl.constexpr) -> tl.tensor:
    """A pointer to a part, to numbers of that kind."""
    return tl.multiple_of(tl.load(addresses_ptr + which).to(tl.pointer_type(kind)), 16)
