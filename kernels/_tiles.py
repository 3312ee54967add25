"""On the device: tiles of weights as the second operand of a dot, [BLOCK_K, BLOCK_N], for products of many rows.

Plain weights come in the dtype they are stored in, others as fp32, scaled; a caller rounds them to the dtype of the
other operand. Pointers are those of one slot. 0 stands where k is beyond K or a row is beyond N, of which nothing is
read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moert.kernels._codes import E2M1_FACTOR, E4M3_FACTOR, e2m1, e4m3, e8m0, signed, whole


@triton.jit
def tile(
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    rows: tl.tensor,
    begin: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Numbers `begin` to `begin + BLOCK_K` of `rows` [BLOCK_N], for the formats with one code a byte or more.

    `begin` is a multiple of `BLOCK_K`, and of `GROUP` and `BLOCK_K` one divides the other.
    """
    k = begin + tl.arange(0, BLOCK_K)
    mask = (k < K)[:, None] & (rows < N)[None, :]
    if TRANSPOSED:
        places = k[:, None] * N + rows[None, :]
    else:
        places = k[:, None] + rows[None, :] * K
    codes = tl.load(codes_ptr + places, mask=mask, other=0)
    if FORMAT == "plain":
        result = codes
    elif FORMAT == "int8":
        result = _scaled(
            signed(codes), _scale_tile(scales_ptr, rows, begin, N, K, GROUP, BLOCK_K).to(tl.float32), BLOCK_K, BLOCK_N
        )
    else:
        tl.static_assert(FORMAT == "fp8")
        scales = _scale_tile(scales_ptr, rows // GROUP, begin, (N + GROUP - 1) // GROUP, K, GROUP, BLOCK_K)
        result = _scaled(e4m3(codes) * E4M3_FACTOR, scales, BLOCK_K, BLOCK_N)
    return result


@triton.jit
def pair_of_tiles(
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    rows: tl.tensor,
    begin: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Numbers `begin`, `begin + 2`, ... and `begin + 1`, `begin + 3`, ... of `rows`, for int4 and mxfp4.

    Two tiles [BLOCK_K / 2, BLOCK_N] whose dots with the even and the odd columns of x are added: the order of k does
    not matter to a dot, and putting the halves of a byte side by side would cost moves between threads.
    """
    HALF: tl.constexpr = BLOCK_K // 2
    pairs = begin // 2 + tl.arange(0, HALF)
    mask = (pairs < K // 2)[:, None] & (rows < N)[None, :]
    codes = tl.load(codes_ptr + pairs[:, None] + rows[None, :] * (K // 2), mask=mask, other=0)
    scales = _scale_tile(scales_ptr, rows, begin, N, K, GROUP, BLOCK_K)
    if FORMAT == "mxfp4":
        scales = e8m0(scales)
        even = _scaled(e2m1(codes & 15) * E2M1_FACTOR, scales, HALF, BLOCK_N)
        odd = _scaled(e2m1(codes >> 4) * E2M1_FACTOR, scales, HALF, BLOCK_N)
    else:
        tl.static_assert(FORMAT == "int4")
        scales = scales.to(tl.float32)
        if zeros_ptr is None:
            even = _scaled(whole(codes & 15, 8.0), scales, HALF, BLOCK_N)
            odd = _scaled(whole(codes >> 4, 8.0), scales, HALF, BLOCK_N)
        else:
            zeros = _scale_tile(zeros_ptr, rows, begin, N, K, GROUP, BLOCK_K).to(tl.float32)
            even = _scaled(_minus(whole(codes & 15, 0.0), zeros, HALF, BLOCK_N), scales, HALF, BLOCK_N)
            odd = _scaled(_minus(whole(codes >> 4, 0.0), zeros, HALF, BLOCK_N), scales, HALF, BLOCK_N)
    return even, odd


@triton.jit
def _scale_tile(
    scales_ptr: tl.tensor,
    rows: tl.tensor,
    begin: tl.tensor,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """The scales (or zero points) of a tile, [groups of it, BLOCK_N], or [1, BLOCK_N] if a group is larger."""
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    COUNT: tl.constexpr = (BLOCK_K + GROUP - 1) // GROUP
    groups = begin // GROUP + tl.arange(0, COUNT)
    mask = (groups < GROUPS)[:, None] & (rows < ROWS)[None, :]
    return tl.load(scales_ptr + groups[:, None] + rows[None, :] * GROUPS, mask=mask, other=0)


@triton.jit
def _scaled(numbers: tl.tensor, scales: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """Each number times the scale of its group."""
    COUNT: tl.constexpr = scales.shape[0]
    if COUNT == 1:
        result = numbers * scales
    else:
        groups = tl.reshape(numbers, (COUNT, ROWS // COUNT, COLUMNS)) * scales[:, None, :]
        result = tl.reshape(groups, (ROWS, COLUMNS))
    return result


@triton.jit
def _minus(numbers: tl.tensor, zeros: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """Each number less the zero point of its group."""
    COUNT: tl.constexpr = zeros.shape[0]
    if COUNT == 1:
        result = numbers - zeros
    else:
        groups = tl.reshape(numbers, (COUNT, ROWS // COUNT, COLUMNS)) - zeros[:, None, :]
        result = tl.reshape(groups, (ROWS, COLUMNS))
    return result
