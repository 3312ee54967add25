"""One MoE layer's step on a device: hits at once, misses as they come, the CPU's share beside both, and the sum.

Where an expert runs and when it comes decides nothing but the time: outputs are added up in an order of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from moert.tiers.read import Priority
from moert.types import ExpertId

BATCH_PICKS = 512
"""While experts are still to come up from disk, the CPU computes so many picks at once before it looks after them."""

ARRIVAL_GROUPS = 4
"""Experts that can be on their way at once are launched in so many parts, each behind its own copies: while one part is
computed and its rows are not free yet, the others come up."""


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
        then: Callable[[], None] | None = None,
    ) -> None:
        """Takes all the memory the step needs; else nothing has happened yet.

        Args:
            on_cpu: computes from host memory.
            then: called once all the step's copies have been started and all rows beside the residents are free.

        Raises:
            OutOfDeviceMemoryError: there is not so much.
        """
        self._device, self._transfers, self._pipeline = machinery.device, machinery.transfers, machinery.pipeline
        self._cache, self._on_cpu, self._inputs = cache, on_cpu, inputs
        self._ids = [ExpertId(cache.spec.index, group.expert) for group in inputs.groups]
        self._here, self._cpu = list(plan.here), list(plan.cpu)
        self._fetch, self._read = list(plan.fetch), list(plan.read)
        self._n_coming = len(plan.fetch) + sum(self._transfers.coming(expert) is not None for expert in self._ids)
        """Experts that come up beside the residents and have not been launched."""
        rows = self._transfers.rows_beside(cache.bank)
        self._reuses_rows = self._n_coming > rows
        self._group_size = -(-min(self._n_coming, rows) // ARRIVAL_GROUPS) or 1
        self._beside: dict[int, int] = {}
        """Residents that are launched with them: group -> row."""
        self._opened: OpenStep = kernels.open(inputs, whole=not plan.cpu and not self._reuses_rows)
        self._share: CpuShare | None = machinery.mailbox.open(inputs, plan.cpu) if plan.cpu else None
        self._then = then
        self.misses: tuple[ExpertId, ...] = ()
        """Of the event, known once it runs."""
        self.cpu_calls: list[tuple[list[int], float]] = []
        """Experts that the CPU computed at once: the tokens of each, and how long it took, in seconds."""

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
            raise
        finally:
            # Whatever else is raised is followed by `recover`.
            host.residency.end()
            host.count_residents()
            cache.residency.end()

    def _run(self) -> torch.Tensor:
        there, coming = self._rows_here()
        held: dict[int, int] = {}
        if not self._opened.can_split:
            held = {**there, **coming}
        elif self._reuses_rows:
            self._beside = there
            self._launch_in_groups(coming)
        else:
            self._launch(there)
            self._launch_in_groups(coming)
        self._go_on()
        while self._fetch or self._cpu:
            self._transfers.collect()
            if self._pipeline.busy:
                self._pipeline.collect()
                self._pipeline.pump()
            started = self._start_fetches()
            if self._opened.can_split:
                self._launch_in_groups(started)
            else:
                held.update(started)
            self._go_on()
            is_computed = self._compute_on_cpu()
            if not started and not is_computed:
                self._wait()
        if held:
            self._launch(held)
        return self._finish()

    def _rows_here(self) -> tuple[dict[int, int], dict[int, int]]:
        """Group -> row of those that can be computed at once, and of those on their way, as they come."""
        turn_of = {self._ids[turn]: turn for turn in self._here}
        there = {turn: self._cache.row_of(e) for e, turn in turn_of.items() if e in self._cache.residency}
        coming = {}
        for one in self._transfers.all_coming():
            turn = turn_of.get(one.expert)
            if turn is None:
                continue
            self._transfers.demand(one.expert)
            one.is_computed = False  # what an earlier part of the step has computed is computed with again
            assert one.event is not None
            if self._reuses_rows:
                # In the order in which they are computed, whatever class they were asked for in: who overtook another
                # on the link would only have its row idle.
                self._device.copies[Priority.DEMAND].wait(one.event)
                coming[turn] = one.row
            else:
                (there if one.event.ready else coming)[turn] = one.row
        assert len(there) + len(coming) == len(turn_of)
        return there, coming

    def _launch_in_groups(self, rows: dict[int, int]) -> None:
        """Each group with its share of what is `_beside`: so rows become free as steadily as copies need them."""
        turns, beside = list(rows), list(self._beside)
        share = len(beside) / max(1, self._n_coming)
        for begin in range(0, len(turns), self._group_size):
            group = turns[begin : begin + self._group_size]
            self._n_coming -= len(group)
            left = round(share * self._n_coming)
            beside, filling = beside[len(beside) - left :], beside[: len(beside) - left]
            self._launch({turn: rows[turn] for turn in group} | {turn: self._beside.pop(turn) for turn in filling})

    def _go_on(self) -> None:
        """If nothing is left to be copied, have the link do what comes after the step."""
        if self._then is not None and not self._fetch and self._opened.can_split:
            then, self._then = self._then, None
            while self._settle():
                pass
            then()

    def _start_fetches(self) -> dict[int, int]:
        """The copies that can be started now: group -> row."""
        started: dict[int, int] = {}
        for turn in list(self._fetch):
            expert = self._ids[turn]
            if not self._cache.host.has(expert):
                continue
            self._transfers.wait_for_room(self._cache.expert_bytes)
            coming = self._transfers.demand(expert)
            while coming is None and self._settle():
                coming = self._transfers.demand(expert)
            if coming is None:
                break
            self._fetch.remove(turn)
            started[turn] = coming.row
            self._cache.host.cache.residency.release(expert)
        return started

    def _settle(self) -> bool:
        """Give the first that has come up and been launched its place among the residents, or its row back. The others
        keep theirs, for a part of the step that is still to come."""
        coming = next(iter(computed(self._cache, self._transfers)), None)
        if coming is None:
            return False
        self._transfers.take(coming.expert)
        if self._cache.install(coming.expert, coming.row) and coming.expert in self._ids:
            self._cache.residency.release(coming.expert)
        return True

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
        begin = self._device.now()
        for turn, output in zip(turns, self._outputs(turns, hidden), strict=True):
            share.put(turn, output)
            self._cpu.remove(turn)
            host.cache.residency.release(self._ids[turn])
            if self._ids[turn] in self._cache.residency:
                self._cache.residency.release(self._ids[turn])
        seconds = self._device.now() - begin
        self._cache.stats.compute_s += seconds
        self.cpu_calls.append(([self._inputs.groups[turn].weights.shape[0] for turn in turns], seconds))
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


def computed(cache: DeviceCache, transfers: DeviceTransfers) -> list[Coming]:
    """Of a layer's experts that have come up those that have been launched, the oldest first."""
    return [one for one in transfers.all_coming() if one.is_computed and one.expert.layer == cache.spec.index]


def install(cache: DeviceCache, transfers: DeviceTransfers) -> list[ExpertId]:
    """After a step: give those that came up for it their places; the ones that have become resident."""
    resident = []
    for coming in sorted(computed(cache, transfers), key=lambda one: one.expert):
        transfers.take(coming.expert)
        if cache.install(coming.expert, coming.row):
            resident.append(coming.expert)
    return resident
