"""What memory this process has, by the kernel's own tables."""

from __future__ import annotations

import ctypes
import gc
import mmap
import re
from array import array
from pathlib import Path

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20


def present_pages(address: int, nbytes: int) -> set[int]:
    """Numbers of the pages of [address, address + nbytes) that have memory, counted from `address`."""
    with open("/proc/self/pagemap", "rb") as table:
        table.seek(address // PAGE_BYTES * 8)
        entries = array("Q", table.read(nbytes // PAGE_BYTES * 8))
    return {page for page, entry in enumerate(entries) if entry >> 63}


def present_bytes(address: int, nbytes: int) -> int:
    """Bytes of [address, address + nbytes) that have memory."""
    return PAGE_BYTES * len(present_pages(address, nbytes))


def resident_bytes() -> int:
    """Resident bytes of this process, to be compared with those of another moment.

    What earlier tests left to the garbage collector goes first, and what the allocator keeps of theirs, lest it go
    between the two. Not VmRSS: some kernels add it up lazily, and are off by MiBs where there are many CPUs.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _whole_process("Rss")


def gets_huge_pages(nbytes: int) -> bool:
    """Whether this much memory, asking for them, is in huge pages: not where they are off or no free ones are left."""
    before = _whole_process("AnonHugePages")
    with mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, len(block), PAGE_BYTES):
            block[offset] = 1
        return _whole_process("AnonHugePages") - before >= nbytes


def _whole_process(name: str) -> int:
    found = re.search(rf"(?m)^{name}:\s+(\d+) kB$", Path("/proc/self/smaps_rollup").read_text())
    assert found is not None
    return int(found[1]) << 10
