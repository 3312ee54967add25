"""`moert.patch` and `moert.unpatch`: a model in memory, its experts handed to moert and handed back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moert.config import OffloadConfig, format_bytes
from moert.device.base import Device
from moert.errors import CapacityError, ConfigError, MoertError, UnsupportedModelError
from moert.hf.adapters import ExpertsAdapter, find_experts
from moert.hf.dense_compute import give_back, take_over
from moert.hf.device_experts import DeviceExperts, check_layers, warn_of_fallbacks
from moert.hf.device_tiered import leave_device, put_on_device
from moert.hf.experts import OffloadedExperts
from moert.hf.layers import Layers, make_layers
from moert.hf.model import is_marked, mark, offloaded_modules, runtime_of, unmark
from moert.hf.quantizer import forget_quantizer
from moert.hf.router_weights import look_ahead, look_from_forwards, look_no_more
from moert.runtime.building import runtime_in_parameters, runtime_in_slots, slots_planned
from moert.runtime.device_layer import is_device
from moert.runtime.preload import Progress
from moert.runtime.runtime import OffloadRuntime
from moert.runtime.spill import SpillSource
from moert.tiers.memory import available_bytes


@dataclass
class _Freed:
    """A stacked parameter whose memory has been given back. It stays the same object, of the same shape."""

    parameter: nn.Parameter
    shape: torch.Size
    nbytes: int
    resizable: bool
    rest: torch.Tensor
    """The rows that belong to no expert with weights; there is no other copy of them."""

    @classmethod
    def free(cls, adapter: ExpertsAdapter, name: str) -> _Freed:
        parameter = adapter.stacked(name)
        storage = parameter.untyped_storage()
        resizable = storage.resizable() and storage.nbytes() == parameter.nbytes
        numbers = adapter.num_experts * math.prod(adapter.expert_shape(name))
        rest = parameter.detach().reshape(-1)[numbers:].clone()
        freed = cls(parameter, parameter.shape, parameter.nbytes, resizable, rest)
        freed.give_back()
        return freed

    def give_back(self) -> None:
        """Free the memory."""
        if self.resizable:
            self.parameter.untyped_storage().resize_(0)
        else:  # mapped from a file, or a view of something larger
            self.parameter.data = torch.empty(0, dtype=self.parameter.dtype)

    def take_back(self) -> None:
        """Allocate it again; the experts' values are the caller's to fill in."""
        if self.resizable:
            self.parameter.untyped_storage().resize_(self.nbytes)
        else:
            self.parameter.data = torch.empty(self.shape, dtype=self.parameter.dtype)
        flat = self.parameter.data.view(-1)
        flat[flat.numel() - self.rest.numel() :] = self.rest


def patch(
    model: nn.Module,
    config: OffloadConfig,
    progress: Progress | None = None,
    device: Device | Sequence[Device] | None = None,
    **device_options: Any,
) -> nn.Module:
    """See `moert.patch`.

    Args:
        device: have the experts come there from host memory and disk, `config.device_memory` bytes of them at a time;
            the runtime owns it from here on. The experts of `model` are on the CPU. None: GPUs, if there is a
            `config.device_memory`. Several: with a `device_map`.
        **device_options: of `put_on_device`.
    """
    if is_marked(model) or offloaded_modules(model):
        raise MoertError(
            f"the experts of this {type(model).__name__} are offloaded already; call moert.unpatch(model) first"
        )
    adapters = find_experts(model)
    for path, adapter in adapters.items():
        for name in adapter.names:
            _check_parameter(f"{path}.{name}", adapter.stacked(name))
    layers = make_layers(adapters, sharing(adapters))
    owners = [adapters[spec.name] for spec in layers.specs]
    on_device = check_layers(layers.specs, owners)
    freed: list[_Freed] = []
    if _fits(layers, config):
        experts = [_experts(owner) for owner in owners]
        runtime = runtime_in_parameters(layers.specs, experts, config, on_device)
    elif on_device:
        raise ConfigError(
            f"host_memory={config.host_memory!r} is less than the experts' {format_bytes(_expert_bytes(layers))}, and "
            f"{len(on_device)} of {len(layers.specs)} layers have theirs on a GPU, where this version of moert leaves "
            "them; leave host_memory out, or move the model to the CPU before patching"
        )
    else:
        source = SpillSource.write(layers.specs, map(_experts, owners), config.cache_dir, direct=config.direct_io)
        runtime = _move_to_slots(owners, layers, source, config, progress, freed)
    is_tiered = device is not None or config.device_memory is not None
    if is_tiered and on_device:
        runtime.close()
        raise ConfigError(
            f"{len(on_device)} of {len(layers.specs)} layers have their experts on a GPU already; move the model to "
            "the CPU before patching, from where they come to the GPU as they are needed"
        )
    for path, adapter in adapters.items():
        module = (DeviceExperts if layers.layer_of[path] in on_device else OffloadedExperts)(adapter)
        module.training = adapter.module.training
        module.bind(runtime, layers.layer_of[path])
        model.set_submodule(path, module)
    mark(model, runtime, leave=unpatch)
    look_ahead(model, runtime)
    model.__dict__["_moert_freed"] = freed
    if is_tiered:
        try:
            put_on_device(model, runtime, config, device, **device_options)
        except BaseException:
            unpatch(model)
            raise
    take_over(model, config.dense_kernels)
    look_from_forwards(model)
    warn_of_fallbacks(runtime)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """See `moert.unpatch`."""
    marked = [module for module in model.modules() if is_marked(module)]
    if not marked:
        raise MoertError(f"{type(model).__name__} has no offloaded experts; there is nothing to unpatch")
    for module in marked:
        _unpatch_one(module)
    return model


def _unpatch_one(model: nn.Module) -> None:
    modules = offloaded_modules(model)
    runtime = runtime_of(model)
    freed: list[_Freed] | None = model.__dict__.get("_moert_freed")
    if freed is None:
        _materialise(modules, runtime)
    elif freed:
        _restore(modules, runtime, freed)
    for path, module in modules.items():
        module.adapter.module.train(module.training)
        model.set_submodule(path, module.adapter.module)
    give_back(model)
    look_no_more(model)
    unmark(model)
    model.__dict__.pop("_moert_freed", None)
    runtime.close("this model has been unpatched; its experts module is in the model again")
    if freed is None:
        forget_quantizer(model)
    leave_device(model)


def _experts(adapter: ExpertsAdapter) -> list[dict[str, torch.Tensor]]:
    """Expert -> tensor name -> view of the module's parameter."""
    views = {name: adapter.expert_views(name) for name in adapter.names}
    return [{name: views[name][expert] for name in views} for expert in range(adapter.num_experts)]


