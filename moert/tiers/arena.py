"""Host memory for experts: one mapping, made once, equal slots within it, and memory behind those that are in use."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Iterable

from moert import _C
from moert.config import format_bytes
from moert.errors import CapacityError, MoertError
from moert.tiers.extents import Extents
from moert.tiers.memory import memory_report

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20

# Clearing pages is bound by memory bandwidth, which a few threads already use up.
_MAX_PREFAULT_THREADS = 8

# Wiped in a forked child: a copy-on-write copy would double the memory, and the parent's O_DIRECT reads in flight could
# land in the child's copy. Out of core dumps: nobody wants the weights there.
_MADV_WIPEONFORK = 18
_ADVICE = (_MADV_WIPEONFORK, mmap.MADV_DONTDUMP)

# Plain MADV_DONTNEED is refused where a process has locked its memory (mlockall); kernels before 5.18 know only that.
_MADV_DONTNEED_LOCKED = 24

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class HostArena:
    """One private anonymous mapping with 2 MiB-aligned start, huge pages where the kernel has them, resident.

    Every page that is committed has its memory: all of them when the constructor returns, or those that `commit` is
    told. So reads into it never wait for the kernel to clear one, and no second process shares it: a forked child sees
    the arena as closed (and the mapping as zeros). What is not committed is address space and no memory, as long as
    nobody writes there.

    Ownership: the arena owns the memory; what `view` returns, and any tensor made from that by `torch.frombuffer`,
    keeps the addresses mapped but not the contents. `close` gives the pages back at once, and such a left-over view
    then reads zeros: it never reads another owner's data and never faults. A plain address (`address`, or a tensor made
    from one through ctypes) keeps nothing and must not outlive the arena. Memory registered with CUDA is unregistered
    before `close`.

    Blocks while the pages are filled in, without the GIL. Safe to use from several threads; `commit`, `decommit` and
    `close` are not to race with use.

    Raises:
        CapacityError: `nbytes` is more than this machine or a cgroup has left, or the kernel refuses it.
    """

    def __init__(self, nbytes: int, *, reserve: bool = False) -> None:
        """`reserve`: take the address space only, and give it memory by `commit`."""
        if nbytes <= 0:
            raise ValueError(f"an arena of {nbytes} bytes cannot be; give at least one byte")
        if not reserve:
            _check_room(nbytes)
        self.nbytes = nbytes
        self.populated = True
        """Whether the kernel filled the pages in at one request, rather than page by page."""
        self._pid = os.getpid()
        self._extents = Extents()
        self._mapping, view = _map_aligned(nbytes, reserve=reserve)
        self._view: memoryview | None = view
        self.address = _address_of(view)
        self._start = -_address_of_mapping(self._mapping) % HUGE_PAGE_BYTES
        if reserve:
            # The last huge page of a range in use would bring memory in beyond it, above any budget.
            self._advise(mmap.MADV_NOHUGEPAGE, 0, nbytes)
        else:
            try:
                self._fill_in([(0, nbytes)])
            except BaseException:
                self.close()
                raise

    @property
    def committed_bytes(self) -> int:
        """How much of it has memory."""
        return self._extents.nbytes

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

    def commit(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Give each range (offset, nbytes) its memory; what has some keeps its contents, the rest reads zeros. Blocks.

        Raises:
            CapacityError: it is more than this machine or a cgroup has left, or the kernel refuses it; nothing has
                changed.
            MoertError: the arena is closed.
            ValueError: a range is not inside the arena.
        """
        missing = []
        for offset, nbytes in ranges:
            self._check_range(offset, nbytes)
            missing += self._extents.missing(offset, offset + nbytes)
        if missing:
            _check_room(sum(end - begin for begin, end in missing))
            self._fill_in(missing)

    def decommit(self, offset: int, nbytes: int) -> None:
        """Give a range's memory back to the system; it reads zeros from then on. Nobody may be reading or writing it.

        Raises:
            MoertError: the arena is closed.
            ValueError: the range is not inside the arena.
        """
        self._check_range(offset, nbytes)
        begin, end = offset, offset + nbytes
        blocks = {begin // HUGE_PAGE_BYTES, (end - 1) // HUGE_PAGE_BYTES} if nbytes else set()
        split = [block for block in sorted(blocks) if self._is_whole(block)]
        self._extents.remove(begin, end)
        for block in split:
            self._split_huge_page(block)
        if nbytes:
            self._advise(mmap.MADV_NOHUGEPAGE, *_blocks_around(begin, end))
            self._give_back(begin, end)

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

    def _fill_in(self, ranges: list[tuple[int, int]]) -> None:
        """Commit ranges [begin, end) of which nothing is committed yet: all of them or none."""
        for begin, end in ranges:
            self._extents.add(begin, end)
        try:
            for begin, end in ranges:
                first, last = _blocks_around(begin, end)
                first += 0 if self._is_whole(first // HUGE_PAGE_BYTES) else HUGE_PAGE_BYTES
                last -= 0 if self._is_whole(last // HUGE_PAGE_BYTES - 1) else HUGE_PAGE_BYTES
                self._advise(mmap.MADV_HUGEPAGE, first, last)
                threads = min(_MAX_PREFAULT_THREADS, os.cpu_count() or 1)
                self.populated &= _C.prefault(self.address + begin, end - begin, threads)
        except BaseException as error:
            for begin, end in ranges:
                self.decommit(begin, end - begin)
            if isinstance(error, OSError):
                raise _refused(sum(end - begin for begin, end in ranges), error) from error
            raise

    def _is_whole(self, block: int) -> bool:
        """Whether a block of 2 MiB has nothing in it that is not committed."""
        begin = block * HUGE_PAGE_BYTES
        return self._extents.covers(begin, min(begin + HUGE_PAGE_BYTES, self.nbytes))

    def _split_huge_page(self, block: int) -> None:
        """Move what is committed of a block out of its huge page, which otherwise keeps all of its memory."""
        begin, end = _blocks_around(block * HUGE_PAGE_BYTES, block * HUGE_PAGE_BYTES + 1)
        assert self._view is not None
        kept = [(slice(b, e), bytes(self._view[b:e])) for b, e in self._extents.within(begin, end)]
        self._advise(mmap.MADV_NOHUGEPAGE, begin, end)
        try:
            self._give_back(begin, end)
        finally:  # an interrupt that came meanwhile is raised here, and these are bytes of residents
            for place, content in kept:
                self._view[place] = content

    def _give_back(self, begin: int, end: int) -> None:
        try:
            self._madvise(_MADV_DONTNEED_LOCKED, begin, end)
        except OSError:
            self._madvise(mmap.MADV_DONTNEED, begin, end)

    def _advise(self, advice: int, begin: int, end: int) -> None:
        # A kernel without huge pages still gives plain memory.
        with contextlib.suppress(OSError):
            self._madvise(advice, begin, end)

    def _madvise(self, advice: int, begin: int, end: int) -> None:
        end = min(self._start + end, len(self._mapping))
        if self._start + begin < end:
            self._mapping.madvise(advice, self._start + begin, end - self._start - begin)

    def _check_range(self, offset: int, nbytes: int) -> None:
        if self.closed:
            raise MoertError(f"the host arena of {format_bytes(self.nbytes)} is closed; load or patch the model again")
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"bytes {offset}..{offset + nbytes} are not inside an arena of {self.nbytes} bytes")


class SlotBank:
    """`n_slots` equal slots of an arena, one expert record each, the first at `offset`.

    `offset` and `slot_bytes` are multiples of 4096, as O_DIRECT wants its destinations. The arena owns the memory; a
    bank is arithmetic and needs no closing. Slots may be added until there are `max_slots` (by default there is no
    room for more), and taken away, at the high end.

    Raises:
        CapacityError: the slots do not fit in the arena.
        ValueError: a number that cannot be, or is not a multiple of 4096.
    """

    def __init__(
        self, arena: HostArena, offset: int, slot_bytes: int, n_slots: int, max_slots: int | None = None
    ) -> None:
        if offset < 0 or slot_bytes <= 0 or n_slots < 0 or offset % PAGE_BYTES or slot_bytes % PAGE_BYTES:
            raise ValueError(f"{n_slots} slots of {slot_bytes} bytes at {offset}: not multiples of {PAGE_BYTES}")
        self.max_slots = n_slots if max_slots is None else max_slots
        if self.max_slots < n_slots:
            raise ValueError(f"{n_slots} slots in a bank with room for {max_slots}")
        if offset + slot_bytes * self.max_slots > arena.nbytes:
            raise CapacityError(
                f"{self.max_slots} slots of {format_bytes(slot_bytes)} at byte {offset} need "
                f"{offset + slot_bytes * self.max_slots} bytes, the arena has {arena.nbytes}; raise host_memory"
            )
        self.arena = arena
        self.offset = offset
        self.slot_bytes = slot_bytes
        self.n_slots = n_slots
        """Those in use, which have their memory if the arena has been told so."""

    def __len__(self) -> int:
        return self.n_slots

    def range(self, n_slots: int) -> tuple[int, int]:
        """(offset, bytes) of the first `n_slots` slots in the arena."""
        assert 0 <= n_slots <= self.max_slots, f"{n_slots} slots in a bank with room for {self.max_slots}"
        return self.offset, n_slots * self.slot_bytes

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


def _blocks_around(begin: int, end: int) -> tuple[int, int]:
    """[begin, end), rounded out to whole huge pages."""
    return begin // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES, -(-end // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES


def _check_room(nbytes: int) -> None:
    report = memory_report()
    if nbytes > report.available_bytes:
        # Asking all the same would end in the kernel killing this process, or another, part-way through.
        raise CapacityError(
            f"{format_bytes(nbytes)} of host memory for experts is more than there is ({report.binding}); "
            "lower host_memory"
        )


def _map_aligned(nbytes: int, *, reserve: bool) -> tuple[mmap.mmap, memoryview]:
    # MAP_PRIVATE, not Python's default: shared anonymous memory is shmem, which gets no huge pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_NORESERVE if reserve else 0)
    try:
        mapping = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES - PAGE_BYTES, flags=flags)
    except (OSError, ValueError, OverflowError) as error:
        raise _refused(nbytes, error) from error
    for advice in _ADVICE:
        # A kernel that does not know one of them still gives plain memory.
        with contextlib.suppress(OSError):
            mapping.madvise(advice)
    start = -_address_of_mapping(mapping) % HUGE_PAGE_BYTES
    whole = memoryview(mapping)
    view = whole[start : start + nbytes]
    whole.release()
    return mapping, view


def _address_of_mapping(mapping: mmap.mmap) -> int:
    with memoryview(mapping) as whole:
        return _address_of(whole)


def _address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _refused(nbytes: int, error: Exception) -> CapacityError:
    reason = errno.errorcode.get(error.errno or 0, "") if isinstance(error, OSError) else type(error).__name__
    return CapacityError(
        f"the kernel refused {format_bytes(nbytes)} of host memory for experts ({reason} {error}); "
        f"{memory_report().binding}; lower host_memory"
    )
