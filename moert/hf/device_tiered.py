"""A model whose dense part is on a device and whose experts come there from host memory and disk as they are needed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moert.config import OffloadConfig, format_bytes
from moert.device.base import Device
from moert.errors import CapacityError, ConfigError, MoertError
from moert.hf.cache_needs import cache_bytes_beside
from moert.hf.experts import OffloadedExperts
from moert.hf.graphed_forward import spare_and_graph
from moert.hf.homes import dense_tensors, move_back, note_homes
from moert.hf.model import offloaded_modules
from moert.hf.placement import DeviceMap, locate, move, read_device_map, remove_hooks, where_is
from moert.hf.router_weights import look_no_more
from moert.runtime import device_opening
from moert.runtime.device_building import Share, attach_device
from moert.runtime.device_check import check_device
from moert.runtime.device_group import DeviceGroup, attach_devices
from moert.runtime.device_tier import DeviceTier
from moert.runtime.runtime import OffloadRuntime

NEW = "experts on a GPU are new in moert and have not been run by its authors on one; the self-check on this one passed"

_HOMES = "_moert_homes"


class TieredExperts(OffloadedExperts):
    """`OffloadedExperts` that are given and give tensors of a device."""

    where: torch.device

    def _run(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        if self.runtime is None:
            raise MoertError("these experts have no device; load or patch the model again")
        if hidden_states.dtype != self.dtype:
            raise self._wrong_dtype(hidden_states.dtype)
        if hidden_states.device != self.where:
            raise MoertError(
                f"the experts come to {self.where}, but were called with hidden states on {hidden_states.device}; move "
                f"the model to {self.where}"
            )
        scores = None if self.scores is None else self.scores(top_k_index, top_k_weights)
        flat = self.adapter.flatten(hidden_states)
        output = self.runtime.run(self.layer, self.adapter.compute, flat, top_k_index, top_k_weights, scores)
        return self.adapter.unflatten(output, hidden_states)


def put_on_device(
    model: nn.Module,
    runtime: OffloadRuntime,
    config: OffloadConfig,
    device: Device | Sequence[Device] | None = None,
    *,
    device_map: DeviceMap | None = None,
    check: bool | None = None,
    **options: Any,
) -> DeviceTier | DeviceGroup:
    """Run a model's experts over `device`, and move everything else of it there. Blocks.

    The KV cache of `config.context` tokens has room there beside the experts. Where this fails the model is the
    caller's to unpatch or close.

    Args:
        model: loaded or patched, its experts in `runtime`, which owns the devices from here on, also if this fails.
        device: one, or several; None: the GPUs that the model is on or `device_map` names, or the current one.
        device_map: which part of the model belongs where, see `DeviceMap`. With several devices at `device` it is a
            dictionary, module path -> which of them. None: where it is, or all on one device.
        check: compare steps with the CPU's, see `check_device`; None: on a GPU.
        **options: of `attach_device`.

    Raises:
        CapacityError, ConfigError: as `attach_device`; a device map leaves layers on the CPU, or says nothing of them.
        KernelUnavailableError: a device does not compute what the CPU does, or is too old.
    """
    paths: dict[int, str] = {}
    for path, module in offloaded_modules(model).items():
        paths.setdefault(module.layer, path)
    devices, of_layer, where = _place(model, paths, device, device_map)
    try:
        tensors = dense_tensors(model)
        away = {} if where is None else {n: t for n, t in tensors.items() if t.device != locate(n, where)}
        cache_bytes = options.pop("cache_bytes", None)
        cache_bytes = cache_bytes_beside(model) if cache_bytes is None else cache_bytes
    except BaseException:
        for one in devices:
            one.close()
        raise
    shares = []
    for place, one in enumerate(devices):
        layers = [runtime.layers[layer] for layer in sorted(of_layer) if of_layer[layer] == place]
        here = [t.nbytes for n, t in away.items() if where is not None and locate(n, where) == one.torch_device]
        # Most models' layers keep as much of a text as each other.
        shares.append(Share(one, layers, sum(here), -(-cache_bytes * len(layers) // len(of_layer))))
    tier: DeviceTier | DeviceGroup
    if len(shares) == 1:
        dense = shares[0].dense_bytes
        tier = attach_device(
            runtime, devices[0], dense_bytes=dense, cache_bytes=cache_bytes, budget=config.device_budget, **options
        )
    else:
        tier = attach_devices(runtime, shares, budget=config.device_budget, **options)
    for module in offloaded_modules(model).values():
        module.__class__ = TieredExperts
        module.__dict__["where"] = devices[of_layer[module.layer]].torch_device
    if away and where is not None:
        model.__dict__[_HOMES] = note_homes(model)
        try:
            move(model, where)
        except torch.OutOfMemoryError as error:
            nbytes = sum(tensor.nbytes for tensor in away.values())
            raise CapacityError(
                f"there was room for {format_bytes(nbytes)} of dense weights beside the experts, and is no longer "
                f"({error}); end what else uses the GPU, or give device_memory less"
            ) from error
    is_real = any(one.torch_device.type == "cuda" for one in devices)
    if is_real if check is None else check:
        computes = {module.layer: module.adapter.compute for module in offloaded_modules(model).values()}
        tiers = tier.tiers if isinstance(tier, DeviceGroup) else (tier,)
        check_device(runtime, tiers, computes, _hidden_size(model))
        warnings.warn(NEW, RuntimeWarning, stacklevel=4)
    look_no_more(model)  # nothing is predicted over a device, and who looks within a pass keeps it from being a graph
    spare_and_graph(model, runtime)
    return tier


def _place(
    model: nn.Module, paths: Mapping[int, str], device: Device | Sequence[Device] | None, device_map: DeviceMap | None
) -> tuple[list[Device], dict[int, int], dict[str, torch.device] | None]:
    """The devices; layer -> which of them; module path -> where it is to be, None if it is there already."""
    if device is not None:
        devices = [device] if isinstance(device, Device) else list(device)
        if len(devices) == 1:
            return devices, dict.fromkeys(paths, 0), {"": devices[0].torch_device}
        if not isinstance(device_map, Mapping):
            raise ConfigError(f"{len(devices)} devices need a device_map that says which layer goes to which of them")
        of_layer = {layer: locate(path, device_map) for layer, path in paths.items()}
        idle = [one.name for place, one in enumerate(devices) if place not in of_layer.values()]
        if idle or not set(device_map.values()) <= set(range(len(devices))):
            raise ConfigError(
                f"device_map={dict(device_map)!r} is to give each of {len(devices)} devices, 0 to {len(devices) - 1}, "
                "a layer of experts at least"
            )
        return devices, of_layer, {name: devices[place].torch_device for name, place in device_map.items()}
    where = None if device_map is None else read_device_map(model, device_map)
    on = {layer: where_is(model, path) if where is None else locate(path, where) for layer, path in paths.items()}
    if where is None and all(one.type == "cpu" for one in on.values()):
        (opened,) = device_opening.open_devices([])
        return [opened], dict.fromkeys(paths, 0), {"": opened.torch_device}
    asked = {paths[layer]: one for layer, one in on.items()} | (where or {})
    left = [path for path, one in asked.items() if one.type != "cuda"]
    if left:
        raise ConfigError(
            f"the device_map puts {left[0] or 'what it does not name'} on {asked[left[0]]}: with device_memory "
            "everything but experts is to be on GPUs; make room for the dense weights there, or leave device_memory out"
        )
    wanted = list(dict.fromkeys(on.values()))
    devices = device_opening.open_devices(wanted)
    if len(wanted) == 1 and where is None:
        where = {"": wanted[0]}
    opened_as = dict(zip(wanted, (one.torch_device for one in devices), strict=True))
    moved = None if where is None else {name: opened_as.get(one, one) for name, one in where.items()}
    return devices, {layer: wanted.index(one) for layer, one in on.items()}, moved


def _hidden_size(model: nn.Module) -> int:
    """By the model's configuration; 0 where that does not say."""
    config: Any = getattr(model, "config", None)
    return 0 if config is None else getattr(config.get_text_config(decoder=True), "hidden_size", 0)


def leave_device(model: nn.Module) -> None:
    """Move everything back to where it was before `put_on_device`, if it was moved. The experts are off it already.

    Raises:
        DeviceLostError: the device has been lost, and with it what was there.
    """
    remove_hooks(model)
    homes = model.__dict__.pop(_HOMES, None)
    if homes is not None:
        move_back(model, homes)
