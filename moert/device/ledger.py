"""Who may read or write which slot when: the books of a device that checks every access."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from moert.device.base import Lease, SlotAccessError


class _State(Enum):
    EMPTY = "empty"
    FILLING = "being filled"
    READY = "ready"


@dataclass
class _Slot:
    filling: int = 0
    state: _State = _State.EMPTY
    readers: int = 0
    writers: int = 0


class Ledger:
    """Told when an access begins and ends, in the order in which the device does it. Not thread-safe.

    A stream that forgot to wait for another shows here as a slot that is not ready yet, or is another expert's by then.
    """

    def __init__(self) -> None:
        self._slots: dict[tuple[int, int], _Slot] = {}
        self.reads = 0
        """Reads of slots that were right."""

    def _slot(self, lease: Lease) -> _Slot:
        return self._slots.setdefault((lease.bank, lease.slot), _Slot())

    def begin(self, reads: Sequence[Lease], writes: Lease | None) -> None:
        """An access begins.

        Raises:
            SlotAccessError: it must not; nothing has changed.
        """
        for lease in reads:
            self._check_read(lease)
        if writes is not None:
            slot = self._slot(writes)
            if slot.readers:
                raise SlotAccessError(f"{writes} is written while {slot.readers} launches read its slot")
            if writes.filling < slot.filling:
                raise SlotAccessError(f"{writes} is written after its slot went to filling {slot.filling}")
            if slot.writers and writes.filling != slot.filling:
                raise SlotAccessError(f"{writes} is written while filling {slot.filling} still is")
            if writes.filling == slot.filling and slot.state is _State.READY:
                raise SlotAccessError(f"{writes} is written after its bytes were all there")
            slot.filling, slot.state = writes.filling, _State.FILLING
            slot.writers += 1
        for lease in reads:
            self._slot(lease).readers += 1

    def end(self, reads: Sequence[Lease], writes: Lease | None, *, is_ready: bool) -> None:
        """An access that began is over; a slot that was written is whole if `is_ready`.

        Raises:
            SlotAccessError: a slot that was read changed meanwhile.
        """
        for lease in reads:
            self._check_read(lease)
        for lease in reads:
            self._slot(lease).readers -= 1
            self.reads += 1
        if writes is not None:
            slot = self._slot(writes)
            slot.writers -= 1
            slot.state = _State.READY if is_ready else slot.state

    def is_ready(self, lease: Lease) -> bool:
        """Whether that filling could be read now."""
        slot = self._slot(lease)
        return slot.filling == lease.filling and slot.state is _State.READY

    def _check_read(self, lease: Lease) -> None:
        slot = self._slot(lease)
        if slot.filling != lease.filling:
            when = "before" if slot.filling < lease.filling else "after"
            raise SlotAccessError(f"{lease} is read {when} its time: the slot has filling {slot.filling}")
        if slot.state is not _State.READY:
            raise SlotAccessError(f"{lease} is read while its slot is {slot.state.value}")
