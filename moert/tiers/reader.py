"""A few threads that read records from disk: demand before prefetch, first in first out within each."""

from __future__ import annotations

import atexit
import enum
import os
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moert.errors import MoertError
from moert.tiers.shard_file import ShardFile

Finish = Callable[[tuple[int, ...]], None]


class Priority(enum.IntEnum):
    """Why a record is read. A worker that becomes free takes any demand before any prefetch."""

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


class _State(enum.Enum):
    QUEUED = enum.auto()
    RUNNING = enum.auto()
    DONE = enum.auto()
    CANCELLED = enum.auto()


class ReadHandle:
    """A record on its way. It holds the destinations until it is over, and the caller leaves them alone so long."""

    def __init__(self, pool: _Pool, reads: tuple[Read, ...], priority: Priority, finish: Finish | None) -> None:
        self._pool = pool
        self._reads = reads
        self._finish = finish
        self.priority = priority
        self._state = _State.QUEUED
        self._over = threading.Event()
        self._starts: tuple[int, ...] = ()
        self._error: BaseException | None = None
        self.read_s = 0.0
        """Seconds its reads took on a worker, without the wait in the queue and without `finish`."""

    @property
    def ready(self) -> bool:
        """Whether `wait` returns or raises at once: done, failed or cancelled."""
        return self._over.is_set()

    def wait(self, timeout: float | None = None) -> tuple[int, ...]:
        """Block until the record is there; return where each read's bytes start in its destination, in order.

        Raises:
            TimeoutError: not done after `timeout` seconds; the read goes on.
            MoertError: the read was cancelled, or the reader closed before it started.
            Exception: whatever the read or `finish` raised (see `ShardFile.read`).
        """
        if not self._over.is_set():
            self._pool.check_process()
            if not self._over.wait(timeout):
                raise TimeoutError(f"a read of {self._nbytes()} bytes is not done after {timeout} s")
        if self._error is not None:
            raise self._error
        return self._starts

    def cancel(self) -> bool:
        """Take the record off the queue; False if it is being read or is over. Never blocks for a read."""
        return self._pool.cancel(self)

    def promote(self) -> None:
        """Make a queued prefetch a demand: it goes behind the demands already queued. Otherwise nothing happens."""
        self._pool.promote(self)

    def _nbytes(self) -> int:
        return sum(read.nbytes for read in self._reads)

    def _run(self) -> None:
        whole = False
        began = time.perf_counter()
        try:
            try:
                self._starts = tuple(read.file.read(read.offset, read.nbytes, read.destination) for read in self._reads)
                whole = True
            finally:
                self.read_s = time.perf_counter() - began
                self._pool.read_ended(self, whole)
            if self._finish is not None:
                self._finish(self._starts)
        except BaseException as error:
            _release_frames(error)
            self._error = error
        self._settle(_State.DONE)

    def _settle(self, state: _State, error: BaseException | None = None) -> None:
        self._state = state
        self._error = self._error or error
        # A settled handle may be kept for long; the buffers and what `finish` holds must not be.
        self._reads = ()
        self._finish = None
        self._over.set()


