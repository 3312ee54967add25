"""Experts computed from quantised weights, held against what their module makes of the weights those stand for."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from moert.hf.experts import OffloadedExperts
from moert.hf.model import offloaded_modules


class DecodedCheck:
    """While entered, compares the first call of each experts module of a model that moert loaded.

    Expected is the module's own code in fp32, on each expert's decoded weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = offloaded_modules(model)
        self._hooks: list[Any] = []
        self.compared = 0
        """Calls of a module."""
        self.largest_error = 0.0
        """The largest difference within one call, as a share of the largest number in it; NaN where there was one."""

    def __enter__(self) -> DecodedCheck:
        for module in self._modules.values():
            seen: list[bool] = []
            self._hooks.append(module.register_forward_hook(self._compare(seen), with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def _compare(self, seen: list[bool]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], torch.Tensor], None]:
        names = ("hidden_states", "top_k_index", "top_k_weights")

        def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            if seen:
                return
            seen.append(True)
            assert isinstance(module, OffloadedExperts)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            expected = _expected(module, *(given[name].to("cpu") for name in names))
            found = module.adapter.flatten(output).float().to("cpu")
            self.compared += 1
            share = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
            if not share <= self.largest_error:  # a NaN stays
                self.largest_error = share

        return compare


def _expected(module: OffloadedExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    assert module.runtime is not None
    spec = module.runtime.layers[module.layer].spec
    rows = module.adapter.flatten(hidden).float()
    out = torch.zeros_like(rows)
    for expert in ids.unique().tolist():
        if not 0 <= expert < spec.num_experts + spec.num_identity:
            continue
        share = ((ids == expert) * weights.float()).sum(-1, keepdim=True)
        picked = share.ne(0).squeeze(-1)
        made = rows[picked]
        if expert < spec.num_experts:
            tensors = module.runtime.weights(module.layer, expert)
            made = module.adapter.compute(made, {name: tensor.float() for name, tensor in tensors.items()})
        out[picked] += made * share[picked]
    return out
