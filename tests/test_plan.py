"""Slots per layer: never over the budget, never fewer than a token needs, as even as it goes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moert.config import Budget
from moert.errors import CapacityError
from moert.plan import LayerNeed, default_budget, least_bytes, plan_slots, shrink_slots

needs_lists = st.lists(
    st.tuples(st.integers(2, 16), st.integers(1, 4), st.integers(1, 3)).map(
        lambda t: LayerNeed("layer", t[0], 4096 * t[1], 4000 * t[1], min(t[2], t[0]))
    ),
    min_size=1,
    max_size=6,
)


@given(needs=needs_lists, nbytes=st.integers(1, 3_000_000))
def test_bytes_are_spent_evenly_and_to_the_end(needs: list[LayerNeed], nbytes: int) -> None:
    least = sum(need.top_k * need.slot_bytes for need in needs)
    if nbytes < least:
        with pytest.raises(CapacityError, match=f"{least} bytes"):
            plan_slots(needs, Budget(nbytes=nbytes))
        return
    slots = plan_slots(needs, Budget(nbytes=nbytes))
    spent = sum(n * need.slot_bytes for n, need in zip(slots, needs, strict=True))
    assert spent <= nbytes
    for n, need in zip(slots, needs, strict=True):
        assert need.top_k <= n <= need.num_experts
        assert n == need.num_experts or spent + need.slot_bytes > nbytes, "room for one more slot was left"
    if len({(need.top_k, need.num_experts) for need in needs}) == 1:
        # What is left may hold several small slots and no large one.
        smallest = min(need.slot_bytes for need in needs)
        assert max(slots) - min(slots) <= max(need.slot_bytes for need in needs) // smallest


@given(needs=needs_lists, percent=st.integers(1, 100))
def test_share_is_of_each_layers_experts(needs: list[LayerNeed], percent: int) -> None:
    expected = [percent * need.num_experts // 100 for need in needs]
    if any(n < need.top_k for n, need in zip(expected, needs, strict=True)):
        with pytest.raises(CapacityError, match="one token needs"):
            plan_slots(needs, Budget(share=percent / 100))
    else:
        assert plan_slots(needs, Budget(share=percent / 100)) == expected


def test_too_small_a_budget_names_one_that_works() -> None:
    needs = [LayerNeed(f"layers.{i}", 64, 3 << 20, 3 << 20, 8) for i in range(16)]
    with pytest.raises(CapacityError, match=r"host_memory is 100.0 MiB .* 384.0 MiB .*8 experts in each of 16 layers"):
        plan_slots(needs, Budget(nbytes=100 << 20))
    assert plan_slots(needs, Budget(nbytes=384 << 20)) == [8] * 16
    with pytest.raises(CapacityError, match=r"layers.0, but one token needs 8; give at least \"13%\""):
        plan_slots(needs, Budget(share=0.1))
    assert plan_slots(needs, Budget(share=0.13)) == [8] * 16


def test_too_small_a_budget_names_the_picks_of_every_layer() -> None:
    needs = [LayerNeed(f"layers.{i}", 8, 1 << 20, 1 << 20, top_k) for i, top_k in enumerate([4, 1, 2])]
    with pytest.raises(
        CapacityError, match=r"device_memory is 1 B .* 7.0 MiB .*token's 1 to 4 experts .*device_memory$"
    ):
        plan_slots(needs, Budget(nbytes=1), "device_memory")


def test_default_leaves_head_room_and_takes_no_more_than_it_needs() -> None:
    needs = [LayerNeed("layers.0", 8, 1 << 20, 1 << 20, 2)]
    assert default_budget(needs, 100 << 30).nbytes == 8 << 20
    available = 1 << 30
    assert default_budget([LayerNeed("l", 1000, 1 << 30, 1 << 30, 2)], available).nbytes == int(available * 0.8) - (
        256 << 20
    )
    reserved = default_budget([LayerNeed("l", 1000, 1 << 30, 1 << 30, 2)], available, 100 << 20).nbytes
    assert reserved == int(available * 0.8) - (256 << 20) - (100 << 20)


@given(needs=needs_lists, percent=st.integers(0, 100), nbytes=st.integers(0, 3_000_000))
def test_shrinking_takes_no_more_than_it_must_and_from_the_fullest(
    needs: list[LayerNeed], percent: int, nbytes: int
) -> None:
    slots = [max(need.top_k, percent * need.num_experts // 100) for need in needs]
    left = shrink_slots(needs, slots, nbytes)
    size = sum(n * need.slot_bytes for n, need in zip(left, needs, strict=True))
    assert all(need.top_k <= n <= had for need, n, had in zip(needs, left, slots, strict=True))
    assert size <= max(nbytes, least_bytes(needs))
    took = [i for i, n in enumerate(left) if n < slots[i]]
    if took:
        assert any(size + needs[i].slot_bytes > nbytes for i in took), "one slot too many was taken"
    for i in took:
        for other, need in enumerate(needs):
            fuller = left[other] / need.num_experts > (left[i] + 1) / needs[i].num_experts
            assert left[other] == need.top_k or not fuller, "a fuller layer was spared"


def test_shrinking_equal_layers_keeps_them_equal() -> None:
    needs = [LayerNeed(f"layers.{i}", 64, 1 << 20, 1 << 20, 8) for i in range(4)]
    assert shrink_slots(needs, [64] * 4, 64 << 20) == [16] * 4
    assert sorted(shrink_slots(needs, [64] * 4, 62 << 20)) == [15, 15, 16, 16]
    assert shrink_slots(needs, [64] * 4, 1) == [8] * 4
    assert shrink_slots(needs, [20] * 4, 1 << 40) == [20] * 4
