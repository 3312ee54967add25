"""A model whose dense part is on a device and whose experts come there from host memory and disk as they are needed."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from moert.config import OffloadConfig
from moert.device.base import Device
from moert.errors import MoertError
from moert.hf.cache_needs import cache_bytes_beside
from moert.hf.experts import OffloadedExperts
from moert.hf.homes import dense_tensors, move_back, note_homes
from moert.hf.model import offloaded_modules
from moert.runtime import device_opening
from moert.runtime.device_building import attach_device
from moert.runtime.device_check import check_device
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
    device: Device | None = None,
    *,
    check: bool | None = None,
    **options: Any,
) -> DeviceTier:
    """Run a model's experts over `device`, and move everything else of it there. Blocks.

    The KV cache of `config.context` tokens has room there beside the experts. Where this fails the model is the
    caller's to unpatch or close.

    Args:
        model: loaded or patched, its experts in `runtime`, which owns the device from here on, also if this fails.
        device: None: the GPU that the model is on, or the current one.
        check: compare steps with the CPU's, see `check_device`; None: on a GPU.
        **options: of `attach_device`.

    Raises:
        CapacityError, ConfigError: as `attach_device`.
        KernelUnavailableError: the device does not compute what the CPU does, or is too old.
    """
    if device is None:
        placed = sorted({str(tensor.device) for tensor in dense_tensors(model).values() if tensor.is_cuda})
        (device,) = device_opening.open_devices([torch.device(name) for name in placed])
    where = device.torch_device
    try:
        away = [tensor for tensor in dense_tensors(model).values() if tensor.device != where]
        options.setdefault("cache_bytes", cache_bytes_beside(model))
    except BaseException:
        device.close()
        raise
    budget, dense_bytes = config.device_budget, sum(tensor.nbytes for tensor in away)
    tier = attach_device(runtime, device, budget=budget, dense_bytes=dense_bytes, **options)
    for module in offloaded_modules(model).values():
        module.__class__ = TieredExperts
        module.__dict__["where"] = where
    if away:
        model.__dict__[_HOMES] = note_homes(model)
        model.to(where)
    is_real = where.type == "cuda"
    if is_real if check is None else check:
        computes = {module.layer: module.adapter.compute for module in offloaded_modules(model).values()}
        check_device(runtime, [tier], computes, _hidden_size(model))
        warnings.warn(NEW, RuntimeWarning, stacklevel=4)
    return tier


def _hidden_size(model: nn.Module) -> int:
    """By the model's configuration; 0 where that does not say."""
    config: Any = getattr(model, "config", None)
    return 0 if config is None else getattr(config.get_text_config(decoder=True), "hidden_size", 0)


def leave_device(model: nn.Module) -> None:
    """Move everything back to where it was before `put_on_device`, if it was moved. The experts are off it already.

    Raises:
        DeviceLostError: the device has been lost, and with it what was there.
    """
    homes = model.__dict__.pop(_HOMES, None)
    if homes is not None:
        move_back(model, homes)
