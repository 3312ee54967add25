"""Records that the extension converts, next to what torch makes of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch

from moert.formats import TensorSpec
from moert.runtime.moves import moves_of
from moert.runtime.records import Convert, Piece, Record, Source, Span, make_record
from moert.tiers.arena import HostArena, SlotBank
from moert.tiers.disk import DiskReader, Moving, Read, ShardFile
from moert.tiers.native_reads import NativeHandle

SLOT_BYTES = 1 << 20
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def slots() -> Iterator[SlotBank]:
    """A buffer, a slot, and another slot."""
    arena = HostArena(3 * SLOT_BYTES)
    yield SlotBank(arena, 0, SLOT_BYTES, 3)
    arena.close()


@pytest.fixture(scope="module")
def content() -> bytes:
    """Every 16-bit number there is, twice, so that half the 32-bit ones begin or end with it; and anything else."""
    every = torch.arange(1 << 16, dtype=torch.int32)
    wide = torch.cat([every << 16, every, (every << 16) + 0x8000, (every << 16) + 0x7FFF])
    head = every.to(torch.uint16).view(torch.uint8).numpy().tobytes() + wide.view(torch.uint8).numpy().tobytes()
    return head + random.Random(3).randbytes(1000)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Iterator[ShardFile]:
    path = tmp_path_factory.mktemp("moves") / "shard.safetensors"
    path.write_bytes(content)
    with ShardFile(path) as file:
        if not file.direct:
            pytest.skip("this file system has no O_DIRECT")
        yield file


def record_of(
    shape: Sequence[int],
    pieces: Sequence[Sequence[int]],
    offsets: Sequence[int],
    dtypes: Sequence[torch.dtype],
    convert: Convert | None,
) -> Record:
    """A record of one tensor in dtypes[0], from pieces in dtypes[1]."""
    to, of = dtypes
    made = []
    for piece, offset in zip(pieces, offsets, strict=True):
        nbytes = torch.Size(piece).numel() * of.itemsize
        made.append(Piece(Span(0, offset, nbytes), tuple(piece), of, "piece"))
    return make_record([TensorSpec("tensor", tuple(shape), to)], [Source(tuple(made), convert)])


def read(record: Record, file: ShardFile, slots: SlotBank) -> tuple[torch.Tensor, torch.Tensor]:
    """What the extension makes of a record, and what torch makes of it."""
    moves = moves_of(record)
    assert moves is not None
    buffer, slot, other = (torch.frombuffer(slots.slot(i), dtype=torch.uint8) for i in range(3))
    for memory in (buffer, slot, other):
        memory.fill_(0xA5)
    reads = [
        Read(file, span.offset, span.nbytes, slots.slot(0)[position : position + span.window_bytes])
        for span, position in zip(record.reads, record.positions, strict=True)
    ]
    with DiskReader(2) as reader:
        handle = reader.submit_read(reads, finish=lambda _: None, moving=Moving(moves, slots.slot(0), slots.slot(1)))
        assert isinstance(handle, NativeHandle)
        handle.wait(PATIENCE_S)
    record.fill(buffer, other)
    end = record.layout.nbytes
    assert (slot[end:] == 0xA5).all()
    return slot[:end], other[:end]


def assert_same(found: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> None:
    """The same bits, but for which NaN it is: torch has several for one number, by where it stands."""
    a, b = found.view(dtype), right.view(dtype)
    nan = b.isnan()
    assert torch.equal(a.isnan(), nan)
    whole = torch.int32 if dtype.itemsize == 4 else torch.int16
    assert torch.equal(a.view(whole)[~nan], b.view(whole)[~nan])
