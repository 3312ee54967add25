"""Rows copied by the kernel against rows copied by torch, and a planner's misses fetched by it."""

from __future__ import annotations

import pytest
import torch
from triton_support import DEVICE, INTERPRETED

from moert.kernels.copy_rows import copy_rows, row_table, scattered_table
from moert.kernels.plan_lru import new_lru, plan_lru


def host(tensor: torch.Tensor) -> torch.Tensor:
    """Where rows come from: pinned, if there is a device that reads it."""
    return tensor if INTERPRETED else tensor.pin_memory()


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def test_rows_of_every_tensor_arrive_and_no_others() -> None:
    torch.manual_seed(0)
    # Larger than a block of the kernel; two tensors of one record, side by side; rows with gaps.
    large = host(torch.randint(-99, 99, (5, 9000), dtype=torch.int32))
    record = host(torch.randint(0, 255, (6, 96), dtype=torch.uint8))
    codes, scales = record[:, :64], record[:, 64:96].view(torch.float16)
    sources = [large, codes, scales]
    destinations = [torch.zeros(4, *s.shape[1:], dtype=s.dtype, device=DEVICE) for s in sources]
    gap = torch.zeros(4, 128, dtype=torch.uint8, device=DEVICE)
    destinations[1] = gap[:, 32:96]
    table = row_table(list(zip(sources, destinations, strict=True)), DEVICE)
    copy_rows(table, numbers(3, 0, 4, 2), numbers(1, 3, 0, 2), numbers(2), programs=3)
    for source, destination in zip(sources, destinations, strict=True):
        wanted = torch.zeros(4, *source.shape[1:], dtype=source.dtype)
        wanted[1], wanted[3] = source[3], source[0]
        assert torch.equal(destination.cpu().view(torch.uint8), wanted.view(torch.uint8))
    assert not gap[:, :32].any() and not gap[:, 96:].any()


def test_rows_that_are_not_there_are_passed_over() -> None:
    source = host(torch.arange(24, dtype=torch.int32).view(3, 8))
    destination = torch.full((2, 8), -1, dtype=torch.int32, device=DEVICE)
    table = row_table([(source, destination)], DEVICE)
    copy_rows(table, numbers(-1, 3, 0, 2, 1), numbers(0, 0, 2, -1, 1), numbers(5), programs=2)
    assert destination.tolist() == [[-1] * 8, source[1].tolist()]
    copy_rows(table, numbers(0), numbers(0), numbers(0))
    assert destination[0, 0] == -1


def test_rows_that_lie_anywhere() -> None:
    # As in files: at multiples of 8 and not of 16.
    large = [host(torch.randint(-99, 99, (9002,), dtype=torch.int32))[2:] for _ in range(4)]
    small = [host(torch.randn(34))[2:].view(8, 4) for _ in range(4)]
    destinations = [
        torch.full((5, 9000), -1, dtype=torch.int32, device=DEVICE),
        torch.full((5, 8, 4), torch.nan, device=DEVICE),
    ]
    rows: list[list[torch.Tensor | None]] = [[*large], [*small]]
    rows[0][1] = rows[1][1] = None
    table = scattered_table(rows, destinations, DEVICE)
    # Row 1 is nowhere, 7 and -2 are none.
    copy_rows(table, numbers(3, 1, 0, 7, -2), numbers(4, 3, 0, 1, 2), numbers(5), programs=2)
    for sources, destination in ((large, destinations[0]), (small, destinations[1])):
        wanted = torch.full_like(destination, -1 if destination.dtype == torch.int32 else torch.nan, device="cpu")
        wanted[4], wanted[0] = sources[3], sources[0]
        torch.testing.assert_close(destination.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


def test_rows_anywhere_that_do_not_fit() -> None:
    row, bank = torch.zeros(8), torch.zeros(3, 8, device=DEVICE)
    for rows, message in (
        ([torch.zeros(9)[1:]], "at a multiple of 8"),
        ([torch.zeros(8, 2)[:, 0]], "contiguous"),
        ([torch.zeros(7)], r"\[7\] does not fit into torch.float32 \[8\]"),
        ([torch.zeros(8, dtype=torch.int32)], "int32"),
        ([None, None], "0 of 2 rows are there"),
    ):
        with pytest.raises(ValueError, match=message):
            scattered_table([rows], [bank], DEVICE)
    with pytest.raises(ValueError, match="2 of 2 rows are there, of 1 at least one"):
        scattered_table([[row], [row, row]], [bank, bank], DEVICE)


def test_what_a_planner_decides_is_fetched() -> None:
    torch.manual_seed(1)
    experts, slots = 9, 4
    weights = host(torch.randn(experts, 12))
    bank = torch.full((slots, 12), torch.nan, device=DEVICE)
    table = row_table([(weights, bank)], DEVICE)
    state = new_lru(experts, slots, DEVICE)
    for _ in range(8):
        ids = torch.randperm(experts)[:3].view(1, 3).to(DEVICE)
        plan = plan_lru(state, ids)
        copy_rows(table, plan.experts, plan.slots, plan.count, programs=2)
        for expert in ids.flatten().tolist():
            assert torch.equal(bank[state.residents.slot_of[expert]].cpu(), weights[expert])


@pytest.mark.parametrize(
    ("source", "destination", "message"),
    [
        (torch.zeros(4, 8), torch.zeros(4, 8).half(), "float16"),
        (torch.zeros(4, 8), torch.zeros(4, 12), r"\[12\]"),
        (torch.zeros(4, 6), torch.zeros(4, 6), "24 is no multiple of 16"),
        (torch.zeros(4, 9)[:, 1:], torch.zeros(4, 8), "36 is no multiple of 16|address"),
        (torch.zeros(8, 4).T, torch.zeros(4, 8), "contiguous"),
        (torch.zeros(8)[None, :].expand(4, 8), torch.zeros(4, 8), "overlap"),
        (torch.zeros(0, 8), torch.zeros(4, 8), "numbers in them"),
        (torch.zeros(4), torch.zeros(4), "rows"),
    ],
)
def test_tensors_that_do_not_fit(source: torch.Tensor, destination: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row_table([(source.to(DEVICE), destination.to(DEVICE))], DEVICE)


def test_memory_that_is_not_reached() -> None:
    with pytest.raises(ValueError, match="meta"):
        row_table([(torch.zeros(4, 8), torch.zeros(4, 8, device="meta"))], DEVICE)
    with pytest.raises(ValueError, match="no tensors"):
        row_table([], DEVICE)


def test_lists_that_do_not_fit() -> None:
    table = row_table([(host(torch.zeros(4, 8)), torch.zeros(4, 8, device=DEVICE))], DEVICE)
    for sources, destinations, count, message in (
        (numbers(1, 2), numbers(1), numbers(1), "2 sources, 1 destinations"),
        (numbers(1), numbers(1), numbers(1, 1), "2 counts"),
        (numbers(1).long(), numbers(1), numbers(1), "int64"),
        (numbers(1), numbers(1)[None], numbers(1), "1 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            copy_rows(table, sources, destinations, count)
    with pytest.raises(ValueError, match="programs=0"):
        copy_rows(table, numbers(1), numbers(1), numbers(1), programs=0)
