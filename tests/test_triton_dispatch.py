"""The work list of grouped products against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_support import DEVICE

from moert.kernels import reference_grouped
from moert.kernels.dispatch import Counts, arrival_order, dispatch
from moert.kernels.router_rule import RouterRule
from moert.kernels.router_topk import router_topk


def check(
    ids: torch.Tensor,
    weights: torch.Tensor,
    slot_of: torch.Tensor,
    slots: int,
    block_m: int,
    order: torch.Tensor | None = None,
    counts: Counts | None = None,
) -> None:
    blocks = dispatch(
        ids.to(DEVICE),
        weights.to(DEVICE),
        slot_of.to(DEVICE),
        slots,
        block_m,
        order=None if order is None else order.to(DEVICE),
        counts=counts,
    )
    picks, block_slots, first = reference_grouped.dispatch(ids, weights, slot_of, slots, block_m, order)
    assert blocks.first.tolist() == first
    assert blocks.slots[: first[-1]].tolist() == block_slots
    assert blocks.picks[: len(picks)].tolist() == picks
    assert first[-1] <= blocks.slots.numel() == blocks.most(len(first) - 1)


@settings(max_examples=15)
@given(
    st.integers(0, 90),
    st.integers(1, 7),
    st.integers(1, 19),
    st.sampled_from([16, 64]),
    st.sampled_from([torch.int32, torch.int64]),
    st.integers(0, 999),
)
def test_random_steps(tokens: int, top_k: int, experts: int, block_m: int, dtype: torch.dtype, seed: int) -> None:
    """Ids that are no experts, experts without slots or with slots the bank has not, weights of 0, experts left out."""
    torch.manual_seed(seed)
    ids = torch.randint(-2, experts + 2, (tokens, top_k), dtype=dtype)
    weights = torch.randint(0, 4, (tokens, top_k)).float()
    slot_of = torch.randint(-2, 9, (experts,), dtype=torch.int32)
    length = int(torch.randint(1, experts + 1, ()))
    order = torch.randperm(experts, dtype=torch.int32)[:length] if seed % 2 else None
    check(ids, weights, slot_of, 7, block_m, order)


def test_an_id_is_not_cut_to_32_bits() -> None:
    ids = torch.tensor([[0, 2**32, 2**32 + 1, -(2**32)]])
    check(ids, torch.ones(1, 4), torch.tensor([0, 1], dtype=torch.int32), 2, 16)


@pytest.mark.parametrize(("experts", "top_k"), [(16, 3), (600, 5)])
def test_with_the_counts_of_the_router(experts: int, top_k: int) -> None:
    """Chunks that are no powers of two."""
    torch.manual_seed(0)
    rule = RouterRule(top_k, scale=1e-5)
    # Some weights round to 0 in fp16, and are not counted then.
    logits = torch.randn(70, experts) * 4
    ids, weights, counts = router_topk(logits.to(DEVICE), rule, dtype=torch.float16)
    assert counts is not None and not (weights != 0).all()
    slot_of = torch.where(torch.rand(experts) < 0.7, torch.arange(experts), -1).int()
    check(ids.cpu(), weights.cpu(), slot_of, experts, 16, counts=counts)


def test_residents_come_first_and_then_the_copies_in_their_order() -> None:
    slot_of = torch.tensor([3, -1, 0, 4, -1, 1, 2], dtype=torch.int32, device=DEVICE)
    arriving = torch.tensor([5, 0, 3], device=DEVICE)
    assert arrival_order(slot_of, arriving).tolist() == [2, 6, 5, 0, 3, 1, 4]
    assert arrival_order(slot_of, arriving[:0]).tolist() == [0, 2, 3, 5, 6, 1, 4]


@pytest.mark.parametrize("slots", [5, 3])
def test_numbers_of_an_order_that_are_no_experts(slots: int) -> None:
    """With 3 slots the first of them has none either."""
    torch.manual_seed(0)
    order = torch.tensor([3, -1, 0, 9], dtype=torch.int32)
    check(torch.randint(0, 5, (9, 2)), torch.ones(9, 2), torch.arange(5, dtype=torch.int32), slots, 16, order)


def test_counts_that_do_not_fit() -> None:
    ids, weights = torch.zeros(8, 2, dtype=torch.int64, device=DEVICE), torch.ones(8, 2, device=DEVICE)
    slot_of = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    table = torch.zeros(3, 4, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"\[3, 4\] by 8 picks; 16 picks of 4 experts ask for \[2, 4\]"):
        dispatch(ids, weights, slot_of, 4, 16, counts=Counts(table, 8))
