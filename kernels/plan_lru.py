"""Which slots an event's misses take, least recently used first, decided on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moert.kernels._launch import CompileSpec, Launch
from moert.kernels.planning import (
    Plan,
    Reach,
    Residents,
    Split,
    event_experts,
    is_void,
    move_in,
    new_plan,
    new_residents,
    plan_arguments,
    row_of,
    those_that_come,
)


@dataclass(frozen=True, eq=False)
class LruState:
    """A layer's cache; made by `new_lru`, changed by `plan_lru`."""

    residents: Residents
    stamps: torch.Tensor
    """int64 [S]: the number of the last use of what is in each slot. Longer where slots are rows of a bank: by row."""


def new_lru(
    experts: int,
    slots: int,
    device: torch.device | str,
    rows: torch.Tensor | None = None,
    log: torch.Tensor | None = None,
    n_rows: int | None = None,
) -> LruState:
    """An empty cache of a layer on a device.

    Args:
        rows, log: as in `Residents`; `n_rows` is above all rows.

    Raises:
        ValueError: not 1 to 8192 of each; rows or a log that do not fit.
    """
    size = slots if rows is None or n_rows is None else n_rows
    return LruState(
        new_residents(experts, slots, device, rows, log), torch.zeros(size, dtype=torch.int64, device=device)
    )


