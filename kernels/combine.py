"""The sum of each token's rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moert.kernels._launch import CompileSpec, Launch, power_of_2_from
from moert.kernels._picks import slots_of_picks
from moert.kernels.bank import FLOATS, output
from moert.kernels.dispatch import check_picks, check_tensor

_BLOCK = 1024


@triton.jit(do_not_specialize=["experts", "slots"])
def _kernel(
    rows_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    slot_of_ptr: tl.tensor,
    y_ptr: tl.tensor,
    experts: tl.tensor,
    slots: tl.tensor,
    PICKS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(PICKS):
        pick = token * PICKS + place
        slot = slots_of_picks(ids_ptr, weights_ptr, slot_of_ptr, pick, pick >= 0, experts, slots)
        y += tl.load(rows_ptr + pick * D + columns, mask=(slot >= 0) & (columns < D), other=0.0).to(tl.float32)
    tl.store(y_ptr + token * D + columns, y.to(y_ptr.dtype.element_ty), mask=columns < D)


def combine(
    rows: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    slot_of: torch.Tensor,
    slots: int,
    *,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum of each token's rows, one for each pick that was computed; `reference_grouped.combine`.

    Sums are fp32 in the order of the picks and rounded once, so a token's result is the same to the last bit whatever
    other tokens there are. A CUDA graph may capture it. Does not wait for the device.

    Args:
        rows: [T * K, D] in bf16, fp16 or fp32, weighted already. Rows of picks that were not computed are not read.
        ids, weights, slot_of, slots: those that `dispatch` had; they say which picks were computed.
        dtype: of the result, one of those three; by default that of `out`, or of the rows.
        out: [T, D], written to if given.

    Returns:
        [T, D], new memory or `out`; 0 where nothing of a token was computed.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit.
        KernelUnavailableError: the device cannot run it.
    """
    launch, y = _launch(rows, ids, weights, slot_of, slots, dtype, out)
    launch.run(rows.device)
    return y


def _launch(
    rows: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    slot_of: torch.Tensor,
    slots: int,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> tuple[Launch, torch.Tensor]:
    check_picks(ids, weights, slot_of)
    check_tensor("rows", rows, 2, FLOATS, ids.device)
    if rows.shape[0] != ids.numel() or not rows.shape[1]:
        raise ValueError(f"rows are {list(rows.shape)} for {ids.numel()} picks: one each, with numbers in them")
    (tokens, picks), hidden = ids.shape, rows.shape[1]
    dtypes = (dtype,) if dtype is not None else (rows.dtype, *FLOATS)
    if not set(dtypes) <= set(FLOATS):
        raise ValueError(f"dtype={dtype} must be {' or '.join(map(str, FLOATS))}")
    out = output(out, (tokens, hidden), dtypes, rows.device)
    block = min(_BLOCK, power_of_2_from(hidden))
    arguments = {
        "rows_ptr": rows,
        "ids_ptr": ids,
        "weights_ptr": weights,
        "slot_of_ptr": slot_of,
        "y_ptr": out,
        "experts": slot_of.numel(),
        "slots": slots,
        "PICKS": picks,
        "D": hidden,
        "BLOCK": block,
    }
    return Launch(_kernel, (tokens, triton.cdiv(hidden, block)), arguments, {"num_warps": 4}), out


def compile_specs(capability: int) -> list[CompileSpec]:
    """What the compile check compiles for a compute capability."""
    specs = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        rows = torch.empty(4096 * 8, 2048, dtype=dtype, device="meta")
        ids = torch.empty(4096, 8, dtype=torch.int64, device="meta")
        weights = torch.empty(4096, 8, device="meta")
        slot_of = torch.empty(128, dtype=torch.int32, device="meta")
        launch, _ = _launch(rows, ids, weights, slot_of, 128)
        specs.append(CompileSpec(f"combine[{name}]", launch, needs=("load128",)))
    return specs
