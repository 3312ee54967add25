"""Everything the experts of a layer compute for a step, on one device, from whichever of them are in its bank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moert.kernels.bank import Bank, check_step, output
from moert.kernels.combine import combine
from moert.kernels.decode_down import decode_down
from moert.kernels.decode_gate_up import decode_gate_up
from moert.kernels.dispatch import Counts, dispatch
from moert.kernels.grouped_configs import block_m_for
from moert.kernels.grouped_down import grouped_down
from moert.kernels.grouped_gate_up import Arrivals, grouped_gate_up, runs_on

MOST_SCRATCH_BYTES = 2 << 30
"""Of a step; steps that would need more are computed some tokens at a time."""


@dataclass(frozen=True)
class ArrivalGroup:
    """Experts of a step's order that become ready together."""

    end: int
    """Up to which place in the order."""
    wait: Callable[[], object] | None
    """Has the current stream wait for their copies, say `event.wait`; None: they are there."""


def is_few(tokens: int, top_k: int, experts: int) -> bool:
    """Whether each pick had better read its weights by itself.

    So for up to two tokens, and while picks rarely share an expert. Where that ends was not measured.
    """
    return tokens <= 2 or (tokens <= 16 and 2 * tokens * top_k <= experts)


def device_experts(
    bank: Bank,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    slot_of: torch.Tensor,
    *,
    counts: Counts | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum over each token's picks in the bank of their experts' outputs times their weights.

    The meaning is `reference.decode_gate_up` and then `reference.decode_down`, at any number of tokens. Picks of
    experts without a slot, of ids outside 0 to E - 1 and of weight 0 add nothing, so several devices, or a device and
    the CPU, can share a step and add what they get. Shapes alone decide which kernels run and how, so a token's result
    is the same to the last bit whatever other tokens the step has and whichever slots its experts are in, among steps
    of one size. A CUDA graph may capture it. Does not wait for the device.

    Args:
        hidden: [T, D] in bf16, fp16 or fp32.
        ids, weights: [T, K], int32 or int64, and one of those.
        slot_of: int32 [E] on the device, the slot of each expert or -1.
        counts: from `router_topk` for these ids and weights.
        out: [T, D] in the dtype of `hidden`, written to if given; where `is_few`, fp32 too, which is not rounded.

    Returns:
        [T, D] in the dtype of `hidden`, new memory or `out`; 0 where nothing of a token is in the bank.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit.
        KernelUnavailableError: the device cannot run it.
    """
    step = check_step(bank, hidden, ids, weights, slot_of, bank.hidden)
    if not is_few(step.tokens, step.picks, step.experts):
        return grouped_experts(bank, hidden, ids, weights, slot_of, counts=counts, out=out)
    out = output(out, (step.tokens, bank.hidden), (hidden.dtype, torch.float32), bank.device)
    h = decode_gate_up(bank, hidden, ids, weights, slot_of)
    return decode_down(bank, h, ids, weights, slot_of, out=out)


def grouped_experts(
    bank: Bank,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    slot_of: torch.Tensor,
    *,
    counts: Counts | None = None,
    order: torch.Tensor | None = None,
    groups: Sequence[ArrivalGroup] = (),
    arrivals: Arrivals | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`device_experts` by the kernels for many tokens, perhaps while weights still arrive.

    Args:
        order: int32 [N], experts in the order in which they arrive; see `dispatch` and `arrival_order`.
        groups: parts of the order, each launched behind its wait; the last must end it. None: all is launched at once.
        arrivals: blocks wait for their slots by themselves, in one launch; not with `groups`.
        (others): as for `device_experts`.

    Returns:
        As `device_experts`. The same to the last bit whatever the order, the groups or the arrivals.

    Raises:
        ValueError: shapes, dtypes, devices, layouts or groups that do not fit.
        KernelUnavailableError: the device cannot run it.
    """
    step = check_step(bank, hidden, ids, weights, slot_of, bank.hidden)
    if hidden.shape[0] != step.tokens:
        raise ValueError(f"hidden has {hidden.shape[0]} rows, ids are for {step.tokens} tokens")
    out = output(out, (step.tokens, bank.hidden), (hidden.dtype,), bank.device)
    length = step.experts if order is None else order.numel()
    ends = [group.end for group in groups] or [length]
    if arrivals is not None and groups:
        raise ValueError(f"{len(groups)} groups and arrivals: either the host or the kernel waits")
    if ends != sorted(ends) or ends[0] < 0 or ends[-1] != length:
        raise ValueError(f"groups end at {ends}; that must ascend to the end of the order, {length}")
    block_m = block_m_for(step.tokens * step.picks, step.experts, runs_on(bank.device))
    tokens_at_once = _tokens_at_once(bank, step.picks, hidden.element_size())
    if step.tokens > tokens_at_once:
        counts = None
    for first in range(0, step.tokens, tokens_at_once):
        part = slice(first, first + tokens_at_once)
        blocks = dispatch(ids[part], weights[part], slot_of, bank.slots, block_m, order=order, counts=counts)
        h = torch.empty(ids[part].numel(), bank.width, dtype=hidden.dtype, device=bank.device)
        rows = torch.empty(ids[part].numel(), bank.hidden, dtype=hidden.dtype, device=bank.device)
        begin = 0
        for group in groups or [ArrivalGroup(length, None)]:
            if group.wait is not None:
                group.wait()
            experts = (begin, group.end)
            grouped_gate_up(bank, hidden[part], blocks, experts=experts, arrivals=arrivals, out=h)
            grouped_down(bank, h, weights[part], blocks, experts=experts, out=rows)
            begin = group.end
        combine(rows, ids[part], weights[part], slot_of, bank.slots, out=out[part])
    return out


def _tokens_at_once(bank: Bank, top_k: int, number_bytes: int) -> int:
    """How many tokens of a step fit into the scratch memory."""
    return max(1, MOST_SCRATCH_BYTES // (top_k * (bank.hidden + bank.width) * number_bytes))
