"""Records that the extension converts: the bytes of torch's own conversion, or else torch's conversion."""

from __future__ import annotations

from collections.abc import Sequence

import moves_support
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moves_support import SLOT_BYTES, assert_same, read, record_of

from moert import _C
from moert.runtime.moves import moves_of
from moert.runtime.records import Convert
from moert.tiers.arena import SlotBank
from moert.tiers.disk import ShardFile

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Tensors = Sequence[torch.Tensor]

slots, content, file = moves_support.slots, moves_support.content, moves_support.file


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("of", FLOATS)
def test_every_number_becomes_what_torch_makes_of_it(
    of: torch.dtype, to: torch.dtype, file: ShardFile, slots: SlotBank
) -> None:
    """All 16-bit numbers; of 32-bit ones those next to a 16-bit one, half-way between two, and just below that."""
    begin = 131072 if of is torch.float32 else 0
    count = (3 if to is torch.float32 else 4) << 16 if of is torch.float32 else 1 << 16
    if to is torch.float32:
        count = min(count, SLOT_BYTES // 4 - 1024)
    record = record_of((count // 256, 256), [(256, count // 256)], [begin], (to, of), lambda t: t[0].T.contiguous())
    found, right = read(record, file, slots)
    assert_same(found, right, to)
    assert right.view(to).isnan().any()
    assert right.view(to).isinf().any()
    flat = record_of((count,), [(count,)], [begin], (to, of), lambda t: t[0].reshape(-1))
    found, right = read(flat, file, slots)
    assert_same(found, right, to)


def test_on_every_instruction_set(isa: str, file: ShardFile, slots: SlotBank) -> None:
    for of in FLOATS:
        for to in FLOATS:
            record = record_of((70, 33), [(33, 70)], [1001], (to, of), lambda t: t[0].T.contiguous())
            assert_same(*read(record, file, slots), to)


@given(data=st.data())
@settings(max_examples=60)
def test_any_piece_in_any_place(data: st.DataObject, file: ShardFile, slots: SlotBank) -> None:
    """Turned, cut, put together along either dimension, from wherever the pieces are, odd addresses among them."""
    to, of = (data.draw(st.sampled_from(FLOATS)) for _ in range(2))
    rows, columns = (data.draw(st.integers(1, 100)) for _ in range(2))
    count = data.draw(st.integers(1, 3))
    offsets = data.draw(st.lists(st.integers(0, 400_000), min_size=count, max_size=count))
    dim = data.draw(st.integers(0, 1))
    how = data.draw(st.sampled_from(["cat", "turn and cat", "half and cat", "stacked"]))

    def convert(tensors: Tensors) -> torch.Tensor:
        if how == "turn and cat":
            tensors = [tensor.T.contiguous() for tensor in tensors]
        elif how == "half and cat":
            tensors = [torch.chunk(tensor, 2, dim=1 - dim)[0].contiguous() for tensor in tensors]
        elif how == "stacked":
            tensors = [torch.stack([tensor], dim=0)[0] for tensor in tensors]
        return torch.cat(list(tensors), dim=dim)

    shape = tuple(convert([torch.empty(rows, columns) for _ in offsets]).shape)
    record = record_of(shape, [(rows, columns)] * count, offsets, (to, of), convert)
    if not record.is_direct:
        assert_same(*read(record, file, slots), to)


@pytest.mark.parametrize(
    "convert",
    [
        lambda t: t[0] * 2,
        lambda t: t[0].add_(1),
        lambda t: t[0].flip(0),
        lambda t: t[0].double(),
        lambda t: t[0].view(torch.int16),
        lambda t: t[0][[1, 0]],
        lambda t: torch.zeros(2, 64),
        lambda t: torch.stack([t[0], t[0]])[0],
        lambda t: torch.cat([t[0], t[0]])[1:3],
        lambda t: t[0][:1],
        lambda t: t[0].clone() if t[0].sum() > 0 else t[0],
    ],
)
def test_what_is_more_than_moving_is_left_to_torch(convert: Convert) -> None:
    assert moves_of(record_of((2, 64), [(2, 64)], [0], (torch.bfloat16, torch.bfloat16), convert)) is None


def test_other_numbers_are_left_to_torch() -> None:
    for of in (torch.float64, torch.float8_e4m3fn):
        assert moves_of(record_of((2, 64), [(2, 64)], [0], (torch.bfloat16, of), None)) is None


def test_a_tensor_of_no_numbers_takes_no_moves() -> None:
    record = record_of((4, 0), [(0, 4)], [9], (torch.bfloat16, torch.bfloat16), lambda t: t[0].T)
    assert moves_of(record) is not None


def test_whatever_lies_side_by_side_moves_as_bytes(file: ShardFile, slots: SlotBank) -> None:
    record = record_of((4, 64), [(2, 64), (2, 64)], [9, 5000], (torch.uint8, torch.uint8), None)
    found, right = read(record, file, slots)
    assert torch.equal(found, right)


@pytest.mark.parametrize(
    "move",
    [
        (4, 4, 1, 1, 0, 0, 1, 0, 0),
        (-1, 0, 1, 1, 0, 0, 1, 0, 0),
        (3, 0, 1, 1, 0, 0, 1, 0, 0),
        (0, 1, 0, 1, 0, 0, 1, 0, 0),
        (0, 1, 1, 1, 0, 0, 1, 1, 0),
        (0, 1, 1 << 40, 1, 0, 1 << 40, 1, 0, 0),
        (0, 1, 1 << 60, 1, 0, 0, 1, 0, 0),
    ],
)
def test_moves_that_cannot_be(move: tuple[int, int, int, int, int, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be moved"):
        _C.moves([move])


@pytest.mark.parametrize(
    ("source_bytes", "destination", "destination_bytes"), [(1076, 8192, 4096), (1077, 8192, 1063), (1077, 8256, 4096)]
)
def test_moves_need_their_memory(source_bytes: int, destination: int, destination_bytes: int) -> None:
    moves = _C.moves([(3, 3, 1, 1000, 77, 0, 1, 64, 0)])
    reader = _C.reader_open(2, 1, _C.busy_clock())
    with pytest.raises(ValueError, match="moves of 1077 bytes into 1064"):
        _C.reader_submit(reader, 0, 1, [], (moves, 4096, source_bytes, destination, destination_bytes))
