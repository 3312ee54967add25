"""The down product of a few tokens' picks, weighted and summed, one program for some numbers of one token's result."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moert.kernels._few_rows import products
from moert.kernels._launch import CompileSpec, Launch, capability
from moert.kernels._picks import slots_of_picks
from moert.kernels._samples import sample_banks, sample_step
from moert.kernels.bank import FLOATS, Bank, check_step, output
from moert.kernels.configs import DecodeConfig, decode_config


@triton.jit(do_not_specialize=["experts", "slots"])
def _kernel(
    h_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    slot_of_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    codes_stride: tl.tensor,
    scales_stride: tl.tensor,
    zeros_stride: tl.tensor,
    bias_stride: tl.tensor,
    experts: tl.tensor,
    slots: tl.tensor,
    PICKS: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    token = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros((BLOCK_N,), tl.float32)
    for begin in range(0, PICKS, BLOCK_P):
        places = begin + tl.arange(0, BLOCK_P)
        picks = token * PICKS + places
        slot = slots_of_picks(ids_ptr, weights_ptr, slot_of_ptr, picks, places < PICKS, experts, slots)
        outputs = products(
            h_ptr,
            picks.to(tl.int64),
            codes_ptr,
            codes_stride,
            scales_ptr,
            scales_stride,
            zeros_ptr,
            zeros_stride,
            slot,
            rows,
            rows < D,
            D,
            F,
            FORMAT,
            GROUP,
            TRANSPOSED,
            BLOCK_P,
            BLOCK_N,
            BLOCK_K,
        )
        present = slot >= 0
        if bias_ptr is not None:
            bias = bias_ptr + (slot * bias_stride)[:, None] + rows[None, :]
            outputs += tl.load(bias, mask=present[:, None] & (rows < D)[None, :], other=0.0).to(tl.float32)
        weights = tl.load(weights_ptr + picks, mask=present, other=0.0).to(tl.float32)
        y += tl.sum(outputs * weights[:, None], axis=0)
    tl.store(y_ptr + token.to(tl.int64) * D + rows, y.to(y_ptr.dtype.element_ty), mask=rows < D)


def decode_down(
    bank: Bank,
    h: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    slot_of: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
) -> torch.Tensor:
    """The sum over each token's picks of their experts' outputs times their weights; `reference.decode_down`.

    For a few tokens, after `decode_gate_up`. The sum is fp32 by the order of the picks, in a tree over as many as the
    configuration reads at a time, and rounded once: no atomics, so a token's result is the same to the last bit
    whatever other tokens there are and whichever slots its experts have. A CUDA graph may capture it. Does not wait for
    the device.

    Args:
        h: [T * K, F] in bf16, fp16 or fp32. Rows of picks that are not computed are not read.
        ids, weights, slot_of: as for `decode_gate_up`, with the same contents.
        dtype: of the result, one of those three; by default that of `out`, or fp32.
        out: [T, D], written to if given.
        config: block sizes other than those of the table.

    Returns:
        [T, D], new memory or `out`; 0 where none of a token's experts is in the bank.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit.
        KernelUnavailableError: the device cannot run it.
    """
    launch, y = _launch(bank, h, ids, weights, slot_of, dtype, out, config)
    launch.run(bank.device)
    return y


def _launch(
    bank: Bank,
    h: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    slot_of: torch.Tensor,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
) -> tuple[Launch, torch.Tensor]:
    step = check_step(bank, h, ids, weights, slot_of, bank.width)
    if h.shape[0] != step.tokens * step.picks:
        raise ValueError(f"h has {h.shape[0]} rows, ids are for {step.tokens} tokens of {step.picks} picks")
    out = output(out, (step.tokens, bank.hidden), FLOATS if dtype is None else (dtype,), bank.device)
    down = bank.down
    config = config or decode_config("decode_down", down, capability(bank.device, _kernel))
    config = config.fitted(down, bank.hidden, step.picks)
    arguments = {
        "h_ptr": h,
        "ids_ptr": ids,
        "weights_ptr": weights,
        "slot_of_ptr": slot_of,
        **down.arguments(),
        "y_ptr": out,
        "experts": step.experts,
        "slots": bank.slots,
        "PICKS": step.picks,
        "D": bank.hidden,
        "F": bank.width,
        "BLOCK_P": config.block_picks,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    grid = (step.tokens, triton.cdiv(bank.hidden, config.block_n))
    return Launch(_kernel, grid, arguments, {"num_warps": config.num_warps}), out


def compile_specs(capability: int) -> list[CompileSpec]:
    """What the compile check compiles for a compute capability."""
    specs = []
    for name, bank in sample_banks().items():
        _, ids, weights, slot_of = sample_step(bank, tokens=1)
        h = torch.empty(ids.numel(), bank.width, device="meta")
        config = decode_config("decode_down", bank.down, capability)
        launch, _ = _launch(bank, h, ids, weights, slot_of, torch.bfloat16, config=config)
        specs.append(CompileSpec(f"decode_down[{name}]", launch, needs=("load128",)))
    return specs
