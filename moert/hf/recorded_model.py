"""What a trace says of the model it was recorded from: its layers of experts, its configuration, how its texts end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import xxhash
from torch import nn

from moert.hf.adapters import ExpertsAdapter, find_experts
from moert.hf.experts import OffloadedExperts
from moert.hf.layers import top_k_of
from moert.hf.model import offloaded_modules
from moert.hf.patching import sharing
from moert.trace.recorder import EndOfText
from moert.trace.sequence import LayerInfo

_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "quantization_config", "use_cache")


class Experts(NamedTuple):
    """One experts module."""

    module: nn.Module
    adapter: ExpertsAdapter
    layer: int


def experts_of(model: nn.Module) -> dict[str, Experts]:
    """Module path -> module, in module order, of a model that is patched or not."""
    offloaded = offloaded_modules(model)
    if offloaded:
        return {path: Experts(module, module.adapter, module.layer) for path, module in offloaded.items()}
    adapters = find_experts(model)
    same_as = sharing(adapters)
    layers: dict[str, int] = {}
    for path in adapters:
        layers[path] = layers[same_as[path]] if path in same_as else len(set(layers.values()))
    return {path: Experts(adapter.module, adapter, layers[path]) for path, adapter in adapters.items()}


def layers_of(modules: Mapping[str, Experts]) -> tuple[LayerInfo, ...]:
    """What a trace says of each layer; of modules that share their experts, of the first."""
    layers: dict[int, LayerInfo] = {}
    for path, (module, adapter, layer) in modules.items():
        if layer in layers:
            continue
        if isinstance(module, OffloadedExperts) and module.runtime is not None:
            expert_bytes = module.runtime.layers[layer].spec.expert_bytes
        else:
            expert_bytes = sum(spec.nbytes for spec in adapter.specs)
        top_k = top_k_of(adapter)
        layers[layer] = LayerInfo(path, adapter.num_experts, top_k, top_k if top_k > 1 else None, expert_bytes)
    return tuple(layers[layer] for layer in sorted(layers))


def end_of_text(model: nn.Module) -> EndOfText:
    """How `generate` ends the model's texts and pads the rows that have ended."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    pad = getattr(config, "pad_token_id", None)
    end_ids = frozenset([ends] if isinstance(ends, int) else ends or ())
    # generate pads with the first end where no padding is configured.
    pad_id = pad if isinstance(pad, int) else next(iter([ends] if isinstance(ends, int) else ends or ()), None)
    return EndOfText(end_ids, pad_id)


def config_hash(config: Any) -> str:
    """Of a model's configuration, but for what says nothing of its routing; empty if there is none."""
    if not hasattr(config, "to_dict"):
        return ""
    return xxhash.xxh3_128(json.dumps(_lasting(config.to_dict()), sort_keys=True, default=str).encode()).hexdigest()


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(name): _lasting(item)
            for name, item in value.items()
            if name not in _VOLATILE and not str(name).startswith("_attn")
        }
    return [_lasting(item) for item in value] if isinstance(value, (list, tuple)) else value
