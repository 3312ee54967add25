"""Threads of the extension that read records, and move what they have read, without the GIL.

They know one way: O_DIRECT, into aligned memory. Whatever goes wrong there is read again by a Python thread, which
knows the other ways and says what is the matter.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from moert import _C
from moert.errors import MoertError
from moert.tiers.depth import PERIOD_BYTES, PERIOD_S, START_DEPTH, DepthTuner
from moert.tiers.read import (
    Finish,
    Moving,
    Priority,
    Read,
    ReadHandle,
    cancelled,
    check_process,
    closed_before,
    not_in_time,
    record_bytes,
)
from moert.tiers.read_plan import Buffer, PlannedRead, ReadPlan
from moert.tiers.shard_file import BLOCK_BYTES, ShardFile
from moert.tiers.thread_reads import ThreadReads

_UNDER_WAY, _WHOLE, _FAILED, _CANCELLED, _CLOSED = range(5)

_Part = tuple[int, int, int, int, int, int, int, int, int]

PIECE_BYTES = 1 << 20
"""Of a record, what is read at once; `kChunkBytes` of the extension."""


def guess_lanes(depth: int, asked: int | None = None) -> int:
    """How many of `depth` reads may be no demands: as many as somebody has `asked` for, else half."""
    return min(asked or max(1, depth // 2), depth)


def _moves(moving: Moving, memory: list[object]) -> tuple[object, int, int, int, int]:
    """What `_C.reader_submit` takes; `memory` keeps the addresses valid."""
    ends = []
    for view in (moving.source, moving.destination):
        byte = ctypes.c_char.from_buffer(view)
        memory.append(byte)
        ends += [ctypes.addressof(byte), len(view)]
    return (moving.moves, ends[0], ends[1], ends[2], ends[3])


class _Kept(NamedTuple):
    """A record that was asked for read by read, and what keeps the addresses valid that they go to."""

    reads_of: tuple[Read, ...]
    memory: list[object]
    files: list[ShardFile]
    finish: Finish | None

    @property
    def nbytes(self) -> int:
        return record_bytes(self.reads_of)

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(read.offset % BLOCK_BYTES for read in self.reads_of)

    def reads(self) -> tuple[Read, ...]:
        return self.reads_of


class NativeHandle(ReadHandle):
    """A record that the extension reads."""

    _settled = False
    _again: ReadHandle | None = None
    _error: MoertError | None = None
    _starts: tuple[int, ...] = ()

    def __init__(self, owner: NativeReads, record: object, wanted: _Kept | PlannedRead, priority: Priority) -> None:
        """`wanted` keeps the record's memory, and its files are in use."""
        self._owner = owner
        self._record = record
        self._wanted: _Kept | PlannedRead | None = wanted
        self.priority = priority

    @property
    def native(self) -> object | None:
        self._owner.check_process()
        return self._record if self._again is None else None

    @property
    def ready(self) -> bool:
        if not self._settled:
            if _C.record_state(self._record) == _UNDER_WAY:
                return False
            self._owner.settle(self)
        return self._again is None or self._again.ready

    @property
    def read_s(self) -> float:
        return _C.record_seconds(self._record) if self._again is None else self._again.read_s

    @property
    def wasted(self) -> int:
        return _C.record_begun(self._record) if _C.record_state(self._record) == _CANCELLED else 0

    def wait(self, timeout: float | None = None) -> tuple[int, ...]:
        if not self._settled:
            self._owner.check_process()
            end = None if timeout is None else time.monotonic() + timeout
            if _C.record_wait(self._record, timeout) == _UNDER_WAY:
                assert self._wanted is not None
                raise not_in_time(self._wanted.nbytes, timeout)
            self._owner.settle(self)
            if end is not None:
                timeout = max(0.0, end - time.monotonic())
        if self._again is not None:
            return self._again.wait(timeout)
        if self._error is not None:
            raise self._error
        return self._starts

    def cancel(self) -> bool:
        if self._again is not None:
            return self._again.cancel()
        return self._owner.cancel(self)

    def give_up(self) -> bool:
        if self._again is not None:
            return self._again.give_up()
        return self._owner.give_up(self)

    def promote(self, priority: Priority = Priority.DEMAND) -> bool:
        if self._settled or not self._owner.promote(self, priority):
            return False
        self.priority = priority
        return True


