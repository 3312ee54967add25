"""Python threads that read records: any file, any failure, and whatever is to be done with the bytes."""

from __future__ import annotations

import contextlib
import enum
import os
import threading
import time
import traceback
from collections import deque

from moert import _C
from moert.tiers.read import (
    Finish,
    Priority,
    Read,
    ReadHandle,
    cancelled,
    check_process,
    closed_before,
    not_in_time,
    reader_closed,
    record_bytes,
)

LOOK_S = 60.0
"""An idle thread looks so often whether its reader is closed: one that shut it down itself, on its way to sleep, has
woken nobody."""


class _State(enum.Enum):
    QUEUED = enum.auto()
    RUNNING = enum.auto()
    DONE = enum.auto()
    CANCELLED = enum.auto()


class ThreadHandle(ReadHandle):
    """A record that a Python thread reads."""

    def __init__(self, owner: ThreadReads, reads: tuple[Read, ...], priority: Priority, finish: Finish | None) -> None:
        self._owner = owner
        self._reads = reads
        self._finish = finish
        self.priority = priority
        self._state = _State.QUEUED
        # A plain lock, held until the record is there: an interrupt on the way into an Event's condition leaves that
        # locked, and then the worker never gets past it.
        self._over = threading.Lock()
        self._over.acquire()
        self._is_over = False
        self._starts: tuple[int, ...] = ()
        self._error: BaseException | None = None
        self._read_s = 0.0

    @property
    def ready(self) -> bool:
        return self._is_over

    @property
    def read_s(self) -> float:
        return self._read_s

    def wait(self, timeout: float | None = None) -> tuple[int, ...]:
        if not self._is_over:
            self._owner.check_process()
            if timeout is None:
                with self._over:
                    pass
            elif self._over.acquire(timeout=timeout):
                self._over.release()
            else:
                raise not_in_time(record_bytes(self._reads), timeout)
        if self._error is not None:
            raise self._error
        return self._starts

    def cancel(self) -> bool:
        return self._owner.cancel(self)

    def give_up(self) -> bool:
        return self._owner.cancel(self)

    def promote(self, priority: Priority = Priority.DEMAND) -> bool:
        return self._owner.promote(self, priority)

    def _run(self) -> None:
        whole = False
        began = time.perf_counter()
        try:
            try:
                self._starts = tuple(read.file.read(read.offset, read.nbytes, read.destination) for read in self._reads)
                whole = True
            finally:
                self._read_s = time.perf_counter() - began
                self._owner.read_ended(self._reads, whole)
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
        self._is_over = True
        self._over.release()


