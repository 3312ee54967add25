"""The module that stands where a model's experts module stood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from moert.errors import MoertError
from moert.hf.adapters import ExpertsAdapter
from moert.hf.own_forward import uncompiled
from moert.runtime.runtime import OffloadRuntime


class OffloadedExperts(nn.Module):
    """Computes what the experts module it replaces would have computed; the experts' weights are in moert's tiers.

    It has no expert parameters. What else the original has (norms, buffers, children) stays registered here under its
    own name, as the same object. The original is kept unregistered: its class's gate and activation are called.
    """

    def __init__(self, adapter: ExpertsAdapter) -> None:
        """Take over from `adapter.module`, which is not changed; `bind` before the first forward."""
        super().__init__()
        original = adapter.module
        stacked = set(adapter.names)
        for name, value in vars(original).items():
            # A `forward` of the instance, as accelerate's hooks make one, would run the original.
            if name in ("training", "_is_expert_parallel") or not (
                name.startswith("_") or name == "forward" or name in vars(self)
            ):
                self.__dict__[name] = value
        for name, parameter in original._parameters.items():
            if name not in stacked:
                self.register_parameter(name, parameter)
        for name, buffer in original._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in original._non_persistent_buffers_set)
        for name, child in original._modules.items():
            if not any(path.startswith(f"{name}.") for path in stacked):
                self.add_module(name, child)
        # Weight initialisation and other code outside may look at the stacked weights' shape and dtype.
        for name in stacked:
            if "." not in name:
                parameter = adapter.stacked(name)
                stand_in = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
                self.__dict__[name] = stand_in
        self.__dict__["adapter"] = adapter
        self.__dict__["runtime"] = None
        self.__dict__["layer"] = -1
        self.__dict__["dtype"] = None
        self.__dict__["scores"] = None

    adapter: ExpertsAdapter
    runtime: OffloadRuntime | None
    layer: int
    scores: Callable[[torch.Tensor, torch.Tensor], list[float] | None] | None
    """(ids, weights) of a step -> its router's mean scores, if the policy wants to know them."""

    def bind(self, runtime: OffloadRuntime, layer: int) -> None:
        """Run on `runtime`'s layer number `layer` from now on."""
        self.runtime = runtime
        self.layer = layer
        self.dtype = runtime.layers[layer].spec.tensors[0].dtype

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As the experts of the model's class: [T, D], [T, K] ids and [T, K] weights -> [T, D]; blocks.

        Raises:
            MoertError: not bound or closed, or called with another dtype than the experts'.
            CorruptFileError, TransferError: an expert could not be read; the forward may be tried again.
            RuntimeError: in a backward pass through it.
        """
        if torch.compiler.is_compiling():
            output: torch.Tensor = uncompiled(self._forward, hidden_states, top_k_index, top_k_weights)
            return output
        return self._forward(hidden_states, top_k_index, top_k_weights)

    def _forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            output: torch.Tensor = _InferenceOnly.apply(hidden_states, top_k_weights, top_k_index, self)
            return output
        return self._run(hidden_states, top_k_index, top_k_weights)

    def _run(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        if self.runtime is None:
            raise MoertError("these experts have not been loaded: loading was interrupted; load the model again")
        if hidden_states.dtype != self.dtype:
            raise self._wrong_dtype(hidden_states.dtype)
        flat = self.adapter.flatten(hidden_states).to("cpu")
        scores = None if self.scores is None else self.scores(top_k_index, top_k_weights)
        output = self.runtime.run(
            self.layer, self.adapter.compute, flat, top_k_index.to("cpu"), top_k_weights.to("cpu"), scores
        )
        return self.adapter.unflatten(output.to(hidden_states.device), hidden_states)

    def _wrong_dtype(self, dtype: torch.dtype) -> MoertError:
        return MoertError(
            f"the experts are {self.dtype}, but were called with {dtype} hidden states; a model whose experts are "
            "offloaded cannot be cast: unpatch, cast, patch, or load it with dtype=..."
        )

    def extra_repr(self) -> str:
        return (
            f"{type(self.adapter.module).__name__}, {self.adapter.num_experts} experts, "
            f"{'unbound' if self.runtime is None else f'layer {self.layer}'}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise MoertError(
            "offloaded experts cannot be copied: load the checkpoint a second time, or unpatch before copying"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise MoertError("offloaded experts cannot be pickled: unpatch the model first")


class _InferenceOnly(torch.autograd.Function):
    """Forward as usual where autograd records; an error with advice in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        top_k_weights: torch.Tensor,
        top_k_index: torch.Tensor,
        experts: OffloadedExperts,
    ) -> torch.Tensor:
        return experts._run(hidden_states, top_k_index, top_k_weights)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> NoReturn:
        raise RuntimeError(
            "moert's offloaded experts have no backward pass; run under torch.inference_mode() or torch.no_grad(), or "
            "unpatch the model to train it"
        )
