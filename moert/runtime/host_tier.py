"""The host tier of one model: an arena with a bank of slots for each layer, which can grow and shrink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moert.config import format_bytes
from moert.errors import CapacityError
from moert.plan import LayerNeed, least_bytes
from moert.pressure import floor_bytes, room_to_grow
from moert.tiers.arena import HUGE_PAGE_BYTES, HostArena, SlotBank
from moert.tiers.memory import MemoryReport, why_no_reservation


@dataclass(frozen=True)
class Resized:
    """What `moert.resize` has done."""

    slots: tuple[int, ...]
    """Slots of each layer now."""
    slots_before: tuple[int, ...]
    slot_bytes: int
    """Bytes of host memory reserved for experts now, as in `moert.stats`."""
    slot_bytes_before: int
    evicted: int
    """Experts that had to leave; they are read again when they are needed."""
    moved: int
    """Experts that stayed resident in another slot."""


class HostTier:
    """Slots for all layers in one arena, and a bank of staging buffers behind them.

    Address space is taken for as many slots as there are experts, memory for those in use only. So slots come and go at
    the end of each bank while those before stay where they are. Where address space is not free, there is only as much
    as is in use at first, and that is the most the tier can grow back to.

    Raises:
        CapacityError: the memory cannot be had.
    """

    def __init__(self, needs: Sequence[LayerNeed], slots: Sequence[int], n_staging: int, staging_bytes: int) -> None:
        self.needs = tuple(needs)
        self.least_bytes = least_bytes(needs)
        """Bytes of the slots that one token needs."""
        self.cannot_grow: str | None = why_no_reservation()
        """Why there is no room beyond the first slots; None: there is."""
        if self.cannot_grow is None:
            try:
                self._reserve([need.num_experts for need in needs], slots, HUGE_PAGE_BYTES, n_staging * staging_bytes)
            except CapacityError as error:
                self.cannot_grow = str(error)
        if self.cannot_grow is not None:
            self._reserve(slots, slots, 1, n_staging * staging_bytes)
        self.staging = SlotBank(self.arena, self._staging_offset, staging_bytes, n_staging) if n_staging else None
        try:
            used = [bank.range(bank.n_slots) for bank in self.banks]
            self.arena.commit(used if self.staging is None else [*used, self.staging.range(n_staging)])
        except BaseException:
            self.arena.close()
            raise

    def _reserve(self, room: Sequence[int], slots: Sequence[int], alignment: int, staging_bytes: int) -> None:
        offsets, end = [], 0
        for need, n in zip(self.needs, room, strict=True):
            offsets.append(end)
            # No huge page belongs to two banks: one that loses some of its slots would have to be split.
            end += -(-n * need.slot_bytes // alignment) * alignment
        self._staging_offset = end
        self.arena = HostArena(end + staging_bytes, reserve=True)
        self.banks = tuple(
            SlotBank(self.arena, offset, need.slot_bytes, n, max_slots)
            for need, offset, n, max_slots in zip(self.needs, offsets, slots, room, strict=True)
        )
        self._count()

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots of each layer."""
        return tuple(bank.n_slots for bank in self.banks)

    def check_room(self, slots: Sequence[int], report: MemoryReport) -> None:
        """Raise CapacityError if growing to `slots` would make memory so short that they were taken away again."""
        growth = sum(max(0, n - bank.n_slots) * bank.slot_bytes for bank, n in zip(self.banks, slots, strict=True))
        room, limit = room_to_grow(report)
        if growth and growth > room:
            raise CapacityError(
                f"growing the slots by {format_bytes(growth)} would leave less free than the "
                f"{format_bytes(floor_bytes(limit.limit_bytes))} below which they shrink ({limit}); give host_memory "
                f"at most {format_bytes(self.slots_bytes + max(0, room))}"
            )

    def grow(self, slots: Sequence[int]) -> None:
        """Give every layer at least so many slots; blocks while the pages are filled in.

        Raises:
            CapacityError: there is no memory or no room for them; nothing has changed.
        """
        growing = [(bank, n) for bank, n in zip(self.banks, slots, strict=True) if n > bank.n_slots]
        if any(n > bank.max_slots for bank, n in growing):
            room = sum(bank.max_slots * bank.slot_bytes for bank in self.banks)
            raise CapacityError(
                f"{format_bytes(sum(n * bank.slot_bytes for bank, n in zip(self.banks, slots, strict=True)))} of slots "
                f"are more than the {format_bytes(room)} there is room for, which were taken at the start because "
                f"{self.cannot_grow}; give host_memory at most that, or load the model again"
            )
        self.arena.commit([bank.range(n) for bank, n in growing])
        for bank, n in growing:
            bank.n_slots = n
        self._count()

    def shrink(self, layer: int, n_slots: int) -> None:
        """Leave a layer its first `n_slots` slots and give the others' memory back; nobody may use them any more."""
        bank = self.banks[layer]
        offset, end = bank.offset + n_slots * bank.slot_bytes, bank.offset + bank.n_slots * bank.slot_bytes
        if offset < end:
            bank.n_slots = n_slots
            self._count()
            self.arena.decommit(offset, end - offset)

    def recover(self) -> None:
        """After a `grow` or `shrink` that was cut short: give back what is behind each bank's slots."""
        for bank in self.banks:
            begin, end = bank.n_slots * bank.slot_bytes, bank.max_slots * bank.slot_bytes
            self.arena.decommit(bank.offset + begin, end - begin)
        self._count()

    def _count(self) -> None:
        self.slots_bytes = sum(bank.n_slots * bank.slot_bytes for bank in self.banks)
        """Bytes of all slots in use, without staging buffers."""

    def close(self) -> None:
        """Give all memory back; idempotent."""
        self.arena.close()
