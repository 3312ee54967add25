"""What the device-side planners share: an event's hits and misses, and their results."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from moert.kernels._launch import power_of_2_from
from moert.kernels.dispatch import check_tensor


@dataclass(frozen=True, eq=False)
class Residents:
    """Which experts of a layer have a slot; on the device, changed in place by the planner that it is given to."""

    slot_of: torch.Tensor
    """int32 [E]: the row of the slot of each expert, -1 for none. What the other kernels take."""
    owner: torch.Tensor
    """int32 [S]: the expert in each slot, -1 for none."""
    marks: torch.Tensor
    """int64 [E]: the last event that each expert was in."""
    counters: torch.Tensor
    """int64 [3]: events so far, uses of experts so far, and how many of those were misses."""
    rows: torch.Tensor | None = None
    """int32 [S]: which row of a bank each slot is, where it shares that with others; None: the row of its number."""
    log: torch.Tensor | None = None
    """int32 [N, R]: the R ids of each of the last N events, event number n (counted from 1) in row n % N; None: nobody
    wants to know."""

    @property
    def experts(self) -> int:
        return self.slot_of.numel()

    @property
    def slots(self) -> int:
        return self.owner.numel()


@dataclass(frozen=True, eq=False)
class Split:
    """How many of an event's misses come, where the CPU computes the others; on the device.

    Those that do not come get no slot, nobody leaves for them, and they count as every use.
    """

    fetch_of: torch.Tensor
    """int32 [R + 1]: of as many misses, so many come; R as in `Residents.log`. Below 0 is none, above that all."""
    left: torch.Tensor
    """int64 [1]: experts that were left to the CPU so far."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What an event's misses change; on the device. Entries from `count` on are not set.

    Where an event may have more experts than there are slots, slots come up again and again, and entries are worked
    off in rounds: copy those of round 0, compute the event's experts that were there before and those of round 0, copy
    those of round 1 and compute them, and so on. `Residents` then says who is left at the end.
    """

    experts: torch.Tensor
    """int32 [M], those that come, ascending. With `slots` and `count` what `copy_rows` takes."""
    slots: torch.Tensor
    """int32 [M], the rows where to."""
    victims: torch.Tensor
    """int32 [M], the experts that leave those slots, -1 where a slot was free."""
    count: torch.Tensor
    """int32 [1]."""
    rounds: torch.Tensor | None = None
    """int32 [M], the round of each; within one no slot comes up twice, and none is of an expert that is still to be
    computed. None: all are of round 0."""
    on_cpu: torch.Tensor | None = None
    """int32 [M], the misses that do not come, ascending; None: all do."""
    on_cpu_count: torch.Tensor | None = None
    """int32 [1]."""


@dataclass(frozen=True, eq=False)
class Reach:
    """What can be copied, and whether the pass under way counts; on the device.

    From the moment an event needs an expert that is neither in a slot nor within reach, the pass is void: planners
    change nothing any more and plan nothing, and whatever else is launched runs through with the experts that are
    there. Whoever runs the passes looks at it behind each, and runs one that was void in another way.
    """

    addresses: torch.Tensor
    """int64 [E]: where each of the layer's experts is in host memory, 0 for nowhere."""
    void: torch.Tensor
    """int32 [1], of all layers together: 0 as long as the pass counts. Planners set it, nobody else but who begins."""


def new_residents(
    experts: int,
    slots: int,
    device: torch.device | str,
    rows: torch.Tensor | None = None,
    log: torch.Tensor | None = None,
) -> Residents:
    """None so far.

    Raises:
        ValueError: not at least one of each, or more than a program can hold; rows or a log that do not fit.
    """
    if not (1 <= experts <= MOST and 1 <= slots <= MOST):
        raise ValueError(f"{experts} experts and {slots} slots: planners take 1 to {MOST} of each")
    device = torch.device(device)
    if rows is not None:
        check_tensor("rows", rows, 1, (torch.int32,), device)
        if rows.numel() != slots:
            raise ValueError(f"{rows.numel()} rows for {slots} slots: each slot is one row")
    if log is not None:
        check_tensor("log", log, 2, (torch.int32,), device)
    return Residents(
        torch.full((experts,), -1, dtype=torch.int32, device=device),
        torch.full((slots,), -1, dtype=torch.int32, device=device),
        torch.zeros(experts, dtype=torch.int64, device=device),
        torch.zeros(3, dtype=torch.int64, device=device),
        rows,
        log,
    )


