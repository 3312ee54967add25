"""A bank: the weights of the experts that have a slot on a device, as the Triton kernels read them.

Every tensor of an expert is a tensor [S, ...] here, one row a slot, and its rows may be any distance apart, so a bank
can be views into one block of records. Which slot an expert has is said by `slot_of` [E], int32, -1 for none; kernels
compute nothing for an expert without a slot, nor for an id outside 0 to E - 1. `moert.formats` says what codes mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moert.kernels.gate import Gate

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The types of activations, router weights, biases and plain weights."""

STORED: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "int8": (torch.int8, torch.float16),
    "int4": (torch.uint8, torch.float16),
    "fp8": (torch.uint8, torch.float32),
    "mxfp4": (torch.uint8, torch.uint8),
}
"""Format -> dtypes of its codes and of its scales."""

GROUPS: dict[str, tuple[int, ...]] = {"int8": (32,), "int4": (32, 128), "fp8": (128,), "mxfp4": (32,)}
"""Format -> how many numbers of a row may share a scale; with fp8 128 rows do, too."""

PACKED = ("int4", "mxfp4")
"""Formats with two codes a byte: number 2j in the low half of byte j, number 2j + 1 in the high one."""


@dataclass(frozen=True, eq=False)
class BankMatrix:
    """One weight [N, K] of every expert in the bank; made by `bank_matrix`. Keeps its tensors alive, copies nothing."""

    format: str
    """ "plain" or a name in `STORED`."""
    codes: torch.Tensor
    """[S, N, K], [S, K, N] if transposed, [S, N, K / 2] for packed codes."""
    scales: torch.Tensor | None
    """[S, N, K / group], for fp8 [S, ceil(N / 128), ceil(K / 128)]; None for plain weights."""
    zeros: torch.Tensor | None
    """uint8, shaped as the scales; None: int4's zero is 8."""
    bias: torch.Tensor | None
    """[S, N] in one of `FLOATS`."""
    n: int
    k: int
    group: int
    """Numbers of a row that share a scale; 0 for plain weights."""
    transposed: bool

    @property
    def slots(self) -> int:
        return self.codes.shape[0]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def arguments(self) -> dict[str, Any]:
        """What kernels take of it, by their names: pointers, numbers from one slot to the next, what it is like."""
        parts = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros, "bias": self.bias}
        return {
            **{f"{name}_ptr": part for name, part in parts.items()},
            **{f"{name}_stride": 0 if part is None else part.stride(0) for name, part in parts.items()},
            "FORMAT": self.format,
            "GROUP": self.group,
            "TRANSPOSED": self.transposed,
        }


@dataclass(frozen=True, eq=False)
class Bank:
    """Both weights of every expert in the bank, and the gate between them.

    Raises:
        ValueError: the weights do not fit each other or the gate.
    """

    up: BankMatrix
    """[2F, D] for a gated expert, else [F, D]."""
    down: BankMatrix
    """[D, F]."""
    gate: Gate

    def __post_init__(self) -> None:
        rows = self.width * (2 if self.gate.gated else 1)
        if (self.up.n, self.up.k) != (rows, self.hidden):
            raise ValueError(
                f"the up weight is [{self.up.n}, {self.up.k}]; a down weight [{self.hidden}, {self.width}] and "
                f"gated={self.gate.gated} ask for [{rows}, {self.hidden}]"
            )
        if self.up.slots != self.down.slots:
            raise ValueError(f"the up weight has {self.up.slots} slots, the down weight {self.down.slots}")
        if self.up.device != self.down.device:
            raise ValueError(f"the up weight is on {self.up.device}, the down weight on {self.down.device}")

    @property
    def hidden(self) -> int:
        """D."""
        return self.down.n

    @property
    def width(self) -> int:
        """F."""
        return self.down.k

    @property
    def slots(self) -> int:
        """S."""
        return self.down.slots

    @property
    def device(self) -> torch.device:
        return self.down.device


def bank_matrix(
    weight_format: str, tensors: Mapping[str, torch.Tensor], name: str, *, transposed: bool = False
) -> BankMatrix:
    """The weight `name` of a bank's stored `tensors`.

    Args:
        weight_format: "plain" (bf16, fp16 or fp32 by dtype), or the name of a quantised format.
        tensors: `name` and, as the format stores them, `name`_scales and perhaps `name`_zeros; perhaps `name`_bias.
            Each [S, ...] on one device, each row contiguous, rows any distance apart that does not overlap them.
        transposed: the plain weight lies as [K, N].

    Raises:
        ValueError: a tensor of the wrong shape, dtype, device or layout.
    """
    codes = tensors[name]
    scales, zeros, bias = (tensors.get(f"{name}_{part}") for part in ("scales", "zeros", "bias"))
    _check_rows(name, codes, 3, codes)
    slots, rows, columns = codes.shape
    n, k = (columns, rows) if transposed else (rows, columns * (2 if weight_format in PACKED else 1))
    if weight_format == "plain":
        _check_dtype(name, codes, FLOATS)
        if scales is not None or zeros is not None:
            raise ValueError(f"{name} is plain, which has neither scales nor zero points")
        group = 0
    elif weight_format not in STORED:
        raise ValueError(f"format {weight_format!r} is unknown; there are plain, {', '.join(STORED)}")
    else:
        if transposed:
            raise ValueError(f"{name} is in {weight_format}, which is never stored transposed")
        code_dtype, scale_dtype = STORED[weight_format]
        _check_dtype(name, codes, (code_dtype,))
        if scales is None:
            raise ValueError(f"{name} is in {weight_format} and needs {name}_scales")
        _check_rows(f"{name}_scales", scales, 3, codes)
        _check_dtype(f"{name}_scales", scales, (scale_dtype,))
        group = _group(weight_format, name, n, k, tuple(scales.shape[1:]))
        if zeros is not None:
            _check_rows(f"{name}_zeros", zeros, 3, codes)
            _check_dtype(f"{name}_zeros", zeros, (torch.uint8,))
            if weight_format != "int4" or zeros.shape != scales.shape:
                raise ValueError(
                    f"{name}_zeros {list(zeros.shape)}: zero points are int4's and shaped as its scales, "
                    f"{list(scales.shape)}; this is {weight_format}"
                )
    if bias is not None:
        _check_rows(f"{name}_bias", bias, 2, codes)
        _check_dtype(f"{name}_bias", bias, FLOATS)
        if bias.shape[1] != n:
            raise ValueError(f"{name}_bias is {list(bias.shape)}, the weight has {n} rows and {slots} slots")
    if n * k >= 2**31:
        raise ValueError(f"{name} has {n} x {k} numbers an expert; kernels count them in 31 bits")
    return BankMatrix(weight_format, codes, scales, zeros, bias, n, k, group, transposed)


