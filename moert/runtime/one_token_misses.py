"""A step of one token of which some experts are missing: with little around the reads and the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch

from moert.errors import MoertError
from moert.kernels.arriving import run_arriving
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
        out = _run(layer, fused.ffn, hidden, event, places, weights, picks, pipeline, look_ahead, awaited)
    except MoertError:
        # Nobody waits for the rest of its reads.
        pipeline.withdraw(awaited)
        _end(layer)
        raise
    _end(layer)
    return out


def _run(
    layer: LayerCache,
    ffn: ExpertFfn,
    hidden: torch.Tensor,
    event: list[ExpertId],
    places: list[int],
    weights: torch.Tensor,
    picks: tuple[torch.Tensor, torch.Tensor],
    pipeline: Pipeline,
    look_ahead: LookAhead | None,
    awaited: set[ExpertId],
) -> torch.Tensor:
    """As `run_misses`. `awaited` are those whose reads it waits for."""
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
    ready: Sequence[ExpertId] = hits
    row_of = {expert: row for row, expert in enumerate(event)}
    records = pipeline.records(misses)
    if records is None:
        held = torch.zeros(len(event), hidden.shape[1])
    else:
        of = dict(zip(misses, records, strict=True))
        found = run_arriving(ffn, hidden, layer.fused_experts(event), places, weights, [of.get(one) for one in event])
        stats.compute_s += found.compute_s
        stats.stall_s += found.wait_s
        if found.output is not None:
            pipeline.collect()
            pipeline.pump()
            awaited.clear()
            return found.output
        # The others could not be read so: a Python thread reads them, or says why not.
        held, ready = found.held, ()
        row_of = {expert: row for expert, row in row_of.items() if not found.is_computed[row]}
    _run_the_rest(layer, ffn, hidden, row_of, ready, held, pipeline, awaited)
    out = torch.zeros(1, hidden.shape[1])
    add_in_order(held, places, weights, out)
    return out.to(hidden.dtype)


def _run_the_rest(
    layer: LayerCache,
    ffn: ExpertFfn,
    hidden: torch.Tensor,
    row_of: dict[ExpertId, int],
    ready: Sequence[ExpertId],
    held: torch.Tensor,
    pipeline: Pipeline,
    awaited: set[ExpertId],
) -> None:
    """Compute those that have a row of `held` [K, D]: what is `ready`, and the others as they arrive."""
    residency, stats = layer.residency, layer.stats
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
            return
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
        awaited.difference_update(arrived)
        ready = [expert for expert in arrived if expert in row_of]


def _end(layer: LayerCache) -> None:
    layer.residency.end()
    layer.count_residents()
