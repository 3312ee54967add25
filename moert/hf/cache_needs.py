"""What a model keeps of a text while it runs: its KV cache, by its own code on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
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
_LONGER_BY = 256
"""Tokens between two texts whose caches are compared; a multiple of those that models make one entry of."""

_PER_TOKEN = ("keys", "values")
_FIXED = ("conv_states", "recurrent_states")
"""Of linear attention and state-space models, whose code may take long for each token of a text."""


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
    queries, latent attention (compressed or not, as transformers keeps it), sliding windows, layers that share a
    cache, states of fixed size, and whatever else grows evenly with the text, such as the keys of an indexer
    or an entry for every few tokens.

    Args:
        model: on the meta device, with its experts offloaded; their forward is put back as it was, and the rest of the
            model may keep tensors on the meta device.
        experts: its experts modules, where they are not offloaded.
    """
    experts = experts or [module for module in model.modules() if isinstance(module, OffloadedExperts)]
    try:
        for module in experts:
            module.forward = _nothing
        short = _kept(model, _PROBE_TOKENS)
        names = {name.partition(".")[0] for _, tensors in short for name in tensors}
        is_known = names.issubset((*_PER_TOKEN, *_FIXED))
        long = short if is_known else _kept(model, _PROBE_TOKENS + _LONGER_BY)
    finally:
        for module in experts:
            del module.forward
    return tuple(_layer(window, some, many) for (window, some), (_, many) in zip(short, long, strict=True))


def _nothing(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(hidden_states)


def _kept(model: PreTrainedModel, tokens: int) -> list[tuple[int | None, dict[str, torch.Tensor]]]:
    """Each layer's window and the tensors that it keeps of a text of so many tokens."""
    cache: Any = DynamicCache(config=model.config)
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    windows = (getattr(layer, "sliding_window", None) for layer in cache.layers)
    found = (dict(_tensors(vars(layer))) for layer in cache.layers)
    return [(n if isinstance(n, int) else None, tensors) for n, tensors in zip(windows, found, strict=True)]


def _tensors(items: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """What is there of tensors of one dimension or more, dictionaries of them included."""
    for name, value in items.items():
        if isinstance(value, torch.Tensor) and value.numel() and value.ndim:
            yield f"{path}{name}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{path}{name}.")


def _layer(window: int | None, short: Mapping[str, torch.Tensor], long: Mapping[str, torch.Tensor]) -> CacheLayer:
    in_window = sum(short[name].nbytes // short[name].shape[-2] for name in _PER_TOKEN if name in short)
    others, later = (
        sum(tensor.nbytes for name, tensor in kept.items() if name not in _PER_TOKEN) for kept in (short, long)
    )
    each = max(0, -(-(later - others) // _LONGER_BY))
    return CacheLayer(in_window, window, max(0, others - each * _PROBE_TOKENS), each)
