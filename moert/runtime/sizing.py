"""How large a model's host tier is: as asked for, and smaller where memory runs short."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moert.config import Budget, OffloadConfig
from moert.errors import MoertError
from moert.plan import default_budget, plan_slots, shrink_slots
from moert.pressure import describe
from moert.runtime.host_tier import HostTier, Resized
from moert.runtime.layer import LayerCache
from moert.runtime.pipeline import Pipeline
from moert.runtime.slot_layer import SlotLayer
from moert.runtime.watch import MemoryWatch
from moert.tiers.memory import memory_report

if TYPE_CHECKING:
    from moert.runtime.device_group import DeviceGroup
    from moert.runtime.device_tier import DeviceTier


class HostSizing:
    """Between two steps, and while nobody else uses the layers, it gives `tier` another size."""

    def __init__(self, tier: HostTier, layers: Sequence[LayerCache], pipeline: Pipeline, config: OffloadConfig) -> None:
        self._tier, self._layers, self._pipeline, self._check = tier, layers, pipeline, config.debug
        self._watch = MemoryWatch() if config.shrink_on_pressure else None
        self._resizing = False
        self.device: DeviceTier | DeviceGroup | None = None
        """What reads the slots too."""
        self.shrinks = 0
        """How often memory has run short."""

    def resize(self, budget: Budget | None, reserved_bytes: int = 0) -> Resized:
        """See `moert.resize`; without a budget, `reserved_bytes` of memory are left free.

        Raises:
            CapacityError: the machine has not so much, or a token needs more.
        """
        tier = self._tier
        report = memory_report()
        available = report.available_bytes + tier.slots_bytes
        slots = plan_slots(tier.needs, budget or default_budget(tier.needs, available, reserved_bytes))
        if self._watch is not None:
            tier.check_room(slots, report)
        return self._resize(slots)

    def relieve(self) -> None:
        """Give memory back if it has run short, and the options allow it."""
        if self._watch is None:
            return
        tier = self._tier
        relief = self._watch.look(tier.slots_bytes, tier.least_bytes)
        if relief is None:
            return
        before = tier.slots_bytes
        if relief.target_bytes < before:
            self._resize(shrink_slots(tier.needs, tier.slots, relief.target_bytes))
            self.shrinks += 1
        if relief.is_new:
            warnings.warn(describe(relief, before, tier.slots_bytes), RuntimeWarning, stacklevel=2)

    def recover(self) -> bool:
        """Put the tier in order after an interrupt; `settle` follows when all is.

        Returns:
            Whether what the slots hold is still where the books say.
        """
        if self._resizing:
            self._tier.recover()
        return not self._resizing

    def settle(self) -> None:
        """Everything is in order again."""
        self._resizing = False

    def _resize(self, slots: Sequence[int]) -> Resized:
        if self.device is not None:
            self.device.before_host_changes()
        self._pipeline.drain()
        self._resizing = True
        try:
            return self._resize_drained(slots)
        except MoertError:
            self._resizing = False
            raise
        finally:
            if self.device is not None:
                self.device.after_host_changes()

    def _resize_drained(self, slots: Sequence[int]) -> Resized:
        tier = self._tier
        before, bytes_before = tier.slots, tier.arena.committed_bytes
        tier.grow(slots)
        evicted = moved = 0
        for index, (layer, n) in enumerate(zip(self._layers, slots, strict=True)):
            assert isinstance(layer, SlotLayer)
            if n != layer.residency.capacity:
                change = layer.resize(n)
                evicted += len(change.victims)
                moved += len(change.moves)
            tier.shrink(index, n)
            if self._check:
                layer.residency.check_integrity()
        self._resizing = False
        return Resized(tier.slots, before, tier.arena.committed_bytes, bytes_before, evicted, moved)
