"""Tiles of weights on the device, against the formats' own decoding: every number, exactly."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton_support import DEVICE, FORMATS, in_slots, stored

from moert.kernels import reference
from moert.kernels._tiles import pair_of_tiles, tile
from moert.kernels.bank import PACKED, bank_matrix

N, K = 40, 384


@triton.jit
def _decode(
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * BLOCK_K
    WIDTH: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    if FORMAT == "int4" or FORMAT == "mxfp4":
        even, odd = pair_of_tiles(codes_ptr, scales_ptr, zeros_ptr, rows, begin, N, K, FORMAT, GROUP, BLOCK_N, BLOCK_K)
        k = begin + 2 * tl.arange(0, BLOCK_K // 2)
        tl.store(out_ptr + rows[None, :] * WIDTH + k[:, None], even)
        tl.store(out_ptr + rows[None, :] * WIDTH + k[:, None] + 1, odd)
    else:
        whole = tile(codes_ptr, scales_ptr, rows, begin, N, K, FORMAT, GROUP, TRANSPOSED, BLOCK_N, BLOCK_K)
        k = begin + tl.arange(0, BLOCK_K)
        tl.store(out_ptr + rows[None, :] * WIDTH + k[:, None], whole.to(tl.float32))


@pytest.mark.parametrize("block_k", [64, 256])
@pytest.mark.parametrize("choice", [*FORMATS, "transposed", "bf16"])
def test_a_tile_is_what_the_codes_stand_for(choice: str, block_k: int) -> None:
    """Also beyond the last row and the last number of a row: 0 there, of which nothing was read."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    if choice in ("transposed", "bf16"):
        parts = {"w": (weight.T.contiguous() if choice == "transposed" else weight).bfloat16()}
        name = "plain"
    else:
        parts, name = stored(choice, weight), choice.partition(",")[0]
    # In the middle of poisoned slots: a number read from beyond the weight is NaN or absurd.
    matrix = bank_matrix(name, in_slots([parts], [1], 3), "w", transposed=choice == "transposed")
    block_n = 64
    blocks = -(-K // block_k)
    out = torch.full((block_n, blocks * block_k), torch.nan, device=DEVICE)
    at_slot = [part if part is None else part[1] for part in (matrix.codes, matrix.scales, matrix.zeros)]
    _decode[(1, blocks)](
        *at_slot, out, N, K, matrix.format, matrix.group, matrix.transposed, BLOCK_N=block_n, BLOCK_K=block_k
    )
    # Codes times scale is rounded to fp32 once.
    torch.testing.assert_close(out[:N, :K].cpu(), reference.bank_weight(matrix, 1).float(), rtol=0, atol=0)
    if matrix.format not in PACKED:
        assert not out[:N, K:].any()
    assert not out[N:].any()
