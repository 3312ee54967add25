"""A step of one token: most of decoding, with little around the kernels.

Where every expert of a layer is resident, who is picked need not be known before the kernels run: then the whole layer
is one call of theirs.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any, Protocol

import torch

from moert.errors import MoertError
from moert.kernels.moe_block import BlockOutput
from moert.kernels.token_layer import LayerOutput
from moert.runtime.layer import LayerCache
from moert.runtime.look_ahead import LookAhead
from moert.runtime.one_token_misses import run_misses
from moert.runtime.pipeline import Pipeline


class TokenKernel(Protocol):
    """What a `TokenLayer` and a `TokenBlock` have in common."""

    def run(self, *args: Any, **kwargs: Any) -> LayerOutput | BlockOutput | None:
        """One token, and the experts as a table or None; see those of either."""

    def finish(self, found: Any, experts: torch.Tensor) -> torch.Tensor:
        """The output for what `run` left without, once somebody has computed the experts [1, D]."""


TokenArguments = tuple[Any, ...]
"""As the kernel's `run` takes them, but for the experts."""


def run_whole_layer(
    layer: LayerCache,
    kernel: TokenKernel,
    arguments: TokenArguments,
    pipeline: Pipeline,
    look_ahead: LookAhead | None,
    is_plain: bool,
) -> LayerOutput | BlockOutput | None:
    """Run one token through a whole layer of the model, or a whole block; with its experts only if `is_plain`.

    Returns:
        Without `output`, where somebody has to look first who was picked; None, and nothing has happened, where the
        kernel is not for these tensors.
    """
    table = layer.table() if is_plain and can_run_whole(layer, pipeline, look_ahead) else None
    found = kernel.run(*arguments, table)
    if found is not None and found.output is not None:
        count_whole(layer, found.ids.tolist()[0], found.experts_s, look_ahead)
    return found


def can_run_whole(layer: LayerCache, pipeline: Pipeline, look_ahead: LookAhead | None) -> bool:
    """Whether a step of one token needs nothing but its kernels, if all of the layer's experts are resident."""
    return not pipeline.busy and (look_ahead is None or look_ahead.rests(layer.spec.index))


def count_whole(layer: LayerCache, picks: list[int], experts_s: float, look_ahead: LookAhead | None) -> None:
    """A token's K picks have been computed, all of them resident."""
    event = [layer.ids[expert] for expert in sorted(picks)]
    layer.residency.hit(event)
    layer.stats.hits += len(event)
    layer.stats.compute_s += experts_s
    if look_ahead is not None:
        look_ahead.begin(layer.spec.index, event)


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
        hidden: contiguous.
        top_k_index: [1, K], integer.
        top_k_weights: [1, K].

    Returns:
        [1, D] in the dtype of `hidden`, new memory; None, and nothing has happened, where an expert is chosen twice or
        no real one, a weight is 0, and where the layer has no fused kernels.

    Raises:
        CorruptFileError, TransferError: see `run_step`.
    """
    spec, residency = layer.spec, layer.residency
    if spec.fused is None:
        return None
    weights = top_k_weights
    if weights.dtype is not torch.float32 or not weights.is_contiguous():
        weights = weights.to(torch.float32).contiguous()
    ids = top_k_index.tolist()[0]
    places = sorted(range(len(ids)), key=ids.__getitem__)
    if not ids or ids[places[0]] < 0 or ids[places[-1]] >= spec.num_experts or len(set(ids)) != len(ids):
        return None
    if 0 in weights.tolist()[0]:
        return None
    event = [layer.ids[ids[place]] for place in places]
    if not residency.begin_hits(event):
        picks = (top_k_index, top_k_weights)
        return run_misses(layer, spec.fused, hidden, event, places, weights, picks, pipeline, look_ahead)
    try:
        layer.stats.hits += len(event)
        if look_ahead is not None:
            look_ahead.begin(spec.index, event)
            look_ahead.observe(spec.index, top_k_index, top_k_weights)
            look_ahead.step(spec.index, hidden)
        if pipeline.busy:
            pipeline.collect()
            pipeline.pump()
        begin = perf_counter()
        out = spec.fused.ffn.run_token(hidden, layer.fused_experts(event), places, weights)
        layer.stats.compute_s += perf_counter() - begin
    except MoertError:
        residency.end()
        raise
    residency.end()
    return out
