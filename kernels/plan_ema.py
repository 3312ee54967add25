"""Which slots an event's misses take, by a decaying sum of use, decided on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moert.errors import ConfigError
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
    those_that_come,
)

PASSING = 8
"""As `moert.turnover.PASSING`, which is above this."""


@dataclass(frozen=True, eq=False)
class EmaState:
    """A layer's cache; made by `new_ema`, changed by `plan_ema`."""

    residents: Residents
    scores: torch.Tensor
    """fp64 [E]: the score of each expert, resident or not. In fp32 it would forget what the policy knows."""
    bursts: torch.Tensor
    """fp64 [E]: burst^g of each expert, g being the events since its last use, 0 before its first."""
    last_uses: torch.Tensor
    """int64 [E]: the number of each expert's last use, 0 for never."""
    rates: torch.Tensor
    """fp64 [3]: 1 - alpha, alpha and burst."""


def new_ema(
    experts: int,
    slots: int,
    device: torch.device | str,
    alpha: float = 0.03,
    burst: float = 0.68,
    *,
    rows: torch.Tensor | None = None,
    log: torch.Tensor | None = None,
) -> EmaState:
    """An empty cache of a layer on a device.

    Args:
        rows, log: as in `Residents`.

    Raises:
        ValueError: not 1 to 8192 of each; rows or a log that do not fit.
        ConfigError: alpha or burst is not between 0 and 1.
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha={alpha} must be above 0 and below 1")
    if not 0 <= burst < 1:
        raise ConfigError(f"burst={burst} must be at least 0 and below 1")
    return EmaState(
        new_residents(experts, slots, device, rows, log),
        torch.zeros(experts, dtype=torch.float64, device=device),
        torch.zeros(experts, dtype=torch.float64, device=device),
        torch.zeros(experts, dtype=torch.int64, device=device),
        torch.tensor([1 - alpha, alpha, burst], dtype=torch.float64).to(device),
    )


@triton.jit(do_not_specialize=["count", "experts", "slots"])
def _kernel(
    ids_ptr: tl.tensor,
    addresses_ptr: tl.tensor,
    void_ptr: tl.tensor,
    slot_of_ptr: tl.tensor,
    owner_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    bursts_ptr: tl.tensor,
    last_uses_ptr: tl.tensor,
    rates_ptr: tl.tensor,
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
    PASSING: tl.constexpr,
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
    missed = wanted & (slot_of < 0)
    size = tl.sum(wanted.to(tl.int32), axis=0)
    misses = tl.sum(missed.to(tl.int32), axis=0)
    tl.store(counters_ptr, counted)
    tl.store(counters_ptr + 2, tl.load(counters_ptr + 2) + misses)
    # An event without experts is none, for the policy too.
    if size > 0:
        scores = tl.load(scores_ptr + e, mask=e < experts, other=0.0) * tl.load(rates_ptr)
        bursts = tl.load(bursts_ptr + e, mask=e < experts, other=0.0) * tl.load(rates_ptr + 2)
        scores = tl.where(wanted, scores + tl.load(rates_ptr + 1) * (1 - bursts), scores)
        tl.store(scores_ptr + e, scores, mask=e < experts)
        tl.store(bursts_ptr + e, tl.where(wanted, 1.0, bursts), mask=e < experts)
        tl.store(last_uses_ptr + e, uses + tl.cumsum(wanted.to(tl.int32), axis=0), mask=wanted)
        tl.store(counters_ptr + 1, uses + size)
    tl.debug_barrier()  # both are read again, by slot
    come = misses
    if fetch_of_ptr is not None:
        worth = tl.load(scores_ptr + e, mask=missed, other=0.0)
        missed = those_that_come(
            missed, misses, worth, fetch_of_ptr, left_ptr, out_on_cpu_ptr, out_on_cpu_count_ptr, BLOCK_E
        )
        come = tl.sum(missed.to(tl.int32), axis=0)
    tl.store(out_count_ptr, come)
    s = tl.arange(0, BLOCK_S)
    owner = tl.load(owner_ptr + s, mask=s < slots, other=-1)
    owned = owner >= 0
    score = tl.load(scores_ptr + owner, mask=owned, other=-1.0)
    last_use = tl.load(last_uses_ptr + owner, mask=owned, other=0)
    locked = tl.load(marks_ptr + owner, mask=owned, other=0) == event
    if out_rounds_ptr is None:
        score = tl.where(locked | (s >= slots), float("inf"), score)
    else:
        own_score = tl.where(s < slots, score, float("inf"))
        next_round = locked.to(tl.int32)
        admitted = tl.full((BLOCK_S,), -1, tl.int32)
        kept = tl.minimum(PASSING - 1, slots - 1)
    # Free slots score less than anything, the lowest first.
    last_use = tl.where(owned, last_use, s.to(tl.int64))
    expert = -1
    for place in range(come):
        if out_rounds_ptr is not None:
            score = tl.where(locked, float("inf"), own_score)
            if tl.min(score, axis=0) == float("inf"):
                score = tl.where((admitted >= 0) & (admitted >= place - kept), float("inf"), own_score)
        lowest = score == tl.min(score, axis=0)
        oldest = lowest & (last_use == tl.min(tl.where(lowest, last_use, 1 << 62), axis=0))
        # Only those never used can be equal even now.
        victim = tl.min(tl.where(oldest, owner, 1 << 30), axis=0)
        slot = tl.min(tl.where(oldest & (owner == victim), s, BLOCK_S), axis=0)
        expert = tl.min(tl.where(missed & (e > expert), e, BLOCK_E), axis=0)
        if out_rounds_ptr is None:
            score = tl.where(s == slot, float("inf"), score)
        else:
            tl.store(out_rounds_ptr + place, tl.sum(tl.where(s == slot, next_round, 0), axis=0))
            next_round += (s == slot).to(tl.int32)
            owner = tl.where(s == slot, expert, owner)
            own_score = tl.where(s == slot, tl.load(scores_ptr + expert), own_score)
            last_use = tl.where(s == slot, tl.load(last_uses_ptr + expert), last_use)
            locked = locked | (s == slot)
            admitted = tl.where(s == slot, place, admitted)
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


def plan_ema(
    state: EmaState,
    ids: torch.Tensor,
    *,
    passing: bool = False,
    reach: Reach | None = None,
    split: Split | None = None,
) -> Plan:
    """Take an event, and give its misses the slots of those that lately were in the fewest events.

    Step for step what `moert.policies.ema.EMA` decides for one layer's cache when `moert.turnover` drives it; of equal
    scores the least recently used leaves, of an event's experts the lower id. Both compute in fp64, the policy from
    the event of an expert's last use, this event by event. Experts that were in the same events score the same in both
    to the last bit. Others score the same but for rounding, so the two agree on all whose scores differ by more than
    about 1e-12 of themselves; below 1e-300, after some 20,000 events without a use, the policy goes on telling them
    apart and this does not. Free slots come first, the lowest before the others. One program, a loop over the misses; a
    CUDA graph may capture it. Does not wait for the device.

    Args:
        state: of the layer that the event is of, changed in place.
        ids: [T, K] int32 or int64; numbers outside 0 to E - 1 are no experts.
        passing: the event may have more experts than there are slots; see `Plan.rounds`.
        reach: which experts can be copied, of a pass that may be void; None: all.
        split: some misses are left to the CPU, those of the lowest scores; None: all come.

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
    state: EmaState,
    ids: torch.Tensor,
    passing: bool = False,
    reach: Reach | None = None,
    split: Split | None = None,
) -> tuple[Launch, Plan]:
    plan = new_plan(state.residents, ids, passing, split)
    arguments = {
        **plan_arguments(state.residents, plan, ids, reach, split),
        "scores_ptr": state.scores,
        "bursts_ptr": state.bursts,
        "last_uses_ptr": state.last_uses,
        "rates_ptr": state.rates,
        "PASSING": PASSING,
    }
    return Launch(_kernel, (1,), arguments, {"num_warps": 4 if state.residents.slots <= 1024 else 16}), plan


def compile_specs(capability: int) -> list[CompileSpec]:
    """What the compile check compiles for a compute capability."""
    ids = torch.empty(8, 8, dtype=torch.int64, device="meta")
    rows, log = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((96,), (64, 64)))
    reach = Reach(*(torch.empty(n, dtype=of, device="meta") for n, of in ((128, torch.int64), (1, torch.int32))))
    split = Split(*(torch.empty(n, dtype=dtype, device="meta") for n, dtype in ((65, torch.int32), (1, torch.int64))))
    return [
        CompileSpec(
            f"plan_ema[{experts},{slots}{',passing' * passing}]",
            _launch(new_ema(experts, slots, "meta"), ids, passing)[0],
        )
        for experts, slots, passing in ((128, 96, False), (512, 512, False), (8192, 4096, False), (128, 96, True))
    ] + [
        CompileSpec(
            f"plan_ema[128,96,{name}]", _launch(new_ema(128, 96, "meta", rows=rows, log=log), ids, False, *of)[0]
        )
        for name, of in (("rows", ()), ("rows,reach", (reach,)), ("split", (None, split)))
    ]
