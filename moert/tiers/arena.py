"""Host memory for experts: one mapping, made once, and equal slots within it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os

from moert import _C
from moert.config import format_bytes
from moert.errors import CapacityError, MoertError
from moert.tiers.memory import memory_report

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20

# Clearing pages is bound by memory bandwidth, which a few threads already use up.
_MAX_PREFAULT_THREADS = 8

# Wiped in a forked child: a copy-on-write copy would double the memory, and the parent's O_DIRECT reads in flight could
# land in the child's copy. Out of core dumps: nobody wants the weights there.
_MADV_WIPEONFORK = 18
_ADVICE = (mmap.MADV_HUGEPAGE, _MADV_WIPEONFORK, mmap.MADV_DONTDUMP)


class HostArena:
    """One private anonymous mapping with 2 MiB-aligned start, huge pages where the kernel has them, all of it resident.

    Every page has its memory when the constructor returns, so later reads into it never wait for the kernel to clear
    one, and no second process shares it: a forked child sees the arena as closed (and the mapping as zeros).

    Ownership: the arena owns the memory; what `view` returns, and any tensor made from that by `torch.frombuffer`,
    keeps the addresses mapped but not the contents. `close` gives the pages back at once, and such a left-over view
    then reads zeros: it never reads another owner's data and never faults. A plain address (`address`, or a tensor made
    from one through ctypes) keeps nothing and must not outlive the arena. Memory registered with CUDA is unregistered
    before `close`.

    Blocks while the pages are filled in, without the GIL. Safe to use from several threads; `close` is not to race with
    use.

    Raises:
        CapacityError: `nbytes` is more than this machine or a cgroup has left, or the kernel refuses it.
    """

    def __init__(self, nbytes: int) -> None:
        if nbytes <= 0:
            raise ValueError(f"an arena of {nbytes} bytes cannot be; give at least one byte")
        self.nbytes = nbytes
        self._pid = os.getpid()
        self._mapping, view = _map_aligned(nbytes)
        self._view: memoryview | None = view
        self.address = _address_of(view)
        try:
            self.populated = _C.prefault(self.address, nbytes, min(_MAX_PREFAULT_THREADS, os.cpu_count() or 1))
        except OSError as error:
            self.close()
            raise _refused(nbytes, error) from error

    @property
    def closed(self) -> bool:
        """Whether the memory is gone: after `close`, and in a forked child."""
        return self._view is None or os.getpid() != self._pid

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Writable bytes [offset, offset + nbytes) of the arena; see the class for how long they may be used.

        Raises:
            MoertError: the arena is closed.
            ValueError: the range is not inside the arena.
        """
        self._check_range(offset, nbytes)
        assert self._view is not None
        return self._view[offset : offset + nbytes]

    def poison(self, offset: int, nbytes: int) -> None:
        """Fill a range with 0xFF, which is NaN in bf16, fp16 and fp32, so that a stale read is loud. Blocks.

        Raises:
            MoertError: the arena is closed.
            ValueError: the range is not inside the arena.
        """
        self._check_range(offset, nbytes)
        _C.fill(self.address + offset, nbytes, 0xFF)

    def close(self) -> None:
        """Give the memory back. Views and tensors still alive stay safe to touch and read zeros. Idempotent."""
        if self._view is None:
            return
        self._view.release()
        self._view = None
        self.address = 0
        try:
            self._mapping.close()
        except BufferError:
            # Views are alive: their addresses must stay mapped, until the last of them lets go of the mapping object.
            with contextlib.suppress(OSError):
                self._mapping.madvise(mmap.MADV_DONTNEED)
        del self._mapping

    def _check_range(self, offset: int, nbytes: int) -> None:
        if self.closed:
            raise MoertError(f"the host arena of {format_bytes(self.nbytes)} is closed; load or patch the model again")
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"bytes {offset}..{offset + nbytes} are not inside an arena of {self.nbytes} bytes")


class SlotBank:
    """`n_slots` equal slots of an arena, one expert record each, the first at `offset`.

    `offset` and `slot_bytes` are multiples of 4096, as O_DIRECT wants its destinations. The arena owns the memory; a
    bank is arithmetic and needs no closing.

    Raises:
        CapacityError: the slots do not fit in the arena.
        ValueError: a number that cannot be, or is not a multiple of 4096.
    """

    def __init__(self, arena: HostArena, offset: int, slot_bytes: int, n_slots: int) -> None:
        if offset < 0 or slot_bytes <= 0 or n_slots < 0 or offset % PAGE_BYTES or slot_bytes % PAGE_BYTES:
            raise ValueError(f"{n_slots} slots of {slot_bytes} bytes at {offset}: not multiples of {PAGE_BYTES}")
        if offset + slot_bytes * n_slots > arena.nbytes:
            raise CapacityError(
                f"{n_slots} slots of {format_bytes(slot_bytes)} at byte {offset} need {offset + slot_bytes * n_slots} "
                f"bytes, the arena has {arena.nbytes}; raise host_memory"
            )
        self.arena = arena
        self.offset = offset
        self.slot_bytes = slot_bytes
        self.n_slots = n_slots

    def __len__(self) -> int:
        return self.n_slots

    def slot(self, index: int) -> memoryview:
        """The writable bytes of slot `index`; the arena says how long they may be used."""
        return self.arena.view(self._offset_of(index), self.slot_bytes)

    def address(self, index: int) -> int:
        """Where slot `index` starts; a multiple of 4096."""
        return self.arena.address + self._offset_of(index)

    def poison(self, index: int) -> None:
        """Make every number in slot `index` NaN. Blocks."""
        self.arena.poison(self._offset_of(index), self.slot_bytes)

    def _offset_of(self, index: int) -> int:
        assert 0 <= index < self.n_slots, f"slot {index} of {self.n_slots}"
        return self.offset + index * self.slot_bytes


def _map_aligned(nbytes: int) -> tuple[mmap.mmap, memoryview]:
    report = memory_report()
    if nbytes > report.available_bytes:
        # Asking all the same would end in the kernel killing this process, or another, part-way through.
        raise CapacityError(
            f"{format_bytes(nbytes)} of host memory for experts is more than there is ({report.binding}); "
            "lower host_memory"
        )
    try:
        # MAP_PRIVATE, not Python's default: shared anonymous memory is shmem, which gets no huge pages.
        mapping = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES - PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise _refused(nbytes, error) from error
    for advice in _ADVICE:
        # A kernel that does not know one of them still gives plain memory.
        with contextlib.suppress(OSError):
            mapping.madvise(advice)
    whole = memoryview(mapping)
    start = -_address_of(whole) % HUGE_PAGE_BYTES
    view = whole[start : start + nbytes]
    whole.release()
    return mapping, view


def _address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _refused(nbytes: int, error: Exception) -> CapacityError:
    reason = errno.errorcode.get(error.errno or 0, "") if isinstance(error, OSError) else type(error).__name__
    return CapacityError(
        f"the kernel refused {format_bytes(nbytes)} of host memory for experts ({reason} {error}); "
        f"{memory_report().binding}; lower host_memory"
    )
