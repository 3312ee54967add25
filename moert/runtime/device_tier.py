"""A model's experts on a device above those in host memory and on disk: all that its steps share, and its life."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from moert.device.base import Device, Graph
from moert.runtime.compute import Compute
from moert.runtime.device_by_layer import ByLayer, caches_by_layer
from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_counts import DeviceCounts
from moert.runtime.device_hosted import HostedSteps
from moert.runtime.device_kernels import LayerKernels
from moert.runtime.device_mailbox import Mailbox
from moert.runtime.device_pinning import PinnedHost
from moert.runtime.device_planned_way import PlannedWay
from moert.runtime.device_rows import RowBank
from moert.runtime.device_sizing import DeviceSizing
from moert.runtime.device_step import Machinery
from moert.runtime.device_table import SlotTable
from moert.runtime.device_transfers import DeviceTransfers
from moert.runtime.device_ways import Ways
from moert.runtime.pipeline import Pipeline
from moert.schedule import Costs
from moert.types import ExpertId

Ranges = Callable[[], Iterable[tuple[int, int]]]
"""(address, bytes) of the host memory that experts are in now."""


class DeviceTier:
    """Owns the banks on the device, and the device itself, until `close`. One step at a time."""

    def __init__(
        self,
        device: Device,
        caches: Sequence[DeviceCache],
        kernels: Sequence[LayerKernels],
        table: SlotTable,
        pipeline: Pipeline,
        ranges: Ranges,
        *,
        reads: bool,
        ways: Ways,
        promoting: bool = True,
        costs: Costs | None = None,
        max_bytes: int | None = None,
        planned: bool | str | None = None,
        debug: bool = False,
        pinned: PinnedHost | None = None,
        reserve_bytes: int = 0,
    ) -> None:
        """
        Args:
            planned: False: the device runs no pass by itself, whatever `ways` would like; True: none with a share for
                the CPU.
            caches: of the layers that the device has; `kernels` are theirs.
            pipeline: from disk to host memory; `reads` says whether anything is there.
            costs: of one expert, for the scheduler; None: they are measured in the first step.
            max_bytes: of copies under way at once; None: the default.
            pinned: what is page-locked, where another device sees to that; None: this one.
            reserve_bytes: what the rest of a model needs of the device, but for dense weights.
        """
        self.device, self.caches, self._table = device, caches_by_layer(caches), table
        self._kernels = ByLayer({cache.spec.index: one for cache, one in zip(caches, kernels, strict=True)})
        self.pinned = PinnedHost(device) if pinned is None else pinned
        self._ranges = ranges
        self.transfers = DeviceTransfers(device, self.caches, self.pinned, pipeline if reads else None, max_bytes)
        self.ways, self.counts = ways, DeviceCounts()
        self._machinery = Machinery(device, self.transfers, Mailbox(device), pipeline)
        self._debug = debug
        self.hosted = HostedSteps(
            self._machinery,
            self.caches,
            self._kernels,
            self.pinned,
            ways,
            self.counts,
            promoting=promoting,
            costs=costs,
        )
        """Steps that the host decides about."""
        self.pinned.lock(ranges())
        self.planned = PlannedWay(self.ways, self.counts)
        """Passes that the device runs by itself."""
        if planned is not False:
            self.planned.make(
                device,
                tuple(self.caches),
                tuple(self._kernels),
                self.pinned,
                self.transfers,
                None if planned is True else lambda: self.hosted.known_costs,
            )

        self.sizing = DeviceSizing(
            device,
            tuple(self.caches),
            tuple(self._kernels),
            self.transfers,
            settle=self.settle,
            before=self._banks_go,
            after=self._banks_came,
            reserve_bytes=reserve_bytes,
        )
        """How much memory its banks have."""

    def go_by(self, ways: Ways) -> None:
        """Run passes as `ways` says from here on; between passes."""
        self.ways = self.hosted.ways = ways
        self.planned.go_by(ways)

    def reset_counts(self) -> None:
        """Start counting anew."""
        self.count()
        self.counts = self.planned.counts = self.hosted.counts = DeviceCounts()

    @property
    def kernels(self) -> tuple[LayerKernels, ...]:
        """What computes each layer on the device."""
        return tuple(self._kernels)

    @property
    def banks(self) -> list[RowBank]:
        """Each once."""
        return list({id(cache.bank): cache.bank for cache in self.caches}.values())

    def run(
        self,
        layer: int,
        compute: Compute,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        scores: Sequence[float] | None = None,
    ) -> torch.Tensor:
        """One step of one layer on tensors of the device: `hidden` [T, D], ids and weights [T, K] -> [T, D].

        Waits for the ids, then for nothing but experts that are neither on the device nor in host memory, and for the
        CPU's share. `compute` is as for `run_step`, and works wherever its tensors are.

        Raises:
            CorruptFileError, TransferError: an expert could not be read; the step may be tried again.
            DeviceLostError: the device is gone; so is the model.
        """
        if self.sizing.is_due:
            self.sizing.make()
        if layer == 0:
            self.planned.pass_begins(len(hidden))
        if scores is not None:
            self.caches[layer].residency.policy.observe_scores(self.caches[layer].spec.index, scores)
        hidden, ids, weights = hidden.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous()
        if not len(hidden):
            return hidden.clone()
        if self.planned.takes(self.caches[layer].spec, ids):
            out = self.planned.run(layer, hidden, ids, weights)
            if out is not None:
                return out
            self._reset_banks()
        out = self.hosted.run(layer, compute, hidden, ids, weights)
        if self._debug:
            self.check_integrity()
        return out

    @property
    def is_planning(self) -> bool:
        """Whether the device runs passes of one token by itself now."""
        return self.planned.is_on

    def begin_planned(self, can_repeat: Callable[[], bool]) -> bool:
        """A pass of one token begins, of somebody who asks `is_void` behind it; see `PlannedWay.begin`. However it goes
        on, `run` knows that it has begun."""
        return self.planned.begin(can_repeat)

    @property
    def may_miss(self) -> bool:
        """Whether the passes that the device runs by itself now may have to be done again."""
        return self.planned.may_miss

    def is_void(self) -> bool:
        """Whether the pass that is over has to be done again; see `PlannedWay.is_void`."""
        return self.planned.is_void()

    @property
    def has_begun(self) -> bool:
        """Whether the pass that begins has been told of already, or is none."""
        return self.planned.has_begun

    def capture(self, work: Callable[[], object]) -> Graph:
        """Make a graph of a pass while the device runs them by itself; see `Device.capture`."""
        return self.planned.capture(work)

    def count(self) -> None:
        """Bring all counts up to date; blocks until the device has got there if it runs passes by itself."""
        self.planned.count()

    def settle(self) -> None:
        """Have the host know everything that there is to know; blocks as `count`."""
        self.planned.settle()

    def preload(self) -> None:
        """Make as many of each layer's experts resident as there are slots for, of those that are in host memory now;
        blocks until they are there. Nothing is read from disk.

        Raises:
            DeviceLostError: the device is gone.
        """
        self.settle()
        for cache in self.caches:
            self.sizing.load(cache, [ExpertId(cache.spec.index, expert) for expert in range(cache.spec.num_experts)])
        self.transfers.drain()

    def _banks_go(self) -> None:
        self.planned.unmake()
        self._table.forget()
        self.hosted.recover()

    def _banks_came(self) -> None:
        self.planned.remake()
        self.ways.forget()

    def prefetch(self, experts: Iterable[ExpertId]) -> None:
        """Bring experts up that may be needed soon, from disk if they are there. Returns at once, unless the device has
        been running passes by itself: `settle`."""
        self.settle()
        self.transfers.collect()
        self.transfers.prefetch(experts)
        self.transfers.pump()

    def withdraw(self, experts: Iterable[ExpertId]) -> None:
        """These experts are not expected any more; what has not started is cancelled."""
        self.transfers.withdraw(experts)

    def begin_sequence(self) -> None:
        """The steps from here on are of another sequence: every layer's policy is told."""
        for cache in self.caches:
            cache.residency.policy.begin_sequence()

    def before_host_changes(self) -> None:
        """Host memory is going to be moved or given back: wait until nothing is copied from it, unlock its pages."""
        self.settle()
        self.planned.forget_addresses()
        self.transfers.drain()
        self.pinned.unlock()

    def after_host_changes(self) -> None:
        """Lock what there is now."""
        self.pinned.lock(self._ranges())

    def recover(self) -> None:
        """Go on after an interrupt that came nobody knows where; blocks until the device has done what it was told.

        Host memory may change then, until `after_host_changes`.

        Raises:
            DeviceLostError: the device is gone.
        """
        self.device.synchronize()
        self.pinned.unlock()
        self.transfers.recover()
        for cache in self.caches:
            cache.recover()
        self.planned.recover()
        self._reset_banks()
        self._table.forget()
        self._machinery.mailbox.forget()
        self.pinned.forget_buffers()
        self.ways.forget()
        self.hosted.recover()
        if self.sizing.is_due:
            self.sizing.make()

    def _reset_banks(self) -> None:
        for bank in self.banks:
            bank.reset([row for cache in self.caches if cache.bank is bank for row in cache.rows])

    def check_integrity(self) -> None:
        """Assert that the books of all layers agree with each other."""
        for cache in self.caches:
            cache.check_integrity()
        self.transfers.check_integrity()

    def close(self) -> None:
        """Wait for what is under way, and give everything back; a lost device gives back what it can. Idempotent."""
        self.device.close()
        self.planned.close()
        self.pinned.close()
        self._machinery.mailbox.close()
        self._table.close()
        for kernel in self._kernels:
            kernel.bank_goes()
        for bank in self.banks:
            bank.close()