@dataclass(frozen=True)
class Step:
    """The sizes of one step: `check_step`."""

    tokens: int
    picks: int
    """Of one token."""
    experts: int


def check_step(
    bank: Bank, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, slot_of: torch.Tensor, columns: int
) -> Step:
    """Check the tensors of a step before any kernel sees them. Does not wait for the device.

    Args:
        x: [rows, columns] in one of `FLOATS`.
        ids: [T, K] int32 or int64, any numbers.
        weights: [T, K] in one of `FLOATS`.
        slot_of: [E] int32; numbers below 0 or above S - 1 mean that the expert has no slot.

    Raises:
        ValueError: shape, dtype, device or layout, with the numbers.
    """
    wanted = (
        ("x", x, 2, FLOATS),
        ("ids", ids, 2, (torch.int32, torch.int64)),
        ("weights", weights, 2, FLOATS),
        ("slot_of", slot_of, 1, (torch.int32,)),
    )
    for name, tensor, dims, dtypes in wanted:
        if tensor.dim() != dims or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must have {dims} dimensions and be contiguous, not {list(tensor.shape)} of strides "
                f"{tensor.stride()}"
            )
        _check_dtype(name, tensor, dtypes)
        if tensor.device != bank.device:
            raise ValueError(f"{name} is on {tensor.device}, the bank on {bank.device}")
    if ids.shape != weights.shape:
        raise ValueError(f"ids are {list(ids.shape)}, the router's weights {list(weights.shape)}")
    if x.shape[1] != columns:
        raise ValueError(f"x is {list(x.shape)}, the bank takes {columns} columns")
    if not ids.shape[1] or not slot_of.shape[0]:
        raise ValueError(f"{ids.shape[1]} picks a token of {slot_of.shape[0]} experts: there must be one of each")
    tokens, picks = ids.shape
    return Step(tokens, picks, slot_of.shape[0])


def output(
    out: torch.Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> torch.Tensor:
    """`out` if it is contiguous, of that shape, one of those dtypes and there, new memory in the first if it is None.

    Raises:
        ValueError: it is not.
    """
    if out is None:
        return torch.empty(shape, dtype=dtypes[0], device=device)
    if tuple(out.shape) != shape or out.dtype not in dtypes or out.device != device or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {list(shape)} in {' or '.join(map(str, dtypes))} on {device}, not "
            f"{list(out.shape)} of strides {out.stride()} in {out.dtype} on {out.device}"
        )
    return out


def _group(weight_format: str, name: str, n: int, k: int, scales: tuple[int, ...]) -> int:
    for group in GROUPS[weight_format]:
        if weight_format == "fp8":
            if scales == (-(-n // group), -(-k // group)):
                return group
        elif k % group == 0 and scales == (n, k // group):
            return group
    groups = " or ".join(map(str, GROUPS[weight_format]))
    raise ValueError(
        f"{name}_scales are {list(scales)} an expert, which do not fit {weight_format} [{n}, {k}] in groups of {groups}"
    )


def _check_rows(name: str, tensor: torch.Tensor, dims: int, codes: torch.Tensor) -> None:
    """Refuse anything but [S, ...] with numbers in it, on the device of the codes, each row contiguous."""
    if tensor.dim() != dims or not tensor.numel():
        raise ValueError(f"{name} must have {dims} dimensions and numbers in them, not {list(tensor.shape)}")
    if tensor.shape[0] != codes.shape[0]:
        raise ValueError(f"{name} has {tensor.shape[0]} slots, the codes have {codes.shape[0]}")
    if tensor.device != codes.device:
        raise ValueError(f"{name} is on {tensor.device}, the codes on {codes.device}")
    row = tensor[0]
    if not row.is_contiguous() or (tensor.shape[0] > 1 and tensor.stride(0) < row.numel()):
        raise ValueError(
            f"{name} {list(tensor.shape)} has strides {tensor.stride()}; each slot must be contiguous and they must "
            f"not overlap"
        )


def _check_dtype(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}")
