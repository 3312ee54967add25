"""On the device: products of many vectors with rows of weights, on tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from moert.kernels._tiles import pair_of_tiles, tile


@triton.jit
def block_products(
    x_ptr: tl.tensor,
    x_rows: tl.tensor,
    x_mask: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    rows: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
) -> tl.tensor:
    """x[x_rows[m]] times row rows[n] of the weight that the pointers begin at -> fp32 [BLOCK_M, BLOCK_N].

    0 where `x_mask` [BLOCK_M] is false, and for rows beyond N. `x_rows` is int64, `rows` int32. Weights are rounded to
    the dtype of x, sums are fp32. `SWAPPED` has the weights on the side of the dot that must be wide.
    """
    x_begin = x_ptr + x_rows[:, None] * K
    # For fp32, tensor cores would round to 10 bits.
    PRECISION: tl.constexpr = "ieee" if x_ptr.dtype.element_ty == tl.float32 else "tf32"
    if SWAPPED:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        x = tl.load(x_begin + k[None, :], mask=x_mask[:, None] & (k < K)[None, :], other=0.0)
        if FORMAT == "int4" or FORMAT == "mxfp4":
            even, odd = pair_of_tiles(
                codes_ptr, scales_ptr, zeros_ptr, rows, begin, N, K, FORMAT, GROUP, BLOCK_N, BLOCK_K
            )
            # Both came from one byte, so they are in one thread. Parting the columns of x instead would take x, which
            # goes to shared memory as it is, through registers.
            pairs = tl.join(even.to(x.dtype), odd.to(x.dtype))
            weights = tl.reshape(tl.permute(pairs, (0, 2, 1)), (BLOCK_K, BLOCK_N))
        else:
            weights = tile(codes_ptr, scales_ptr, rows, begin, N, K, FORMAT, GROUP, TRANSPOSED, BLOCK_N, BLOCK_K).to(
                x.dtype
            )
        if SWAPPED:
            sums = tl.dot(tl.trans(weights), tl.trans(x), sums, input_precision=PRECISION)
        else:
            sums = tl.dot(x, weights, sums, input_precision=PRECISION)
    if SWAPPED:
        sums = tl.trans(sums)
    return sums
