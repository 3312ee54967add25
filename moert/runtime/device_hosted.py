"""Steps over a device that the host decides about: what runs where, in how many parts, and what comes of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from moert.device.base import Device, OutOfDeviceMemoryError
from moert.errors import MoertError
from moert.runtime.compute import Compute, ExpertCompute, Fused, OneByOne, Scratch
from moert.runtime.device_ahead import LayerAhead
from moert.runtime.device_by_layer import ByLayer
from moert.runtime.device_cache import DeviceCache
from moert.runtime.device_costs import Contention, measure_costs
from moert.runtime.device_counts import DeviceCounts
from moert.runtime.device_drift import CpuDrift
from moert.runtime.device_kernels import Inputs, LayerKernels
from moert.runtime.device_parts import Parts
from moert.runtime.device_pinning import PinnedHost
from moert.runtime.device_plan import plan_step
from moert.runtime.device_promoting import Promoting
from moert.runtime.device_step import DeviceStep, Machinery, install
from moert.runtime.device_ways import Ways
from moert.runtime.step import run_step
from moert.schedule import Costs, Curve
from moert.types import ExpertId

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


class HostedSteps:
    """Runs the steps of a device's layers one after the other, each as the scheduler in use says."""

    def __init__(
        self,
        machinery: Machinery,
        caches: ByLayer[DeviceCache],
        kernels: ByLayer[LayerKernels],
        pinned: PinnedHost,
        ways: Ways,
        counts: DeviceCounts,
        *,
        promoting: bool,
        costs: Costs | None,
    ) -> None:
        """`costs` are of one expert, for the scheduler; None: they are measured in the first step."""
        self._machinery, self._caches, self._kernels, self._pinned = machinery, caches, kernels, pinned
        self._device: Device = machinery.device
        self._transfers, self._pipeline = machinery.transfers, machinery.pipeline
        self.ways, self.counts = ways, counts
        self.costs = costs
        self.contention: Contention | None = None
        """What the link and the CPU take from each other; None: not measured."""
        self.drift = CpuDrift()
        self.promoting = Promoting(caches, self._transfers) if promoting else None
        self.ahead: LayerAhead | None = LayerAhead(caches, self._transfers)
        """None: while a prompt's layer is computed nothing is copied for the next one."""
        self.parts = Parts()
        self._scratch = Scratch()
        self._warned: set[str] = set()

    def run(
        self, layer: int, compute: Compute, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """As many tokens at a time as the device has memory for. What one part has had copied keeps its row for the
        next ones, as far as rows go."""
        host_ids, host_weights = self._device.to_host(ids), self._device.to_host(weights)
        whole = _Whole(host_ids.numel())
        whole_out: torch.Tensor | None = None
        begin = 0
        try:
            while begin < len(hidden):
                most = min(self.parts.most_tokens or len(hidden), len(hidden) - begin)
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
                if most < len(hidden):
                    # Memory for one part more, and not for all of them twice.
                    whole_out = torch.empty_like(hidden) if whole_out is None else whole_out
                    whole_out[begin : begin + most] = out
                begin += most
        except MoertError:
            self._transfers.demote(self._caches[layer].spec.index)
            raise
        except torch.OutOfMemoryError as error:
            self._transfers.demote(self._caches[layer].spec.index)
            raise OutOfDeviceMemoryError(f"{self._device.name} is out of memory: {error}") from error
        self.parts.went(len(hidden))
        self._end_step(layer, whole.misses)
        return out if whole_out is None else whole_out

    def _halve(self, tokens: int, error: OutOfDeviceMemoryError) -> None:
        fewer = self.parts.halve(tokens)
        self.counts.halved += 1
        self.ways.forget()
        self._warn(
            "halved",
            f"{error}: steps of {tokens} tokens are computed {fewer} at a time for now, or fewer, "
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
        self._transfers.drain()
        host = self._caches[layer].host.cache
        hidden, ids, weights = (self._device.to_host(tensor) for tensor in tensors)
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
        cache, kernels = self._caches[layer], self._kernels[layer]
        spec = cache.spec
        on_cpu = self._on_cpu(layer, compute)
        self._transfers.collect()
        hidden, ids, weights, host_ids, host_weights = tensors
        costs = self._known_costs(layer, compute, on_cpu, hidden)
        inputs = rest = Inputs(hidden, ids, weights, host_ids, host_weights, spec, compute)
        if tokens < len(hidden):
            hidden, ids, weights, host_ids, host_weights = (tensor[:tokens] for tensor in tensors)
            inputs = Inputs(hidden, ids, weights, host_ids, host_weights, spec, compute)
        picks = {group.expert: group.weights.shape[0] for group in rest.groups}
        event = [ExpertId(spec.index, group.expert) for group in inputs.groups]
        promoting = self.promoting
        value = (lambda _: 0.0) if promoting is None else promoting.rate
        scheduler = self.ways.scheduler
        plan = plan_step(
            cache,
            event,
            [picks[expert.expert] for expert in event],
            transfers=self._transfers,
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
        if self.costs is not None and self.contention is not None:
            for computed_for, seconds in step.cpu_calls:
                self.drift.note(self.costs, computed_for, seconds)
        whole.misses.update(step.misses)
        self._count(plan.here, plan.fetch, plan.cpu)
        cache.stats.hits += len(inputs.identity)
        return out

    def _end_step(self, layer: int, misses: Iterable[ExpertId]) -> None:
        """All parts of a step have been; `misses` were not resident."""
        cache, promoting = self._caches[layer], self.promoting
        resident = install(cache, self._transfers)
        self._transfers.forget_guesses(cache.spec.index)
        if promoting is not None:
            promoting.after(cache, sorted(misses), resident)
        self._transfers.pump()
        if promoting is not None:
            promoting.pump()

    def _on_cpu(self, layer: int, compute: Compute) -> ExpertCompute:
        host = self._caches[layer].host.cache
        self._scratch.clear()
        return OneByOne(host, compute) if host.spec.fused is None else Fused(host, host.spec.fused, self._scratch)

    @property
    def known_costs(self) -> Costs | None:
        """`costs` as schedulers go by them: what was measured here is corrected by what the CPU takes by now."""
        return self.costs if self.costs is None or self.contention is None else self.drift.of(self.costs)

    def _known_costs(self, layer: int, compute: Compute, on_cpu: ExpertCompute, hidden: torch.Tensor) -> Costs:
        if self.costs is None:
            measured = measure_costs(
                self._device,
                self._caches[layer],
                self._kernels[layer],
                on_cpu,
                self._pinned,
                compute,
                hidden.shape[1],
                hidden.dtype,
            )
            if measured is not None:
                self.costs, self.contention = measured
        return self.known_costs or _UNKNOWN

    def _count(self, here: Sequence[int], fetched: Sequence[int], on_cpu: Sequence[int]) -> None:
        counts = self.counts
        counts.on_device += len(here) + len(fetched)
        counts.fetched += len(fetched)
        counts.on_cpu += len(on_cpu)
        counts.ways[self.ways.way] = counts.ways.get(self.ways.way, 0) + 1

    def recover(self) -> None:
        """What was being promoted is not known any more; the transfers have forgotten it."""
        if self.promoting is not None:
            self.promoting = Promoting(self._caches, self._transfers)
