"""Root mean square norms on the CPU."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from moert import _C
from moert.kernels.cpu import HALVES, NUMBERS

SCALES: Final = ("after_rounding", "before_rounding", "one_plus")
"""Where the weight comes in. With r = 1 / sqrt(mean(x^2) + eps), in fp32 but for the roundings to the dtype of `x`:
round(w * round(x * r)), round(w * (x * r)), round((1 + w) * (x * r))."""


class Norm(NamedTuple):
    """What `rms_norm` takes beside the rows."""

    weight: torch.Tensor
    eps: float
    scale: str


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, scale: str) -> torch.Tensor | None:
    """Each row of `x` [..., D] over the root of its mean square, times `weight` [D]: new memory, laid out as torch's.

    Every operation is rounded as if torch did it, but for the sum of the squares, which is exact to fp32. The result is
    the same for every instruction set and whatever rows come with it. Blocks.

    Args:
        scale: one of `SCALES`.

    Returns:
        None where the kernels are not for these tensors: other than bf16 or fp16, both of one dtype, on the CPU, with
        numbers, the weight contiguous, and the rows of `x` contiguous and evenly spaced.
    """
    dtype = x.dtype
    if (
        weight.dtype is not dtype
        or dtype not in HALVES
        or not (x.is_cpu and weight.is_cpu)
        or x.layout is not torch.strided
        or weight.layout is not torch.strided
        or not weight.is_contiguous()
        or weight.dim() != 1
    ):
        return None
    (width,) = weight.shape
    numbers = x.numel()
    if not numbers or not x.dim() or x.shape[-1] != width:
        return None
    spacing: int | None = width
    if x.is_contiguous():
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        y = torch.empty_like(x)
        spacing = _spacing(x, y)
    if spacing is None:
        return None
    _C.rms_norm(
        scale,
        NUMBERS[dtype],
        eps,
        weight.data_ptr(),
        width,
        x.data_ptr(),
        spacing,
        y.data_ptr(),
        width,
        numbers // width,
    )
    return y


def _spacing(x: torch.Tensor, y: torch.Tensor) -> int | None:
    """How far apart the rows of `x` lie in the order in which those of `y` follow one another; None if unevenly."""
    width = x.shape[-1]
    steps = sorted((y.stride(i), x.stride(i), size) for i, size in enumerate(x.shape[:-1]) if size > 1)
    if not steps or (width > 1 and x.stride(-1) != 1):
        return None
    spacing, rows = steps[0][1], 1
    for y_step, x_step, size in steps:
        if y_step != rows * width or x_step != rows * spacing:
            return None
        rows *= size
    return spacing if spacing >= width else None
