"""Rotary position embedding on the CPU."""

from __future__ import annotations

import torch

from moert import _C
from moert.kernels.cpu import HALVES, NUMBERS


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, whole: bool) -> torch.Tensor | None:
    """x * cos + turned(x) * sin for the first R numbers of each head of `x` [B, H, T, D], the others as they are.

    turned(x) is minus the second half of those R numbers and then the first. Every product and sum is rounded to the
    dtype, so the result is torch's to the last bit. New memory. Blocks.

    Args:
        cos, sin: [B or 1, T, R], R even and at most D.
        whole: R must be D, and the result has the strides of `x`; else it is contiguous.

    Returns:
        None where the kernel is not for these tensors: other than bf16 or fp16, all of one dtype, on the CPU, with
        numbers, and heads and angles whose numbers follow one another; a layout that new memory cannot have.
    """
    dtype = x.dtype
    if (
        dtype not in HALVES
        or cos.dtype is not dtype
        or sin.dtype is not dtype
        or not (x.is_cpu and cos.is_cpu and sin.is_cpu)
        or x.layout is not torch.strided
        or cos.layout is not torch.strided
        or x.dim() != 4
        or cos.dim() != 3
        or not x.numel()
    ):
        return None
    batch, heads, tokens, width = x.shape
    angles, per_angle, turned = cos.shape
    steps = cos.stride()
    if (
        angles not in (1, batch)
        or per_angle != tokens
        or turned > width
        or (whole and turned < width)
        or turned % 2
        or not 0 < turned <= 1024
        or sin.shape != cos.shape
        or sin.stride() != steps
        or steps[2] != 1
        or x.stride(3) != 1
    ):
        return None
    if whole and not x.is_contiguous():
        y = torch.empty_like(x)
        if y.stride() != x.stride():
            return None
    else:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _C.rotate(
        NUMBERS[dtype],
        (batch, heads, tokens, width, turned),
        x.data_ptr(),
        x.stride()[:3],
        y.data_ptr(),
        y.stride()[:3],
        cos.data_ptr(),
        sin.data_ptr(),
        (steps[0] if angles == batch else 0, steps[1]),
    )
    return y
