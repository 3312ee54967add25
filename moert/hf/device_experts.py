"""Experts on a GPU, computed there from the model's own parameters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from moert.errors import MoertError, UnsupportedModelError
from moert.hf.adapters import ExpertsAdapter
from moert.hf.experts import OffloadedExperts
from moert.runtime.device_layer import DeviceLayer, check_device, is_device
from moert.runtime.layer import LayerSpec
from moert.runtime.runtime import OffloadRuntime


class DeviceExperts(OffloadedExperts):
    """`OffloadedExperts` whose weights are all on a GPU: no tensor leaves it, and no step waits for it."""

    _device: torch.device
    _is_own: bool

    def bind(self, runtime: OffloadRuntime, layer: int) -> None:
        super().bind(runtime, layer)
        cache = runtime.layers[layer]
        assert isinstance(cache, DeviceLayer)
        self._device = cache.device
        self._is_own = cache.fallback is not None

    def _run(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        assert self.runtime is not None
        if hidden_states.dtype != self.dtype:
            raise self._wrong_dtype(hidden_states.dtype)
        if hidden_states.device != self._device:
            raise MoertError(
                f"the experts are on {self._device}, but were called with hidden states on {hidden_states.device}; "
                "unpatch the model before moving it"
            )
        # Instances may carry a forward of accelerate's, which does to its inputs what the original's did.
        forward = self.adapter.module.forward
        if self._is_own:
            return self.runtime.run_on_device(self.layer, forward, hidden_states, top_k_index, top_k_weights)
        output = self.runtime.run_on_device(
            self.layer, forward, self.adapter.flatten(hidden_states), top_k_index, top_k_weights
        )
        return self.adapter.unflatten(output, hidden_states)


def check_layers(specs: Sequence[LayerSpec], owners: Sequence[ExpertsAdapter]) -> dict[int, dict[str, torch.Tensor]]:
    """Layer -> its tensors over all experts, for those layers whose experts are on a GPU; `owners[layer]` has them.

    Raises:
        UnsupportedModelError: the experts of one layer are on several devices.
        KernelUnavailableError: the kernels cannot run on a GPU that experts are on.
    """
    found = {}
    for spec, owner in zip(specs, owners, strict=True):
        stacked = {name: owner.stacked(name).detach() for name in owner.names}
        devices = sorted({str(tensor.device) for tensor in stacked.values()})
        if len(devices) > 1:
            where = ", ".join(f"{name} on {tensor.device}" for name, tensor in stacked.items())
            raise UnsupportedModelError(f"{spec.name} has {where}; an expert must be on one device: move them together")
        device = next(iter(stacked.values())).device
        if is_device(device):
            check_device(device)
            found[spec.index] = stacked
    return found


def warn_of_fallbacks(runtime: OffloadRuntime) -> None:
    """Say which layers on a GPU moert's kernels do not compute, and why."""
    layers = [layer for layer in runtime.layers if isinstance(layer, DeviceLayer)]
    fallen = [layer for layer in layers if layer.fallback is not None]
    if fallen:
        reasons = "; ".join(dict.fromkeys(str(layer.fallback) for layer in fallen))
        warnings.warn(
            f"{len(fallen)} of {len(layers)} layers of experts on a GPU run the model's own code, not moert's kernels: "
            f"{reasons}",
            RuntimeWarning,
            stacklevel=2,
        )
