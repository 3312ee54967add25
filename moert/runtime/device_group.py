"""Several devices over one model's experts in host memory and on disk: each has some of the layers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from moert.device.base import CaptureError, DeviceLostError, Graph
from moert.errors import CapacityError
from moert.runtime.compute import Compute
from moert.runtime.device_building import Share, build_tier
from moert.runtime.device_counts import DeviceCounts
from moert.runtime.device_pinning import PinnedHost
from moert.runtime.device_sizing import GroupSizing
from moert.runtime.device_tier import DeviceTier
from moert.runtime.device_ways import PURE, Ways
from moert.runtime.runtime import OffloadRuntime
from moert.types import ExpertId


class DeviceGroup:
    """What a `DeviceTier` is to a runtime, made of one for each device.

    They share host memory, which the first one page-locks for all, and the pipeline from disk; slots, links, costs and
    promotions are each one's own. One step at a time, of whichever layer.
    """

    def __init__(self, tiers: Sequence[DeviceTier]) -> None:
        """`tiers` have every layer once; the first one page-locks, and the others follow it."""
        self.tiers = tuple(tiers)
        self._of = {layer: tier for tier in tiers for layer in tier.caches.layers}

        self.sizing = GroupSizing([tier.sizing for tier in tiers])
        """How much memory the banks of each have."""

    @property
    def pinned(self) -> PinnedHost:
        """What is page-locked."""
        return self.tiers[0].pinned

    @property
    def counts(self) -> DeviceCounts:
        """Of all devices together."""
        each = [tier.counts for tier in self.tiers]
        ways = sum((Counter(one.ways) for one in each), Counter[str]())
        names = ("on_device", "fetched", "on_cpu", "halved", "without")
        return DeviceCounts(**{name: sum(getattr(one, name) for one in each) for name in names}, ways=dict(ways))

    def run(
        self,
        layer: int,
        compute: Compute,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        scores: Sequence[float] | None = None,
    ) -> torch.Tensor:
        """See `DeviceTier.run`; the tensors are on the device that has `layer`."""
        return self._of[layer].run(layer, compute, hidden, top_k_index, top_k_weights, scores)

    @property
    def is_planning(self) -> bool:
        """No pass is one device's alone."""
        return False

    has_begun = may_miss = is_planning

    def begin_planned(self, can_repeat: Callable[[], bool]) -> bool:
        """None can be."""
        return False

    def is_void(self) -> bool:
        """None was."""
        return False

    def settle(self) -> None:
        """The host knows everything at any time."""

    def capture(self, work: Callable[[], object]) -> Graph:
        """Raises CaptureError: a graph is one device's."""
        raise CaptureError("a pass over several devices is no graph")

    def preload(self) -> None:
        """See `DeviceTier.preload`."""
        for tier in self.tiers:
            tier.preload()

    def prefetch(self, experts: Iterable[ExpertId]) -> None:
        """See `DeviceTier.prefetch`."""
        wanted = list(experts)
        for tier in self.tiers:
            tier.prefetch([expert for expert in wanted if self._of[expert.layer] is tier])

    def withdraw(self, experts: Iterable[ExpertId]) -> None:
        """See `DeviceTier.withdraw`."""
        gone = list(experts)
        for tier in self.tiers:
            tier.withdraw([expert for expert in gone if self._of[expert.layer] is tier])

    def begin_sequence(self) -> None:
        """See `DeviceTier.begin_sequence`."""
        for tier in self.tiers:
            tier.begin_sequence()

    def count(self) -> None:
        """See `DeviceTier.count`."""
        for tier in self.tiers:
            tier.count()

    def before_host_changes(self) -> None:
        """See `DeviceTier.before_host_changes`: nothing is unlocked while any device copies."""
        for tier in self.tiers:
            tier.transfers.drain()
        self.pinned.unlock()

    def after_host_changes(self) -> None:
        """Lock what there is now."""
        self.tiers[0].after_host_changes()

    def recover(self) -> None:
        """See `DeviceTier.recover`. Devices that are not lost are in order afterwards even if another one is.

        Raises:
            DeviceLostError: one is gone.
        """
        lost: list[DeviceLostError] = []
        for action in (lambda tier: tier.device.synchronize(), DeviceTier.recover):
            for tier in self.tiers:
                try:
                    action(tier)
                except DeviceLostError as error:
                    lost.append(error)
        if lost:
            raise lost[0]

    def check_integrity(self) -> None:
        """Assert that the books of all devices agree with each other."""
        for tier in self.tiers:
            tier.check_integrity()

    def close(self) -> None:
        """Wait for what is under way on any device, and give everything back. Idempotent."""
        with contextlib.ExitStack() as stack:
            # The first one is closed last, as it unlocks what the others copy from.
            for tier in self.tiers:
                stack.callback(tier.close)


def attach_devices(
    runtime: OffloadRuntime, shares: Sequence[Share], *, schedule: str = "exact", guarded: bool = True, **options: Any
) -> DeviceGroup:
    """Have `runtime` run the steps of each layer over the device that has it; owns and closes all devices from then on,
    also if this fails. As `attach_device` for each share, `budget` being that of each device; none runs passes by
    itself. Blocks.

    Raises:
        CapacityError: a device, which is named, has not so much memory.
        ConfigError: there is no such scheduler.
    """
    tiers: list[DeviceTier] = []
    try:
        # One for all: a forward pass goes through every device.
        ways = Ways(schedule, shares[0].device.now, PURE if guarded else ())
        for share in shares:
            lead = tiers[0].pinned if tiers else None
            try:
                tiers.append(build_tier(runtime, share, ways, lead=lead, planned=False, **options))
            except CapacityError as error:
                raise CapacityError(f"{share.device.name}: {error}") from error
        group = DeviceGroup(tiers)
        if runtime.config.preload is not False:
            group.preload()
        runtime.attach(group)
        return group
    except BaseException:
        with contextlib.ExitStack() as stack:
            stack.callback(DeviceGroup(tiers).close)
            for share in shares:
                stack.callback(share.device.close)
        raise