@triton.jit(do_not_specialize=["count", "experts", "slots"])
def _kernel(
    ids_ptr: tl.tensor,
    addresses_ptr: tl.tensor,
    void_ptr: tl.tensor,
    slot_of_ptr: tl.tensor,
    owner_ptr: tl.tensor,
    stamps_ptr: tl.tensor,
    marks_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    log_ptr: tl.tensor,
    out_experts_ptr: tl.tensor,
    out_slots_ptr: tl.tensor,
    out_victims_ptr: tl.tensor,
    out_count_ptr: tl.tensor,
    out_rounds_ptr: tl.tensor,
    fetch_of_ptr: tl.tensor,
    left_ptr: tl.tensor,
    out_on_cpu_ptr: tl.tensor,
    out_on_cpu_count_ptr: tl.tensor,
    count: tl.tensor,
    experts: tl.tensor,
    slots: tl.tensor,
    LOGGED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    event = tl.load(counters_ptr) + 1
    uses = tl.load(counters_ptr + 1)
    counted = event
    if void_ptr is not None:
        void = is_void(ids_ptr, slot_of_ptr, addresses_ptr, void_ptr, count, experts, BLOCK_R)
        # An event without ids that is not counted: nothing changes below.
        count = tl.where(void == 0, count, 0)
        counted = event - void
    wanted = event_experts(ids_ptr, marks_ptr, log_ptr, event, count, experts, LOGGED, BLOCK_R, BLOCK_E)
    e = tl.arange(0, BLOCK_E)
    slot_of = tl.load(slot_of_ptr + e, mask=wanted, other=-1)
    hit = wanted & (slot_of >= 0)
    missed = wanted & (slot_of < 0)
    hits = tl.sum(hit.to(tl.int32), axis=0)
    misses = tl.sum(missed.to(tl.int32), axis=0)
    tl.store(counters_ptr, counted)
    tl.store(counters_ptr + 1, uses + hits + misses)
    tl.store(counters_ptr + 2, tl.load(counters_ptr + 2) + misses)
    come = misses
    if fetch_of_ptr is not None:
        worth = tl.zeros((BLOCK_E,), tl.float32)
        missed = those_that_come(
            missed, misses, worth, fetch_of_ptr, left_ptr, out_on_cpu_ptr, out_on_cpu_count_ptr, BLOCK_E
        )
        come = tl.sum(missed.to(tl.int32), axis=0)
    tl.store(out_count_ptr, come)
    rank = tl.cumsum(hit.to(tl.int32), axis=0) - 1
    tl.store(stamps_ptr + slot_of, uses + rank, mask=hit)
    tl.debug_barrier()  # stamps are read again, by slot
    s = tl.arange(0, BLOCK_S)
    owner = tl.load(owner_ptr + s, mask=s < slots, other=-1)
    # Free slots first. The event's own experts are younger than all others, so they are reached when no other is left.
    rows = s
    if rows_ptr is not None:
        rows = tl.load(rows_ptr + s, mask=s < slots, other=0)
    age = tl.load(stamps_ptr + rows, mask=s < slots, other=0)
    if out_rounds_ptr is not None:
        next_round = ((owner >= 0) & (age >= uses)).to(tl.int32)
    age = tl.where(owner < 0, s.to(tl.int64) - (1 << 62), age)
    age = tl.where(s < slots, age, (1 << 62))
    expert = -1
    for place in range(come):
        slot = tl.argmin(age, axis=0).to(tl.int32)
        victim = tl.sum(tl.where(s == slot, owner, 0), axis=0)
        expert = tl.min(tl.where(missed & (e > expert), e, BLOCK_E), axis=0)
        age = tl.where(s == slot, uses + hits + place, age)
        tl.store(stamps_ptr + row_of(slot, rows_ptr), uses + hits + place)
        if out_rounds_ptr is not None:
            tl.store(out_rounds_ptr + place, tl.sum(tl.where(s == slot, next_round, 0), axis=0))
            next_round += (s == slot).to(tl.int32)
            owner = tl.where(s == slot, expert, owner)
        move_in(
            expert,
            slot,
            victim,
            place,
            rows_ptr,
            slot_of_ptr,
            owner_ptr,
            out_experts_ptr,
            out_slots_ptr,
            out_victims_ptr,
        )


def plan_lru(
    state: LruState,
    ids: torch.Tensor,
    *,
    passing: bool = False,
    reach: Reach | None = None,
    split: Split | None = None,
) -> Plan:
    """Take an event, and give its misses the slots of those whose last event is longest ago.

    Step for step what `moert.policies.lru.LRU` decides when `moert.turnover` drives it: every expert counts once an
    event, hits are older than misses, and of each the lower id is the older. Free slots come first, the lowest before
    the others. One program, a loop over the misses; a CUDA graph may capture it. Does not wait for the device.

    A planner on the device is FreeToken's (2026) and vLLM's expert pool's idea.

    Args:
        state: of the layer that the event is of, changed in place.
        ids: [T, K] int32 or int64; numbers outside 0 to E - 1 are no experts.
        passing: the event may have more experts than there are slots; see `Plan.rounds`.
        reach: which experts can be copied, of a pass that may be void; None: all.
        split: some misses are left to the CPU, those of the higher ids; None: all come.

    Returns:
        New memory.

    Raises:
        ValueError: ids of the wrong dtype, layout or device, or, unless `passing`, so many that they could be of more
            experts than there are slots; a split of other numbers of ids. Nothing is changed.
        KernelUnavailableError: the device cannot run it.
    """
    launch, plan = _launch(state, ids, passing, reach, split)
    launch.run(ids.device)
    return plan


def _launch(
    state: LruState,
    ids: torch.Tensor,
    passing: bool = False,
    reach: Reach | None = None,
    split: Split | None = None,
) -> tuple[Launch, Plan]:
    plan = new_plan(state.residents, ids, passing, split)
    arguments = {**plan_arguments(state.residents, plan, ids, reach, split), "stamps_ptr": state.stamps}
    return Launch(_kernel, (1,), arguments, {"num_warps": 4 if state.residents.slots <= 1024 else 8}), plan


def compile_specs(capability: int) -> list[CompileSpec]:
    """What the compile check compiles for a compute capability."""
    ids = torch.empty(8, 8, dtype=torch.int64, device="meta")
    rows, log = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((96,), (64, 64)))
    reach = Reach(*(torch.empty(n, dtype=of, device="meta") for n, of in ((128, torch.int64), (1, torch.int32))))
    split = Split(*(torch.empty(n, dtype=dtype, device="meta") for n, dtype in ((65, torch.int32), (1, torch.int64))))
    return [
        CompileSpec(
            f"plan_lru[{experts},{slots}{',passing' * passing}]",
            _launch(new_lru(experts, slots, "meta"), ids, passing)[0],
        )
        for experts, slots, passing in ((128, 96, False), (8192, 4096, False), (128, 96, True))
    ] + [
        CompileSpec(f"plan_lru[128,96,{name}]", _launch(new_lru(128, 96, "meta", rows, log, 512), ids, False, *of)[0])
        for name, of in (("rows", ()), ("rows,reach", (reach,)), ("split", (None, split)))
    ]
