"""Which pages of this process have memory, by the kernel's own table."""

from __future__ import annotations

from array import array

PAGE_BYTES = 4096


def present_pages(address: int, nbytes: int) -> set[int]:
    """Numbers of the pages of [address, address + nbytes) that have memory, counted from `address`."""
    with open("/proc/self/pagemap", "rb") as table:
        table.seek(address // PAGE_BYTES * 8)
        entries = array("Q", table.read(nbytes // PAGE_BYTES * 8))
    return {page for page, entry in enumerate(entries) if entry >> 63}


def present_bytes(address: int, nbytes: int) -> int:
    """Bytes of [address, address + nbytes) that have memory."""
    return PAGE_BYTES * len(present_pages(address, nbytes))
