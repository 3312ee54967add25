"""Weights with what is added to their products, as the extension takes them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from moert.kernels.cpu_matrix import Matrix

Projection = tuple[torch.Tensor, torch.Tensor | None]
"""A weight [N, K] and a bias [N]."""

Arguments = tuple[object, int | None]


def projection_arguments(projection: Projection) -> Arguments:
    """What the extension takes of a weight and its bias, which it copies; what they point to is the caller's.

    Raises:
        ValueError: a weight or bias that kernels cannot read.
    """
    weight, bias = projection
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"a bias {list(bias.shape)} does not fit a weight {list(weight.shape)}")
    return Matrix("plain", weight).capsule, None if bias is None else bias.data_ptr()


def check_plain(what: str, tensors: Iterable[torch.Tensor | None], dtype: torch.dtype) -> None:
    """
    Raises:
        ValueError: one of them is not contiguous, on the CPU and of that dtype.
    """
    for tensor in tensors:
        if tensor is not None and not (tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous()):
            raise ValueError(f"all of {what} must be contiguous {dtype} on the CPU, not {tensor.dtype}")
