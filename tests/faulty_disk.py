"""Calls to the system that go wrong when a test says so, beneath real files and the real reader."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moert.tiers.disk import FileCalls

PATIENCE_S = 30.0
"""No wait of a test is longer; what has not happened by then is a deadlock."""


@dataclass(eq=False)
class Fault:
    """What becomes of reads that touch bytes [begin, end) of a file: of the next `times`, or of all of them."""

    code: int | None = None
    """The errno that they fail with."""
    keep_bytes: int | None = None
    """They read no more than this, and fill the rest of their buffer with nonsense."""
    flip_at: int | None = None
    """The byte of the file of which a bit comes back turned. Only a record with a checksum can show that."""
    path: str | None = None
    begin: int = 0
    end: int = sys.maxsize
    times: int | None = None


@dataclass(eq=False)
class HeldRead:
    """A call that waits at the gate, on the thread that made it."""

    path: str
    offset: int
    due: float
    is_let_through: bool = False


class FaultyDisk:
    """Any number of files, opened with `calls`. Thread-safe.

    While its gate is closed, calls wait there for `let_through`. While it is open, they go one at a time, and of those
    that wait together not the first one but one by chance, so that reads end out of order without a clock.

    What changes a file as a whole (truncation, replacing, overwriting) a test does to the file itself.
    """

    def __init__(self, seed: int = 0) -> None:
        self.calls = FileCalls(open=self._open, preadv=self._preadv)
        self.faults: list[Fault] = []
        self.refuses_direct = False
        """EINVAL for what is read past the page cache, as file systems say it that cannot."""
        self.before_call: Callable[[], None] | None = None
        self.count = 0
        """Calls so far."""
        self._paths: dict[int, str] = {}
        # Entered as a lock: an interrupt on the way into a condition would leave it locked.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._is_open = True
        self._waiting: list[HeldRead] = []
        self._random = random.Random(seed)

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self.faults.append(fault)
        return fault

    def mend(self) -> None:
        """No faults from now on; calls that have failed have failed."""
        with self._lock:
            self.faults.clear()
            self.refuses_direct = False

    def hold(self) -> None:
        """Close the gate."""
        with self._lock:
            self._is_open = False

    def release(self) -> None:
        """Open the gate."""
        with self._lock:
            self._is_open = True
            self._changed.notify_all()

    def wait_held(self, count: int) -> None:
        """Block until so many calls are at the gate."""
        with self._lock:
            assert self._changed.wait_for(lambda: len(self._waiting) >= count, PATIENCE_S), (
                f"{len(self._waiting)} of {count} calls have come to the gate"
            )

    def held(self) -> list[HeldRead]:
        """The calls that are at the gate now, by place."""
        with self._lock:
            return sorted(self._waiting, key=lambda read: (read.path, read.offset))

    def let_through(self, read: HeldRead) -> None:
        """Block until one call has left the gate."""
        with self._lock:
            read.is_let_through = True
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: read not in self._waiting, PATIENCE_S)

    def _pass_gate(self, path: str, offset: int) -> None:
        with self._lock:
            self.count += 1
            read = HeldRead(path, offset, self._random.random())
            self._waiting.append(read)
            self._changed.notify_all()

            def may_go() -> bool:
                return read.is_let_through or (self._is_open and read.due == min(other.due for other in self._waiting))

            passed = self._changed.wait_for(may_go, 10 * PATIENCE_S)
            self._waiting.remove(read)
            self._changed.notify_all()
            assert passed, "nobody has opened the gate"

    def _open(self, path: str, flags: int) -> int:
        if self.refuses_direct and flags & os.O_DIRECT:
            raise _error(errno.EINVAL)
        fd = os.open(path, flags)
        self._paths[fd] = path
        return fd

    def _preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        path, nbytes = self._paths[fd], sum(len(buffer) for buffer in buffers)
        self._pass_gate(path, offset)
        if self.before_call is not None:
            self.before_call()
        if self.refuses_direct and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise _error(errno.EINVAL)
        fault = self._take_fault(path, offset, offset + nbytes)
        if fault is None:
            return os.preadv(fd, buffers, offset)
        if fault.code is not None:
            raise _error(fault.code)
        (buffer,) = buffers
        count = os.preadv(fd, [buffer], offset)
        if fault.flip_at is not None and offset <= fault.flip_at < offset + count:
            buffer[fault.flip_at - offset] ^= 16
        if fault.keep_bytes is not None and fault.keep_bytes < count:
            count = fault.keep_bytes
            buffer[count:] = b"\xa5" * (len(buffer) - count)
        return count

    def _take_fault(self, path: str, begin: int, end: int) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.path in (None, path) and fault.begin < end and begin < fault.end:
                    if fault.times is not None:
                        fault.times -= 1
                        if fault.times == 0:
                            self.faults.remove(fault)
                    return fault
        return None


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
