"""The disk tier: files, the threads that read them, and how fast this disk is."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections import deque
from collections.abc import Sequence

from moert.tiers.arena import HostArena, SlotBank
from moert.tiers.read_plan import Buffer, PlannedRead, ReadPlan, Window
from moert.tiers.reader import DiskReader, Moving, Priority, Read, ReadHandle, ReadTotals
from moert.tiers.shard_file import BLOCK_BYTES, FileCalls, FileIdentity, ShardFile, window_bytes

__all__ = [
    "BLOCK_BYTES",
    "Buffer",
    "DiskReader",
    "FileCalls",
    "FileIdentity",
    "Moving",
    "PlannedRead",
    "Priority",
    "Read",
    "ReadHandle",
    "ReadPlan",
    "ReadTotals",
    "ShardFile",
    "Window",
    "measure_read_bandwidth",
    "window_bytes",
]


def measure_read_bandwidth(
    paths: Sequence[str | os.PathLike[str]], record_bytes: int, depth: int = 4, seconds: float = 1.0
) -> float:
    """Bytes per second of random reads of `record_bytes` over existing files, `depth` in flight, for about `seconds`.

    This is the hardware limit that benchmarks print beside their own rate. Reads go past the page cache where the file
    system can; where it cannot, a cached file answers from memory. Files smaller than a record are left out. Takes
    `depth` records of host memory. Blocks.

    Raises:
        ValueError: no file is as large as one record.
        TransferError, CorruptFileError: as `ShardFile` raises them.
    """
    record_bytes = -(-record_bytes // BLOCK_BYTES) * BLOCK_BYTES
    with contextlib.ExitStack() as cleanup:
        files = [cleanup.enter_context(ShardFile(path)) for path in paths]
        places = [(file, (file.size - record_bytes) // BLOCK_BYTES) for file in files if file.size >= record_bytes]
        if not places:
            raise ValueError(f"none of {len(files)} files has {record_bytes} bytes, one record; give larger files")
        weights = [blocks + 1 for _, blocks in places]
        pick = random.Random(0)
        arena = cleanup.enter_context(contextlib.closing(HostArena(record_bytes * depth)))
        slots = SlotBank(arena, 0, record_bytes, depth)
        reader = cleanup.enter_context(DiskReader(depth))
        waiting: deque[tuple[int, ReadHandle]] = deque()

        def submit(slot: int) -> None:
            file, blocks = pick.choices(places, weights)[0]
            offset = pick.randint(0, blocks) * BLOCK_BYTES
            read = Read(file, offset, record_bytes, slots.slot(slot))
            waiting.append((slot, reader.submit_read([read])))

        started = time.perf_counter()
        for slot in range(depth):
            submit(slot)
        while waiting:
            slot, handle = waiting.popleft()
            handle.wait()
            if time.perf_counter() - started < seconds:
                submit(slot)
        return reader.totals().bytes_read / (time.perf_counter() - started)
