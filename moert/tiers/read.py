"""What a record on its way from disk is to whoever asked for it."""

from __future__ import annotations

import enum
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from moert.errors import MoertError
from moert.tiers.shard_file import ShardFile

Finish = Callable[[tuple[int, ...]], None]


class Priority(enum.IntEnum):
    """Why a record is read. A lane that becomes free takes any demand first, and any prefetch last."""

    DEMAND = 0
    """Somebody waits for it."""
    PROMOTION = 1
    """It is worth more in memory than what is there."""
    PREFETCH = 2
    """It may be needed soon."""


class Read(NamedTuple):
    """`nbytes` at `offset` of `file` into `destination` (see `ShardFile.read` for what the buffer must be)."""

    file: ShardFile
    offset: int
    nbytes: int
    destination: memoryview


class Moving(NamedTuple):
    """What is to be done with a record's bytes once they are there, where it can be done without Python."""

    moves: object
    """Of `_C.moves`."""
    source: memoryview
    """Where they begin: the record's buffer."""
    destination: memoryview
    """Where they end, in whole blocks; the reader's until the handle is ready."""


@dataclass(frozen=True)
class ReadTotals:
    """What a reader has done so far. `read_s` is the time during which at least one read was in flight."""

    records: int
    bytes_read: int
    read_s: float

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth while the disk was busy; 0 before the first read."""
        return self.bytes_read / self.read_s if self.read_s else 0.0


class ReadHandle(ABC):
    """A record on its way. It holds the destinations until it is over, and the caller leaves them alone so long."""

    priority: Priority

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether `wait` returns or raises at once: done, failed or cancelled."""

    @property
    @abstractmethod
    def read_s(self) -> float:
        """Seconds its reads took, without the wait in the queue and without `finish`; 0 until it is over."""

    @property
    def native(self) -> object | None:
        """The record as the extension's kernels may wait for it; None: only `wait` can.

        Raises:
            MoertError: the threads that read it belong to another process.
        """
        return None

    @abstractmethod
    def wait(self, timeout: float | None = None) -> tuple[int, ...]:
        """Block until the record is there; return where each read's bytes start in its destination, in order.

        Raises:
            TimeoutError: not done after `timeout` seconds; the read goes on.
            MoertError: the read was cancelled or given up, or the reader closed before it started.
            Exception: whatever the read or `finish` raised (see `ShardFile.read`).
        """

    @abstractmethod
    def cancel(self) -> bool:
        """Take the record off the queue; False if it is being read or is over. Never blocks for a read."""

    @property
    def wasted(self) -> int:
        """Bytes that were read of a record that was given up and is over."""
        return 0

    @abstractmethod
    def give_up(self) -> bool:
        """Begin no more of the record: it is over, as cancelled, when what has been begun of it is read. Never blocks.

        False, and no change, where nothing of it is left to begin; it will be there then.
        """

    @abstractmethod
    def promote(self, priority: Priority = Priority.DEMAND) -> bool:
        """Raise what is still to be begun of the record to a class: it goes behind what is queued of that already.

        What has been given up is taken up again in that class, if it is not over. False, and no change, where nothing
        is to be begun, or not of a lower class.
        """


def record_bytes(reads: tuple[Read, ...]) -> int:
    """The bytes asked for, without the rounding to blocks."""
    return sum(read.nbytes for read in reads)


def check_process(pid: int) -> None:
    """Raise MoertError in any process but `pid`, which has the threads."""
    if os.getpid() != pid:
        raise MoertError(
            f"this disk reader belongs to process {pid}, and its threads did not survive the fork into "
            f"process {os.getpid()}; load or patch the model in the process that runs it"
        )


def not_in_time(nbytes: int, timeout: float | None) -> TimeoutError:
    """What a `wait` of a record of `nbytes` raises after `timeout` seconds."""
    return TimeoutError(f"a read of {nbytes} bytes is not done after {timeout} s")


def cancelled() -> MoertError:
    """What `wait` raises after `cancel` and `give_up`."""
    return MoertError("the read was cancelled before it started, or before all of it had")


def closed_before() -> MoertError:
    """What `wait` raises for a record that was queued when the reader closed."""
    return MoertError("the disk reader was closed before this read started")


def reader_closed() -> MoertError:
    """What a closed reader answers to new reads."""
    return MoertError("the disk reader is closed; load or patch the model again")
