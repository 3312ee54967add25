"""On the device: products of a few vectors with rows of weights, limited by how fast the weights can be read.

No tensor cores: a vector times a matrix would leave them idle for 15 of 16 rows. Every weight is read once, in loads of
16 bytes, and sums are fp32 in an order that the block sizes alone decide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moert.kernels._codes import E2M1_FACTOR, E4M3_FACTOR, e2m1, e4m3, e8m0, signed, whole


@triton.jit
def products(
    x_ptr: tl.tensor,
    x_rows: tl.tensor,
    codes_ptr: tl.tensor,
    codes_stride: tl.tensor,
    scales_ptr: tl.tensor,
    scales_stride: tl.tensor,
    zeros_ptr: tl.tensor,
    zeros_stride: tl.tensor,
    slots: tl.tensor,
    rows: tl.tensor,
    row_mask: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """x[x_rows[p]] times row rows[n] of the weight in slots[p] -> fp32 [BLOCK_P, BLOCK_N].

    0 for slots below 0 and where `row_mask` is false, of which nothing is read. `x_rows` and `slots` [BLOCK_P] are
    int64, `rows` and `row_mask` [BLOCK_N] int32 and bool. `GROUP` divides `BLOCK_K`, but for plain weights, which have
    none.
    """
    wanted = (slots >= 0)[:, None] & row_mask[None, :]
    x_begin = x_ptr + x_rows * K
    codes_begin = codes_ptr + slots * codes_stride
    if FORMAT == "plain":
        sums = tl.zeros((BLOCK_P, BLOCK_N, BLOCK_K), tl.float32)
        for begin in range(0, K, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            inside = (k < K)[None, None, :]
            if TRANSPOSED:
                places = k[None, :] * N + rows[:, None]
            else:
                places = rows[:, None] * K + k[None, :]
            weights = tl.load(
                codes_begin[:, None, None] + places[None, :, :], mask=wanted[:, :, None] & inside, other=0.0
            )
            x = tl.load(x_begin[:, None, None] + k[None, None, :], mask=(slots >= 0)[:, None, None] & inside, other=0.0)
            sums += weights.to(tl.float32) * x.to(tl.float32)
        result = tl.sum(sums, axis=2)
    else:
        BLOCK_G: tl.constexpr = BLOCK_K // GROUP
        GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
        sums = tl.zeros((BLOCK_P, BLOCK_N, BLOCK_G), tl.float32)
        scales_begin = scales_ptr + slots * scales_stride
        if FORMAT == "fp8":
            scale_rows = rows // GROUP * GROUPS
        else:
            scale_rows = rows * GROUPS
        for begin in range(0, GROUPS, BLOCK_G):
            groups = begin + tl.arange(0, BLOCK_G)
            scale_places = scale_rows[:, None] + groups[None, :]
            scale_mask = wanted[:, :, None] & (groups < GROUPS)[None, None, :]
            scales = tl.load(scales_begin[:, None, None] + scale_places[None, :, :], mask=scale_mask, other=0)
            if FORMAT == "int4" or FORMAT == "mxfp4":
                pairs = groups[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
                places = rows[:, None, None] * (K // 2) + pairs[None, :, :]
                codes = tl.load(
                    codes_begin[:, None, None, None] + places[None, :, :, :], mask=scale_mask[:, :, :, None], other=0
                )
                x_places = x_begin[:, None, None] + 2 * pairs[None, :, :]
                x_mask = (slots >= 0)[:, None, None] & (groups < GROUPS)[None, :, None]
                even = tl.load(x_places, mask=x_mask, other=0.0).to(tl.float32)[:, None, :, :]
                odd = tl.load(x_places + 1, mask=x_mask, other=0.0).to(tl.float32)[:, None, :, :]
                if FORMAT == "mxfp4":
                    parts = tl.sum(e2m1(codes & 15) * even + e2m1(codes >> 4) * odd, axis=3) * E2M1_FACTOR
                    sums += parts * e8m0(scales)
                else:
                    if zeros_ptr is None:
                        low = whole(codes & 15, 8.0)
                        high = whole(codes >> 4, 8.0)
                    else:
                        zeros = zeros_ptr + (slots * zeros_stride)[:, None, None] + scale_places[None, :, :]
                        zero = tl.load(zeros, mask=scale_mask, other=0).to(tl.float32)[:, :, :, None]
                        low = whole(codes & 15, zero)
                        high = whole(codes >> 4, zero)
                    sums += tl.sum(low * even + high * odd, axis=3) * scales.to(tl.float32)
            else:
                k = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
                inside = k < K
                places = rows[:, None, None] * K + k[None, :, :]
                codes = tl.load(
                    codes_begin[:, None, None, None] + places[None, :, :, :],
                    mask=wanted[:, :, None, None] & inside[None, None, :, :],
                    other=0,
                )
                x_mask = (slots >= 0)[:, None, None] & inside[None, :, :]
                x = tl.load(x_begin[:, None, None] + k[None, :, :], mask=x_mask, other=0.0)
                x = x.to(tl.float32)[:, None, :, :]
                if FORMAT == "fp8":
                    sums += tl.sum(e4m3(codes) * x, axis=3) * E4M3_FACTOR * scales
                else:
                    tl.static_assert(FORMAT == "int8")
                    sums += tl.sum(signed(codes) * x, axis=3) * scales.to(tl.float32)
        result = tl.sum(sums, axis=2)
    return result
