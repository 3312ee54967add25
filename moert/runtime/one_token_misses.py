"""A step of one token of which some experts are missing: with little around the reads and the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch

from moert.errors import MoertError
from moert.kernels.cpu_ffn import ExpertFfn, add_in_order
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
    awaited: set[ExpertId] = set()
    try:
        held = _run(layer, fused.ffn, hidden, event, picks, pipeline, look_ahead, awaited)
    except MoertError:
        # Nobody waits for the rest of its reads.
        pipeline.withdraw(awaited)
        _end(layer)
        raise
    _end(layer)
    out = torch.zeros(1, hidden.shape[1])
    add_in_order(held, places, weights, out)
    return out.to(hidden.dtype)


def _run(
    layer: LayerCache,
    ffn: ExpertFfn,
    hidden: torch.Tensor,
    event: list[ExpertId],
    picks: tuple[torch.Tensor, torch.Tensor],
    pipeline: Pipeline,
    look_ahead: LookAhead | None,
    awaited: set[ExpertId],
) -> torch.Tensor:
    """What each expert of the event gives, not weighted: [K, D]. `awaited` are those whose reads it waits for."""
    residency, stats, index = layer.residency, layer.stats, layer.spec.index
    tells = look_ahead is not None and look_ahead.tells(index)
    if look_ahead is not None and tells:
        look_ahead.observe(index, *picks)
        look_ahead.tell(index, event)
    if look_ahead is not None:
        # Before it is decided who leaves: what is given up makes room.
        look_ahead.begin(index, event)
    hits, misses, arriving = residency.begin(event)
    awaited.update(misses)
    residency.promise()
    pipeline.demand(misses)
    pipeline.pump()
    # What the reads do not need comes after they have been asked for.
    stats.hits += len(hits)
    stats.misses += len(misses)
    stats.forwarded += len(arriving)
    if look_ahead is not None:
        if not tells:
            # What only later steps go by is learned while this one waits.
            look_ahead.observe(index, *picks)
        look_ahead.step(index, hidden)
    held = torch.zeros(len(event), hidden.shape[1])
    row_of = {expert: row for row, expert in enumerate(event)}
    ready: Sequence[ExpertId] = hits
    while True:
        if ready:
            begin = perf_counter()
            nothing = [None] * len(ready)
            rows = [row_of[expert] for expert in ready]
            ffn.run(hidden, layer.fused_experts(ready), nothing, nothing, held, out_rows=rows)
            for expert in ready:
                residency.release(expert)
            stats.compute_s += perf_counter() - begin
        if not awaited:
            return held
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
        ready = [expert for expert in arrived if expert in awaited]
        awaited.difference_update(ready)


def _end(layer: LayerCache) -> None:
    layer.residency.end()
    layer.count_residents()
