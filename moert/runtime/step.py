"""One MoE layer's step: the experts its tokens chose, fetched where they are missing, computed, and combined.

Experts run as soon as they are there, resident ones first, while the reads of the missing ones are under way. Their
outputs are added in a fixed order, by token and then by expert, in fp32, so where an expert was and when it arrived
cannot change the result by a bit.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from time import perf_counter

import torch

from moert.errors import MoertError
from moert.runtime.layer import Fetch, LayerCache, Weights
from moert.runtime.routing import Group, group_by_expert
from moert.types import ExpertId

Compute = Callable[[torch.Tensor, Weights], torch.Tensor]
"""(hidden [T, D], one expert's tensors) -> [T, D]"""

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
    groups = group_by_expert(top_k_index, top_k_weights, spec.num_experts + spec.num_identity)
    real = [group for group in groups if group.expert < spec.num_experts]
    if real:
        step = _Step(layer, compute, hidden, out, real, reads_in_flight)
        try:
            step.run()
        finally:
            step.close()
        if check:
            layer.residency.check_integrity()
    for group in groups[len(real) :]:
        layer.stats.hits += 1
        _add(out, group, _weighted(group, group.rows(hidden), dtype))
    return out.to(hidden.dtype)


def _weighted(group: Group, output: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return output.to(dtype) * group.weights.to(dtype).unsqueeze(1)


def _add(out: torch.Tensor, group: Group, part: torch.Tensor) -> None:
    if group.tokens is None:
        out += part
    else:
        out.index_add_(0, group.tokens, part)


class _Step:
    """The state of one step; see `run_step`."""

    def __init__(
        self,
        layer: LayerCache,
        compute: Compute,
        hidden: torch.Tensor,
        out: torch.Tensor,
        groups: list[Group],
        reads_in_flight: int,
    ) -> None:
        self._layer = layer
        self._compute = compute
        self._hidden = hidden
        self._out = out
        self._groups = groups
        self._ids = [ExpertId(layer.spec.index, group.expert) for group in groups]
        self._reads_in_flight = reads_in_flight
        self._next = 0
        self._ready: deque[int] = deque()
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
            (self._to_fetch if expert in missing else self._ready).append(index)
        while self._next < len(self._groups):
            self._submit()
            self._collect()
            turn = self._pick()
            if turn is None:
                self._wait()
            else:
                self._run_expert(turn)

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
        self._ready.append(turn)

    def _pick(self) -> int | None:
        """The expert to run now: the one whose turn it is, else another one unless too many outputs are held."""
        if not self._ready:
            return None
        if self._next in self._ready:
            return self._next
        blocked = bool(self._to_fetch) and not self._layer.residency.can_admit()
        if self._held_bytes < HELD_OUTPUT_BYTES or blocked or not self._reading:
            return min(self._ready)
        return None

    def _wait(self) -> None:
        begin = perf_counter()
        try:
            self._arrive(min(self._reading))
        finally:
            self._layer.stats.stall_s += perf_counter() - begin

    def _run_expert(self, turn: int) -> None:
        begin = perf_counter()
        group = self._groups[turn]
        self._ready.remove(turn)
        output = self._compute(group.rows(self._hidden), self._layer.weights(group.expert))
        self._layer.residency.release(self._ids[turn])
        if turn == self._next:
            self._finish(group, output)
            while self._next in self._held:
                held = self._held.pop(self._next)
                self._held_bytes -= held.nbytes
                self._finish(self._groups[self._next], held)
        else:
            self._held[turn] = output
            self._held_bytes += output.nbytes
        self._layer.stats.compute_s += perf_counter() - begin

    def _finish(self, group: Group, output: torch.Tensor) -> None:
        _add(self._out, group, _weighted(group, output, self._out.dtype))
        self._next += 1