def _release_frames(error: BaseException) -> None:
    """Empty the frames of an error and of those that led to it: it may be kept for long, and they hold the buffers."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


class _Pool:
    """The shared part of a reader: queues, threads and counters. Threads hold this, never the reader itself, so that a
    forgotten reader is collected and then shuts its threads down."""

    def __init__(self, depth: int, prefetch_depth: int) -> None:
        self.depth = depth
        self.prefetch_depth = prefetch_depth
        self.closed = False
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._queues: dict[Priority, deque[ReadHandle]] = {priority: deque() for priority in Priority}
        self._prefetches = 0
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._in_flight = 0
        self._busy_since = 0.0
        self._read_s = 0.0
        self._records = 0
        self._bytes_read = 0

    def check_process(self) -> None:
        if os.getpid() != self._pid:
            raise MoertError(
                f"this disk reader belongs to process {self._pid}, and its threads did not survive the fork into "
                f"process {os.getpid()}; load or patch the model in the process that runs it"
            )

    def submit(self, handle: ReadHandle) -> None:
        self.check_process()
        with self._changed:
            if self.closed:
                raise MoertError("the disk reader is closed; load or patch the model again")
            queued = sum(len(queue) for queue in self._queues.values())
            if self._idle <= queued and len(self._threads) < self.depth:
                # Daemon only so that the interpreter's exit gets as far as the exit handler below, which joins them.
                thread = threading.Thread(target=self._work, name=f"moert-read-{len(self._threads)}", daemon=True)
                thread.start()
                self._threads.append(thread)
            self._queues[handle.priority].append(handle)
            self._changed.notify()

    def cancel(self, handle: ReadHandle) -> bool:
        with self._changed:
            if handle._state is not _State.QUEUED:
                return False
            self._queues[handle.priority].remove(handle)
            handle._settle(_State.CANCELLED, MoertError("the read was cancelled before it started"))
            return True

    def promote(self, handle: ReadHandle) -> None:
        with self._changed:
            if handle._state is _State.QUEUED and handle.priority is not Priority.DEMAND:
                self._queues[handle.priority].remove(handle)
                handle.priority = Priority.DEMAND
                self._queues[Priority.DEMAND].append(handle)
                self._changed.notify()

    def read_ended(self, handle: ReadHandle, whole: bool) -> None:
        with self._changed:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._read_s += time.perf_counter() - self._busy_since
            if whole:
                self._records += 1
                self._bytes_read += handle._nbytes()

    def totals(self) -> ReadTotals:
        with self._changed:
            running_s = time.perf_counter() - self._busy_since if self._in_flight else 0.0
            return ReadTotals(self._records, self._bytes_read, self._read_s + running_s)

    def shut_down(self) -> None:
        """Fail what is queued and tell the threads to end after what they are reading. Does not wait."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            self.closed = True
            abandoned = [handle for queue in self._queues.values() for handle in queue]
            for queue in self._queues.values():
                queue.clear()
            for handle in abandoned:
                handle._settle(_State.CANCELLED, MoertError("the disk reader was closed before this read started"))
            self._changed.notify_all()

    def close(self) -> None:
        self.shut_down()
        for thread in self._threads:
            # A `finish` may be what closes the reader.
            if thread is not threading.current_thread():
                thread.join()

    def _work(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        # A function of its own: an idle worker's frame must not keep the last record's buffers alive.
        handle = self._take()
        if handle is None:
            return False
        prefetch = handle.priority is not Priority.DEMAND
        handle._run()
        if prefetch:
            with self._changed:
                self._prefetches -= 1
                self._changed.notify()
        return True

    def _take(self) -> ReadHandle | None:
        """The next record to read, waiting for one; None once the pool is closed."""
        with self._changed:
            self._idle += 1
            try:
                while not self.closed:
                    handle = self._next_handle()
                    if handle is not None:
                        handle._state = _State.RUNNING
                        if self._in_flight == 0:
                            self._busy_since = time.perf_counter()
                        self._in_flight += 1
                        return handle
                    self._changed.wait()
            finally:
                self._idle -= 1
        return None

    def _next_handle(self) -> ReadHandle | None:
        if self._queues[Priority.DEMAND]:
            return self._queues[Priority.DEMAND].popleft()
        # A demand that comes now waits for what is in flight, so guesses never fill all the lanes.
        for priority in (Priority.PROMOTION, Priority.PREFETCH):
            if self._queues[priority] and self._prefetches < self.prefetch_depth:
                self._prefetches += 1
                return self._queues[priority].popleft()
        return None


_live_pools: weakref.WeakSet[_Pool] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for pool in list(_live_pools):
        pool.close()


class DiskReader:
    """Reads records, up to `depth` at once, of which up to `prefetch_depth` (half of `depth`) are prefetches.

    Threads start with the first reads and end in `close`; a reader that is collected without it ends them too, and the
    interpreter's exit waits for them. Thread-safe. Not usable in a forked child.
    """

    def __init__(self, depth: int = 4, prefetch_depth: int | None = None) -> None:
        if prefetch_depth is None:
            prefetch_depth = max(1, depth // 2)
        if depth < 1 or not 1 <= prefetch_depth <= depth:
            raise ValueError(f"depth {depth} with prefetch_depth {prefetch_depth}: need 1 <= prefetch_depth <= depth")
        self._pool = _Pool(depth, prefetch_depth)
        _live_pools.add(self._pool)
        # It runs wherever the collector happens to run, perhaps on a worker: it must not wait for the threads.
        weakref.finalize(self, self._pool.shut_down).atexit = False

    @property
    def depth(self) -> int:
        """Most records in flight at once."""
        return self._pool.depth

    @property
    def closed(self) -> bool:
        return self._pool.closed

    def submit_read(
        self, reads: Sequence[Read], priority: Priority = Priority.DEMAND, finish: Finish | None = None
    ) -> ReadHandle:
        """Queue one record: `reads`, done one after another by one worker, then `finish(starts)` on the same worker.

        Returns at once. The destinations belong to the reader until the handle is ready.

        Raises:
            MoertError: the reader is closed, or this is a forked child.
        """
        handle = ReadHandle(self._pool, tuple(reads), priority, finish)
        self._pool.submit(handle)
        return handle

    def totals(self) -> ReadTotals:
        """Records and record bytes read so far (without the rounding to blocks), and how long the disk was busy."""
        return self._pool.totals()

    def close(self) -> None:
        """Fail what is queued, wait for what is in flight, end the threads. Idempotent.

        Handles that were queued raise MoertError in `wait`; those in flight end as they would have.
        """
        self._pool.close()

    def __enter__(self) -> DiskReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
