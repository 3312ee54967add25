"""The face of csrc/: products on the CPU, the instruction set they use and the threads that compute."""

from __future__ import annotations

import atexit
import os

import torch

from moert import _C
from moert.errors import ConfigError, KernelUnavailableError
from moert.kernels.cpu_matrix import NUMBERS, Matrix

__all__ = [
    "HALVES",
    "NUMBERS",
    "Matrix",
    "bias_fits",
    "isa",
    "isa_names",
    "linear",
    "product",
    "set_threads",
    "threads",
    "use_isa",
]

HALVES = (torch.bfloat16, torch.float16)


def use_isa(name: str | None) -> str:
    """Have every product use this instruction set from now on, or the best there is; returns its name.

    Not while a product runs. Results differ between instruction sets in the last bits.

    Raises:
        ValueError: unknown, or not to be had on this machine.
    """
    return _C.use_isa(name)


def isa() -> str:
    """The instruction set in use."""
    return _C.isa()


def isa_names(usable_only: bool = True) -> list[str]:
    """The instruction sets there are kernels for, best first; by default those that this machine can run."""
    return _C.isa_names(usable_only).split()


def threads() -> int:
    """How many threads compute, the calling one included."""
    return _C.threads()


def set_threads(count: int | None) -> int:
    """Compute on `count` threads from now on, or on as many as `MOERT_THREADS` or the machine says; returns how many.

    Raises:
        RuntimeError: while anything computes.
    """
    return _C.set_threads(count)


# Threads that compute must not touch tensors which the interpreter frees as it exits.
atexit.register(_C.stop_threads)

if _forced := os.environ.get("MOERT_ISA"):
    try:
        use_isa(_forced)
    except ValueError as error:
        raise KernelUnavailableError(f"MOERT_ISA={_forced}: {error}; give one of those") from error
if os.environ.get("MOERT_THREADS"):
    try:
        _C.threads()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def linear(x: torch.Tensor, weight: torch.Tensor | Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [..., K] times the transpose of `weight` [N, K], plus `bias` [N]: [..., N] in the dtype of `x`; new memory.

    Products are this project's own where `x` is on the CPU, the weight contiguous and both of one 16-bit type, or the
    weight a `Matrix`: sums are in fp32 and rounded once. Else they are torch's. Which of the two runs depends on
    dtypes and shapes alone, and neither depends on where the weights are, so an expert's output is the same from any
    slot. Blocks.

    Raises:
        ValueError: `x` and a `Matrix` do not fit.
    """
    if isinstance(weight, Matrix):
        return _linear_matrix(x, weight, bias)
    if (
        x.dtype not in HALVES
        or weight.dtype != x.dtype
        or weight.dim() != 2
        or x.dim() == 0
        or x.shape[-1] != weight.shape[1]
        or not x.numel()
        or not weight.numel()
        or not weight.is_contiguous()
        or not (weight.is_cpu and x.is_cpu)
        or not (bias is None or bias_fits(bias, weight.shape[0], x.dtype))
    ):
        return torch.nn.functional.linear(x, weight, bias)
    return product(x, weight, bias)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] times the transpose of `weight` [N, K], plus `bias` [N], in the dtype of all of them; the sums in the
    order of moert's kernels. All on the CPU, weight and bias contiguous, which is not checked. New memory. Blocks."""
    n, k = weight.shape
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
    _C.product(
        NUMBERS[x.dtype],
        weight.data_ptr(),
        n,
        k,
        x.data_ptr(),
        x.numel() // k,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
    )
    return y


def bias_fits(bias: torch.Tensor, n: int, dtype: torch.dtype) -> bool:
    """Whether kernels can read `bias` where it is, as one of `n` numbers in `dtype`."""
    return bias.dtype == dtype and bias.is_cpu and bias.shape == (n,) and bias.is_contiguous()


def _linear_matrix(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
    n, k = weight.shape
    if x.dtype not in NUMBERS or not x.is_cpu or x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x {tuple(x.shape)} in {x.dtype} on {x.device} does not fit a weight {weight.shape}")
    if bias is not None and not bias_fits(bias, n, x.dtype):
        raise ValueError(
            f"bias {tuple(bias.shape)} of strides {bias.stride()} in {bias.dtype} on {bias.device} does not fit {n} "
            f"rows in {x.dtype} on the CPU; it must be contiguous"
        )
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
    if x.numel():
        _C.linear(
            weight.capsule,
            NUMBERS[x.dtype],
            x.data_ptr(),
            x.numel() // k,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
        )
    return y
