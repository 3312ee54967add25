"""The plug-in through which HuggingFace's own loader loads everything but the experts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from moert.config import OffloadConfig
from moert.device.base import Device
from moert.errors import CorruptFileError, UnsupportedModelError
from moert.formats import FormatChoice
from moert.hf.adapters import ExpertsAdapter, find_experts
from moert.hf.cache_needs import cache_bytes
from moert.hf.checkpoint import CheckpointMap
from moert.hf.dense import own_memory
from moert.hf.dense_compute import take_over
from moert.hf.device_tiered import put_on_device
from moert.hf.experts import OffloadedExperts
from moert.hf.layers import Layers, make_layers, tied_modules
from moert.hf.model import close, mark
from moert.hf.packed import Pack, open_pack
from moert.hf.router_weights import look_ahead, look_from_forwards
from moert.hf.source import CheckpointSource, checkpoint_records, read_checkpoint
from moert.runtime import device_opening
from moert.runtime.building import runtime_in_slots
from moert.runtime.pack_file import MANIFEST
from moert.runtime.preload import Progress
from moert.runtime.records import Record
from moert.runtime.runtime import OffloadRuntime

key_mapping: ContextVar[dict[str, str] | None] = ContextVar("key_mapping", default=None)
"""The `key_mapping` argument of the `from_pretrained` that is running, which it does not tell its quantizer."""

progress: ContextVar[Progress | None] = ContextVar("progress", default=None)
"""Whom to tell how far the experts have been read while loading."""

options: ContextVar[OffloadConfig | None] = ContextVar("options", default=None)
"""The options for a pack that is being loaded, in place of those in its own config.json."""


class Handed(NamedTuple):
    """Devices that experts are to come to."""

    device: Device | Sequence[Device]
    options: dict[str, Any]
    """Of `put_on_device`."""


handed: ContextVar[Handed | None] = ContextVar("handed", default=None)
"""A device that the caller has opened; without one, `device_memory` opens a GPU."""


@register_quantizer("moert")
class MoertQuantizer(HfQuantizer):
    """Takes the experts modules out before the weights are loaded, and gives them their tiers afterwards."""

    def __init__(self, quantization_config: OffloadConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)  # type: ignore[arg-type]  # duck-typed on purpose
        self._config = options.get() or quantization_config
        self._source = getattr(quantization_config, "source", None)
        # Nothing is quantised: "not pre-quantised" would make the loader read the dense weights on one thread.
        self.pre_quantized = True
        self._make_runtime: Callable[[], OffloadRuntime] | None = None
        self._stored_as: FormatChoice | None = None
        self._reserved_bytes = 0
        """Of memory that is measured, for the KV cache."""
        self._is_tiered = self._config.device_memory is not None or handed.get() is not None

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self._is_tiered and handed.get() is None:
            device_opening.check_machine(self._config)

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        use_kernels: bool = False,
        **kwargs: Any,
    ) -> PreTrainedModel:
        if use_kernels:
            raise UnsupportedModelError(
                "use_kernels=True replaces the MoE block's forward and goes round its experts module"
            )
        if getattr(model.config, "distributed_config", None) is not None:
            raise UnsupportedModelError(
                "experts cannot be offloaded and sharded at once: drop tp_plan / distributed_config"
            )
        adapters = find_experts(model)
        self._reserve(model, list(adapters))
        pack = self._find_pack(checkpoint_files)
        entries = read_checkpoint(checkpoint_files) if pack is None else {}
        dtypes = _dtypes_in_memory(model, adapters, dtype)
        tied = {**(getattr(model, "all_tied_weights_keys", None) or {})}
        same_as = tied_modules(adapters, tied)
        stacked = {f"{path}.{name}" for path, adapter in adapters.items() for name in adapter.names}
        for name in stacked & tied.keys():
            del model.all_tied_weights_keys[name]
        self.tied_keys = {name: tied[name] for name in stacked & tied.keys()}
        for path, adapter in adapters.items():
            model.set_submodule(path, OffloadedExperts(adapter))
        ignored = {f"^{re.escape(name)}$" for name in stacked}
        self._ignored_keys = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored
        layers = make_layers(adapters, same_as, dtypes, self._stored_as if pack is None else pack.stored_as)
        if pack is None:
            mapping = CheckpointMap(model, adapters, dtypes, entries, key_mapping.get())
            records = checkpoint_records(mapping, layers.specs, layers.paths_of)
            self._plan(model, layers, mapping.paths, records, mapping)
        else:
            self._plan(model, layers, *pack.records(layers))
        return model

    def _reserve(self, model: PreTrainedModel, experts: list[str]) -> None:
        """Find out what `model`, whose experts modules are still there, needs beside its weights."""
        # The cache is where attention is.
        if self._config.host_memory is None and not self._is_tiered:
            self._reserved_bytes = cache_bytes(model, self._config.context, experts)

    def _find_pack(self, checkpoint_files: list[str] | None) -> Pack | None:
        """The pack that the model is loaded from; None for an ordinary checkpoint."""
        if not checkpoint_files:
            return None
        folder = Path(checkpoint_files[0]).parent
        pack = open_pack(folder)
        if pack is None and self._source is not None:
            raise CorruptFileError(
                f"{folder / MANIFEST} is missing, and config.json says that this is a pack; copy all of its files, "
                "from the hub with `hf download`"
            )
        if pack is not None and self._source not in (None, pack.source):
            raise CorruptFileError(f"{folder}: config.json and {MANIFEST} are of two different packs; copy it again")
        return pack

    def _plan(
        self,
        model: PreTrainedModel,
        layers: Layers,
        paths: list[str],
        records: list[list[Record]],
        mapping: CheckpointMap | None = None,
    ) -> None:
        config = self._config
        _warn_of_decoding(layers)

        def make_runtime() -> OffloadRuntime:
            source = CheckpointSource(paths, records, direct=config.direct_io)
            try:
                return runtime_in_slots(layers.specs, source, config, progress.get(), self._reserved_bytes)
            except BaseException:
                source.close()
                raise

        self._make_runtime = make_runtime
        self._layer_of = layers.layer_of

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module in model.modules():
            config = getattr(module, "config", None)
            # Some models take another code path where this attribute exists, whatever its value.
            if config is not None and "_is_quantized" in vars(config):
                del config._is_quantized
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model._keys_to_ignore_on_load_unexpected = self._ignored_keys
        own_memory(model)
        assert self._make_runtime is not None
        runtime = self._make_runtime()
        self._make_runtime = None
        for path, layer in self._layer_of.items():
            module = model.get_submodule(path)
            assert isinstance(module, OffloadedExperts)
            module.bind(runtime, layer)
        mark(model, runtime, leave=close)
        look_ahead(model, runtime)
        if self._is_tiered:
            device, options = handed.get() or (None, {})
            try:
                put_on_device(model, runtime, self._config, device, **options)
            except BaseException:
                close(model)
                raise
        take_over(model, self._config.dense_kernels)
        look_from_forwards(model)
        return model


def _warn_of_decoding(layers: Layers) -> None:
    """Say so where experts are stored in a format that their layer's kernels do not read."""
    slow = [
        spec
        for spec in layers.specs
        if spec.fused is None and spec.storage is not None and not spec.storage.choice.is_plain
    ]
    if slow:
        warnings.warn(
            f"{slow[0].name}, one of {len(slow)} layers: {slow[0].unfused_reason}; its experts are decoded each time "
            "they are used, which is slow: pack the model as plain",
            RuntimeWarning,
            stacklevel=2,
        )


def _dtypes_in_memory(
    model: PreTrainedModel, adapters: dict[str, ExpertsAdapter], dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Full parameter name -> the dtype that the loader would give it."""
    plan = model._get_dtype_plan(dtype) if dtype is not None else {}
    search, dtype_of_group = None, {}
    if plan:
        search, name_of_group, _ = build_glob_alternation(list(plan))
        dtype_of_group = {group: plan[name] for group, name in name_of_group.items()}
    dtypes = {}
    for path, adapter in adapters.items():
        for spec in adapter.specs:
            name = f"{path}.{spec.name}"
            match = search.search(name) if search is not None else None
            dtypes[name] = dtype_of_group[str(match.lastgroup)] if match is not None else spec.dtype
    return dtypes


def forget_quantizer(model: nn.Module) -> None:
    """Make a model whose experts are back an ordinary one again, as if it had been loaded without moert."""
    assert isinstance(model, PreTrainedModel)
    quantizer = model.hf_quantizer
    assert isinstance(quantizer, MoertQuantizer)
    model.all_tied_weights_keys.update(quantizer.tied_keys)
    if quantizer.tied_keys:
        model.tie_weights()
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
