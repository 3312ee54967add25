"""Weights as the kernels of csrc/ read them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moert import _C

NUMBERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""The types of activations, of biases and of unquantised weights."""


class Matrix:
    """A weight [N, K] that kernels read where it is; keeps its tensors alive and never changes them."""

    __slots__ = ("_tensors", "capsule", "dtype", "format", "shape")

    def __init__(
        self,
        weight_format: str,
        data: torch.Tensor,
        scales: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None,
        *,
        transposed: bool = False,
    ) -> None:
        """See `matrix`.

        Raises:
            ValueError: a tensor of the wrong dtype, shape, layout or device for the format.
        """
        _check_layout("weight", data, 2)
        rows, columns = data.shape
        per_byte = 2 if weight_format in ("int4", "mxfp4") else 1
        self.shape = (columns, rows) if transposed else (rows, columns * per_byte)
        self.format = weight_format
        self.dtype = data.dtype
        self._tensors = (data, scales, zeros)
        stored, scale_dtype = _STORED.get(weight_format, (None, None))
        if weight_format == "plain":
            name = NUMBERS.get(data.dtype)
            if name is None:
                raise ValueError(f"a plain weight is {', '.join(map(str, NUMBERS))}, not {data.dtype}")
        elif stored is None:
            raise ValueError(f"format {weight_format!r} is unknown; there are plain, {', '.join(_STORED)}")
        else:
            name = weight_format
            if data.dtype != stored:
                raise ValueError(f"a weight in {weight_format} is stored as {stored}, not {data.dtype}")
        group = 0
        if (scales is None) != (weight_format == "plain"):
            raise ValueError(f"a weight in {weight_format} {'needs' if scales is None else 'has no'} scales")
        if scales is not None:
            _check_layout("scales", scales, 2)
            if scales.dtype != scale_dtype:
                raise ValueError(f"the scales of {weight_format} are {scale_dtype}, not {scales.dtype}")
            group = _group(weight_format, self.shape, tuple(scales.shape))
        if zeros is not None:
            if scales is None:
                raise ValueError(f"a weight in {weight_format} has no zero points")
            _check_layout("zeros", zeros, 2)
            if zeros.dtype != torch.uint8 or zeros.shape != scales.shape:
                raise ValueError(
                    f"zero points are uint8 {tuple(scales.shape)} like the scales, not {zeros.dtype} "
                    f"{tuple(zeros.shape)}"
                )
        self.capsule = _C.matrix(
            name,
            transposed,
            group,
            *self.shape,
            data.data_ptr(),
            None if scales is None else scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(),
        )

    def kernel_name(self, tokens: int) -> str:
        """The kernel that a product with that many tokens uses."""
        return _C.kernel_name(self.capsule, tokens)


_STORED = {
    "int8": (torch.int8, torch.float16),
    "int4": (torch.uint8, torch.float16),
    "fp8": (torch.uint8, torch.float32),
    "mxfp4": (torch.uint8, torch.uint8),
}
"""Format -> dtypes of its codes and of its scales."""

FORMATS = ("plain", *_STORED)
"""The weight formats that kernels read."""

_FP8_BLOCK = 128


def _group(weight_format: str, shape: tuple[int, int], scales: tuple[int, ...]) -> int:
    """The numbers that share a scale."""
    n, k = shape
    if weight_format == "fp8":
        wanted = (-(-n // _FP8_BLOCK), -(-k // _FP8_BLOCK))
        if scales != wanted:
            raise ValueError(f"fp8 weights [{n}, {k}] have scales {list(wanted)}, not {list(scales)}")
        return _FP8_BLOCK
    for group in (32, 128) if weight_format == "int4" else (32,):
        if k % group == 0 and scales == (n, k // group):
            return group
    groups = "groups of 32 or 128" if weight_format == "int4" else "groups of 32"
    raise ValueError(f"{weight_format} weights [{n}, {k}] come in {groups}, which scales {list(scales)} do not fit")


def _check_layout(what: str, tensor: torch.Tensor, dim: int) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"the {what} must be on the CPU, not on {tensor.device}")
    if tensor.dim() != dim or tensor.numel() == 0:
        raise ValueError(f"the {what} must have {dim} dimensions and numbers in them, not shape {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"the {what} must be contiguous, not of strides {tensor.stride()}")


def matrix(weight_format: str, tensors: Mapping[str, torch.Tensor], name: str, *, transposed: bool = False) -> Matrix:
    """The weight `name` of an expert's stored `tensors`.

    Args:
        weight_format: "plain" (fp32, bf16 or fp16 by dtype), or the name of a quantised format.
        tensors: `name` with, for a quantised format, `name`_scales and perhaps `name`_zeros, as the format stores them.
        transposed: the plain weight lies as [K, N].

    Raises:
        ValueError: a tensor of the wrong dtype, shape, layout or device for the format.
    """
    return Matrix(
        weight_format, tensors[name], tensors.get(f"{name}_scales"), tensors.get(f"{name}_zeros"), transposed=transposed
    )
