"""Which picks each block of a grouped product computes: picks sorted by expert, experts in the order they arrive.

Three launches of fixed size: picks of each expert counted chunk by chunk, sums over chunks and experts, places. Nothing
is added atomically, so the order within an expert is that of the picks, and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moert.kernels._launch import CompileSpec, Launch, power_of_2_from
from moert.kernels.bank import FLOATS

CHUNK = 256
"""Picks that are counted together where the router has not counted them."""

_TILE = 32


@dataclass(frozen=True, eq=False)
class Counts:
    """How often each expert is picked in every `chunk` picks; `router_topk` makes them, or `dispatch` does."""

    table: torch.Tensor
    """int32 [chunks, E]; picks that `dispatch` would leave out are not counted."""
    chunk: int


@dataclass(frozen=True, eq=False)
class Blocks:
    """The work list of a grouped product; on the device, its shapes those of the largest there could be."""

    picks: torch.Tensor
    """int32 [B * block_m]: the picks (places in ids) of each block; T * K where a block has no more."""
    slots: torch.Tensor
    """int32 [B]: the slot of each block's expert."""
    first: torch.Tensor
    """int32 [N + 1]: the first block of each expert in `order`, and the number of blocks; beyond it nothing is set."""
    block_m: int
    tokens: int
    top_k: int

    @property
    def order_length(self) -> int:
        """N."""
        return self.first.numel() - 1

    def most(self, experts: int) -> int:
        """No more blocks than this are needed for so many experts of the order."""
        return most_blocks(self.tokens * self.top_k, experts, self.block_m)


