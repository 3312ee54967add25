"""Memory of a device that experts have, given back while the model lives: fewer slots, in smaller banks."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moert.device.base import Device, DeviceMemory
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


class Given(NamedTuple):
    """What a device's experts have given back, and how it is afterwards."""

    device: str
    nbytes: int
    """0: there was nothing to give, and nothing has changed."""
    held: Held
    memory: DeviceMemory


class Shrinking:
    """Gives a device's layers fewer slots. A bank is one piece of memory, so a smaller one takes its place.

    What was in it is lost. In between, banks have no rows, and `is_due` says so, also after an interrupt.
    """

    def __init__(self, device: Device, caches: Iterable[DeviceCache], kernels: Iterable[LayerKernels]) -> None:
        self._device, self._caches, self._kernels = device, tuple(caches), tuple(kernels)
        self._needs = [
            LayerNeed(of.spec.name, of.spec.num_experts, of.bank.row_bytes, of.spec.expert_bytes, of.spec.top_k)
            for of in self._caches
        ]
        self._beside = {bank: bank.n_rows - self._slots_in(bank) for bank in dict.fromkeys(self._banks)}
        self.is_due = False
        """Whether `make` has to come before anything else."""

    @property
    def _banks(self) -> list[RowBank]:
        return [of.bank for of in self._caches]

    @property
    def _slots(self) -> list[int]:
        return [of.residency.capacity for of in self._caches]

    def _slots_in(self, bank: RowBank) -> int:
        return sum(n for n, of in zip(self._slots, self._caches, strict=True) if of.bank is bank)

    @property
    def held(self) -> Held:
        """What they have now, or are to have."""
        slots = self._slots
        nbytes = sum(n * of.bank.row_bytes for n, of in zip(slots, self._caches, strict=True))
        return Held(sum(slots), nbytes, sum(bank.row_bytes * n for bank, n in self._beside.items()))

    def fewer(self, nbytes: int) -> list[int] | None:
        """Slots of each layer with so many bytes less, as far as each keeps those of a token; None: all do only that
        already."""
        wanted = max(self.held.slot_bytes - nbytes, least_bytes(self._needs))
        slots = shrink_slots(self._needs, self._slots, wanted)
        return None if slots == self._slots else slots

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
