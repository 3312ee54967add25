"""Single tokens without the host: the device looks up their experts, decides who leaves, fetches and computes.

The host learns of it when it asks. While it does not, its books of who is resident are those of the last time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moert.device.base import Device
from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_kernels import LayerKernels
from moert.runtime.device_pinning import PinnedHost
from moert.runtime.device_planners import Copy, Planner, Slots, make_planner
from moert.runtime.device_sharing import Sharing
from moert.runtime.device_transfers import DeviceTransfers
from moert.types import ExpertId

if TYPE_CHECKING:
    from moert.kernels.copy_rows import RowTable
    from moert.runtime.device_triton import RowByPick

LOGGED = 64
"""The latest events of each layer, which the host's policy is told of. Of what `ema` remembers they are five sixths."""


@dataclass
class _Layer:
    cache: DeviceCache
    kernels: RowByPick
    planner: Planner
    log: torch.Tensor
    table: RowTable | None = None
    taken: tuple[int, ...] = ()
    """The rows of its slots, in their order, while it is run here."""
    counted: tuple[int, int] = (0, 0)
    """Uses and misses that the statistics have."""


class PlannedPasses:
    """Runs passes of one token through all layers of a device, between `enter` and `leave`.

    In between, rows and residents are the device's to change; nothing else may use them. All experts must be in
    page-locked host memory and stay there.
    """

    def __init__(
        self,
        device: Device,
        caches: Sequence[DeviceCache],
        kernels: Sequence[LayerKernels],
        pinned: PinnedHost,
        transfers: DeviceTransfers,
    ) -> None:
        """Takes some kilobytes on the device for each layer.

        Raises:
            ValueError: it cannot be done with this device, these kernels, tensors or policies; the message says why.
            ImportError: there is no triton.
        """
        if not device.reads_host:
            raise ValueError(f"kernels on {device.name} cannot read host memory where it is")
        self._device, self._pinned, self._transfers = device, pinned, transfers
        self._layers = {
            cache.spec.index: _new_layer(device, cache, kernel) for cache, kernel in zip(caches, kernels, strict=True)
        }
        self.is_entered = False
        self._knows_addresses = True
        self.sharing: Sharing | None = None
        """The CPU's share of passes; None: it has none. Set before the first pass."""

    @property
    def is_ready(self) -> bool:
        """Whether all experts are in host memory by now."""
        return all(len(of.cache.host.cache.residency) == of.cache.spec.num_experts for of in self._layers.values())

    def why_not(self) -> str | None:
        """Why it can never be entered with host memory as it is; None: it can, once it is ready."""
        from moert.kernels.copy_rows import SCATTERED_ALIGNMENT

        for of in self._layers.values():
            host, spec = of.cache.host, of.cache.spec
            room = host.cache.residency.capacity
            if room < spec.num_experts:
                return f"host memory has room for {room} of {spec.num_experts} experts of {spec.name}"
            for expert in host.cache.residency.residents:
                weights = host.weights(expert)
                tensors = [weights[one.name] for one in of.cache.bank.specs]
                if not all(map(self._pinned.is_locked, tensors)):
                    return f"expert {expert.expert} of {spec.name} is not in page-locked memory"
                if any(tensor.data_ptr() % SCATTERED_ALIGNMENT for tensor in tensors):
                    where = f"at a multiple of {SCATTERED_ALIGNMENT} bytes"
                    return f"expert {expert.expert} of {spec.name} does not begin {where}"
        return None

    def enter(self) -> None:
        """From here on passes are run here, as `why_not` and `is_ready` allow. Blocks until nothing is on its way up.

        Raises:
            ValueError: the tensors' sizes are not what the kernels can copy; nothing has changed.
        """
        from moert.kernels.copy_rows import scattered_table

        for of in self._layers.values():
            if of.table is None:
                tensors, destinations = _tensors(of.cache), list(of.cache.bank.tensors.values())
                of.table = scattered_table(tensors, destinations, self._device.torch_device)
        if self.sharing is not None:
            self.sharing.enter()
        self.is_entered = True
        self._transfers.drain()
        for coming in self._transfers.all_coming():
            self._transfers.discard(coming.expert)
        copies: list[Copy] = []
        for of in self._layers.values():
            cache = of.cache
            residents = {expert: cache.row_of(expert) for expert in cache.residency.residents}
            free = [cache.bank.take() for _ in range(cache.residency.capacity - len(residents))]
            rows = [row for row in free if row is not None]
            assert len(rows) == len(free), "a slot without a row"
            of.taken = (*residents.values(), *rows)
            of.counted = (len(residents), 0)
            copies += of.planner.begin(cache.residency.policy, residents, rows)
            if not self._knows_addresses:
                assert of.table is not None and of.table.addresses is not None
                here = [[tensor.data_ptr() for tensor in rows] for rows in _tensors(cache)]
                copies.append((of.table.addresses, torch.tensor(here)))
        self._knows_addresses = True

        def work() -> None:
            for there, here in copies:
                there.copy_(here)

        self._device.compute.launch(work)
        self._device.join(self._device.compute.record())

    def run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One step of a layer: [1, D], [1, K] and [1, K] on the device -> [1, D]. Waits for nothing.

        Raises:
            OutOfDeviceMemoryError: what is in the rows is not known any more: `abandon`.
            DeviceLostError: the device is gone.
        """
        from moert.kernels.copy_rows import copy_rows
        from moert.kernels.device_experts import device_experts

        of = self._layers[layer]
        table, sharing = of.table, self.sharing
        assert table is not None
        if sharing is not None and hidden.dtype is not sharing.dtype:
            sharing = None  # the CPU takes none of these
        slot_of = of.planner.residents.slot_of
        found: list[torch.Tensor] = []

        def work() -> None:
            if sharing is None:
                plan = of.planner.plan(ids)
                copy_rows(table, plan.experts, plan.slots, plan.count)
                out = device_experts(of.kernels.bank, hidden, ids, weights, slot_of)
            else:
                plan = of.planner.plan(ids, sharing.split(layer))
                sharing.post(layer, plan, hidden, ids, weights)
                copy_rows(table, plan.experts, plan.slots, plan.count)
                out = sharing.compute(plan, of.kernels, hidden, ids, weights, slot_of)
            found.append(of.kernels.add_identity(hidden, ids, weights, out))

        compute = self._device.compute
        compute.launch(work)
        self._device.join(compute.record())
        return found[0]

    def count(self) -> tuple[int, int, int]:
        """Bring the layers' statistics up to date; blocks until the device has got there.

        Returns:
            Uses of experts since the last time, how many of them were misses, and how many of those the CPU computed.
        """
        uses = misses = on_cpu = 0
        for index, of in self._layers.items():
            _, now_used, now_missed = self._device.to_host(of.planner.residents.counters).tolist()
            used, missed = now_used - of.counted[0], now_missed - of.counted[1]
            of.counted = (now_used, now_missed)
            of.cache.stats.hits += used - missed
            of.cache.stats.misses += missed
            left = 0 if self.sharing is None else self.sharing.count(index)
            self._transfers.counts.nbytes += (missed - left) * of.cache.expert_bytes
            uses, misses, on_cpu = uses + used, misses + missed, on_cpu + left
        return uses, misses, on_cpu

    def leave(self) -> None:
        """Have the host's books say what the device has made of it; blocks until it has got there.

        What has not been counted is not in the statistics.
        """
        for index, of in self._layers.items():
            cache = of.cache
            owners = self._device.to_host(of.planner.residents.owner).tolist()
            for event in self._events(index, of):
                cache.residency.policy.access(event)
            rows = {ExpertId(index, owner): row for owner, row in zip(owners, of.taken, strict=True) if owner >= 0}
            cache.take_over(rows)
            for owner, row in zip(owners, of.taken, strict=True):
                if owner >= 0:
                    cache.bank.take_over(row)
                else:
                    cache.bank.give_back(row)
        self._end()

    def _events(self, layer: int, of: _Layer) -> list[list[ExpertId]]:
        """The latest, the oldest first."""
        events = int(self._device.to_host(of.planner.residents.counters)[0])
        log = self._device.to_host(of.log).tolist()
        real = range(of.cache.spec.num_experts)
        return [
            [ExpertId(layer, expert) for expert in sorted({*log[number % LOGGED]}) if expert in real]
            for number in range(max(1, events - LOGGED + 1), events + 1)
        ]

    def abandon(self) -> None:
        """Nobody knows what is in the rows: no expert is resident any more. Blocks until the device has done all.

        Rows are nobody's then; see `RowBank.reset`.
        """
        self._device.synchronize()
        for of in self._layers.values():
            of.cache.take_over({})
        self._end()

    def _end(self) -> None:
        if self.sharing is not None:
            self.sharing.leave()
        self.is_entered = False

    def forget_addresses(self) -> None:
        """Host memory has moved, or is going to."""
        self._knows_addresses = False
        if self.sharing is not None:
            self.sharing.forget_addresses()


def _new_layer(device: Device, cache: DeviceCache, kernels: LayerKernels) -> _Layer:
    from moert.runtime.device_triton import RowByPick

    if not isinstance(kernels, RowByPick):
        raise ValueError(f"{cache.spec.name} is computed by {kernels.name}")
    spec, where = cache.spec, device.torch_device
    rows = torch.zeros(cache.residency.capacity, dtype=torch.int32, device=where)
    log = torch.zeros(LOGGED, spec.top_k, dtype=torch.int32, device=where)
    planner = make_planner(cache.residency.policy, Slots(spec.index, spec.num_experts, rows, cache.bank.n_rows, log))
    return _Layer(cache, kernels, planner, log)


def _tensors(cache: DeviceCache) -> list[list[torch.Tensor]]:
    """For each tensor of an expert, where each expert has it in host memory."""
    experts = [cache.host.weights(ExpertId(cache.spec.index, expert)) for expert in range(cache.spec.num_experts)]
    return [[weights[spec.name] for weights in experts] for spec in cache.bank.specs]
