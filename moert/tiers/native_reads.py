"""Threads of the extension that read records, and move what they have read, without the GIL.

They know one way: O_DIRECT, into aligned memory. Whatever goes wrong there is read again by a Python thread, which
knows the other ways and says what is the matter.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time

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
from moert.tiers.shard_file import BLOCK_BYTES, ShardFile
from moert.tiers.thread_reads import ThreadReads

_UNDER_WAY, _WHOLE, _FAILED, _CANCELLED, _CLOSED = range(5)

_Part = tuple[int, int, int, int, int, int, int, int, int]


def guess_lanes(depth: int) -> int:
    """How many of `depth` reads may be no demands, unless somebody says otherwise."""
    return max(1, depth // 2)


def _moves(moving: Moving, memory: list[object]) -> tuple[object, int, int, int, int]:
    """What `_C.reader_submit` takes; `memory` keeps the addresses valid."""
    ends = []
    for view in (moving.source, moving.destination):
        byte = ctypes.c_char.from_buffer(view)
        memory.append(byte)
        ends += [ctypes.addressof(byte), len(view)]
    return (moving.moves, ends[0], ends[1], ends[2], ends[3])


class NativeHandle(ReadHandle):
    """A record that the extension reads."""

    def __init__(
        self,
        owner: NativeReads,
        record: object,
        reads: tuple[Read, ...],
        memory: list[object],
        priority: Priority,
        finish: Finish | None,
        files: list[ShardFile],
    ) -> None:
        self._owner = owner
        self._record = record
        self._reads = reads
        self._memory = memory
        self._finish = finish
        self._files = files
        self._starts = tuple(read.offset % BLOCK_BYTES for read in reads)
        self.priority = priority
        self._settled = False
        self._again: ReadHandle | None = None
        self._error: MoertError | None = None

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
                raise not_in_time(record_bytes(self._reads), timeout)
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

    def promote(self) -> bool:
        if self._settled or not self._owner.promote(self):
            return False
        self.priority = Priority.DEMAND
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
        self._reader = _C.reader_open(start, prefetch_depth or guess_lanes(start), clock)

    @property
    def depth(self) -> int:
        """Most reads in flight at once, of the disk that has most."""
        if self._depth is not None:
            return self._depth
        with self._lock:
            return max((tuner.depth for tuner in self._tuners.values()), default=START_DEPTH)

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
        self._tune()
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
            handle = NativeHandle(self, record, reads, memory, priority, finish, lent)
            with self._lock:
                self._unsettled.add(handle)
                dropped = len(self._unsettled) >= self._sweep_at
            is_kept = True
        except (MoertError, RuntimeError):
            return None
        finally:
            if not is_kept:
                for file in lent:
                    file.end_use()
        if dropped:
            self.sweep()
        return handle

    def settle(self, handle: NativeHandle, *, here: bool = False) -> None:
        """Take over what the extension made of a record, and let go of its memory and files.

        A record that failed goes to the Python threads, or with `here` is read by the calling one, which blocks.
        """
        with self._lock:
            if handle._settled:
                return
            state = _C.record_state(handle._record)
            if state == _FAILED:
                try:
                    handle._again = (
                        self._threads.read_here(handle._reads, handle._finish)
                        if here
                        else self._threads.submit(handle._reads, Priority.DEMAND, handle._finish)
                    )
                except MoertError as error:
                    handle._error = error
            elif state != _WHOLE:
                handle._error = cancelled() if state == _CANCELLED else closed_before()
            for file in handle._files:
                file.end_use()
            handle._files = []
            handle._reads = ()
            handle._memory = []
            handle._finish = None
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

    def promote(self, handle: NativeHandle) -> bool:
        return os.getpid() == self._pid and _C.reader_promote(self._reader, handle._record)

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
                guesses = min(self._prefetch_depth or guess_lanes(depth), depth)
                _C.reader_set_lanes(self._reader, device, depth, guesses)
