"""Records read one after the other, with the next ones already on their way."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from moert.runtime.records import Span
from moert.tiers.arena import SlotBank
from moert.tiers.disk import DiskReader, Priority, Read, ReadHandle, ShardFile

T = TypeVar("T")

Wanted = tuple[T, Sequence[Span], Sequence[int]]
"""Whatever the caller knows it by, its spans, and where the window of each starts in a buffer."""


Work = Callable[[T, int, memoryview], None]
"""What is done with a record on the thread that has read it: (the record, its slot, its buffer)."""


def read_ahead(
    reader: DiskReader,
    files: Sequence[ShardFile],
    bank: SlotBank,
    wanted: Iterable[Wanted[T]],
    work: Work[T] | None = None,
) -> Iterator[tuple[T, int, memoryview]]:
    """Yield the records in order, each with its slot of `bank` and the buffer there, valid until the next is asked for.

    As many are read and worked on at once as `bank` has slots and `reader` threads. When the iterator is closed nothing
    is under way any more.

    Raises:
        CorruptFileError, TransferError: a record could not be read.
        Exception: whatever `work` raised.
    """
    started: deque[tuple[T, int, memoryview, ReadHandle]] = deque()
    free = deque(range(bank.n_slots))
    source = iter(wanted)

    def start() -> None:
        item = next(source, None)
        if item is None:
            return
        what, spans, positions = item
        slot = free.popleft()
        buffer = bank.slot(slot)
        reads = [
            Read(files[span.file], span.offset, span.nbytes, buffer[position : position + span.window_bytes])
            for span, position in zip(spans, positions, strict=True)
        ]
        finish = None if work is None else lambda _: work(what, slot, buffer)
        started.append((what, slot, buffer, reader.submit_read(reads, Priority.DEMAND, finish=finish)))
        free.append(slot)  # it comes to its turn again once those before it have been handed out

    try:
        for _ in range(bank.n_slots):
            start()
        while started:
            what, slot, buffer, handle = started[0]
            handle.wait()
            yield what, slot, buffer
            started.popleft()
            start()
    finally:
        for *_, handle in started:
            handle.cancel()
        for *_, handle in started:
            with contextlib.suppress(Exception):  # the error that ended it is the one to report
                handle.wait()