def _release_frames(error: BaseException) -> None:
    """Empty the frames of an error and of those that led to it: it may be kept for long, and they hold the buffers."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


class ThreadReads:
    """Queues, threads and counters. Threads hold this, never the reader itself, so that a forgotten reader is collected
    and then shuts its threads down."""

    def __init__(self, depth: int, prefetch_depth: int, clock: object) -> None:
        """`clock` is a `_C.busy_clock`, which runs while anything is read."""
        self.depth = depth
        self.prefetch_depth = prefetch_depth
        self.closed = False
        self.records = 0
        self.bytes_read = 0
        self._clock = clock
        self._pid = os.getpid()
        # Threads that may be interrupted enter by the lock itself; whoever is interrupted on the way into a condition
        # never leaves it. A thread may have it already when the garbage collector has it shut a forgotten reader down.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._running: set[ThreadHandle] = set()
        self._queues: dict[Priority, deque[ThreadHandle]] = {priority: deque() for priority in Priority}
        self._guesses = 0
        self._threads: list[threading.Thread] = []
        self._idle = 0

    def check_process(self) -> None:
        check_process(self._pid)

    def submit(self, reads: tuple[Read, ...], priority: Priority, finish: Finish | None) -> ThreadHandle:
        """Queue a record.

        Raises:
            MoertError: closed, or in a forked child.
        """
        handle = ThreadHandle(self, reads, priority, finish)
        self.check_process()
        with self._lock:
            if self.closed:
                raise reader_closed()
            queued = sum(len(queue) for queue in self._queues.values())
            if self._idle <= queued and len(self._threads) < self.depth:
                # Daemon only so that the interpreter's exit gets as far as the reader's exit handler, which joins them.
                thread = threading.Thread(target=self._work, name=f"moert-read-{len(self._threads)}", daemon=True)
                # In this order: an interrupt in `start` comes when the thread runs already.
                self._threads.append(thread)
                try:
                    thread.start()
                except RuntimeError as error:
                    # So an interrupt comes out of `start` when it hits the condition in which that waits for the thread
                    # to have begun: the thread runs.
                    if isinstance(error.__context__, KeyboardInterrupt):
                        raise error.__context__ from None
                    self._threads.remove(thread)
                    raise
            self._queues[handle.priority].append(handle)
            self._changed.notify()
        return handle

    def read_here(self, reads: tuple[Read, ...], finish: Finish | None = None) -> ThreadHandle:
        """Read a record on the calling thread, beside the queues. Blocks; the handle says how it went."""
        handle = ThreadHandle(self, reads, Priority.DEMAND, finish)
        handle._state = _State.RUNNING
        _C.busy_enter(self._clock)
        handle._run()
        return handle

    def cancel(self, handle: ThreadHandle) -> bool:
        with self._lock:
            if handle._state is not _State.QUEUED:
                return False
            self._queues[handle.priority].remove(handle)
            handle._settle(_State.CANCELLED, cancelled())
            return True

    def promote(self, handle: ThreadHandle, priority: Priority) -> bool:
        with self._lock:
            if handle._state is not _State.QUEUED or handle.priority <= priority:
                return False
            self._queues[handle.priority].remove(handle)
            handle.priority = priority
            self._queues[priority].append(handle)
            self._changed.notify()
            return True

    def read_ended(self, reads: tuple[Read, ...], whole: bool) -> None:
        with self._lock:
            _C.busy_leave(self._clock)
            if whole:
                self.records += 1
                self.bytes_read += record_bytes(reads)

    def shut_down(self) -> None:
        """Fail what is queued and tell the threads to end after what they are reading. Does not wait."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self.closed = True
            abandoned = [handle for queue in self._queues.values() for handle in queue]
            for queue in self._queues.values():
                queue.clear()
            for handle in abandoned:
                handle._settle(_State.CANCELLED, closed_before())
            self._changed.notify_all()

    def close(self) -> None:
        if os.getpid() != self._pid:
            return  # whoever had the lock when it forked has it for ever
        self.shut_down()
        # A `finish` may be what closes the reader.
        if threading.current_thread() not in self._threads:
            with self._lock:
                running = list(self._running)
            for handle in running:
                with contextlib.suppress(Exception):
                    handle.wait()
        for thread in self._threads:
            # One whose start was interrupted may not run yet; it will find nothing to do.
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join()

    def _work(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        # A function of its own: an idle worker's frame must not keep the last record's buffers alive.
        handle = self._take()
        if handle is None:
            return False
        guess = handle.priority is not Priority.DEMAND
        handle._run()
        with self._lock:
            self._running.discard(handle)
            if guess:
                self._guesses -= 1
                self._changed.notify()
        return True

    def _take(self) -> ThreadHandle | None:
        """The next record to read, waiting for one; None once closed."""
        with self._lock:
            self._idle += 1
            try:
                while not self.closed:
                    handle = self._next_handle()
                    if handle is not None:
                        handle._state = _State.RUNNING
                        self._running.add(handle)
                        _C.busy_enter(self._clock)
                        return handle
                    if not self.closed:
                        self._changed.wait(LOOK_S)
            finally:
                self._idle -= 1
        return None

    def _next_handle(self) -> ThreadHandle | None:
        if self._queues[Priority.DEMAND]:
            return self._queues[Priority.DEMAND].popleft()
        # A demand that comes now waits for what is in flight, so guesses never fill all the lanes.
        if self._guesses < self.prefetch_depth:
            for priority in (Priority.PROMOTION, Priority.PREFETCH):
                if self._queues[priority]:
                    self._guesses += 1
                    return self._queues[priority].popleft()
        return None
