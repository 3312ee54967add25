"""A model's experts on a device above those in host memory and on disk: all that its steps share, and its life."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from moert.device.base import Device, Graph, OutOfDeviceMemoryError
from moert.errors import MoertError
from moert.runtime.compute import Compute, ExpertCompute, Fused, OneByOne, Scratch
from moert.runtime.device_ahead import LayerAhead
from moert.runtime.device_by_layer import ByLayer, caches_by_layer
from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_costs import measure_costs
from moert.runtime.device_counts import DeviceCounts
from moert.runtime.device_kernels import Inputs, LayerKernels
from moert.runtime.device_mailbox import Mailbox
from moert.runtime.device_pinning import PinnedHost
from moert.runtime.device_plan import plan_step
from moert.runtime.device_planned_way import PlannedWay
from moert.runtime.device_promoting import Promoting
from moert.runtime.device_rows import RowBank
from moert.runtime.device_step import DeviceStep, Machinery, install
from moert.runtime.device_table import SlotTable
from moert.runtime.device_transfers import DeviceTransfers
from moert.runtime.device_ways import Ways
from moert.runtime.pipeline import Pipeline
from moert.runtime.step import run_step
from moert.schedule import Costs, Curve
from moert.types import ExpertId

Ranges = Callable[[], Iterable[tuple[int, int]]]
"""(address, bytes) of the host memory that experts are in now."""


_UNKNOWN = Costs(Curve.constant(1e-3), Curve.constant(1e-4), move_s=1e-3, read_s=1e-2)
"""As long as nothing is in host memory that could be tried."""


@dataclass
class _Whole:
    """A step, perhaps of several parts."""

    picks: int
    needed: set[ExpertId] = field(default_factory=set)
    """Of the parts so far."""
    misses: set[ExpertId] = field(default_factory=set)
    """Of those, they were not resident."""


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
        planned: bool | None = None,
        debug: bool = False,
        pinned: PinnedHost | None = None,
    ) -> None:
        """
        Args:
            planned: False: the device runs no pass by itself, whatever `ways` would like.
            caches: of the layers that the device has; `kernels` are theirs.
            pipeline: from disk to host memory; `reads` says whether anything is there.
            costs: of one expert, for the scheduler; None: they are measured in the first step.
            max_bytes: of copies under way at once; None: the default.
            pinned: what is page-locked, where another device sees to that; None: this one.
        """
        self.device, self.caches, self._table = device, caches_by_layer(caches), table
        self._kernels = ByLayer({cache.spec.index: one for cache, one in zip(caches, kernels, strict=True)})
        self.pinned = PinnedHost(device) if pinned is None else pinned
        self._ranges = ranges
        self.transfers = DeviceTransfers(device, self.caches, self.pinned, pipeline if reads else None, max_bytes)
        self.ahead: LayerAhead | None = LayerAhead(self.caches, self.transfers)
        """None: while a prompt's layer is computed nothing is copied for the next one."""
        self._pipeline = pipeline
        self.ways = ways
        self._promoting = Promoting(self.caches, self.transfers) if promoting else None
        self._costs = costs
        self._machinery = Machinery(device, self.transfers, Mailbox(device), pipeline)
        self._scratch = Scratch()
        self._debug = debug
        self.most_tokens: int | None = None
        """Of one step, since the device had no memory for more."""
        self._warned: set[str] = set()
        self.counts = DeviceCounts()
        self.pinned.lock(ranges())
        self.planned = PlannedWay(self.ways, self.counts)
        """Passes that the device runs by itself."""
        if planned is not False:
            self.planned.make(device, tuple(self.caches), tuple(self._kernels), self.pinned, self.transfers)

    def go_by(self, ways: Ways) -> None:
        """Run passes as `ways` says from here on; between passes."""
        self.ways = self.planned.ways = ways

    def reset_counts(self) -> None:
        """Start counting anew."""
        self.count()
        self.counts = self.planned.counts = DeviceCounts()

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
        return self._run_parts(layer, compute, hidden, ids, weights)

    @property
    def is_planning(self) -> bool:
        """Whether the device runs passes of one token by itself now."""
        return self.planned.is_on

    def begin_planned(self) -> bool:
        """A pass of one token begins; whether a graph of it may be replayed. If not, `run` knows that it has begun."""
        return self.planned.begin()

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

    def _run_parts(
        self, layer: int, compute: Compute, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """As many tokens at a time as the device has memory for. What one part has had copied keeps its row for the
        next ones, as far as rows go."""
        host_ids, host_weights = self.device.to_host(ids), self.device.to_host(weights)
        whole = _Whole(host_ids.numel())
        outs: list[torch.Tensor] = []
        begin = 0
        try:
            while begin < len(hidden):
                most = min(self.most_tokens or len(hidden), len(hidden) - begin)
                # Where an expert is to be computed is a question of all the tokens that are left.
                left = [tensor[begin:] for tensor in (hidden, ids, weights, host_ids, host_weights)]
                try:
                    out = self._step(layer, compute, left, most, whole)
                except OutOfDeviceMemoryError as error:
                    if most > 1:
                        self._halve(most, error)
                        continue
                    part = [tensor[:most] for tensor in left[:3]]
                    out = self._without_device(layer, compute, part, error)
                outs.append(out)
                begin += most
        except MoertError:
            self.transfers.demote(self.caches[layer].spec.index)
            raise
        self._end_step(layer, whole.misses)
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _halve(self, tokens: int, error: OutOfDeviceMemoryError) -> None:
        self.most_tokens = tokens // 2
        self.counts.halved += 1
        self.ways.forget()
        self._warn(
            "halved",
            f"{error}: steps of {tokens} tokens are computed {self.most_tokens} at a time from here on, or fewer, "
            "which is slower; give device_memory less, or end what else uses the device",
        )

    def _without_device(
        self,
        layer: int,
        compute: Compute,
        tensors: Sequence[torch.Tensor],
        error: OutOfDeviceMemoryError,
    ) -> torch.Tensor:
        """A step of hidden states, ids and weights."""
        self._warn(
            "without",
            f"{error}: not even one token's experts can be computed there, and the CPU computes them while that is so; "
            "end what else uses the device, or give device_memory less",
        )
        self.counts.without += 1
        self.ways.forget()
        # What is copied must not leave host memory, and an ordinary step does not ask.
        self.transfers.drain()
        host = self.caches[layer].host.cache
        hidden, ids, weights = (self.device.to_host(tensor) for tensor in tensors)
        out = run_step(host, compute, hidden, ids, weights, pipeline=self._pipeline, scratch=self._scratch)
        return out.to(tensors[0].device)

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _step(
        self, layer: int, compute: Compute, tensors: Sequence[torch.Tensor], tokens: int, whole: _Whole
    ) -> torch.Tensor:
        """The first so many tokens of `tensors`, which are hidden states, ids and weights, and the last two in host
        memory; the others are for later parts of the `whole` step."""
        cache, kernels = self.caches[layer], self._kernels[layer]
        spec = cache.spec
        on_cpu = self._on_cpu(layer, compute)
        self.transfers.collect()
        hidden, ids, weights, host_ids, host_weights = tensors
        costs = self._known_costs(layer, compute, on_cpu, hidden)
        inputs = rest = Inputs(hidden, ids, weights, host_ids, host_weights, spec, compute)
        if tokens < len(hidden):
            hidden, ids, weights, host_ids, host_weights = (tensor[:tokens] for tensor in tensors)
            inputs = Inputs(hidden, ids, weights, host_ids, host_weights, spec, compute)
        picks = {group.expert: group.weights.shape[0] for group in rest.groups}
        event = [ExpertId(spec.index, group.expert) for group in inputs.groups]
        promoting = self._promoting
        value = (lambda _: 0.0) if promoting is None else promoting.rate
        scheduler = self.ways.scheduler
        plan = plan_step(
            cache,
            event,
            [picks[expert.expert] for expert in event],
            transfers=self.transfers,
            scheduler=scheduler,
            costs=costs,
            value=value,
        )

        def look_ahead() -> None:
            if self.ahead is not None:
                self.ahead.start(layer, whole.picks, len(whole.needed), scheduler, costs, value)

        then = look_ahead if inputs is rest else None
        step = DeviceStep(self._machinery, cache, kernels, on_cpu, inputs, plan, then)
        whole.needed.update(event)
        if promoting is not None:
            promoting.observe(event)
        out = step.run()
        whole.misses.update(step.misses)
        self._count(plan.here, plan.fetch, plan.cpu)
        cache.stats.hits += len(inputs.identity)
        return out

    def _end_step(self, layer: int, misses: Iterable[ExpertId]) -> None:
        """All parts of a step have been; `misses` were not resident."""
        cache, promoting = self.caches[layer], self._promoting
        resident = install(cache, self.transfers)
        self.transfers.forget_guesses(cache.spec.index)
        if promoting is not None:
            promoting.after(cache, sorted(misses), resident)
        self.transfers.pump()
        if promoting is not None:
            promoting.pump()
        if self._debug:
            self.check_integrity()

    def _on_cpu(self, layer: int, compute: Compute) -> ExpertCompute:
        host = self.caches[layer].host.cache
        self._scratch.clear()
        return OneByOne(host, compute) if host.spec.fused is None else Fused(host, host.spec.fused, self._scratch)

    def _known_costs(self, layer: int, compute: Compute, on_cpu: ExpertCompute, hidden: torch.Tensor) -> Costs:
        if self._costs is None:
            self._costs = measure_costs(
                self.device,
                self.caches[layer],
                self._kernels[layer],
                on_cpu,
                self.pinned,
                compute,
                hidden.shape[1],
                hidden.dtype,
            )
        return self._costs or _UNKNOWN

    def _count(self, here: Sequence[int], fetched: Sequence[int], on_cpu: Sequence[int]) -> None:
        counts = self.counts
        counts.on_device += len(here) + len(fetched)
        counts.fetched += len(fetched)
        counts.on_cpu += len(on_cpu)
        counts.ways[self.ways.way] = counts.ways.get(self.ways.way, 0) + 1

    def preload(self) -> None:
        """Make as many of each layer's experts resident as there are slots for, of those that are in host memory now;
        blocks until they are there. Nothing is read from disk.

        Raises:
            DeviceLostError: the device is gone.
        """
        self.settle()
        for cache in self.caches:
            room = cache.residency.capacity - len(cache.residency)
            all_experts = (ExpertId(cache.spec.index, expert) for expert in range(cache.spec.num_experts))
            wanted = [expert for expert in all_experts if cache.host.has(expert) and expert not in cache.residency]
            for expert in wanted[:room]:
                self.transfers.wait_for_room(cache.expert_bytes)
                coming = self.transfers.demand(expert)
                assert coming is not None, "no row for a free slot"
                self.transfers.take(expert)
                cache.replace(expert, coming.row, None)
        self.transfers.drain()

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
        if self._promoting is not None:
            self._promoting = Promoting(self.caches, self.transfers)

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
        self.pinned.close()
        self._machinery.mailbox.close()
        self._table.close()
        for bank in self.banks:
            bank.close()
