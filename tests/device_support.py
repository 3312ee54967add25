"""A device tier over layers of experts of one number each, whose disk is a fake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from fake_disk import FakeDisk, FakeLayer

from moert.device.simulated import Machine, SimulatedDevice
from moert.policies import make_policy
from moert.residency import Residency
from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_host import HeldResidency, HostLayer
from moert.runtime.device_kernels import RowByRow
from moert.runtime.device_rows import RowBank
from moert.runtime.device_table import SlotTable
from moert.runtime.device_tier import DeviceTier
from moert.runtime.device_ways import Ways
from moert.runtime.pipeline import Pipeline
from moert.schedule import Costs, Curve

COSTS = Costs(Curve.proportional(3e-3), Curve.constant(1e-3), move_s=2e-3, read_s=1e-2, merge_s=1e-3)


def compute(hidden: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return hidden * weights["w"]


class HostOfNumbers(FakeLayer):
    """A `FakeLayer` whose residents may be held."""

    def __init__(self, index: int, num_experts: int, capacity: int, disk: FakeDisk) -> None:
        super().__init__(index, num_experts, capacity, disk)
        self.residency = HeldResidency(capacity, make_policy("lru", capacity))


class NumberTier:
    """Layers, the pipeline between disk and host, and a tier over a simulated device."""

    def __init__(
        self,
        *,
        layers: int = 2,
        num_experts: int = 6,
        host_slots: int = 6,
        device_slots: int = 2,
        spare_rows: int = 2,
        machine: Machine | None = None,
        virtual: bool = True,
        schedule: str = "exact",
        policy: str = "ema",
        promoting: bool = True,
        costs: Costs | None = COSTS,
        max_bytes: int | None = None,
        poison: bool = True,
    ) -> None:
        self.disk = FakeDisk()
        self.hosts = [HostOfNumbers(index, num_experts, host_slots, self.disk) for index in range(layers)]
        self.pipeline = Pipeline(self.hosts, 8)
        self.device = SimulatedDevice(machine, virtual=virtual)
        self.bank = RowBank(
            self.device, 0, self.hosts[0].spec.stored, layers * device_slots + spare_rows, poison=poison
        )
        caches = [
            DeviceCache(
                host.spec, Residency(device_slots, make_policy(policy, device_slots)), self.bank, HostLayer(host)
            )
            for host in self.hosts
        ]
        self.tier = DeviceTier(
            self.device,
            caches,
            [RowByRow(self.device, cache.spec, self.bank, fused=False) for cache in caches],
            SlotTable(self.device, caches),
            self.pipeline,
            lambda: [(host.slots.data_ptr(), host.slots.nbytes) for host in self.hosts],
            reads=True,
            ways=Ways(schedule, self.device.now, ()),
            promoting=promoting,
            costs=costs,
            max_bytes=max_bytes,
            debug=True,
        )
        self.caches = caches

    def factor(self, layer: int, expert: int) -> float:
        return self.hosts[layer].factor(expert)

    def step(self, layer: int, event: Sequence[Sequence[int]]) -> list[float]:
        """For each token, whose experts have weight 1, what they give for a hidden state of 1."""
        ids = torch.tensor(event)
        out = self.tier.run(layer, compute, torch.ones(len(ids), 1), ids, torch.ones(ids.shape))
        return [float(number) for number in out[:, 0]]

    def right(self, layer: int, event: Sequence[Sequence[int]]) -> list[float]:
        """What `step` is to return."""
        return [sum(self.factor(layer, expert) for expert in sorted(token)) for token in event]

    def check(self) -> None:
        """Whatever the books call resident or coming has the right bytes once the device calls them ready."""
        self.device.check()
        self.tier.check_integrity()
        for host in self.hosts:
            host.residency.check_integrity()
        rows = {expert: cache.row_of(expert) for cache in self.caches for expert in cache.residency.residents}
        rows |= {coming.expert: coming.row for coming in self.tier.transfers.all_coming() if coming.is_whole}
        for expert, row in rows.items():
            if self.device.ledger.is_ready(self.bank.lease(row)):
                assert self.bank.views(row)["w"].item() == self.factor(*expert), f"{expert} in row {row}"

    def settle(self) -> None:
        """All is over that has been started."""
        self.device.synchronize()
        self.tier.transfers.collect()
        for cache in self.caches:
            for expert in cache.residency.residents:
                assert self.device.ledger.is_ready(self.bank.lease(cache.row_of(expert))), expert
