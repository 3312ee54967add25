"""A step of one token whose experts are all resident: most of decoding, with little around the kernels."""

from __future__ import annotations

from time import perf_counter

import torch

from moert.errors import MoertError
from moert.runtime.layer import LayerCache
from moert.runtime.look_ahead import LookAhead
from moert.runtime.pipeline import Pipeline
from moert.types import ExpertId


def run_one_token(
    layer: LayerCache,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    pipeline: Pipeline,
    look_ahead: LookAhead | None,
) -> torch.Tensor | None:
    """Run `layer` on `hidden` [1, D] as `run_step` would, to the bit, if it is as simple as it mostly is.

    Args:
        top_k_index: [1, K], integer.
        top_k_weights: [1, K], fp32.

    Returns:
        [1, D] in fp32, new memory; None, and nothing has happened, where an expert is missing, chosen twice or has no
        weights, and where the layer has no fused kernels.
    """
    spec, residency = layer.spec, layer.residency
    if spec.fused is None:
        return None
    ids = top_k_index[0].tolist()
    if len(set(ids)) != len(ids) or max(ids) >= spec.num_experts:
        return None
    weights = top_k_weights[0].contiguous()
    picks = sorted(
        (expert, place)
        for place, (expert, weight) in enumerate(zip(ids, weights.tolist(), strict=True))
        if expert >= 0 and weight != 0
    )
    event = [ExpertId(spec.index, expert) for expert, _ in picks]
    if not all(expert in residency for expert in event):
        return None
    out = torch.zeros(hidden.shape, dtype=torch.float32)
    if not event:
        return out
    residency.begin(event)
    try:
        layer.stats.hits += len(event)
        if look_ahead is not None:
            look_ahead.begin(spec.index, event)
            look_ahead.step(spec.index, hidden)
        if pipeline.busy:
            pipeline.collect()
            pipeline.pump()
        begin = perf_counter()
        experts = [layer.fused_expert(expert) for expert, _ in picks]
        spec.fused.ffn.run_token(hidden, experts, [place for _, place in picks], weights, out)
        layer.stats.compute_s += perf_counter() - begin
    except MoertError:
        residency.end()
        raise
    residency.end()
    return out