MOST = 8192
"""Experts and slots that one program can plan for."""


def new_plan(residents: Residents, ids: torch.Tensor, passing: bool, split: Split | None = None) -> Plan:
    """Room for the misses of an event, once its ids are checked; with rounds if `passing`.

    Raises:
        ValueError: ids of the wrong dtype, layout or device, not as many as the log or the split takes, or of more
            experts than there are slots, perhaps, and not `passing`; a split of an event that passes.
    """
    check_tensor("ids", ids, 2, (torch.int32, torch.int64), residents.slot_of.device)
    if residents.log is not None and ids.numel() != residents.log.shape[1]:
        raise ValueError(f"ids {list(ids.shape)} do not fit into a log of {residents.log.shape[1]} ids an event")
    most = min(ids.numel(), residents.experts)
    if most > residents.slots and not passing:
        raise ValueError(
            f"ids {list(ids.shape)} may be of {most} of {residents.experts} experts, and there are {residents.slots} "
            "slots; plan fewer tokens at a time, or with passing=True and work the plan off in rounds"
        )

    def new(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=ids.device)

    most = max(1, most)
    plan = Plan(new(most), new(most), new(most), new(1), new(most) if passing else None)
    if split is None:
        return plan
    check_tensor("fetch_of", split.fetch_of, 1, (torch.int32,), ids.device)
    check_tensor("left", split.left, 1, (torch.int64,), ids.device)
    if split.fetch_of.numel() != ids.numel() + 1 or passing:
        raise ValueError(
            f"fetch_of has {split.fetch_of.numel()} numbers for {ids.numel()} ids: it needs one for each number of "
            "misses, and an event that passes through the slots cannot be split"
        )
    return replace(plan, on_cpu=new(most), on_cpu_count=new(1))


def check_reach(reach: Reach, residents: Residents) -> None:
    """
    Raises:
        ValueError: tensors of the wrong dtype, shape or device.
    """
    device = residents.slot_of.device
    check_tensor("addresses", reach.addresses, 1, (torch.int64,), device)
    check_tensor("void", reach.void, 1, (torch.int32,), device)
    if reach.addresses.numel() != residents.experts or reach.void.numel() != 1:
        raise ValueError(
            f"{reach.addresses.numel()} addresses and {reach.void.numel()} flags: there is one address for each of "
            f"{residents.experts} experts, and one flag"
        )


def plan_arguments(
    residents: Residents, plan: Plan, ids: torch.Tensor, reach: Reach | None, split: Split | None
) -> dict[str, object]:
    """What both planners' kernels take."""
    if reach is not None:
        check_reach(reach, residents)
    return {
        "addresses_ptr": None if reach is None else reach.addresses,
        "void_ptr": None if reach is None else reach.void,
        "ids_ptr": ids,
        "slot_of_ptr": residents.slot_of,
        "owner_ptr": residents.owner,
        "marks_ptr": residents.marks,
        "counters_ptr": residents.counters,
        "rows_ptr": residents.rows,
        "log_ptr": residents.log,
        "out_experts_ptr": plan.experts,
        "out_slots_ptr": plan.slots,
        "out_victims_ptr": plan.victims,
        "out_count_ptr": plan.count,
        "out_rounds_ptr": plan.rounds,
        "fetch_of_ptr": None if split is None else split.fetch_of,
        "left_ptr": None if split is None else split.left,
        "out_on_cpu_ptr": plan.on_cpu,
        "out_on_cpu_count_ptr": plan.on_cpu_count,
        "count": ids.numel(),
        "experts": residents.experts,
        "slots": residents.slots,
        "LOGGED": 0 if residents.log is None else residents.log.shape[0],
        "BLOCK_R": min(1024, power_of_2_from(ids.numel())),
        "BLOCK_E": power_of_2_from(residents.experts),
        "BLOCK_S": power_of_2_from(residents.slots),
    }


