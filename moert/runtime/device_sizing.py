"""How much of a device's memory experts have: what they were given, less where it runs short, and more again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from moert.device.base import Device, DeviceMemory, OutOfDeviceMemoryError
from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_kernels import LayerKernels
from moert.runtime.device_regrowth import Regrowth
from moert.runtime.device_shrinking import Held, Shrinking
from moert.runtime.device_transfers import DeviceTransfers
from moert.types import ExpertId

CacheBytes = Callable[[torch.device], int]
"""What the cache of keys and values of whoever asks holds on a device."""


class Given(NamedTuple):
    """What a device's experts have given back, and how it is afterwards."""

    device: str
    nbytes: int
    """0: there was nothing to give, and nothing has changed."""
    held: Held
    memory: DeviceMemory


class Regained(NamedTuple):
    """What a device's experts have got back, and how it is afterwards."""

    device: str
    nbytes: int
    missing_bytes: int
    """What they had at first, and have not."""
    held: Held


class DeviceSizing:
    """Gives the banks of a device other sizes, between passes, when all graphs of them are gone.

    Whom the policies would lose last is brought up again from host memory.
    """

    def __init__(
        self,
        device: Device,
        caches: Sequence[DeviceCache],
        kernels: Iterable[LayerKernels],
        transfers: DeviceTransfers,
        *,
        settle: Callable[[], None],
        before: Callable[[], None],
        after: Callable[[], None],
        reserve_bytes: int = 0,
    ) -> None:
        """
        Args:
            settle: the host is to know everything.
            before, after: nothing is to look at the banks that there were; there are others.
            reserve_bytes: of the device, for all but dense weights and banks.
        """
        self._device, self._caches, self._transfers = device, tuple(caches), transfers
        self._settle, self._before, self._after = settle, before, after
        self._shrinking = Shrinking(device, caches, kernels)
        self._regrowth = Regrowth(reserve_bytes)
        self._may_grow = False

    @property
    def free_bytes(self) -> int:
        """Of the device, now."""
        return self._device.memory.free_bytes

    @property
    def is_due(self) -> bool:
        """Whether there are no rows, and `make` has to come before anything else."""
        return self._shrinking.is_due

    @property
    def is_short(self) -> bool:
        """Whether experts have less than at first."""
        return self._shrinking.missing_bytes > 0

    def give_back(self, nbytes: int, share: float, cache_bytes: CacheBytes) -> Given:
        """Have fewer slots, by so many bytes, by this share of their bytes if that is more, or as far as each layer
        keeps those of a token. Blocks.

        Raises:
            OutOfDeviceMemoryError: somebody else has taken even what the few slots need; steps try to get it again.
            DeviceLostError: the device is gone.
        """
        before = self._shrinking.held.slot_bytes
        slots = self._shrinking.fewer(max(nbytes, int(share * before)))
        try:
            if slots is not None:
                self._change(slots)
        finally:
            self._regrowth.gave_back(self._room_bytes(cache_bytes))
        held = self._shrinking.held
        return Given(self._device.name, before - held.slot_bytes, held, self._device.memory)

    def can_grow(self, cache_bytes: CacheBytes) -> bool:
        """Whether `grow` would get something back now; asked before each pass, and nearly always False.

        Raises:
            DeviceLostError: the device is gone.
        """
        self._may_grow = self.is_short and self._regrowth.is_time() and self._more(cache_bytes) is not None
        return self._may_grow

    def grow(self, cache_bytes: CacheBytes) -> list[Regained]:
        """Have as many slots again as there is room for, if `can_grow` said so. Blocks.

        Returns:
            Nothing where there is no room, or no longer when it comes to taking it.

        Raises:
            DeviceLostError: the device is gone.
        """
        before = self._shrinking.held.slot_bytes
        slots, self._may_grow = self._more(cache_bytes) if self._may_grow else None, False
        if slots is None:
            return []
        self._regrowth.grew()
        with contextlib.suppress(OutOfDeviceMemoryError):  # steps try to get the fewest that they need
            self._change(slots)
        held = self._shrinking.held
        if held.slot_bytes <= before:
            self._regrowth.gave_back(self._room_bytes(cache_bytes))
            return []
        return [Regained(self._device.name, held.slot_bytes - before, self._shrinking.missing_bytes, held)]

    def _room_bytes(self, cache_bytes: CacheBytes) -> int:
        return self.free_bytes + cache_bytes(self._device.torch_device)

    def _more(self, cache_bytes: CacheBytes) -> list[int] | None:
        missing = self._shrinking.missing_bytes
        nbytes = self._regrowth.takes(missing, self._room_bytes(cache_bytes), self.free_bytes)
        slots = self._shrinking.more(nbytes) if nbytes > 0 else self._shrinking.slots
        return None if slots == self._shrinking.slots else slots

    def _change(self, slots: Sequence[int]) -> None:
        """Have so many slots, or, where there is no memory for them, not more than before, or the fewest."""
        before = self._shrinking.slots
        self._settle()
        self._transfers.drain()
        for coming in self._transfers.all_coming():
            self._transfers.discard(coming.expert)
        kept = self._shrinking.begin(slots)
        instead = [before] if sum(before) < sum(slots) else []
        while True:
            try:
                self.make()
                break
            except OutOfDeviceMemoryError:
                fewer = instead.pop() if instead else self._shrinking.fewer(self._shrinking.held.slot_bytes)
                if fewer is None:
                    raise
                self._shrinking.begin(fewer)
        for cache, experts in zip(self._caches, kept, strict=True):
            self.load(cache, experts)
        self._transfers.drain()

    def make(self) -> None:
        """Take the memory for the slots that there are to be; nobody is resident. Also after an interrupt anywhere.

        Raises:
            OutOfDeviceMemoryError: there is not so much; it may be tried again.
        """
        self._before()
        self._shrinking.make()
        self._after()

    def load(self, cache: DeviceCache, experts: Iterable[ExpertId]) -> None:
        """Make those of `experts` resident that are in host memory, the first ones first, while there are slots."""
        room = cache.residency.capacity - len(cache.residency)
        wanted = [expert for expert in experts if cache.host.has(expert) and expert not in cache.residency]
        for expert in wanted[:room]:
            self._transfers.wait_for_room(cache.expert_bytes)
            coming = self._transfers.demand(expert)
            assert coming is not None, "no row for a free slot"
            self._transfers.take(expert)
            cache.replace(expert, coming.row, None)


class GroupSizing:
    """What a `DeviceSizing` is to one device, for several: each has its own slots."""

    def __init__(self, each: Sequence[DeviceSizing]) -> None:
        self._each = tuple(each)

    @property
    def is_short(self) -> bool:
        """Whether experts of any device have less than at first."""
        return any(one.is_short for one in self._each)

    def give_back(self, nbytes: int, share: float, cache_bytes: CacheBytes) -> Given:
        """See `DeviceSizing.give_back`: the device that has the least memory left, of those that can."""
        fullest = sorted(self._each, key=lambda one: one.free_bytes)
        given = (one.give_back(nbytes, share, cache_bytes) for one in fullest)
        return next((one for one in given if one.nbytes), None) or fullest[0].give_back(0, 0.0, cache_bytes)

    def can_grow(self, cache_bytes: CacheBytes) -> bool:
        """See `DeviceSizing.can_grow`: any of them."""
        each = [one.can_grow(cache_bytes) for one in self._each]
        return any(each)

    def grow(self, cache_bytes: CacheBytes) -> list[Regained]:
        """See `DeviceSizing.grow`: each that there is room on."""
        return [regained for one in self._each for regained in one.grow(cache_bytes)]
