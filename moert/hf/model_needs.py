"""What a checkpoint's model asks of memory, from its configuration and file headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from moert.hf.experts import OffloadedExperts
from moert.hf.inspection import Planner, inspection_of, plan_checkpoint
from moert.planning.model import CacheLayer, ModelNeeds

_PROBE_TOKENS = 8


def read_needs(folder: Path, *, dtype: str = "auto") -> ModelNeeds:
    """The needs of the checkpoint in `folder`; reads headers, no weights.

    Args:
        dtype: as for `from_pretrained`.

    Raises:
        ConfigError, UnsupportedModelError, CorruptFileError, TransferError: loading would raise the same.
    """
    plan = plan_checkpoint(folder, Planner(), dtype=dtype)
    found = inspection_of(plan)
    cache: tuple[CacheLayer, ...] | None = None
    problem = ""
    try:
        cache = cache_layers(plan.model)
    except Exception as error:  # any model's own code runs here
        problem = f"its attention cannot be run without weights ({type(error).__name__}: {error})"
    text = plan.model.config.get_text_config(decoder=True)
    return ModelNeeds(
        name=found.architecture,
        layers=found.needs,
        dense_bytes=found.dense_bytes,
        dense_read_bytes=found.dense_bytes - _unread_bytes(plan.model),
        cache=cache,
        cache_problem=problem,
        longest_context=getattr(text, "max_position_embeddings", None),
        weight_bits=_weight_bits(found.stored_as, plan.dtype),
    )


def cache_layers(model: PreTrainedModel) -> tuple[CacheLayer, ...]:
    """What each layer keeps of a sequence, as the model itself says when it runs: a few tokens, on the meta device.

    Nothing is computed and nothing allocated. Every kind of attention is served that fills transformers' cache: grouped
    queries, latent attention (of which transformers keeps the decompressed keys and values), sliding windows, layers
    that share another's cache, and states of fixed size.

    Args:
        model: on the meta device, with its experts offloaded; its forward is put back as it was.
    """
    experts = [module for module in model.modules() if isinstance(module, OffloadedExperts)]
    cache: Any = DynamicCache(config=model.config)
    ids = torch.zeros((1, _PROBE_TOKENS), dtype=torch.long, device="meta")
    try:
        for module in experts:
            module.forward = _nothing  # type: ignore[method-assign]
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    finally:
        for module in experts:
            del module.forward
    return tuple(_layer(layer) for layer in cache.layers)


def _weight_bits(stored_as: tuple[str, ...], dtype: torch.dtype) -> float:
    """Of a weight as it is stored, without its share of scales."""
    if not stored_as:
        return float(torch.finfo(dtype).bits)
    return min(4.0 if "4" in name.partition(",")[0] else 8.0 for name in stored_as)


def _nothing(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(hidden_states)


def _layer(layer: Any) -> CacheLayer:
    per_token = fixed = 0
    for name, value in vars(layer).items():
        if not isinstance(value, torch.Tensor):
            continue
        if name in ("keys", "values"):
            per_token += value.nbytes // _PROBE_TOKENS if value.numel() else 0
        else:
            fixed += value.nbytes
    window = getattr(layer, "sliding_window", None)
    return CacheLayer(per_token, window if isinstance(window, int) else None, fixed)


def _unread_bytes(model: PreTrainedModel) -> int:
    """Of the table of input embeddings, of which a token reads one row, unless it is the output's too."""
    table = model.get_input_embeddings()
    weight = getattr(table, "weight", None)
    head = getattr(model.get_output_embeddings(), "weight", None)
    is_tied = head is weight or getattr(model.config, "tie_word_embeddings", False)
    return 0 if weight is None or is_tied else int(weight.nbytes)