def _fits(layers: Layers, config: OffloadConfig) -> bool:
    """Whether every expert may stay in the parameter it is in."""
    budget = config.host_budget
    if budget is None:
        return True
    if budget.share is not None:
        return budget.share >= 1
    assert budget.nbytes is not None
    return budget.nbytes >= sum(spec.num_experts * spec.expert_bytes for spec in layers.specs)


def _move_to_slots(
    owners: Sequence[ExpertsAdapter],
    layers: Layers,
    source: SpillSource,
    config: OffloadConfig,
    progress: Progress | None,
    freed: list[_Freed],
) -> OffloadRuntime:
    """Free the parameters and make the slots; after any failure the parameters are as they were."""
    try:
        # Checked first: nothing is freed for a budget that cannot work.
        slots_planned(layers.specs, source, config, available_bytes() + _expert_bytes(layers))
        for owner in owners:
            freed.extend(_Freed.free(owner, name) for name in owner.names)
        return runtime_in_slots(layers.specs, source, config, progress)
    except BaseException:
        if freed:
            for entry in freed:
                entry.take_back()
            for spec, owner in zip(layers.specs, owners, strict=True):
                for expert, tensors in enumerate(_experts(owner)):
                    _copy(source.read(spec.index, expert), tensors)
        source.close()
        raise


def _restore(modules: Mapping[str, OffloadedExperts], runtime: OffloadRuntime, freed: list[_Freed]) -> None:
    """Bring the values back into the parameters they came from; after a failure the model is patched as before."""
    _check_room(sum(entry.nbytes for entry in freed))
    try:
        for entry in freed:
            entry.take_back()
        for layer, module in {module.layer: module for module in modules.values()}.items():
            for expert, tensors in enumerate(_experts(module.adapter)):
                _copy(runtime.weights(layer, expert), tensors)
    except BaseException:
        for entry in freed:
            entry.give_back()
        raise


def _materialise(modules: Mapping[str, OffloadedExperts], runtime: OffloadRuntime) -> None:
    """Give the modules of a loaded model the parameters they never had; tied ones share theirs."""
    _check_room(runtime.stats().expert_bytes)
    made: dict[int, dict[str, nn.Parameter]] = {}
    for module in modules.values():
        adapter, spec = module.adapter, runtime.layers[module.layer].spec
        if module.layer not in made:
            stacked = {
                tensor.name: torch.zeros(adapter.stacked(tensor.name).shape, dtype=tensor.dtype)
                for tensor in spec.tensors
            }
            for expert in range(spec.num_experts):
                for name, tensor in runtime.weights(module.layer, expert).items():
                    stacked[name].view(-1, *tensor.shape)[expert] = tensor
            made[module.layer] = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in stacked.items()}
    for module in modules.values():
        for name, parameter in made[module.layer].items():
            owner, _, leaf = name.rpartition(".")
            parameter.requires_grad_(module.adapter.stacked(name).requires_grad)
            setattr(module.adapter.module.get_submodule(owner), leaf, parameter)


def _copy(values: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])


def _check_room(nbytes: int) -> None:
    free = available_bytes()
    if nbytes > free:
        raise CapacityError(
            f"unpatching needs {format_bytes(nbytes)} for the experts beside the slots they are read through, and "
            f"{format_bytes(free)} are available; patch or load again with a smaller host_memory, or close the model"
        )


def _expert_bytes(layers: Layers) -> int:
    return sum(spec.num_experts * spec.expert_bytes for spec in layers.specs)


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if parameter.device.type == "meta":
        raise UnsupportedModelError(
            f"{name} has no values (meta device): the model is offloaded by accelerate; load it with moert.load instead"
        )
    if parameter.device.type != "cpu" and not is_device(parameter.device):
        raise UnsupportedModelError(
            f"{name} is on {parameter.device}; moert runs experts on the CPU and on CUDA devices: move the model there"
        )
    if not parameter.is_contiguous():
        raise UnsupportedModelError(
            f"{name} is not contiguous (strides {parameter.stride()}); make it so before patching"
        )


def sharing(adapters: Mapping[str, ExpertsAdapter]) -> dict[str, str]:
    """Module path -> path of an earlier module that has the very same parameters."""
    first: dict[tuple[int, ...], str] = {}
    same_as = {}
    for path, adapter in adapters.items():
        key = tuple(id(adapter.stacked(name)) for name in adapter.names)
        if key in first:
            same_as[path] = first[key]
        first.setdefault(key, path)
    return same_as
