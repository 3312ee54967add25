"""What a model keeps of a text while it runs: its KV cache, by its own code on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from moert.hf.adapters import find_experts
from moert.hf.experts import OffloadedExperts
from moert.hf.model import Offloaded, is_marked, runtime_of
from moert.planning.model import CacheLayer

CONTEXT = 4096
"""Tokens that memory is planned for where nobody says how many, or what the model takes if that is less."""

_PROBE_TOKENS = 8


def cache_bytes(model: PreTrainedModel, context: int | None, experts: Sequence[str] = ()) -> int:
    """The KV cache of one sequence of so many tokens, or of `CONTEXT`; 0 where the model's code does not tell.

    Args:
        model: on the meta device.
        experts: the paths of its experts modules, where they are not offloaded. Then the model is to be used yet, and
            a copy of it runs, as some classes keep what they make on the way.
    """
    try:
        probe = copy.deepcopy(model) if experts else model
        layers = cache_layers(probe, [probe.get_submodule(path) for path in experts])
    except Exception:  # any model's own code runs here
        return 0
    longest = longest_context(model)
    wanted = CONTEXT if context is None else context
    tokens = wanted if longest is None else min(wanted, longest)
    return sum(layer.nbytes(tokens) for layer in layers)


def cache_bytes_beside(model: nn.Module) -> int:
    """The same for a model whose experts are offloaded, at the context that its options say; 0 where it is on a device.

    Blocks while an empty model of its class is made, on the meta device.

    Args:
        model: or what wraps it.
    """
    own = next((module for module in model.modules() if is_marked(module)), None)
    if not isinstance(own, PreTrainedModel) or runtime_of(own).device is not None:
        return 0
    kind: Any = next(cls for cls in type(own).__mro__[1:] if cls is not Offloaded)
    try:
        with torch.device("meta"):
            empty = kind._from_config(copy.deepcopy(own.config), dtype=own.dtype)
        experts = list(find_experts(empty))
    except Exception:  # any model's own code runs here
        return 0
    return cache_bytes(empty, runtime_of(own).config.context, experts)


def longest_context(model: PreTrainedModel) -> int | None:
    """Tokens of the longest text that the model takes; None: its configuration does not say."""
    text = model.config.get_text_config(decoder=True)
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def cache_layers(model: PreTrainedModel, experts: Sequence[nn.Module] = ()) -> tuple[CacheLayer, ...]:
    """What each layer keeps of a sequence, as the model itself says when it runs: a few tokens, on the meta device.

    Nothing is computed and nothing allocated. Every kind of attention is served that fills transformers' cache: grouped
    queries, latent attention (of which transformers keeps the decompressed keys and values), sliding windows, layers
    that share another's cache, and states of fixed size.

    Args:
        model: on the meta device, with its experts offloaded; their forward is put back as it was, and the rest of the
            model may keep tensors on the meta device.
        experts: its experts modules, where they are not offloaded.
    """
    experts = experts or [module for module in model.modules() if isinstance(module, OffloadedExperts)]
    cache: Any = DynamicCache(config=model.config)
    ids = torch.zeros((1, _PROBE_TOKENS), dtype=torch.long, device="meta")
    try:
        for module in experts:
            module.forward = _nothing
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    finally:
        for module in experts:
            del module.forward
    return tuple(_layer(layer) for layer in cache.layers)


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
