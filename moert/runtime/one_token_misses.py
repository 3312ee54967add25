"""A step of one token of which some experts are missing: with little around the reads and the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch

from moert.errors import MoertError
from moert.kernels.cpu_ffn import add_in_order
from moert.runtime.fused import FusedExperts
from moert.runtime.layer import LayerCache
from moert.runtime.look_ahead import LookAhead
from moert.runtime.pipeline import Pipeline
from moert.types import ExpertId


def run_misses(
    layer: LayerCache,
    fused: FusedExperts,
    hidden: torch.Tensor,
    event: list[ExpertId],
    places: list[int],
    weights: torch.Tensor,
    picks: tuple[torch.Tensor, torch.Tensor],
    pipeline: Pipeline,
    look_ahead: LookAhead | None,
) -> torch.Tensor:
    """Run `layer` on `hidden` [1, D] as `run_step` would, to the bit: what is there at once, the rest as it comes.

    Args:
        hidden: contiguous.
        event: the token's experts, ascending, each once.
        places: of each, where its weight is in `weights`.
        weights: [1, K], fp32, contiguous, none of them 0.
        picks: what the router gave, ids and weights, both [1, K].

    Returns:
        [1, D] in the dtype of `hidden`; new memory.

    Raises:
        CorruptFileError, TransferError: see `run_step`.
    """
    step = _Step(layer, fused, hidden, event, pipeline)
    try:
        step.run(picks, look_ahead)
    except MoertError:
        step.close()
        raise
    step.close()
    out = torch.zeros(1, hidden.shape[1])
    add_in_order(step.held, places, weights, out)
    return out.to(hidden.dtype)


class _Step:
    """The state of one step; see `run_misses`."""

    def __init__(
        self,
        layer: LayerCache,
        fused: FusedExperts,
        hidden: torch.Tensor,
        event: list[ExpertId],
        pipeline: Pipeline,
    ) -> None:
        self._layer = layer
        self._ffn = fused.ffn
        self._hidden = hidden
        self._event = event
        self._pipeline = pipeline
        self._row_of = {expert: row for row, expert in enumerate(event)}
        self.held = torch.zeros(len(event), hidden.shape[1])
        """[K, D] of each expert of the event, not weighted."""
        self._awaited: set[ExpertId] = set()

    def run(self, picks: tuple[torch.Tensor, torch.Tensor], look_ahead: LookAhead | None) -> None:
        layer, pipeline, stats = self._layer, self._pipeline, self._layer.stats
        index = layer.spec.index
        tells = look_ahead is not None and look_ahead.tells(index)
        if look_ahead is not None and tells:
            look_ahead.observe(index, *picks)
            look_ahead.tell(index, self._event)
        if look_ahead is not None:
            # Before it is decided who leaves: what is given up makes room.
            look_ahead.begin(index, self._event)
        hits, misses, arriving = layer.residency.begin(self._event)
        stats.hits += len(hits)
        stats.misses += len(misses)
        stats.forwarded += len(arriving)
        self._awaited.update(misses)
        layer.residency.promise()
        pipeline.demand(misses)
        pipeline.pump()
        if look_ahead is not None:
            if not tells:
                # What only later steps go by is learned while this one waits.
                look_ahead.observe(index, *picks)
            look_ahead.step(index, self._hidden)
        ready: Sequence[ExpertId] = hits
        while True:
            if ready:
                self._compute(ready)
            if not self._awaited:
                break
            arrived = pipeline.collect()
            if not arrived:
                # What has been computed may have left its slot.
                pipeline.pump()
                begin = perf_counter()
                try:
                    arrived = pipeline.wait()
                finally:
                    stats.stall_s += perf_counter() - begin
            pipeline.pump()
            ready = [expert for expert in arrived if expert in self._awaited]
            self._awaited.difference_update(ready)

    def close(self) -> None:
        """End the step; after an error nobody waits for the rest of its reads."""
        if self._awaited:
            self._pipeline.withdraw(self._awaited)
        self._layer.residency.end()
        self._layer.count_residents()

    def _compute(self, experts: Sequence[ExpertId]) -> None:
        begin = perf_counter()
        rows = [self._row_of[expert] for expert in experts]
        nothing = [None] * len(rows)
        self._ffn.run(self._hidden, self._layer.fused_experts(experts), nothing, nothing, self.held, out_rows=rows)
        for expert in experts:
            self._layer.residency.release(expert)
        self._layer.stats.compute_s += perf_counter() - begin
