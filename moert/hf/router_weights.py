"""The routers of a model, as far as they are a product of the hidden state with one weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moert.hf.model import offloaded_modules
from moert.plugins import load_plugin
from moert.predictors.base import Predictor, Router
from moert.runtime.layer import LayerSpec
from moert.runtime.look_ahead import LookAhead
from moert.runtime.runtime import OffloadRuntime

_CORRECTIONS = ("e_score_correction_bias", "expert_bias")
_HOOKS = "_moert_look_ahead_hooks"


def find_routers(model: nn.Module, specs: Sequence[LayerSpec]) -> list[Router | None]:
    """Each layer's router: a module beside its experts, or within one beside them, with a weight [E, D].

    None where there is none, or more than one, or where several modules of the model share the layer's experts.
    """
    paths: dict[int, list[str]] = {}
    for path, module in offloaded_modules(model).items():
        paths.setdefault(module.layer, []).append(path)
    found: list[Router | None] = []
    for spec in specs:
        router = None
        if len(paths.get(spec.index, [])) == 1:
            path = paths[spec.index][0]
            router = _router_beside(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], spec)
        found.append(router)
    return found


def _router_beside(block: nn.Module, experts: str, spec: LayerSpec) -> Router | None:
    rows = spec.num_experts + spec.num_identity
    fitting = [
        module
        for name, child in block.named_children()
        if name != experts
        for module in child.modules()
        if (weight := module._parameters.get("weight")) is not None and weight.dim() == 2 and weight.shape[0] == rows
    ]
    if len(fitting) != 1:
        return None
    module = fitting[0]
    weight = module._parameters["weight"]
    assert weight is not None
    if not weight.is_floating_point() or not weight.is_cpu:
        return None
    corrections = [_vector(owner, name, rows) for owner in (module, block) for name in _CORRECTIONS]
    correction = next((vector for vector in corrections if vector is not None), None)
    return Router(weight.detach(), _vector(module, "bias", rows), correction, spec.num_experts, spec.top_k)


def _vector(module: nn.Module, name: str, length: int) -> torch.Tensor | None:
    value = getattr(module, name, None)
    return value.detach() if isinstance(value, torch.Tensor) and value.shape == (length,) else None


def look_ahead(model: nn.Module, runtime: OffloadRuntime) -> None:
    """Have `runtime` prefetch what is likely to be needed, where experts are read from disk and routers are known.

    Hooks on the model's blocks tell it what they are given, until `look_no_more`.

    Raises:
        ConfigError: there is no such predictor.
    """
    if runtime.config.predictor == "none":
        return
    kind = load_plugin("moert.predictors", runtime.config.predictor, Predictor)  # type: ignore[type-abstract]
    if not runtime.reads:
        return
    routers = find_routers(model, [layer.spec for layer in runtime.layers])
    if all(router is None for router in routers):
        return
    runtime.look_ahead = LookAhead(kind(routers), runtime.layers, runtime.pipeline)
    hooks = []
    for path, module in offloaded_modules(model).items():
        block = _block_of(model, path)
        if block is not None and routers[module.layer] is not None:
            hooks.append(block.register_forward_pre_hook(_Enter(runtime, module.layer), with_kwargs=True))
    model.__dict__[_HOOKS] = hooks


def look_no_more(model: nn.Module) -> None:
    """Take back what `look_ahead` did to the model."""
    for hook in model.__dict__.pop(_HOOKS, ()):
        hook.remove()


def _block_of(model: nn.Module, path: str) -> nn.Module | None:
    """The nearest element of a list of modules that `path` is within: a layer of the model with its attention."""
    names = path.split(".")
    for end in range(len(names) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(names[: end - 1])), nn.ModuleList):
            return model.get_submodule(".".join(names[:end]))
    return None


class _Enter:
    """Tells the runtime what a block is given, before it runs."""

    def __init__(self, runtime: OffloadRuntime, layer: int) -> None:
        self._runtime = runtime
        self._layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ahead = self._runtime.look_ahead
        if ahead is None or not ahead.enters(self._layer):
            return
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, torch.Tensor) and hidden.is_floating_point() and hidden.dim() > 1 and hidden.is_cpu:
            self._runtime.enter(self._layer, hidden.detach().reshape(-1, hidden.shape[-1]))
