"""The face of csrc/: expert arithmetic on the CPU that is faster than torch's own."""

from __future__ import annotations

import os

import torch

from moert import _C
from moert.errors import KernelUnavailableError

MOST_ROWS = 4
"""With more rows than this, torch's blocked products are faster."""

HALVES = (torch.bfloat16, torch.float16)

if _forced := os.environ.get("MOERT_ISA"):
    try:
        _C.use_isa(_forced)
    except ValueError as error:
        raise KernelUnavailableError(f"MOERT_ISA={_forced}: {error}; give avx512, avx2 or scalar") from error


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [T, K] times the transpose of `weight` [N, K], plus `bias` [N]: [T, N] in the dtype of `x`; new memory.

    For a few rows and 16-bit weights the product is this project's own: it reads the weights where they are, at the
    speed of memory, on the calling thread, and sums in fp32, rounding once. Otherwise it is torch's. Which of the two
    runs depends on dtypes and shapes alone, and neither depends on where the weights are, so an expert's output is the
    same from any slot.
    """
    if (
        x.dtype not in HALVES
        or weight.dtype != x.dtype
        or not 0 < x.shape[0] <= MOST_ROWS
        or not weight.is_contiguous()
        or not (weight.dim() == x.dim() == 2 and weight.shape[1] == x.shape[1])
        or not (weight.device.type == x.device.type == "cpu")
    ):
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.float().contiguous()
    y = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    t, k = rows.shape
    is_fp16 = weight.dtype == torch.float16
    _C.linear(is_fp16, weight.data_ptr(), rows.data_ptr(), y.data_ptr(), t, weight.shape[0], k)
    return (y if bias is None else y + bias.float()).to(x.dtype)
