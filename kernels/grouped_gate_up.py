"""The up product and the gate of many tokens' picks, block by block of picks of one expert; rows are gathered on load.

A block may wait until its expert's weights have come: see `Arrivals`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moert.kernels._gates import activation, gated
from moert.kernels._launch import CompileSpec, Launch, capability
from moert.kernels._many_rows import block_products
from moert.kernels._samples import sample_banks
from moert.kernels.bank import FLOATS, Bank, output
from moert.kernels.dispatch import Blocks, check_tensor
from moert.kernels.grouped_configs import GroupedConfig, check_blocks, grouped_config, sample_blocks, samples


@dataclass(frozen=True, eq=False)
class Arrivals:
    """How blocks learn that the weights in their slot have come, while copies into other slots still run.

    Whoever copies writes the epoch into a slot's place in `ready` once the whole slot is written: by the copy engine,
    in the stream of the copies, never by a kernel, which might not be started while all blocks wait. Epochs only grow
    (they may wrap), so nothing is reset between steps. Every copy that is waited for is enqueued before the kernel.
    """

    ready: torch.Tensor
    """int32 [S]: the epoch of what is in each slot."""
    epoch: torch.Tensor
    """int32 [1], on the same device: the least that will do."""
    most_polls: int = 0
    """Give up after so many looks, leaving NaN; 0: wait as long as it takes. For tests."""


@triton.jit
def _arrived(ready_ptr: tl.tensor, epoch_ptr: tl.tensor, slot: tl.tensor, MOST_POLLS: tl.constexpr) -> tl.tensor:
    """Look until the slot has its epoch; false if that was given up."""
    epoch = tl.load(epoch_ptr)
    # Adding 0 compiles to a load that later loads cannot overtake, and that sees what a copy engine writes.
    ahead = tl.atomic_add(ready_ptr + slot, 0, sem="acquire", scope="sys") - epoch
    if MOST_POLLS == 0:
        while ahead < 0:
            ahead = tl.atomic_add(ready_ptr + slot, 0, sem="acquire", scope="sys") - epoch
    else:
        polls = 1
        while (ahead < 0) & (polls < MOST_POLLS):
            ahead = tl.atomic_add(ready_ptr + slot, 0, sem="acquire", scope="sys") - epoch
            polls += 1
    return ahead >= 0


@triton.jit(do_not_specialize=["begin", "end", "count"])
def _kernel(
    x_ptr: tl.tensor,
    picks_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    first_ptr: tl.tensor,
    ready_ptr: tl.tensor,
    epoch_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    h_ptr: tl.tensor,
    codes_stride: tl.tensor,
    scales_stride: tl.tensor,
    zeros_stride: tl.tensor,
    bias_stride: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    count: tl.tensor,
    PICKS: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    GATE: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MOST_POLLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
) -> None:
    # All tiles of a block side by side: its rows of x stay in the cache, and it waits once.
    TILES: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    block = tl.load(first_ptr + begin) + tl.program_id(0) // TILES
    if block >= tl.load(first_ptr + end):
        return
    slot = tl.load(slots_ptr + block).to(tl.int64)
    picks = tl.load(picks_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    mask = picks < count
    tile = tl.program_id(0) % TILES
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    HALVES: tl.constexpr = 2 if GATE.gated else 1
    if GATE.gated:
        places = tl.arange(0, 2 * BLOCK_N)
        # A gate and what it is multiplied with side by side, where that costs no contiguous loads.
        SIDE_BY_SIDE: tl.constexpr = GATE.interleaved or not TRANSPOSED
        if SIDE_BY_SIDE:
            column = tile * BLOCK_N + places // 2
            if GATE.interleaved:
                rows = tile * (2 * BLOCK_N) + places
            else:
                rows = column + places % 2 * F
        else:
            column = tile * BLOCK_N + places % BLOCK_N
            rows = column + places // BLOCK_N * F
    else:
        rows = columns
    if ready_ptr is not None:
        arrived = _arrived(ready_ptr, epoch_ptr, slot, MOST_POLLS)
    up = block_products(
        x_ptr,
        tl.where(mask, picks // PICKS, 0).to(tl.int64),
        mask,
        codes_ptr + slot * codes_stride,
        scales_ptr if scales_ptr is None else scales_ptr + slot * scales_stride,
        zeros_ptr if zeros_ptr is None else zeros_ptr + slot * zeros_stride,
        rows,
        HALVES * F,
        D,
        FORMAT,
        GROUP,
        TRANSPOSED,
        BLOCK_M,
        HALVES * BLOCK_N,
        BLOCK_K,
        SWAPPED,
    )
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + slot * bias_stride + rows, mask=rows < HALVES * F, other=0.0)
        up += bias.to(tl.float32)[None, :]
    if GATE.gated:
        if SIDE_BY_SIDE:
            gates, ups = tl.split(tl.reshape(up, (BLOCK_M, BLOCK_N, 2)))
        else:
            gates, ups = tl.split(tl.permute(tl.reshape(up, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
        h = gated(gates, ups, GATE)
    else:
        h = activation(up, GATE)
    if ready_ptr is not None and MOST_POLLS != 0:
        h = tl.where(arrived, h, float("nan"))
    tl.store(
        h_ptr + picks[:, None].to(tl.int64) * F + columns[None, :],
        h.to(h_ptr.dtype.element_ty),
        mask=mask[:, None] & (columns < F)[None, :],
    )


def grouped_gate_up(
    bank: Bank,
    x: torch.Tensor,
    blocks: Blocks,
    *,
    experts: tuple[int, int] | None = None,
    arrivals: Arrivals | None = None,
    out: torch.Tensor | None = None,
    config: GroupedConfig | None = None,
) -> torch.Tensor:
    """What goes into the down product, for every pick in the blocks; `reference.decode_gate_up` is the meaning.

    On tensor cores: weights become the dtype of x in the kernel, sums are fp32, and h is rounded once. A row's result
    does not depend on what else is in its block. Shapes alone decide what is launched, so a CUDA graph may capture it.
    Does not wait for the device.

    Work may start before all weights are there, in two ways. With `experts`, a launch for each group of experts, each
    behind an event that the copies of the group have recorded. With `arrivals`, one launch whose blocks look for
    themselves; as blocks start in the order of the work list, those of experts that were there before begin at once.
    The second follows COMET (Zhang et al., 2025), over PCIe instead of between GPUs.

    Args:
        x: [T, D] in bf16, fp16 or fp32.
        blocks: from `dispatch`, of these tokens and this bank.
        experts: from and up to which place in the dispatch's order; None: all.
        arrivals: None: all weights are there when the kernel starts.
        out: [T * K, F] in the dtype of x or fp32, written to if given.
        config: block sizes other than those of the table; `block_m` is that of the blocks.

    Returns:
        [T * K, F] in the dtype of x, new memory, or `out`. Rows of picks in no block are left as they were.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit.
        KernelUnavailableError: the device cannot run it.
    """
    launch, h = _launch(bank, x, blocks, experts, arrivals, out, config)
    launch.run(bank.device)
    return h


def runs_on(device: torch.device) -> int:
    """The compute capability that configurations are chosen by; see `_launch.capability`."""
    return capability(device, _kernel)


def _launch(
    bank: Bank,
    x: torch.Tensor,
    blocks: Blocks,
    experts: tuple[int, int] | None = None,
    arrivals: Arrivals | None = None,
    out: torch.Tensor | None = None,
    config: GroupedConfig | None = None,
) -> tuple[Launch, torch.Tensor]:
    check_tensor("x", x, 2, FLOATS, bank.device)
    if tuple(x.shape) != (blocks.tokens, bank.hidden):
        raise ValueError(f"x is {list(x.shape)}, the blocks and the bank ask for {[blocks.tokens, bank.hidden]}")
    begin, end = check_blocks(blocks, experts, bank.device)
    count = blocks.tokens * blocks.top_k
    out = output(out, (count, bank.width), (x.dtype, torch.float32), bank.device)
    if arrivals is not None:
        check_tensor("ready", arrivals.ready, 1, (torch.int32,), bank.device)
        check_tensor("epoch", arrivals.epoch, 1, (torch.int32,), bank.device)
        if arrivals.ready.numel() != bank.slots or arrivals.epoch.numel() != 1:
            raise ValueError(
                f"ready has {arrivals.ready.numel()} numbers and epoch {arrivals.epoch.numel()}; the bank has "
                f"{bank.slots} slots, and there is one epoch"
            )
    up = bank.up
    halves = 2 if bank.gate.gated else 1
    if config is None:
        config = grouped_config("gate_up", up, blocks.block_m, x.dtype, capability(bank.device, _kernel))
    config = config.fitted(up)
    block_n = config.block_n // halves
    arguments = {
        "x_ptr": x,
        "picks_ptr": blocks.picks,
        "slots_ptr": blocks.slots,
        "first_ptr": blocks.first,
        "ready_ptr": None if arrivals is None else arrivals.ready,
        "epoch_ptr": None if arrivals is None else arrivals.epoch,
        **up.arguments(),
        "h_ptr": out,
        "begin": begin,
        "end": end,
        "count": count,
        "PICKS": blocks.top_k,
        "D": bank.hidden,
        "F": bank.width,
        "GATE": bank.gate,
        "MOST_POLLS": 0 if arrivals is None else arrivals.most_polls,
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": config.block_k,
        "SWAPPED": config.swapped,
    }
    grid = (blocks.most(end - begin) * triton.cdiv(bank.width, block_n),)
    return Launch(_kernel, grid, arguments, config.options), out


def compile_specs(capability: int) -> list[CompileSpec]:
    """What the compile check compiles for a compute capability."""
    specs = []
    for name, bank in sample_banks().items():
        for sample in samples("gate_up", bank.up, capability):
            blocks = sample_blocks(sample.block_m)
            x = torch.empty(blocks.tokens, bank.hidden, dtype=sample.dtype, device="meta")
            launch, _ = _launch(bank, x, blocks, config=sample.config)
            label = f"{name},{sample.label}"
            specs.append(CompileSpec(f"grouped_gate_up[{label}]", launch, sample.needs, sample.lacks))
            if label == "bf16,64":
                ready = torch.empty(bank.slots, dtype=torch.int32, device="meta")
                arrivals = Arrivals(ready, torch.empty(1, dtype=torch.int32, device="meta"))
                launch, _ = _launch(bank, x, blocks, arrivals=arrivals, config=sample.config)
                specs.append(CompileSpec(f"grouped_gate_up[{label},arrivals]", launch, (*sample.needs, "acquire")))
    return specs
