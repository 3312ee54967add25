"""A record that is read again and again, each time into another buffer: what stays the same is worked out once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moert.tiers.read import Finish, Moving, Read
from moert.tiers.shard_file import BLOCK_BYTES, ShardFile, window_bytes


class Window(NamedTuple):
    """`nbytes` at `offset` of `file`; the window around them begins at `position`, in whole blocks, of the buffer."""

    file: ShardFile
    offset: int
    nbytes: int
    position: int


class ReadPlan:
    """The reads of one record, and what is done with its bytes then."""

    def __init__(self, windows: Sequence[Window], moves: object | None = None) -> None:
        """`moves` are of `_C.moves`, from the buffer to a destination; None: the bytes stay in the buffer."""
        self.windows = tuple(windows)
        self.files = tuple({window.file: None for window in windows})
        self.starts = tuple(window.offset % BLOCK_BYTES for window in windows)
        self.nbytes = sum(window.nbytes for window in windows)
        """The bytes asked for, without the rounding to blocks."""
        self.moves = moves
        self.native: object | None = None
        """The same for the extension's threads, once one of them has read it."""

    def reads(self, buffer: memoryview) -> tuple[Read, ...]:
        """What there is to read into `buffer`, window by window."""
        return tuple(
            Read(file, offset, nbytes, buffer[position : position + window_bytes(offset, nbytes)])
            for file, offset, nbytes, position in self.windows
        )


class Buffer(NamedTuple):
    """Memory that a record is read or moved into: writable, in whole blocks."""

    memory: memoryview
    address: int
    """Where it begins."""


class PlannedRead(NamedTuple):
    """One reading of a plan's record."""

    plan: ReadPlan
    buffer: Buffer
    destination: Buffer | None = None
    """Where the plan's moves go, if it has any."""
    finish: Finish | None = None
    """As `DiskReader.submit_read` takes it."""

    @property
    def files(self) -> tuple[ShardFile, ...]:
        """Each file once."""
        return self.plan.files

    @property
    def nbytes(self) -> int:
        """The bytes asked for, without the rounding to blocks."""
        return self.plan.nbytes

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the bytes of each window start in it."""
        return self.plan.starts

    def reads(self) -> tuple[Read, ...]:
        """What there is to read, window by window."""
        return self.plan.reads(self.buffer.memory)

    @property
    def moving(self) -> Moving | None:
        """As `DiskReader.submit_read` takes it."""
        if self.plan.moves is None or self.destination is None:
            return None
        return Moving(self.plan.moves, self.buffer.memory, self.destination.memory)