class NativeReads:
    """The extension's reader, and what its records need kept alive: their memory and their files."""

    def __init__(self, depth: int | None, prefetch_depth: int | None, clock: object, threads: ThreadReads) -> None:
        """`depth` None: measured, for each disk. `threads` read what fails here."""
        self._depth = depth
        self._prefetch_depth = prefetch_depth
        self._threads = threads
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._tuners: dict[int, DepthTuner] = {}
        self._unsettled: set[NativeHandle] = set()
        self._sweep_at = 64
        start = depth or START_DEPTH
        self._reader = _C.reader_open(start, guess_lanes(start, prefetch_depth), clock)

    @property
    def depth(self) -> int:
        """Most reads in flight at once, of the disk that has most."""
        if self._depth is not None:
            return self._depth
        with self._lock:
            return max((tuner.depth for tuner in self._tuners.values()), default=START_DEPTH)

    @property
    def prefetch_depth(self) -> int:
        """How many of those may be no demands."""
        return guess_lanes(self.depth, self._prefetch_depth)

    def check_process(self) -> None:
        check_process(self._pid)

    def submit(
        self,
        reads: tuple[Read, ...],
        priority: Priority,
        finish: Finish | None = None,
        moving: Moving | None = None,
    ) -> NativeHandle | None:
        """Queue a record; None if it is not one for these threads, or they are closed.

        `moving` is done here, and `finish` where a Python thread has to read instead.
        """
        parts: list[_Part] = []
        memory: list[object] = []
        lent: list[ShardFile] = []
        is_kept = False
        try:
            for read in reads:
                file = read.file
                window = file.direct_window(read.offset, read.nbytes, read.destination)
                if window is None:
                    return None
                if file not in lent:
                    file.begin_use()
                    lent.append(file)
                memory.append(window.memory)
                parts.append((window.fd, *file.identity, window.begin, window.nbytes, window.needed, window.address))
            moves = None if moving is None else _moves(moving, memory)
            record = _C.reader_submit(self._reader, priority, record_bytes(reads), parts, moves)
            handle = NativeHandle(self, record, _Kept(reads, memory, lent, finish), priority)
            self._add([handle])
            is_kept = True
        except (MoertError, RuntimeError):
            return None
        finally:
            if not is_kept:
                for file in lent:
                    file.end_use()
        self._look_after()
        return handle

    def submit_planned(self, wanted: Sequence[PlannedRead], priority: Priority) -> list[NativeHandle] | None:
        """Queue these records, in order; None, and nothing has happened, if one is not for these threads, or they are
        closed."""
        plans: list[tuple[object, ...]] = []
        lent: list[ShardFile] = []
        is_kept = False
        try:
            for plan, buffer, destination, finish in wanted:
                if finish is not None and plan.moves is None:
                    return None
                native = plan.native or self._plan(plan, buffer)
                if native is None:
                    return None
                for file in plan.files:
                    if not file.direct:
                        return None
                    file.begin_use()
                    lent.append(file)
                place = (native, buffer.address, len(buffer.memory))
                if plan.moves is None:
                    plans.append(place)
                else:
                    assert destination is not None
                    plans.append((*place, destination.address, len(destination.memory)))
            records = _C.reader_submit_plans(self._reader, priority, plans)
            handles = [NativeHandle(self, record, one, priority) for record, one in zip(records, wanted, strict=True)]
            self._add(handles)
            is_kept = True
        except (MoertError, RuntimeError):
            return None
        finally:
            if not is_kept:
                for file in lent:
                    file.end_use()
        self._look_after()
        return handles

    def _plan(self, plan: ReadPlan, buffer: Buffer) -> object | None:
        parts: list[_Part] = []
        for read in plan.reads(buffer.memory):
            window = read.file.direct_window(read.offset, read.nbytes, read.destination)
            if window is None:
                return None
            place = window.address - buffer.address
            parts.append((window.fd, *read.file.identity, window.begin, window.nbytes, window.needed, place))
        plan.native = _C.read_plan(plan.nbytes, parts, plan.moves)
        return plan.native

    def _add(self, handles: Sequence[NativeHandle]) -> None:
        with self._lock:
            self._unsettled.update(handles)

    def _look_after(self) -> None:
        """What can wait until the reads are under way."""
        if len(self._unsettled) >= self._sweep_at:
            self.sweep()
        self._tune()

    def settle(self, handle: NativeHandle, *, here: bool = False) -> None:
        """Take over what the extension made of a record, and let go of its memory and files.

        A record that failed goes to the Python threads, or with `here` is read by the calling one, which blocks.
        """
        with self._lock:
            if handle._settled:
                return
            wanted = handle._wanted
            assert wanted is not None
            state = _C.record_state(handle._record)
            if state == _FAILED:
                try:
                    handle._again = (
                        self._threads.read_here(wanted.reads(), wanted.finish)
                        if here
                        else self._threads.submit(wanted.reads(), Priority.DEMAND, wanted.finish)
                    )
                except MoertError as error:
                    handle._error = error
            elif state != _WHOLE:
                handle._error = cancelled() if state == _CANCELLED else closed_before()
            for file in wanted.files:
                file.end_use()
            handle._starts = wanted.starts
            handle._wanted = None
            self._unsettled.discard(handle)
            handle._settled = True

    def cancel(self, handle: NativeHandle) -> bool:
        if os.getpid() != self._pid or not _C.reader_cancel(self._reader, handle._record):
            return False
        self.settle(handle)
        return True

    def give_up(self, handle: NativeHandle) -> bool:
        if os.getpid() != self._pid or not _C.reader_give_up(self._reader, handle._record):
            return False
        if _C.record_state(handle._record) != _UNDER_WAY:
            self.settle(handle)
        return True

    def promote(self, handle: NativeHandle, priority: Priority) -> bool:
        return os.getpid() == self._pid and _C.reader_promote(self._reader, handle._record, priority)

    def sweep(self) -> bool:
        """Settle what is over though nobody has asked; whether nothing is under way any more."""
        with self._lock:
            handles = list(self._unsettled)
        for handle in handles:
            if _C.record_state(handle._record) != _UNDER_WAY:
                self.settle(handle)
        self._sweep_at = max(64, 2 * len(self._unsettled))
        return not self._unsettled

    def totals(self) -> tuple[int, int]:
        """Records read whole, and their bytes."""
        return _C.reader_totals(self._reader)

    def shut_down(self) -> bool:
        """Fail what is queued; whether nothing is under way any more. Neither waits nor takes the lock."""
        _C.reader_shut_down(self._reader)
        return not self._unsettled

    def close(self) -> None:
        """Wait for what is being read, and read here what fails."""
        if os.getpid() != self._pid:
            return
        _C.reader_close(self._reader)
        with self._lock:
            handles = list(self._unsettled)
        for handle in handles:
            self.settle(handle, here=True)

    def _tune(self) -> None:
        if self._depth is not None:
            return
        for device, lanes, nbytes, seconds in _C.reader_saturation(self._reader, PERIOD_S, PERIOD_BYTES):
            with self._lock:
                depth = self._tuners.setdefault(device, DepthTuner()).observe(nbytes, seconds, lanes)
            if depth != lanes:
                _C.reader_set_lanes(self._reader, device, depth, guess_lanes(depth, self._prefetch_depth))
