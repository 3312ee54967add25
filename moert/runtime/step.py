"""One MoE layer's step: the experts its tokens chose, fetched where they are missing, computed, and combined.

Experts run as soon as they are there, resident ones first, while the reads of the missing ones are under way. Their
outputs are added in a fixed order, by token and then by expert, in fp32, so where an expert was and when it arrived
cannot change the result by a bit.
"""

from __future__ import annotations

import contextlib
from collections import deque
from time import perf_counter

import torch

from moert.errors import MoertError
from moert.runtime.compute import Compute, ExpertCompute, Fused, OneByOne, add_weighted
from moert.runtime.layer import Fetch, LayerCache
from moert.runtime.routing import Group, group_by_expert
from moert.types import ExpertId

BATCH_PICKS = 512
"""While reads are still to be started, a batch ends at the expert that reaches this many picks, so that they are."""

HELD_OUTPUT_BYTES = 64 << 20
"""Outputs of experts that ran before their turn may take this much memory before a step waits for the turn."""


def run_step(
    layer: LayerCache,
    compute: Compute,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    reads_in_flight: int,
    check: bool = False,
) -> torch.Tensor:
    """Run one layer on `hidden` [T, D] with `top_k_index` and `top_k_weights` [T, K], all on the CPU.

    Blocks until done. Ids that name no expert (expert-parallel sentinels) and picks of weight 0 contribute nothing
    and fetch nothing.

    Returns:
        [T, D] in the dtype of `hidden`; new memory.

    Raises:
        CorruptFileError, TransferError: an expert could not be read. The cache stays consistent and the step may be
            run again.
    """
    spec = layer.spec
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    out = torch.zeros(hidden.shape, dtype=dtype)
    hidden = hidden.contiguous()
    groups = group_by_expert(top_k_index, top_k_weights.to(dtype), spec.num_experts + spec.num_identity)
    real = [group for group in groups if group.expert < spec.num_experts]
    if real:
        kernels = OneByOne(layer, compute) if spec.fused is None else Fused(layer, spec.fused)
        step = _Step(layer, kernels, hidden, out, real, reads_in_flight)
        try:
            step.run()
        finally:
            step.close()
        if check:
            layer.residency.check_integrity()
    for group in groups[len(real) :]:
        layer.stats.hits += 1
        add_weighted(group, group.rows(hidden), out)
    return out.to(hidden.dtype)


class _Step:
    """The state of one step; see `run_step`."""

    def __init__(
        self,
        layer: LayerCache,
        kernels: ExpertCompute,
        hidden: torch.Tensor,
        out: torch.Tensor,
        groups: list[Group],
        reads_in_flight: int,
    ) -> None:
        self._layer = layer
        self._kernels = kernels
        self._hidden = hidden
        self._out = out
        self._groups = groups
        self._ids = [ExpertId(layer.spec.index, group.expert) for group in groups]
        self._reads_in_flight = reads_in_flight
        self._next = 0
        self._ready: set[int] = set()
        self._to_fetch: deque[int] = deque()
        self._reading: dict[int, Fetch] = {}
        self._held: dict[int, torch.Tensor] = {}
        self._held_bytes = 0

    def run(self) -> None:
        residency, stats = self._layer.residency, self._layer.stats
        hits, misses = residency.begin(self._ids)
        stats.hits += len(hits)
        stats.misses += len(misses)
        missing = set(misses)
        for index, expert in enumerate(self._ids):
            if expert in missing:
                self._to_fetch.append(index)
            else:
                self._ready.add(index)
        while self._next < len(self._groups):
            self._submit()
            self._collect()
            turns = self._pick()
            if turns:
                self._compute(turns)
            else:
                self._wait()

    def close(self) -> None:
        """End the step. After an error or an interrupt no read may still write into a slot when this returns."""
        residency = self._layer.residency
        try:
            for fetch in self._reading.values():
                fetch.handle.cancel()
            for turn in list(self._reading):
                with contextlib.suppress(MoertError):  # the error that ended the step is the one to report
                    self._arrive(turn)
        finally:
            residency.end()

    def _submit(self) -> None:
        """Start as many reads as there are slots and buffers for, in the order of their turns."""
        while self._to_fetch and len(self._reading) < self._reads_in_flight:
            fetch = self._layer.start(self._ids[self._to_fetch[0]])
            if fetch is None:
                return
            self._reading[self._to_fetch.popleft()] = fetch

    def _collect(self) -> None:
        for turn in [turn for turn, fetch in self._reading.items() if fetch.handle.ready]:
            self._arrive(turn)

    def _arrive(self, turn: int) -> None:
        """Wait for a read and take it over, or raise what it raised."""
        try:
            self._layer.arrive(self._ids[turn], self._reading[turn])
        except Exception:
            del self._reading[turn]
            raise
        del self._reading[turn]
        self._ready.add(turn)

    def _pick(self) -> list[int]:
        """The experts to run now: those whose turn it is, else others unless too many outputs are held."""
        turns: list[int] = []
        if self._next in self._ready:
            turn, picks = self._next, 0
            while turn in self._ready and not (self._to_fetch and picks >= BATCH_PICKS):
                turns.append(turn)
                picks += self._groups[turn].weights.shape[0]
                turn += 1
            return turns
        blocked = bool(self._to_fetch) and not self._layer.residency.can_admit()
        held_bytes = self._held_bytes
        for turn in sorted(self._ready):
            if held_bytes >= HELD_OUTPUT_BYTES and not (not turns and (blocked or not self._reading)):
                break
            turns.append(turn)
            held_bytes += self._groups[turn].weights.shape[0] * self._out.shape[1] * self._out.element_size()
        return turns

    def _wait(self) -> None:
        begin = perf_counter()
        try:
            self._arrive(min(self._reading))
        finally:
            self._layer.stats.stall_s += perf_counter() - begin

    def _compute(self, turns: list[int]) -> None:
        begin = perf_counter()
        groups = [self._groups[turn] for turn in turns]
        self._ready.difference_update(turns)
        if turns[0] == self._next:
            self._kernels.add(groups, self._hidden, self._out)
            self._next += len(turns)
        else:
            for turn, output in zip(turns, self._kernels.outputs(groups, self._hidden), strict=True):
                self._held[turn] = output
                self._held_bytes += output.nbytes
        for turn in turns:
            self._layer.residency.release(self._ids[turn])
        while self._next in self._held:
            held = self._held.pop(self._next)
            self._held_bytes -= held.nbytes
            add_weighted(self._groups[self._next], held, self._out)
            self._next += 1
        self._layer.stats.compute_s += perf_counter() - begin
