"""Products that begin before all weights have come: blocks that look at epochs, and groups behind events."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from test_triton_grouped import Layer, error
from triton_support import DEVICE, INTERPRETED, poison

from moert.kernels.device_experts import ArrivalGroup, grouped_experts
from moert.kernels.dispatch import arrival_order
from moert.kernels.grouped_gate_up import Arrivals, grouped_gate_up

RESIDENT = 2


class Arriving:
    """A layer of which some experts are still to come: poison is in their slots."""

    def __init__(self, choice: str = "int8") -> None:
        self.layer = layer = Layer(choice, tokens=12, top_k=2, experts=6, present=6, slots=7, hidden=64, width=32)
        self.complete = grouped_experts(layer.bank, layer.x, *layer.step)
        self.h = torch.full((layer.ids.numel(), layer.bank.width), torch.nan, dtype=layer.x.dtype, device=DEVICE)
        grouped_gate_up(layer.bank, layer.x, layer.blocks(), out=self.h)
        self.order = torch.randperm(6).tolist()
        self.order[:RESIDENT] = sorted(self.order[:RESIDENT])
        self.arriving = self.order[RESIDENT:]
        self.tensors = [
            part
            for matrix in (layer.bank.up, layer.bank.down)
            for part in (matrix.codes, matrix.scales)
            if part is not None
        ]
        self.full = [tensor.clone() for tensor in self.tensors]
        for expert in self.arriving:
            for tensor in self.tensors:
                row = torch.empty_like(tensor[0])
                poison(row)
                tensor[self.slot(expert)] = row

    def slot(self, expert: int) -> int:
        return int(self.layer.slot_of[expert])

    def arrive(self, expert: int) -> None:
        for tensor, full in zip(self.tensors, self.full, strict=True):
            tensor[self.slot(expert)] = full[self.slot(expert)]

    def dispatch_order(self) -> torch.Tensor:
        return arrival_order(self.layer.slot_of, torch.tensor(self.arriving, device=DEVICE))


@pytest.mark.skipif(not INTERPRETED, reason="the host's thread stands for the copy engine, which a GPU has")
@pytest.mark.parametrize("epoch", [7, -(2**31)])
def test_blocks_wait_for_their_slots(epoch: int) -> None:
    """While the kernel runs, each expert arrives once the kernel is done with the one before; then epochs wrap."""
    case = Arriving()
    layer = case.layer
    before = epoch - 1 if epoch > 0 else 2**31 - 1
    ready = torch.full((7,), before, dtype=torch.int32)
    arrivals = Arrivals(ready, torch.tensor([epoch], dtype=torch.int32))
    for expert in case.order[:RESIDENT]:
        ready[case.slot(expert)] = epoch + 1
    blocks = layer.blocks(order=case.dispatch_order())
    computed = (layer.weights != 0).flatten()
    h = torch.full((layer.ids.numel(), layer.bank.width), torch.nan, dtype=layer.x.dtype)
    over = threading.Event()
    came: list[int] = []

    def copy() -> None:
        """What the copy engine does: rows first, then the epoch."""
        for expert, earlier in zip(case.arriving, case.order[RESIDENT - 1 :], strict=False):
            mine = (layer.ids.flatten() == earlier) & computed
            assert mine.any()
            while not h[mine].isfinite().all():
                if over.wait(0.002):
                    return
            # Time enough for a kernel that does not wait to compute from what is there now.
            if over.wait(0.1):
                return
            case.arrive(expert)
            ready[case.slot(expert)] = epoch
            came.append(expert)

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        grouped_gate_up(layer.bank, layer.x, blocks, arrivals=arrivals, out=h)
    finally:
        over.set()
        thread.join()
    assert came == case.arriving, "the kernel did not wait"
    assert torch.equal(h.nan_to_num(9), case.h.nan_to_num(9))


def test_without_the_epoch_a_block_would_read_what_is_there() -> None:
    """What the others rest upon: too early means NaN."""
    case = Arriving()
    got = grouped_experts(case.layer.bank, case.layer.x, *case.layer.step)
    late = torch.isin(case.layer.ids.cpu(), torch.tensor(case.arriving)) & (case.layer.weights.cpu() != 0)
    assert torch.equal(got.cpu().isnan().all(1), late.any(1))


def test_a_slot_that_never_comes_is_given_up_and_leaves_nan() -> None:
    case = Arriving()
    ready = torch.zeros(7, dtype=torch.int32, device=DEVICE)
    for expert in case.order[:-1]:
        case.arrive(expert)
        ready[case.slot(expert)] = 3
    case.arrive(case.order[-1])  # the rows are there, but nobody said so
    arrivals = Arrivals(ready, torch.tensor([3], dtype=torch.int32, device=DEVICE), most_polls=4)
    blocks = case.layer.blocks(order=case.dispatch_order())
    h = grouped_gate_up(case.layer.bank, case.layer.x, blocks, arrivals=arrivals)
    wanted, _ = case.layer.wanted()
    late = (case.layer.ids.cpu() == case.order[-1]).flatten() & (case.layer.weights.cpu() != 0).flatten()
    assert late.any() and h[late.to(DEVICE)].isnan().all()
    on_time = ~late & ~wanted.isnan().any(1)
    assert error(h.cpu()[on_time], wanted[on_time]) < 8e-3


@pytest.mark.parametrize("choice", ["plain", "mxfp4"])
def test_groups_behind_events(choice: str) -> None:
    """Each group's weights are there once its wait returns, and no group is launched before its wait."""
    case = Arriving(choice)
    waited: list[int] = []

    def wait_for(begin: int, end: int) -> Callable[[], None]:
        def wait() -> None:
            waited.append(end)
            for expert in case.arriving[begin - RESIDENT : end - RESIDENT]:
                case.arrive(expert)

        return wait

    groups = [ArrivalGroup(RESIDENT, None), ArrivalGroup(3, wait_for(2, 3)), ArrivalGroup(6, wait_for(3, 6))]
    got = grouped_experts(case.layer.bank, case.layer.x, *case.layer.step, order=case.dispatch_order(), groups=groups)
    assert torch.equal(got, case.complete)
    assert waited == [3, 6]


def test_arrivals_that_do_not_fit() -> None:
    layer = Layer(tokens=2)
    epoch = torch.ones(1, dtype=torch.int32, device=DEVICE)
    ready = torch.ones(6, dtype=torch.int32, device=DEVICE)
    groups = [ArrivalGroup(8, None)]
    for arguments, message in (
        ({"arrivals": Arrivals(ready[:5], epoch)}, "5 numbers and epoch 1; the bank has 6 slots"),
        ({"arrivals": Arrivals(ready, ready)}, "epoch 6"),
        ({"arrivals": Arrivals(ready.long(), epoch)}, "int64"),
        ({"arrivals": Arrivals(ready, epoch), "groups": groups}, "1 groups and arrivals"),
        ({"groups": [ArrivalGroup(3, None)]}, r"\[3\].* 8"),
        ({"groups": [ArrivalGroup(5, None), ArrivalGroup(3, None), *groups]}, r"\[5, 3, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_experts(layer.bank, layer.x, *layer.step, **arguments)
