"""Single tokens without the host: the device looks up their experts, decides who leaves, fetches and computes.

The host learns of it when it asks. While it does not, its books of who is resident are those of the last time. What is
on disk the device cannot fetch: a pass that needs it is void, and the host is to look after each whether it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from moert.device.base import Device, Lease, OutOfDeviceMemoryError
from moert.runtime.device_addresses import HostAddresses
from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_kernels import LayerKernels
from moert.runtime.device_packed import PackedTensors
from moert.runtime.device_pinning import PinnedHost
from moert.runtime.device_planners import Planner, Slots, make_planner
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
    host: HostAddresses
    addresses: torch.Tensor
    """int64 [P, E], on the device: as in `host`."""
    table: RowTable | None = None
    taken: tuple[int, ...] = ()
    """The rows of its slots, in their order, while it is run here."""
    owners: tuple[int, ...] = ()
    """Who was in them at the beginning, -1 for nobody."""
    leases: tuple[Lease, ...] = ()
    """Of those that somebody was in."""
    counted: tuple[int, int] = (0, 0)
    """Uses and misses that the statistics have."""


class PlannedPasses:
    """Runs passes of one token through all layers of a device, between `enter` and `leave`.

    In between, rows and residents are the device's to change; nothing else may use them. What is in page-locked host
    memory must stay where it is.
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
        self._device, self._transfers = device, transfers
        self.parts = (tuple(caches), tuple(kernels), pinned, transfers)
        """What it was made of, besides the device."""
        with torch.inference_mode(False):
            self._layers = {
                cache.spec.index: _new_layer(device, cache, kernel, pinned)
                for cache, kernel in zip(caches, kernels, strict=True)
            }
            self._void = torch.zeros(1, dtype=torch.int32, device=device.torch_device)
        packed = [self._void]
        for of in self._layers.values():
            packed += [*of.planner.tensors, of.addresses]
        self._packed = PackedTensors(device, packed)
        self.is_entered = False
        self.may_miss = False
        """Whether passes since `enter` may need what is on disk, and be void."""
        self.asked: Counter[int] = Counter()
        """Steps of each layer since `enter`."""
        self._asked_before: Counter[int] = Counter()
        """Of those, the ones of passes before the one under way."""
        self.sharing: Sharing | None = None
        """The CPU's share of passes that need nothing from disk; None: it has none. Set before the first pass."""

    @property
    def is_complete(self) -> bool:
        """Whether all experts are in host memory by now."""
        return all(len(of.cache.host.cache.residency) == of.cache.spec.num_experts for of in self._layers.values())

    def enter(self) -> None:
        """From here on passes are run here. Blocks until nothing is on its way up.

        Raises:
            ValueError: host memory is not where kernels can read it; nothing has changed.
            OutOfDeviceMemoryError: there is no memory for the tables; nothing has changed.
        """
        for of in self._layers.values():
            of.host.look()
            if of.table is None:
                try:
                    of.table = self._table_of(of)
                except torch.OutOfMemoryError as error:
                    why = f"{self._device.name} has no memory for its tables: {error}"
                    raise OutOfDeviceMemoryError(why) from error
        self.may_miss = not self.is_complete
        if self.sharing is not None and not self.may_miss:
            self.sharing.enter()
        self.is_entered = True
        self.asked.clear()
        self._transfers.drain()
        for coming in self._transfers.all_coming():
            self._transfers.discard(coming.expert)
        here = self._packed.here
        here(self._void).zero_()
        for of in self._layers.values():
            cache = of.cache
            residents = {expert: cache.row_of(expert) for expert in cache.residency.residents}
            free = [cache.bank.take() for _ in range(cache.residency.capacity - len(residents))]
            rows = [row for row in free if row is not None]
            assert len(rows) == len(free), "a slot without a row"
            of.taken = (*residents.values(), *rows)
            of.owners = (*(expert.expert for expert in residents), *(-1 for _ in rows))
            of.leases = tuple(map(cache.bank.lease, residents.values()))
            of.counted = (len(residents), 0)
            for there, contents in of.planner.begin(cache.residency.policy, residents, rows):
                here(there).copy_(contents)
            here(of.addresses).copy_(of.host.table)
        self._packed.send()

    def _table_of(self, of: _Layer) -> RowTable:
        from moert.kernels.copy_rows import scattered_table

        destinations = list(of.cache.bank.tensors.values())
        # Rows of the bank stand for those of host memory, of which there may be none yet: they are of the same shapes.
        absent = [None] * (of.cache.spec.num_experts - 1)
        sources = [[destination[0], *absent] for destination in destinations]
        table = scattered_table(sources, destinations, self._device.torch_device)
        return replace(table, addresses=of.addresses)

    def begin_pass(self) -> None:
        """Somebody who will ask `is_void` begins a pass."""
        self._asked_before = Counter(self.asked)

    def is_void(self) -> bool:
        """Whether the pass that was begun needed what is on disk, so that it does not count; blocks until it is
        over."""
        return bool(self._device.to_host(self._void).item())

    def leases(self, layers: Sequence[int]) -> list[Lease]:
        """What steps of these layers may read: for devices that check it."""
        return [lease for layer in dict.fromkeys(layers) for lease in self._layers[layer].leases]

    def run(
        self,
        layer: int,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        is_captured: bool = False,
    ) -> torch.Tensor:
        """One step of a layer: [1, D], [1, K] and [1, K] on the device -> [1, D]. Waits for nothing.

        The caller adds it to `asked` when it is done.

        Raises:
            OutOfDeviceMemoryError: what is in the rows is not known any more: `abandon`.
            DeviceLostError: the device is gone.
        """
        from moert.kernels.copy_rows import copy_rows
        from moert.kernels.device_experts import device_experts
        from moert.kernels.planning import Reach

        of = self._layers[layer]
        table, sharing = of.table, self.sharing
        assert table is not None
        if self.may_miss or (sharing is not None and hidden.dtype is not sharing.dtype):
            sharing = None  # the CPU takes none of these
        # All of an expert's tensors are in host memory, or none.
        reach = Reach(of.addresses[0], self._void) if self.may_miss else None
        slot_of = of.planner.residents.slot_of
        found: list[torch.Tensor] = []

        def work() -> None:
            if sharing is None:
                plan = of.planner.plan(ids, reach)
                copy_rows(table, plan.experts, plan.slots, plan.count)
                out = device_experts(of.kernels.bank, hidden, ids, weights, slot_of)
            else:
                plan = of.planner.plan(ids, split=sharing.split(layer))
                sharing.post(layer, plan, hidden, ids, weights)
                copy_rows(table, plan.experts, plan.slots, plan.count)
                out = sharing.compute(plan, of.kernels, hidden, ids, weights, slot_of)
            found.append(of.kernels.add_identity(hidden, ids, weights, out))

        compute = self._device.compute
        compute.launch(work, () if is_captured else of.leases)
        self._device.join(compute.record())
        return found[0]

    def count(self) -> tuple[int, int, int]:
        """Bring the layers' statistics up to date; blocks until the device has got there.

        Returns:
            Uses of experts since the last time, how many of them were misses, and how many of those the CPU computed.
        """
        self._packed.fetch()
        return self._count()

    def _count(self) -> tuple[int, int, int]:
        uses = misses = on_cpu = 0
        for index, of in self._layers.items():
            _, now_used, now_missed = self._packed.here(of.planner.residents.counters).tolist()
            used, missed = now_used - of.counted[0], now_missed - of.counted[1]
            of.counted = (now_used, now_missed)
            of.cache.stats.hits += used - missed
            of.cache.stats.misses += missed
            left = 0 if self.sharing is None or self.may_miss else self.sharing.count(index)
            self._transfers.counts.nbytes += (missed - left) * of.cache.expert_bytes
            uses, misses, on_cpu = uses + used, misses + missed, on_cpu + left
        return uses, misses, on_cpu

    def leave(self, *, again: bool = False) -> tuple[int, int, int]:
        """Have the host's books say what the device has made of it; blocks until it has got there.

        Args:
            again: the pass under way will be run once more. Its events are left to that to tell the policies of, and
                its uses to count: each of them is a hit then.

        Returns:
            As `count`.
        """
        uses, misses, on_cpu = self.count()
        for index, of in self._layers.items():
            cache = of.cache
            events = self._events(index, of)
            if again:
                n_events = int(self._packed.here(of.planner.residents.counters)[0])
                first = max(0, len(events) - (n_events - self._asked_before[index]))
                untold = sum(map(len, events[first:]))
                events, uses = events[:first], uses - untold
                cache.stats.hits -= untold
            came = set(of.owners)
            for event in events:
                cache.residency.policy.access(event)
                # What has left since, and come again, is told once.
                cache.host.observe([expert for expert in event if expert.expert not in came])
                came.update(expert.expert for expert in event)
            owners = self._packed.here(of.planner.residents.owner).tolist()
            rows = {ExpertId(index, owner): row for owner, row in zip(owners, of.taken, strict=True) if owner >= 0}
            cache.take_over(rows)
            for owner, before, row in zip(owners, of.owners, of.taken, strict=True):
                if owner < 0:
                    cache.bank.give_back(row)
                elif owner != before:  # else its bytes are the same, whoever has been there meanwhile
                    cache.bank.take_over(row)
        self._end()
        return uses, misses, on_cpu

    def _events(self, layer: int, of: _Layer) -> list[list[ExpertId]]:
        """The latest, the oldest first."""
        events = int(self._packed.here(of.planner.residents.counters)[0])
        log = self._packed.here(of.log).tolist()
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
        for of in self._layers.values():
            of.host.forget()
        if self.sharing is not None:
            self.sharing.forget_addresses()


def _new_layer(device: Device, cache: DeviceCache, kernels: LayerKernels, pinned: PinnedHost) -> _Layer:
    from moert.runtime.device_triton import RowByPick

    if not isinstance(kernels, RowByPick):
        raise ValueError(f"{cache.spec.name} is computed by {kernels.name}")
    spec, where = cache.spec, device.torch_device
    rows = torch.zeros(cache.residency.capacity, dtype=torch.int32, device=where)
    log = torch.zeros(LOGGED, spec.top_k, dtype=torch.int32, device=where)
    planner = make_planner(cache.residency.policy, Slots(spec.index, spec.num_experts, rows, cache.bank.n_rows, log))
    host = HostAddresses(cache, pinned)
    return _Layer(cache, kernels, planner, log, host, torch.zeros_like(host.table, device=where))
