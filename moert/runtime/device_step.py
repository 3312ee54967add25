"""One MoE layer's step on a device: hits at once, misses as they come, the CPU's share beside both, and the sum.

Where an expert runs and when it comes decides nothing but the time: outputs are added up in an order of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from moert.device.base import Device
from moert.errors import MoertError
from moert.runtime.compute import ExpertCompute
from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_kernels import Inputs, LayerKernels, OpenStep
from moert.runtime.device_mailbox import CpuShare, Mailbox
from moert.runtime.device_plan import StepPlan
from moert.runtime.device_transfers import Coming, DeviceTransfers
from moert.runtime.pipeline import Pipeline
from moert.types import ExpertId

BATCH_PICKS = 512
"""While experts are still to come up from disk, the CPU computes so many picks at once before it looks after them."""

ARRIVAL_GROUPS = 4
"""Experts that are copied together are launched in so many parts, each behind its own copies."""


@dataclass(frozen=True)
class Machinery:
    """What the steps of all layers share."""

    device: Device
    transfers: DeviceTransfers
    mailbox: Mailbox
    pipeline: Pipeline
    """From disk to host memory."""


class DeviceStep:
    """The state of one step. `run` may be called once."""

    def __init__(
        self,
        machinery: Machinery,
        cache: DeviceCache,
        kernels: LayerKernels,
        on_cpu: ExpertCompute,
        inputs: Inputs,
        plan: StepPlan,
    ) -> None:
        """Takes all the memory the step needs; else nothing has happened yet.

        Args:
            on_cpu: computes from host memory.

        Raises:
            OutOfDeviceMemoryError: there is not so much.
        """
        self._device, self._transfers, self._pipeline = machinery.device, machinery.transfers, machinery.pipeline
        self._cache, self._on_cpu, self._inputs = cache, on_cpu, inputs
        self._ids = [ExpertId(cache.spec.index, group.expert) for group in inputs.groups]
        self._here, self._cpu = list(plan.here), list(plan.cpu)
        self._fetch, self._read = list(plan.fetch), list(plan.read)
        self._opened: OpenStep = kernels.open(inputs, whole=not plan.cpu and len(plan.fetch) <= cache.bank.n_free)
        self._share: CpuShare | None = machinery.mailbox.open(inputs, plan.cpu) if plan.cpu else None
        self._launched: dict[int, int] = {}
        self.misses: tuple[ExpertId, ...] = ()
        """Of the event, known once it runs."""

    def run(self) -> torch.Tensor:
        """[T, D]; what the caller does with it on the device comes after what computes it.

        Raises:
            CorruptFileError, TransferError: an expert could not be read; the step may be tried again.
            DeviceLostError: the device is gone.
        """
        cache, host = self._cache, self._cache.host.cache
        hits, self.misses, _ = cache.residency.begin(self._ids)
        forwarded = [expert for expert in self.misses if self._transfers.coming(expert) is not None]
        cache.stats.hits += len(hits)
        cache.stats.misses += len(self.misses)
        cache.stats.forwarded += len(forwarded)
        needed = sorted(self._ids[turn] for turn in {*self._fetch, *self._cpu})
        from_host = host.residency.begin(needed)
        try:
            missing = set(from_host.misses)
            self._pipeline.demand(self._ids[turn] for turn in self._read if self._ids[turn] in missing)
            self._pipeline.pump()
            return self._run()
        except MoertError:
            self._pipeline.withdraw(needed)
            self._transfers.demote(cache.spec.index)
            raise
        finally:
            # Whatever else is raised is followed by `recover`.
            host.residency.end()
            host.count_residents()
            cache.residency.end()

    def _run(self) -> torch.Tensor:
        rows = {turn: self._row_here(turn) for turn in self._here}
        held: dict[int, int] = {}
        if self._opened.can_split:
            self._launch(rows)
        else:
            held = rows
        while self._fetch or self._cpu:
            self._transfers.collect()
            if self._pipeline.busy:
                self._pipeline.collect()
                self._pipeline.pump()
            started = self._start_fetches()
            if self._opened.can_split:
                size = -(-len(started) // ARRIVAL_GROUPS) or 1
                turns = list(started)
                for begin in range(0, len(turns), size):
                    self._launch({turn: started[turn] for turn in turns[begin : begin + size]})
            else:
                held.update(started)
            computed = self._compute_on_cpu()
            if not started and not computed:
                self._wait()
        if held:
            self._launch(held)
        return self._finish()

    def _row_here(self, turn: int) -> int:
        expert = self._ids[turn]
        if expert in self._cache.residency:
            return self._cache.row_of(expert)
        coming = self._transfers.demand(expert)
        assert coming is not None
        return coming.row

    def _start_fetches(self) -> dict[int, int]:
        """The copies that can be started now: group -> row."""
        started: dict[int, int] = {}
        for turn in list(self._fetch):
            expert = self._ids[turn]
            if not self._cache.host.has(expert):
                continue
            self._transfers.wait_for_room(self._cache.expert_bytes)
            coming = self._transfers.demand(expert)
            if coming is None and self._settle():
                coming = self._transfers.demand(expert)
            if coming is None:
                break
            self._fetch.remove(turn)
            started[turn] = coming.row
            self._cache.host.cache.residency.release(expert)
        return started

    def _settle(self) -> bool:
        """Give what has come up and been launched its place among the residents, or its row back."""
        done = self._computed()
        for coming in done:
            self._transfers.take(coming.expert)
            if self._cache.install(coming.expert, coming.row):
                self._cache.residency.release(coming.expert)
        return bool(done)

    def _computed(self) -> list[Coming]:
        index = self._cache.spec.index
        return [one for one in self._transfers.all_coming() if one.is_computed and one.expert.layer == index]

    def _launch(self, rows: dict[int, int]) -> None:
        if not rows:
            return
        self._cache.bank.read(list(rows.values()), self._device.compute, self._opened.compute(rows))
        for turn in rows:
            expert = self._ids[turn]
            coming = self._transfers.coming(expert)
            if coming is not None:
                coming.is_computed = True
            elif expert in self._cache.residency:
                self._cache.residency.release(expert)

    def _compute_on_cpu(self) -> bool:
        """Some of the CPU's groups whose experts are in host memory; False if there are none."""
        host = self._cache.host
        turns: list[int] = []
        picks = 0
        for turn in self._cpu:
            if host.has(self._ids[turn]):
                turns.append(turn)
                picks += self._inputs.groups[turn].weights.shape[0]
                if picks >= BATCH_PICKS and (self._fetch or self._pipeline.busy):
                    break
        if not turns:
            return False
        share = self._share
        assert share is not None
        hidden = share.hidden()
        begin = perf_counter()
        for turn, output in zip(turns, self._outputs(turns, hidden), strict=True):
            share.put(turn, output)
            self._cpu.remove(turn)
            host.cache.residency.release(self._ids[turn])
            if self._ids[turn] in self._cache.residency:
                self._cache.residency.release(self._ids[turn])
        self._cache.stats.compute_s += perf_counter() - begin
        return True

    def _outputs(self, turns: Sequence[int], hidden: torch.Tensor) -> Iterable[torch.Tensor]:
        return self._on_cpu.outputs([self._inputs.groups[turn] for turn in turns], hidden)

    def _wait(self) -> None:
        begin = perf_counter()
        waited_for = [self._ids[turn] for turn in (*self._fetch, *self._cpu)]
        try:
            if any(self._pipeline.is_in_flight(expert) for expert in waited_for):
                self._pipeline.wait()
            elif self._transfers.copying:
                self._transfers.wait_for_one()
            elif not self._transfers.give_up_parts():
                self._pipeline.wait()
        finally:
            self._cache.stats.stall_s += perf_counter() - begin

    def _finish(self) -> torch.Tensor:
        compute, opened, share = self._device.compute, self._opened, self._share
        if share is not None:
            compute.wait(share.send())
            compute.launch(opened.take_in(share.turns, share.staged))
        found: list[torch.Tensor] = []
        finish = opened.finish()
        compute.launch(lambda: found.append(finish()))
        self._device.join(compute.record())
        return found[0]

    def install(self) -> list[ExpertId]:
        """After `run`: give those that came up their places; the ones that have become resident."""
        resident = []
        for coming in sorted(self._computed(), key=lambda one: one.expert):
            self._transfers.take(coming.expert)
            if self._cache.install(coming.expert, coming.row):
                resident.append(coming.expert)
        return resident
