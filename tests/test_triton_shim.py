"""bf16 under the interpreter with the shim: what a GPU computes, which torch computes too."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
import triton_support
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(not triton_support.INTERPRETED, reason="there is no interpreter in use on a GPU")

SPECIAL = torch.tensor(
    [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.00390625, 1.01171875, -1.00390625, 1e-40, -9.2e-41, 3.4e38]
)
"""Ties to either side, subnormals of bf16, and a number that rounds to infinity."""


@triton.jit
def _to_bf16(in_ptr, out_ptr, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    tl.store(out_ptr + places, tl.load(in_ptr + places).to(tl.bfloat16))


@triton.jit
def _to_fp32(in_ptr, out_ptr, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    tl.store(out_ptr + places, tl.load(in_ptr + places).to(tl.float32))


def test_a_cast_to_bf16_rounds_to_the_nearest_and_ties_to_even() -> None:
    numbers = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    numbers[: len(SPECIAL)] = SPECIAL
    out = torch.empty(1024, dtype=torch.bfloat16)
    _to_bf16[(1,)](numbers, out, 1024)
    torch.testing.assert_close(out, numbers.bfloat16(), rtol=0, atol=0, equal_nan=True)
    whole = torch.arange(1024, dtype=torch.int32)
    _to_bf16[(1,)](whole, out, 1024)
    torch.testing.assert_close(out, whole.bfloat16(), rtol=0, atol=0)


def test_a_cast_from_bf16_is_exact() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = torch.empty(2**16)
    _to_fp32[(1,)](every, out, 2**16)
    torch.testing.assert_close(out, every.float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + places, tl.dot(tl.load(a_ptr + places), tl.load(b_ptr + places)))


def test_a_dot_of_bf16() -> None:
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(32, 32)
    _dot[(1,)](a, b, out, 32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@triton.jit
def _arithmetic(a_ptr, b_ptr, out_ptr, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    a, b = tl.load(a_ptr + places), tl.load(b_ptr + places)
    tl.store(out_ptr + places, a * b + a)
    tl.store(out_ptr + COUNT + places, tl.where(a < b, a, -b))
    tl.store(out_ptr + 2 * COUNT + places, tl.zeros((COUNT,), tl.bfloat16) + tl.sum(a, axis=0))
    tl.store(out_ptr + 3 * COUNT + places, tl.zeros((COUNT,), tl.bfloat16) + tl.max(a, axis=0))


def test_arithmetic_comparisons_and_reductions_of_bf16() -> None:
    a, b = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(4, 64, dtype=torch.bfloat16)
    _arithmetic[(1,)](a, b, out, 64)
    torch.testing.assert_close(out[0], a * b + a, rtol=0, atol=0)
    torch.testing.assert_close(out[1], torch.where(a < b, a, -b), rtol=0, atol=0)
    torch.testing.assert_close(out[2], a.float().sum().bfloat16().expand(64), rtol=1e-2, atol=0)
    torch.testing.assert_close(out[3], a.max().expand(64), rtol=0, atol=0)


@triton.jit
def _twice(number):
    return number + number


@triton.jit
def _tables(number_ptr, whole_ptr, out_ptr, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    numbers, whole = tl.load(number_ptr + places), tl.load(whole_ptr + places)
    tl.static_assert(numbers.dtype == tl.float32 and whole.dtype == tl.int32 and whole.shape[0] == COUNT)
    table = _twice(numbers)[:, None] + _twice(whole)[None, :]
    tl.static_assert(table.dtype == tl.float32 and table.shape[0] == COUNT and table.shape[1] == COUNT)
    tl.store(out_ptr + places[:, None] * COUNT + places[None, :], table)


def test_tensors_of_one_shape_keep_their_own_types() -> None:
    for count in (8, 16, 8):
        numbers = torch.randn(count, generator=torch.Generator().manual_seed(count))
        whole = torch.arange(count, dtype=torch.int32)
        out = torch.empty(count, count)
        _tables[(1,)](numbers, whole, out, count)
        torch.testing.assert_close(out, 2 * numbers[:, None] + 2 * whole, rtol=0, atol=0)


@triton.jit
def _unlike(in_ptr, out_ptr, COUNT: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(in_ptr + tl.arange(0, COUNT)) + tl.arange(0, 2 * COUNT), axis=0))


def test_shapes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InterpreterError, match="incompatible dimensions"):
        _unlike[(1,)](torch.zeros(8), torch.zeros(1), 8)
