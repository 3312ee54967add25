"""One MoE layer's step: the experts its tokens chose, fetched where they are missing, computed, and combined.

Experts run as soon as they are there, resident ones first, while the reads of the missing ones are under way. Their
outputs are added in a fixed order, by token and then by expert, in fp32, so where an expert was and when it arrived
cannot change the result by a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch

from moert.errors import MoertError
from moert.runtime.compute import Compute, ExpertCompute, Fused, OneByOne, Scratch, add_weighted
from moert.runtime.layer import LayerCache
from moert.runtime.look_ahead import LookAhead
from moert.runtime.one_token import run_one_token
from moert.runtime.pipeline import Pipeline
from moert.runtime.routing import Group, group_by_expert
from moert.types import ExpertId

BATCH_PICKS = 512
"""While reads are still to be started, a batch ends at the expert that reaches this many picks, so that they are."""

HELD_OUTPUT_BYTES = 64 << 20
"""Outputs of experts that ran before their turn may take this much memory before a step waits for the turn."""

SHOWN_TOKENS = 256
"""The last so many of a long step are shown to predictors: enough to learn from, and the step hardly waits for it."""


def run_step(
    layer: LayerCache,
    compute: Compute,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    pipeline: Pipeline,
    scratch: Scratch | None = None,
    look_ahead: LookAhead | None = None,
    scores: Sequence[float] | None = None,
    check: bool = False,
) -> torch.Tensor:
    """Run one layer on `hidden` [T, D] with `top_k_index` and `top_k_weights` [T, K], all on the CPU.

    Missing experts come through `pipeline`, before all that nobody waits for. `scratch` is used by one step at a time.
    `scores` are the router's probabilities [E], averaged over the tokens, for a policy that wants to know them.

    Blocks until done. Ids that name no expert (expert-parallel sentinels) and picks of weight 0 contribute nothing
    and fetch nothing.

    Returns:
        [T, D] in the dtype of `hidden`; new memory.

    Raises:
        CorruptFileError, TransferError: an expert could not be read. The cache stays consistent and the step may be
            run again. After anything else, an interrupt for one, layer and pipeline must `recover` first: nobody knows
            what it has cut short.
    """
    spec = layer.spec
    hidden = hidden.contiguous()
    if len(hidden) == 1 and scores is None and not check:
        simple = run_one_token(layer, hidden, top_k_index, top_k_weights, pipeline, look_ahead)
        if simple is not None:
            return simple
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    top_k_weights = top_k_weights.to(dtype)
    out = torch.zeros(hidden.shape, dtype=dtype)
    groups = group_by_expert(top_k_index, top_k_weights, spec.num_experts + spec.num_identity)
    real = [group for group in groups if group.expert < spec.num_experts]
    if real:
        scratch = scratch or Scratch()
        scratch.clear()
        kernels = OneByOne(layer, compute) if spec.fused is None else Fused(layer, spec.fused, scratch)
        if scores is not None:
            layer.residency.policy.observe_scores(spec.index, scores)
        if look_ahead is not None:
            look_ahead.observe(spec.index, top_k_index, top_k_weights)
        step = _Step(layer, kernels, hidden, out, real, pipeline, look_ahead)
        try:
            step.run()
        except MoertError:
            step.close()
            raise
        step.close()
        if check:
            layer.residency.check_integrity()
            pipeline.check_integrity()
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
        pipeline: Pipeline,
        look_ahead: LookAhead | None,
    ) -> None:
        self._layer = layer
        self._kernels = kernels
        self._hidden = hidden
        self._out = out
        self._groups = groups
        self._ids = [ExpertId(layer.spec.index, group.expert) for group in groups]
        self._pipeline = pipeline
        self._look_ahead = look_ahead
        self._next = 0
        self._ready: set[int] = set()
        self._awaited: dict[ExpertId, int] = {}
        self._held: dict[int, torch.Tensor] = {}
        self._held_bytes = 0

    def run(self) -> None:
        stats = self._layer.stats
        ahead = self._look_ahead
        if ahead is not None:
            ahead.tell(self._layer.spec.index, self._ids)
            # Before it is decided who leaves: what is given up makes room.
            ahead.begin(self._layer.spec.index, self._ids, len(self._hidden))
        hits, misses, arriving = self._layer.residency.begin(self._ids)
        stats.hits += len(hits)
        stats.misses += len(misses)
        stats.forwarded += len(arriving)
        if misses:
            self._layer.residency.promise()
        turn_of = {expert: turn for turn, expert in enumerate(self._ids)}
        self._ready.update(turn_of[expert] for expert in hits)
        self._awaited = {expert: turn_of[expert] for expert in misses}
        self._pipeline.demand(misses)
        if ahead is not None:
            self._pipeline.pump()
            ahead.step(self._layer.spec.index, self._hidden[-SHOWN_TOKENS:])
        while self._next < len(self._groups):
            if self._pipeline.busy:
                self._take(self._pipeline.collect())
                self._pipeline.pump()
            turns = self._pick()
            if turns:
                self._compute(turns)
            else:
                self._wait()

    def close(self) -> None:
        """End the step; after an error nobody waits for the rest of its reads."""
        self._pipeline.withdraw(self._awaited)
        self._layer.residency.end()
        self._layer.count_residents()

    def _take(self, arrived: list[ExpertId]) -> None:
        for expert in arrived:
            turn = self._awaited.pop(expert, None)
            if turn is not None:
                self._ready.add(turn)

    def _pick(self) -> list[int]:
        """The experts to run now: those whose turn it is, else others unless too many outputs are held."""
        turns: list[int] = []
        if self._next in self._ready:
            turn, picks = self._next, 0
            while turn in self._ready and not (self._pipeline.has_queued_demands and picks >= BATCH_PICKS):
                turns.append(turn)
                picks += self._groups[turn].weights.shape[0]
                turn += 1
            return turns
        leaving = self._leaving()
        held_bytes, picks = self._held_bytes, 0
        for turn in [*leaving, *sorted(self._ready.difference(leaving))]:
            if held_bytes >= HELD_OUTPUT_BYTES and not (not turns and (leaving or not self._is_any_in_flight())):
                break
            turns.append(turn)
            held_bytes += self._groups[turn].weights.shape[0] * self._out.shape[1] * self._out.element_size()
            picks += self._groups[turn].weights.shape[0]
            if picks >= BATCH_PICKS:
                break  # holding outputs costs more than adding them in their turn, which may have come by then
        return turns

    def _leaving(self) -> list[int]:
        """Those that can run, and whose slots are waited for."""
        residency = self._layer.residency
        if not self._pipeline.has_queued_demands or residency.can_admit():
            return []
        return [turn for turn in sorted(self._ready) if residency.is_leaving(self._ids[turn])]

    def _is_any_in_flight(self) -> bool:
        return any(self._pipeline.is_in_flight(expert) for expert in self._awaited)

    def _wait(self) -> None:
        begin = perf_counter()
        try:
            self._take(self._pipeline.wait())
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
