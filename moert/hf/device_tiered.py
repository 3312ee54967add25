"""A model whose dense part is on a device and whose experts come there from host memory and disk as they are needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moert.config import OffloadConfig
from moert.device.base import Device
from moert.errors import MoertError
from moert.hf.experts import OffloadedExperts
from moert.hf.graphed_forward import graph_passes
from moert.hf.model import offloaded_modules
from moert.runtime.device_building import attach_device
from moert.runtime.device_tier import DeviceTier
from moert.runtime.runtime import OffloadRuntime


class TieredExperts(OffloadedExperts):
    """`OffloadedExperts` that are given and give tensors of a device."""

    def _run(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        if self.runtime is None or self.runtime.device is None:
            raise MoertError("these experts have no device; load or patch the model again")
        if hidden_states.dtype != self.dtype:
            raise self._wrong_dtype(hidden_states.dtype)
        where = self.runtime.device.device.torch_device
        if hidden_states.device != where:
            raise MoertError(
                f"the experts come to {where}, but were called with hidden states on {hidden_states.device}; move the "
                f"model to {where}"
            )
        scores = None if self.scores is None else self.scores(top_k_index, top_k_weights)
        flat = self.adapter.flatten(hidden_states)
        output = self.runtime.run(self.layer, self.adapter.compute, flat, top_k_index, top_k_weights, scores)
        return self.adapter.unflatten(output, hidden_states)


def put_on_device(
    model: nn.Module,
    runtime: OffloadRuntime,
    device: Device,
    config: OffloadConfig,
    *,
    context: int | None = None,
    **options: Any,
) -> DeviceTier:
    """Run a model's experts over `device`, and move everything else of it there. Blocks.

    Args:
        model: loaded or patched, its experts in `runtime`, which owns the device from here on, also if this fails.
        context: tokens of the KV cache that the device must have room for beside the experts; None: none are counted.
        **options: of `attach_device`.

    Raises:
        CapacityError, ConfigError: as `attach_device`.
    """
    where = device.torch_device
    tensors = [*model.parameters(), *model.buffers()]
    dense = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.device != where}
    tier = attach_device(
        runtime,
        device,
        budget=config.device_budget,
        dense_bytes=sum(dense.values()),
        cache_bytes=0 if context is None else cache_bytes(model, context),
        **options,
    )
    for module in offloaded_modules(model).values():
        module.__class__ = TieredExperts
    model.to(where)
    graph_passes(model, runtime)
    return tier


def cache_bytes(model: nn.Module, context: int) -> int:
    """Of the KV cache of one sequence of `context` tokens, by the model's configuration; 0 where that does not say.

    Windows and compressed caches take less than this counts.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return 0
    text = config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", 0)
    heads = getattr(text, "num_attention_heads", 0)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or (getattr(text, "hidden_size", 0) // heads if heads else 0)
    number_bytes = next((p.dtype.itemsize for p in model.parameters()), 2)
    return 2 * layers * kv_heads * head_dim * number_bytes * context
