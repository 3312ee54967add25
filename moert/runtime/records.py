"""Where one expert's bytes are on disk, and how they become tensors in a slot."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moert.formats import RecordLayout, TensorSpec
from moert.tiers.disk import BLOCK_BYTES, Read, ShardFile, window_bytes

MERGE_GAP_BYTES = 64 * 1024
"""Two spans of one file this close are read as one: the gap costs less than a second request."""


@dataclass(frozen=True, slots=True)
class Span:
    """`nbytes` bytes at `offset` of file number `file` of the source."""

    file: int
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    @property
    def window_bytes(self) -> int:
        """The bytes a buffer needs to read the span through aligned blocks."""
        return window_bytes(self.offset, self.nbytes)


@dataclass(frozen=True, slots=True)
class Piece:
    """One checkpoint tensor, or one expert's row of it: its bytes, shape and dtype."""

    span: Span
    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str


Convert = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""The pieces' tensors -> the expert's tensor."""


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor of one expert, made of `pieces`.

    `convert` is None when the tensor is its pieces one after the other along its first dimension; then no byte has
    to move if they also lie one after the other in the file.
    """

    pieces: tuple[Piece, ...]
    convert: Convert | None

    def tensor(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """The expert's tensor from the tensors of its pieces."""
        if self.convert is not None:
            return self.convert(pieces)
        return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=0)


def merge_spans(spans: Sequence[Span]) -> tuple[Span, ...]:
    """The spans as few reads, in file order; every span lies within one of them."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.file, span.offset)):
        last = merged[-1] if merged else None
        if last is not None and last.file == span.file and span.offset - last.end <= MERGE_GAP_BYTES:
            merged[-1] = Span(last.file, last.offset, max(last.end, span.end) - last.offset)
        else:
            merged.append(span)
    return tuple(merged)


class Check(Protocol):
    """Looks at a record's bytes before they are used."""

    is_over: bool
    """There is nothing to look at any more."""

    def __call__(self, reads: Sequence[Read]) -> None:
        """Look at the buffers once the reads are done, on the thread that did them.

        It may do them again, and raises where the bytes are not the right ones.
        """


@dataclass(frozen=True, slots=True)
class Record:
    """One expert on disk.

    A *direct* record is read into its slot and used where it lands: `offsets` says where each tensor then starts. A
    *staged* one is read into a staging buffer and converted into the slot, whose layout is `RecordLayout.packed`.
    """

    reads: tuple[Span, ...]
    positions: tuple[int, ...]
    """Where each read's window starts in the buffer it is read into."""
    buffer_bytes: int
    """The size of that buffer."""
    layout: RecordLayout
    """The tensors in the slot once it is filled."""
    sources: tuple[Source, ...] | None
    """None for a direct record."""
    check: Check | None = None
    """What to do with the bytes before they are used. None: nothing, and if the disk returns other bytes than were
    written, without an error, nobody notices: a checkpoint has no checksums, only a pack does."""

    @property
    def is_direct(self) -> bool:
        return self.sources is None

    @property
    def read_bytes(self) -> int:
        """The bytes its reads move, rounded out to whole blocks."""
        return sum(read.window_bytes for read in self.reads)

    @property
    def slot_bytes(self) -> int:
        """The bytes a slot needs for this record, a multiple of 4 KiB."""
        return self.buffer_bytes if self.is_direct else -(-self.layout.nbytes // BLOCK_BYTES) * BLOCK_BYTES

    def place(self, span: Span) -> int:
        """Where the first byte of `span` is in the buffer that the record is read into."""
        for read, position in zip(self.reads, self.positions, strict=True):
            if read.file == span.file and read.offset <= span.offset and span.end <= read.end:
                return position + read.offset % BLOCK_BYTES + span.offset - read.offset
        raise AssertionError(f"{span} is in no read of {self.reads}")

    def fill(self, staging: torch.Tensor, slot: torch.Tensor) -> None:
        """Convert a staged record: 1-D uint8 `staging`, as read, into 1-D uint8 `slot`."""
        assert self.sources is not None
        views = self.layout.views(slot)
        for spec, source in zip(self.layout.specs, self.sources, strict=True):
            tensors = [_tensor_at(staging, self.place(piece.span), piece) for piece in source.pieces]
            views[spec.name].copy_(source.tensor(tensors))


def _tensor_at(buffer: torch.Tensor, offset: int, piece: Piece) -> torch.Tensor:
    raw = buffer[offset : offset + piece.span.nbytes]
    if offset % piece.dtype.itemsize:
        raw = raw.clone()  # files with an odd header length: a view of a wider dtype needs an aligned start
    return raw.view(piece.dtype).view(piece.shape)


def make_record(specs: Sequence[TensorSpec], sources: Sequence[Source]) -> Record:
    """The record of one expert whose tensor `specs[i]` comes from `sources[i]`; direct wherever that is possible."""
    reads = merge_spans([piece.span for source in sources for piece in source.pieces])
    positions, end = [], 0
    for read in reads:
        positions.append(end)
        end += read.window_bytes
    staged = Record(reads, tuple(positions), end, RecordLayout.packed(specs), tuple(sources))
    offsets = []
    for spec, source in zip(specs, sources, strict=True):
        begin = staged.place(source.pieces[0].span)
        adjacent = all(
            a.span.file == b.span.file and a.span.end == b.span.offset for a, b in itertools.pairwise(source.pieces)
        )
        same_dtype = all(piece.dtype == spec.dtype for piece in source.pieces)
        if source.convert is not None or not adjacent or not same_dtype or begin % spec.dtype.itemsize:
            return staged
        offsets.append(begin)
    return Record(reads, tuple(positions), end, RecordLayout(tuple(specs), tuple(offsets), end), None)


class RecordSource(Protocol):
    """Where the experts of a model come from."""

    @property
    def files(self) -> Sequence[ShardFile]:
        """What a `Span.file` counts."""
        ...

    def record(self, layer: int, expert: int) -> Record:
        """The record of one expert; cheap, no I/O."""
        ...

    def close(self) -> None:
        """Close the files; idempotent."""
        ...
