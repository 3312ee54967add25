"""Records read from disk beside the program: demand before prefetch, first in first out within each."""

from __future__ import annotations

import atexit
import contextlib
import weakref
from collections.abc import Sequence

from moert import _C
from moert.tiers.depth import START_DEPTH
from moert.tiers.native_reads import PIECE_BYTES, NativeReads, guess_lanes
from moert.tiers.read import Finish, Moving, Priority, Read, ReadHandle, ReadTotals, reader_closed
from moert.tiers.read_plan import PlannedRead
from moert.tiers.thread_reads import ThreadReads

__all__ = ["DiskReader", "Finish", "Moving", "Priority", "Read", "ReadHandle", "ReadTotals"]


class _Reads:
    """Both kinds of threads. They know nothing of the reader, so a forgotten one is collected and shuts them down."""

    def __init__(self, depth: int | None, prefetch_depth: int | None) -> None:
        self.closed = False
        self.clock = _C.busy_clock()
        at_once = depth or START_DEPTH
        self.threads = ThreadReads(at_once, guess_lanes(at_once, prefetch_depth), self.clock)
        self.native = NativeReads(depth, prefetch_depth, self.clock, self.threads)

    def shut_down(self) -> None:
        """Fail what is queued, and wait for nothing."""
        self.closed = True
        if not self.native.shut_down():
            _unfinished.add(self)
        self.threads.shut_down()

    def close(self) -> None:
        self.closed = True
        # In this order: what fails in the extension is tried again by the others.
        self.native.close()
        self.threads.close()
        _unfinished.discard(self)


_live: weakref.WeakSet[_Reads] = weakref.WeakSet()

# Of readers that were collected in the middle of a read: the memory that it goes to must stay.
_unfinished: set[_Reads] = set()


@atexit.register
def _close_all() -> None:
    for reads in list(_live):
        reads.close()


class DiskReader:
    """Reads records: of each disk up to `depth` pieces at once, of which up to `prefetch_depth` are no demands.

    A piece is about a MiB of a record that is only to be read and moved, and a whole record where a `finish` follows or
    the file is read through the page cache. So records of one priority arrive one after the other, not all at the end.

    `depth` None: as many as the disk's bandwidth gains from, measured while it is used. `prefetch_depth` None: half.

    Threads start with the first reads and end in `close`; a reader that is collected without it ends them too, and the
    interpreter's exit waits for them. Thread-safe. Not usable in a forked child.
    """

    def __init__(self, depth: int | None = None, prefetch_depth: int | None = None) -> None:
        if (depth is not None and depth < 1) or (prefetch_depth is not None and prefetch_depth < 1):
            raise ValueError(f"depth {depth} with prefetch_depth {prefetch_depth}: need 1 <= prefetch_depth <= depth")
        if depth is not None and prefetch_depth is not None and prefetch_depth > depth:
            raise ValueError(f"depth {depth} with prefetch_depth {prefetch_depth}: need 1 <= prefetch_depth <= depth")
        for reads in list(_unfinished):
            if reads.native.sweep():
                _unfinished.discard(reads)
        self._reads = _Reads(depth, prefetch_depth)
        _live.add(self._reads)
        # It runs wherever the collector happens to run, perhaps on a worker: it must not wait for the threads.
        weakref.finalize(self, self._reads.shut_down).atexit = False

    @property
    def depth(self) -> int:
        """Most pieces in flight at once, of one disk; now, where it is measured."""
        return self._reads.native.depth

    @property
    def begun_bytes(self) -> int:
        """Of records read in pieces, and for nobody who waits, what is in flight at most once they are given up."""
        return self._reads.native.prefetch_depth * PIECE_BYTES

    @property
    def closed(self) -> bool:
        return self._reads.closed

    def submit_read(
        self,
        reads: Sequence[Read],
        priority: Priority = Priority.DEMAND,
        finish: Finish | None = None,
        moving: Moving | None = None,
    ) -> ReadHandle:
        """Queue one record: `reads`, then `finish(starts)` on the Python thread that did them.

        `moving` is the same as `finish` for threads without Python: then they read, and `finish` is for what they
        could not. Returns at once. The destinations belong to the reader until the handle is ready.

        Raises:
            MoertError: the reader is closed, or this is a forked child.
        """
        wanted = tuple(reads)
        self._reads.threads.check_process()
        if self._reads.closed:
            raise reader_closed()
        if (finish is None or moving is not None) and wanted:
            handle = self._reads.native.submit(wanted, priority, finish, moving)
            if handle is not None:
                return handle
        return self._reads.threads.submit(wanted, priority, finish)

    def submit_planned(
        self, wanted: Sequence[PlannedRead], priority: Priority = Priority.DEMAND
    ) -> Sequence[ReadHandle]:
        """Queue several records, in this order and all of them, or none: `submit_read` of each, with less around it.

        Returns at once, unless it raises: then it waits for what had been begun. The buffers and destinations belong
        to the reader until the handles are ready.

        Raises:
            MoertError: see `submit_read`.
        """
        native = self._reads.native.submit_planned(wanted, priority)
        if native is not None:
            return native
        handles: list[ReadHandle] = []
        try:
            for one in wanted:
                handles += [self.submit_read(one.reads(), priority, one.finish, one.moving)]
        except Exception:
            for handle in handles:
                handle.give_up()
            for handle in handles:
                with contextlib.suppress(Exception):  # the error that ended it is the one to report
                    handle.wait()
            raise
        return handles

    def totals(self) -> ReadTotals:
        """Records and record bytes read so far (without the rounding to blocks), and how long a disk was busy."""
        native, threads = self._reads.native.totals(), self._reads.threads
        return ReadTotals(
            native[0] + threads.records, native[1] + threads.bytes_read, _C.busy_seconds(self._reads.clock)
        )

    def close(self) -> None:
        """Fail what is queued, wait for what is in flight, end the threads. Idempotent.

        Handles that were queued raise MoertError in `wait`; those in flight end as they would have.
        """
        self._reads.close()

    def __enter__(self) -> DiskReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
