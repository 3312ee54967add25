"""The up product and the gate of a few tokens' picks, one program for some rows of one pick."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moert.kernels._few_rows import products
from moert.kernels._gates import activation, gated
from moert.kernels._launch import CompileSpec, Launch, capability
from moert.kernels._picks import slots_of_picks
from moert.kernels._samples import sample_banks, sample_step
from moert.kernels.bank import Bank, check_step, output
from moert.kernels.configs import DecodeConfig, decode_config


@triton.jit(do_not_specialize=["experts", "slots"])
def _kernel(
    x_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    slot_of_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    h_ptr: tl.tensor,
    codes_stride: tl.tensor,
    scales_stride: tl.tensor,
    zeros_stride: tl.tensor,
    bias_stride: tl.tensor,
    experts: tl.tensor,
    slots: tl.tensor,
    PICKS: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    GATE: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    pick = tl.program_id(0)
    slot = slots_of_picks(ids_ptr, weights_ptr, slot_of_ptr, pick, pick >= 0, experts, slots)
    if slot < 0:
        return
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = (pick // PICKS).to(tl.int64)
    # Gates and the other half in one product, so that the loads of both are in flight together.
    HALVES: tl.constexpr = 2 if GATE.gated else 1
    if GATE.gated:
        places = tl.arange(0, 2 * BLOCK_N)
        if GATE.interleaved:
            rows = tl.program_id(1) * 2 * BLOCK_N + places
            mask = rows < 2 * F
        else:
            column = tl.program_id(1) * BLOCK_N + places % BLOCK_N
            rows = column + places // BLOCK_N * F
            mask = column < F
    else:
        rows = columns
        mask = columns < F
    up = products(
        x_ptr,
        tl.full((1,), token, tl.int64),
        codes_ptr,
        codes_stride,
        scales_ptr,
        scales_stride,
        zeros_ptr,
        zeros_stride,
        tl.full((1,), slot, tl.int64),
        rows,
        mask,
        HALVES * F,
        D,
        FORMAT,
        GROUP,
        TRANSPOSED,
        1,
        HALVES * BLOCK_N,
        BLOCK_K,
    )
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + slot * bias_stride + rows, mask=mask, other=0.0)
        up += bias.to(tl.float32)[None, :]
    if GATE.gated:
        if GATE.interleaved:
            gates, ups = tl.split(tl.reshape(up, (BLOCK_N, 2)))
        else:
            gates, ups = tl.split(tl.trans(tl.reshape(up, (2, BLOCK_N))))
        h = gated(gates, ups, GATE)
    else:
        h = activation(tl.reshape(up, (BLOCK_N,)), GATE)
    tl.store(h_ptr + pick.to(tl.int64) * F + columns, h, mask=columns < F)


def decode_gate_up(
    bank: Bank,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    slot_of: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
) -> torch.Tensor:
    """What goes into the down product, for every pick whose expert is in the bank; `reference.decode_gate_up`.

    For a few tokens: each pick reads its expert's weights by itself. Nothing is sorted and nothing is added across
    programs, so a token's result is the same to the last bit whatever other tokens there are. Shapes alone decide what
    is launched, so a CUDA graph may capture it. Does not wait for the device.

    Organising by output instead of by expert follows Morph's "warp decode"; the slot table is ours.

    Args:
        x: [T, D] in bf16, fp16 or fp32.
        ids, weights: [T, K]: what the router picked, int32 or int64, and how much it weighs. Ids outside 0 to E - 1,
            experts without a slot and weights of 0 cost nothing.
        slot_of: [E] int32, the slot of each expert or -1.
        out: fp32 [T * K, F], written to if given.
        config: block sizes other than those of the table.

    Returns:
        fp32 [T * K, F], new memory or `out`. Rows of picks that are not computed are left as they were.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit.
        KernelUnavailableError: the device cannot run it.
    """
    launch, h = _launch(bank, x, ids, weights, slot_of, out, config)
    launch.run(bank.device)
    return h


def _launch(
    bank: Bank,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    slot_of: torch.Tensor,
    out: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
) -> tuple[Launch, torch.Tensor]:
    step = check_step(bank, x, ids, weights, slot_of, bank.hidden)
    if x.shape[0] != step.tokens:
        raise ValueError(f"x has {x.shape[0]} rows, ids are for {step.tokens} tokens")
    wanted = (step.tokens * step.picks, bank.width)
    out = output(out, wanted, (torch.float32,), bank.device)
    up = bank.up
    config = (config or decode_config("decode_gate_up", up, capability(bank.device, _kernel))).fitted(up, bank.width)
    arguments = {
        "x_ptr": x,
        "ids_ptr": ids,
        "weights_ptr": weights,
        "slot_of_ptr": slot_of,
        **up.arguments(),
        "h_ptr": out,
        "experts": step.experts,
        "slots": bank.slots,
        "PICKS": step.picks,
        "D": bank.hidden,
        "F": bank.width,
        "GATE": bank.gate,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    grid = (wanted[0], triton.cdiv(bank.width, config.block_n))
    return Launch(_kernel, grid, arguments, {"num_warps": config.num_warps}), out


def compile_specs(capability: int) -> list[CompileSpec]:
    """What the compile check compiles for a compute capability."""
    specs = []
    for name, bank in sample_banks().items():
        config = decode_config("decode_gate_up", bank.up, capability)
        launch, _ = _launch(bank, *sample_step(bank, tokens=1), config=config)
        specs.append(CompileSpec(f"decode_gate_up[{name}]", launch, needs=("load128",)))
    return specs
