"""The down product of many tokens' picks, block by block of picks of one expert, weighted by the router."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moert.kernels._launch import CompileSpec, Launch, capability
from moert.kernels._many_rows import block_products
from moert.kernels._samples import sample_banks
from moert.kernels.bank import FLOATS, Bank, output
from moert.kernels.dispatch import Blocks, check_tensor
from moert.kernels.grouped_configs import GroupedConfig, check_blocks, grouped_config, sample_blocks, samples


@triton.jit(do_not_specialize=["begin", "end", "count"])
def _kernel(
    h_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    picks_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    first_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    codes_stride: tl.tensor,
    scales_stride: tl.tensor,
    zeros_stride: tl.tensor,
    bias_stride: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    count: tl.tensor,
    D: tl.constexpr,
    F: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
) -> None:
    TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    block = tl.load(first_ptr + begin) + tl.program_id(0) // TILES
    if block >= tl.load(first_ptr + end):
        return
    slot = tl.load(slots_ptr + block).to(tl.int64)
    picks = tl.load(picks_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    mask = picks < count
    rows = tl.program_id(0) % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    y = block_products(
        h_ptr,
        tl.where(mask, picks, 0).to(tl.int64),
        mask,
        codes_ptr + slot * codes_stride,
        scales_ptr if scales_ptr is None else scales_ptr + slot * scales_stride,
        zeros_ptr if zeros_ptr is None else zeros_ptr + slot * zeros_stride,
        rows,
        D,
        F,
        FORMAT,
        GROUP,
        TRANSPOSED,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SWAPPED,
    )
    if bias_ptr is not None:
        y += tl.load(bias_ptr + slot * bias_stride + rows, mask=rows < D, other=0.0).to(tl.float32)[None, :]
    y *= tl.load(weights_ptr + picks, mask=mask, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y_ptr + picks[:, None].to(tl.int64) * D + rows[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=mask[:, None] & (rows < D)[None, :],
    )


def grouped_down(
    bank: Bank,
    h: torch.Tensor,
    weights: torch.Tensor,
    blocks: Blocks,
    *,
    experts: tuple[int, int] | None = None,
    out: torch.Tensor | None = None,
    config: GroupedConfig | None = None,
) -> torch.Tensor:
    """Each pick's output times its weight, for every pick in the blocks; `reference_grouped.grouped_down`.

    On tensor cores, as `grouped_gate_up`. Every pick has a row of its own, so nothing is added atomically; `combine`
    sums the rows of a token, as in SonicMoE (2025). A CUDA graph may capture it. Does not wait for the device.

    Args:
        h: [T * K, F] in bf16, fp16 or fp32, from `grouped_gate_up`.
        weights: [T, K] in one of those, those that the blocks were made with.
        blocks: from `dispatch`.
        experts: from and up to which place in the dispatch's order; None: all.
        out: [T * K, D] in the dtype of h or fp32, written to if given.
        config: block sizes other than those of the table; `block_m` is that of the blocks.

    Returns:
        [T * K, D] in the dtype of h, new memory, or `out`. Rows of picks in no block are left as they were.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit.
        KernelUnavailableError: the device cannot run it.
    """
    launch, y = _launch(bank, h, weights, blocks, experts, out, config)
    launch.run(bank.device)
    return y


def _launch(
    bank: Bank,
    h: torch.Tensor,
    weights: torch.Tensor,
    blocks: Blocks,
    experts: tuple[int, int] | None = None,
    out: torch.Tensor | None = None,
    config: GroupedConfig | None = None,
) -> tuple[Launch, torch.Tensor]:
    check_tensor("h", h, 2, FLOATS, bank.device)
    check_tensor("weights", weights, 2, FLOATS, bank.device)
    count = blocks.tokens * blocks.top_k
    if tuple(h.shape) != (count, bank.width):
        raise ValueError(f"h is {list(h.shape)}, the blocks and the bank ask for {[count, bank.width]}")
    if tuple(weights.shape) != (blocks.tokens, blocks.top_k):
        raise ValueError(f"the router's weights are {list(weights.shape)}, not {[blocks.tokens, blocks.top_k]}")
    begin, end = check_blocks(blocks, experts, bank.device)
    out = output(out, (count, bank.hidden), (h.dtype, torch.float32), bank.device)
    down = bank.down
    if config is None:
        config = grouped_config("down", down, blocks.block_m, h.dtype, capability(bank.device, _kernel))
    config = config.fitted(down)
    arguments = {
        "h_ptr": h,
        "weights_ptr": weights,
        "picks_ptr": blocks.picks,
        "slots_ptr": blocks.slots,
        "first_ptr": blocks.first,
        **down.arguments(),
        "y_ptr": out,
        "begin": begin,
        "end": end,
        "count": count,
        "D": bank.hidden,
        "F": bank.width,
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SWAPPED": config.swapped,
    }
    grid = (blocks.most(end - begin) * triton.cdiv(bank.hidden, config.block_n),)
    return Launch(_kernel, grid, arguments, config.options), out


def compile_specs(capability: int) -> list[CompileSpec]:
    """What the compile check compiles for a compute capability."""
    specs = []
    for name, bank in sample_banks().items():
        for sample in samples("down", bank.down, capability):
            blocks = sample_blocks(sample.block_m)
            h = torch.empty(blocks.tokens * blocks.top_k, bank.width, dtype=sample.dtype, device="meta")
            weights = torch.empty(blocks.tokens, blocks.top_k, device="meta")
            launch, _ = _launch(bank, h, weights, blocks, config=sample.config)
            specs.append(CompileSpec(f"grouped_down[{name},{sample.label}]", launch, sample.needs, sample.lacks))
    return specs