@triton.jit
def is_void(
    ids_ptr: tl.tensor,
    slot_of_ptr: tl.tensor,
    addresses_ptr: tl.tensor,
    void_ptr: tl.tensor,
    count: tl.tensor,
    experts: tl.tensor,
    BLOCK_R: tl.constexpr,
) -> tl.tensor:
    """1 if the pass does not count, be it because of these ids, and 0 if it does; notes that. Reads nothing else."""
    void = (tl.load(void_ptr) != 0).to(tl.int32)
    for begin in range(0, count, BLOCK_R):
        place = begin + tl.arange(0, BLOCK_R)
        ids = tl.load(ids_ptr + place, mask=place < count, other=-1)
        absent = (ids >= 0) & (ids < experts)
        absent = absent & (tl.load(slot_of_ptr + ids, mask=absent, other=0) < 0)
        absent = absent & (tl.load(addresses_ptr + ids, mask=absent, other=1) == 0)
        void = tl.maximum(void, tl.max(absent.to(tl.int32), axis=0))
    tl.store(void_ptr, void)
    return void


@triton.jit
def event_experts(
    ids_ptr: tl.tensor,
    marks_ptr: tl.tensor,
    log_ptr: tl.tensor,
    event: tl.tensor,
    count: tl.tensor,
    experts: tl.tensor,
    LOGGED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> tl.tensor:
    """Mark the experts among the ids with the number of their event, and log them; bool [BLOCK_E], which they are."""
    for begin in range(0, count, BLOCK_R):
        place = begin + tl.arange(0, BLOCK_R)
        ids = tl.load(ids_ptr + place, mask=place < count, other=-1)
        # The same number from everyone, however often an id is there.
        tl.store(marks_ptr + ids, event + tl.zeros((BLOCK_R,), tl.int64), mask=(ids >= 0) & (ids < experts))
        if log_ptr is not None:
            tl.store(log_ptr + event % LOGGED * count + place, ids.to(tl.int32), mask=place < count)
    tl.debug_barrier()
    e = tl.arange(0, BLOCK_E)
    return tl.load(marks_ptr + e, mask=e < experts, other=0) == event


@triton.jit
def those_that_come(
    missed: tl.tensor,
    misses: tl.tensor,
    worth: tl.tensor,
    fetch_of_ptr: tl.tensor,
    left_ptr: tl.tensor,
    out_on_cpu_ptr: tl.tensor,
    out_on_cpu_count_ptr: tl.tensor,
    BLOCK_E: tl.constexpr,
) -> tl.tensor:
    """bool [BLOCK_E], which of the missed come: those of the highest worth, of equal ones the lower ids. The others are
    written down as the CPU's."""
    e = tl.arange(0, BLOCK_E)
    come = tl.minimum(tl.maximum(tl.load(fetch_of_ptr + misses), 0), misses)
    left = missed
    for _ in range(come):
        highest = tl.max(tl.where(left, worth, float("-inf")), axis=0)
        left = left & (e != tl.min(tl.where(left & (worth == highest), e, BLOCK_E), axis=0))
    tl.store(out_on_cpu_ptr + tl.cumsum(left.to(tl.int32), axis=0) - 1, e, mask=left)
    tl.store(out_on_cpu_count_ptr, misses - come)
    tl.store(left_ptr, tl.load(left_ptr) + (misses - come))
    return missed & (left == 0)


@triton.jit
def row_of(slot: tl.tensor, rows_ptr: tl.tensor) -> tl.tensor:
    """The row that a slot is."""
    row = slot
    if rows_ptr is not None:
        row = tl.load(rows_ptr + slot)
    return row


@triton.jit
def move_in(
    expert: tl.tensor,
    slot: tl.tensor,
    victim: tl.tensor,
    place: tl.tensor,
    rows_ptr: tl.tensor,
    slot_of_ptr: tl.tensor,
    owner_ptr: tl.tensor,
    out_experts_ptr: tl.tensor,
    out_slots_ptr: tl.tensor,
    out_victims_ptr: tl.tensor,
) -> None:
    """Give a slot to an expert and write that down as number `place` of the plan."""
    row = row_of(slot, rows_ptr)
    tl.store(slot_of_ptr + victim, -1, mask=victim >= 0)
    tl.store(slot_of_ptr + expert, row)
    tl.store(owner_ptr + slot, expert)
    tl.store(out_experts_ptr + place, expert)
    tl.store(out_slots_ptr + place, row)
    tl.store(out_victims_ptr + place, victim)
