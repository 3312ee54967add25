"""Memory of a device that experts have while the model lives: fewer slots in smaller banks, and more again."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moert.device.base import Device
from moert.plan import LayerNeed, least_bytes, shrink_slots
from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_kernels import LayerKernels
from moert.runtime.device_rows import RowBank
from moert.types import ExpertId


class Held(NamedTuple):
    """What experts have of a device's memory."""

    slots: int
    slot_bytes: int
    """What `device_memory` bounds."""
    beside_bytes: int
    """Rows that experts come up in."""


class Shrinking:
    """Gives a device's layers other numbers of slots, never more than they had at first. A bank is one piece of memory,
    so another one takes its place.

    What was in it is lost. In between, banks have no rows, and `is_due` says so, also after an interrupt.
    """

    def __init__(self, device: Device, caches: Iterable[DeviceCache], kernels: Iterable[LayerKernels]) -> None:
        self._device, self._caches, self._kernels = device, tuple(caches), tuple(kernels)
        self._needs = [
            LayerNeed(of.spec.name, of.spec.num_experts, of.bank.row_bytes, of.spec.expert_bytes, of.spec.top_k)
            for of in self._caches
        ]
        self._beside = {bank: bank.n_rows - self._slots_in(bank) for bank in dict.fromkeys(self._banks)}
        self._most = self.slots
        self.is_due = False
        """Whether `make` has to come before anything else."""

    @property
    def _banks(self) -> list[RowBank]:
        return [of.bank for of in self._caches]

    @property
    def slots(self) -> list[int]:
        """Of each layer, now or as there are to be."""
        return [of.residency.capacity for of in self._caches]

    def _slots_in(self, bank: RowBank) -> int:
        return sum(n for n, of in zip(self.slots, self._caches, strict=True) if of.bank is bank)

    @property
    def held(self) -> Held:
        """What they have now, or are to have."""
        slots = self.slots
        nbytes = sum(n * of.bank.row_bytes for n, of in zip(slots, self._caches, strict=True))
        return Held(sum(slots), nbytes, sum(bank.row_bytes * n for bank, n in self._beside.items()))

    def fewer(self, nbytes: int) -> list[int] | None:
        """Slots of each layer with so many bytes less, as far as each keeps those of a token; None: all do only that
        already."""
        wanted = max(self.held.slot_bytes - nbytes, least_bytes(self._needs))
        slots = shrink_slots(self._needs, self.slots, wanted)
        return None if slots == self.slots else slots

    @property
    def missing_bytes(self) -> int:
        """Of the slots that there were at first, those that there are not now."""
        gone = [most - now for most, now in zip(self._most, self.slots, strict=True)]
        return sum(n * of.bank.row_bytes for n, of in zip(gone, self._caches, strict=True))

    def more(self, nbytes: int) -> list[int]:
        """Slots of each layer with at most so many bytes more, and at most as many as at first."""
        return shrink_slots(self._needs, self._most, self.held.slot_bytes + nbytes)

    def begin(self, slots: Sequence[int]) -> list[list[ExpertId]]:
        """Have so many slots from now on, and give all memory back. Nothing is on its way up, and nobody runs.

        Returns:
            Whom the policies would have kept, of each layer.
        """
        self.is_due = True
        for of, n in zip(self._caches, slots, strict=True):
            of.resize(n)
        kept = [list(of.residency.residents) for of in self._caches]
        self._device.synchronize()
        self._drop()
        return kept

    def _drop(self) -> None:
        for of in self._caches:
            of.take_over({})
        for kernel in self._kernels:
            kernel.bank_goes()
        for bank in self._beside:
            bank.close()
        gc.collect()  # views in what was dropped would keep the memory, and there is no room for it twice

    def make(self) -> None:
        """Take the memory for the slots that there are to be; nobody is resident. Also after an interrupt anywhere.

        Raises:
            OutOfDeviceMemoryError: there is not so much; it may be tried again.
        """
        self._drop()
        for bank, beside in self._beside.items():
            bank.open(self._slots_in(bank) + beside)
        for kernel in self._kernels:
            kernel.bank_comes()
        self.is_due = False