def most_blocks(picks: int, experts: int, block_m: int) -> int:
    """The most blocks that so many picks of so many experts can need."""
    return min(picks, picks // block_m + experts)


@triton.jit
def _experts_of_picks(
    ids_ptr: tl.tensor, weights_ptr: tl.tensor, picks: tl.tensor, count: tl.tensor, experts: tl.tensor
) -> tl.tensor:
    """int32 expert of each pick, `experts` for those beyond `count`, of no expert, or of weight 0."""
    ids = tl.load(ids_ptr + picks, mask=picks < count, other=-1)
    weights = tl.load(weights_ptr + picks, mask=picks < count, other=0.0).to(tl.float32)
    # Compared as they are: an int64 id may be anything.
    return tl.where((ids >= 0) & (ids < experts) & (weights != 0), ids, experts).to(tl.int32)


@triton.jit(do_not_specialize=["count", "experts"])
def _count_kernel(
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    table_ptr: tl.tensor,
    count: tl.tensor,
    experts: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    chunk = tl.program_id(0)
    ids = _experts_of_picks(ids_ptr, weights_ptr, chunk * CHUNK + tl.arange(0, CHUNK), count, experts)
    e = tl.arange(0, BLOCK_E)
    tl.store(table_ptr + chunk * experts + e, tl.histogram(ids, BLOCK_E), mask=e < experts)


@triton.jit(do_not_specialize=["chunks", "experts", "slots", "length"])
def _sum_kernel(
    table_ptr: tl.tensor,
    order_ptr: tl.tensor,
    slot_of_ptr: tl.tensor,
    before_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    first_of_ptr: tl.tensor,
    first_ptr: tl.tensor,
    chunks: tl.tensor,
    experts: tl.tensor,
    slots: tl.tensor,
    length: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    place = tl.arange(0, BLOCK_E)
    tl.store(first_of_ptr + place, -1, mask=place < experts)
    if order_ptr is None:
        e = place
    else:
        e = tl.load(order_ptr + place, mask=place < length, other=-1)
    listed = (place < length) & (e >= 0) & (e < experts)
    slot = tl.load(slot_of_ptr + e, mask=listed, other=-1)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for begin in range(0, chunks, BLOCK_C):
        chunk = begin + tl.arange(0, BLOCK_C)
        places = chunk[:, None] * experts + e[None, :]
        mask = (chunk < chunks)[:, None] & listed[None, :]
        counts = tl.load(table_ptr + places, mask=mask, other=0)
        tl.store(before_ptr + places, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=mask)
        total += tl.sum(counts, axis=0)
    present = listed & (slot >= 0) & (slot < slots)
    blocks = tl.where(present, (total + BLOCK_M - 1) // BLOCK_M, 0)
    first = tl.cumsum(blocks, axis=0) - blocks
    tl.store(first_ptr + place, first, mask=place < length)
    tl.store(first_ptr + length, tl.sum(blocks, axis=0))
    tl.store(totals_ptr + e, total, mask=listed)
    tl.debug_barrier()  # the -1 come first
    tl.store(first_of_ptr + e, first, mask=present)


@triton.jit(do_not_specialize=["count", "chunks", "chunk_picks", "experts"])
def _place_kernel(
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    order_ptr: tl.tensor,
    slot_of_ptr: tl.tensor,
    before_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    first_of_ptr: tl.tensor,
    first_ptr: tl.tensor,
    picks_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    count: tl.tensor,
    chunks: tl.tensor,
    chunk_picks: tl.tensor,
    experts: tl.tensor,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    if program < chunks:
        begin = program * chunk_picks
        end = tl.minimum(begin + chunk_picks, count)
        picks = begin + tl.arange(0, CHUNK)
        ids = _experts_of_picks(ids_ptr, weights_ptr, picks, end, experts)
        rank = tl.zeros((CHUNK,), tl.int32)
        for other in range(0, CHUNK, TILE):
            others = begin + other + tl.arange(0, TILE)
            other_ids = _experts_of_picks(ids_ptr, weights_ptr, others, end, experts)
            same = (ids[:, None] == other_ids[None, :]) & (others[None, :] < picks[:, None])
            rank += tl.sum(same.to(tl.int32), axis=1)
        firsts = tl.load(first_of_ptr + ids, mask=ids < experts, other=-1)
        before = tl.load(before_ptr + program * experts + ids, mask=ids < experts, other=0)
        tl.store(picks_ptr + firsts * BLOCK_M + before + rank, picks, mask=firsts >= 0)
    else:
        place = program - chunks
        first = tl.load(first_ptr + place)
        blocks = tl.load(first_ptr + place + 1) - first
        if blocks > 0:
            if order_ptr is None:
                e = place
            else:
                e = tl.load(order_ptr + place)
            slot = tl.load(slot_of_ptr + e)
            for some in range(0, blocks, TILE):
                block = some + tl.arange(0, TILE)
                tl.store(slots_ptr + first + block, slot, mask=block < blocks)
            row = tl.load(totals_ptr + e) + tl.arange(0, BLOCK_M)
            tl.store(picks_ptr + first * BLOCK_M + row, count, mask=row < blocks * BLOCK_M)


def dispatch(
    ids: torch.Tensor,
    weights: torch.Tensor,
    slot_of: torch.Tensor,
    slots: int,
    block_m: int,
    *,
    order: torch.Tensor | None = None,
    counts: Counts | None = None,
) -> Blocks:
    """The blocks of a grouped product over the picks of a step; `reference_grouped.dispatch`.

    Each expert with picks has ceil(picks / block_m) blocks of its own, experts in the given order, picks in theirs.
    Experts without a slot have none, and picks of them, of ids outside 0 to E - 1 and of weight 0 are in none. Sorting
    is by expert, slots come in afterwards, so a bank may have any number of them. Shapes alone decide what is launched,
    so a CUDA graph may capture it. Does not wait for the device.

    Lists padded to blocks are those of vLLM's and SGLang's fused MoE kernels; the order and the slots are ours.

    Args:
        ids, weights: [T, K], as for `grouped_gate_up`.
        slot_of: int32 [E], the slot of each expert or -1.
        slots: S, of the bank; a slot from there on is none.
        block_m: picks of a block, a power of two from 16 on.
        order: int32 [N], experts in the order in which they arrive, none twice; None: by id. Experts it does not have
            get no blocks, numbers that are none are passed over. `arrival_order` makes one.
        counts: from `router_topk` for these ids and weights; None: they are counted here.

    Returns:
        New memory.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit.
        KernelUnavailableError: the device cannot run it.
    """
    launches, blocks = _launches(ids, weights, slot_of, slots, block_m, order, counts)
    for launch in launches:
        launch.run(ids.device)
    return blocks


def arrival_order(slot_of: torch.Tensor, arriving: torch.Tensor) -> torch.Tensor:
    """All experts by arrival, int32 [E]: those that have a slot already by id, then `arriving`, then the rest.

    Args:
        slot_of: int32 [E], where experts that arrive have the slots they arrive in.
        arriving: int64 [A], experts in the order of their copies, on the same device, none twice.
    """
    experts = slot_of.numel()
    rank = torch.where(slot_of >= 0, 0, experts)
    rank[arriving] = torch.arange(1, arriving.numel() + 1, device=slot_of.device)
    return torch.argsort(rank, stable=True).to(torch.int32)


def check_picks(ids: torch.Tensor, weights: torch.Tensor, slot_of: torch.Tensor) -> None:
    """Refuse ids [T, K], weights [T, K] and slot_of [E] that kernels cannot read.

    Raises:
        ValueError: shape, dtype, device or layout, with the numbers.
    """
    for name, tensor, dims, dtypes in (
        ("ids", ids, 2, (torch.int32, torch.int64)),
        ("weights", weights, 2, FLOATS),
        ("slot_of", slot_of, 1, (torch.int32,)),
    ):
        check_tensor(name, tensor, dims, dtypes, ids.device)
    if ids.shape != weights.shape:
        raise ValueError(f"ids are {list(ids.shape)}, the router's weights {list(weights.shape)}")
    if not ids.shape[1] or not slot_of.numel():
        raise ValueError(f"{ids.shape[1]} picks a token of {slot_of.numel()} experts: there must be one of each")
    if ids.numel() >= 2**31 - 2**16:
        raise ValueError(f"{ids.numel()} picks; kernels count them in 31 bits")


def check_tensor(
    name: str, tensor: torch.Tensor, dims: int, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Refuse a tensor that is not contiguous, of so many dimensions, one of those dtypes and there.

    Raises:
        ValueError: it is not.
    """
    if tensor.dim() != dims or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must have {dims} dimensions and be contiguous, not {list(tensor.shape)} of strides "
            f"{tensor.stride()}"
        )
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the others are on {device}")


def _launches(
    ids: torch.Tensor,
    weights: torch.Tensor,
    slot_of: torch.Tensor,
    slots: int,
    block_m: int,
    order: torch.Tensor | None = None,
    counts: Counts | None = None,
) -> tuple[list[Launch], Blocks]:
    check_picks(ids, weights, slot_of)
    if block_m < 16 or block_m != power_of_2_from(block_m):
        raise ValueError(f"block_m={block_m} must be a power of two from 16 on")
    device, count, experts = ids.device, ids.numel(), slot_of.numel()
    if order is not None:
        check_tensor("order", order, 1, (torch.int32,), device)
        if not 0 < order.numel() <= experts:
            raise ValueError(f"order has {order.numel()} experts of {experts}")
    length = experts if order is None else order.numel()
    chunk = CHUNK if counts is None else counts.chunk
    chunks = triton.cdiv(count, chunk)
    if counts is not None:
        check_tensor("counts", counts.table, 2, (torch.int32,), device)
        if counts.table.shape != (chunks, experts):
            raise ValueError(
                f"counts are {list(counts.table.shape)} by {chunk} picks; {count} picks of {experts} experts ask for "
                f"[{chunks}, {experts}]"
            )

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    most = most_blocks(count, length, block_m)
    if not count:
        first = torch.zeros(length + 1, dtype=torch.int32, device=device)
        return [], Blocks(new(0), new(0), first, block_m, *ids.shape)
    blocks = Blocks(new(most * block_m), new(most), new(length + 1), block_m, *ids.shape)
    table = new(chunks, experts) if counts is None else counts.table
    before, totals, first_of = new(chunks, experts), new(experts), new(experts)
    # One more than there are experts, for picks that are in no block.
    block_e = power_of_2_from(experts + 1)
    launches = []
    if counts is None:
        arguments = {
            "ids_ptr": ids,
            "weights_ptr": weights,
            "table_ptr": table,
            "count": count,
            "experts": experts,
            "CHUNK": CHUNK,
            "BLOCK_E": block_e,
        }
        launches.append(Launch(_count_kernel, (chunks,), arguments, {"num_warps": 4}))
    arguments = {
        "table_ptr": table,
        "order_ptr": order,
        "slot_of_ptr": slot_of,
        "before_ptr": before,
        "totals_ptr": totals,
        "first_of_ptr": first_of,
        "first_ptr": blocks.first,
        "chunks": chunks,
        "experts": experts,
        "slots": slots,
        "length": length,
        "BLOCK_M": block_m,
        "BLOCK_C": max(1, min(8192 // block_e, power_of_2_from(chunks))),
        "BLOCK_E": block_e,
    }
    launches.append(Launch(_sum_kernel, (1,), arguments, {"num_warps": 8}))
    arguments = {
        "ids_ptr": ids,
        "weights_ptr": weights,
        "order_ptr": order,
        "slot_of_ptr": slot_of,
        "before_ptr": before,
        "totals_ptr": totals,
        "first_of_ptr": first_of,
        "first_ptr": blocks.first,
        "picks_ptr": blocks.picks,
        "slots_ptr": blocks.slots,
        "count": count,
        "chunks": chunks,
        "chunk_picks": chunk,
        "experts": experts,
        "BLOCK_M": block_m,
        "CHUNK": power_of_2_from(chunk),
        "TILE": min(_TILE, power_of_2_from(chunk)),
    }
    launches.append(Launch(_place_kernel, (chunks + length,), arguments, {"num_warps": 8}))
    return launches, blocks


def compile_specs(capability: int) -> list[CompileSpec]:
    """What the compile check compiles for a compute capability."""
    ids = torch.empty(4096, 8, dtype=torch.int64, device="meta")
    weights = torch.empty(4096, 8, device="meta")
    specs = []
    for experts in (128, 512):
        slot_of = torch.empty(experts, dtype=torch.int32, device="meta")
        launches, _ = _launches(ids, weights, slot_of, experts, 64, slot_of)
        names = ("count", "sum", "place")
        specs += [
            CompileSpec(f"dispatch_{name}[{experts}]", launch) for name, launch in zip(names, launches, strict=True)
        ]
    return specs
