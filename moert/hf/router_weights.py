"""The routers of a model, as far as they are a product of the hidden state with one weight."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moert.hf.decoder_layer import DecoderLayerForward
from moert.hf.forwards import Forward, ForwardWatch
from moert.hf.model import offloaded_modules
from moert.hf.own_forward import is_recorded, uncompiled
from moert.predictors._choice import make_predictor, read_predictor
from moert.predictors.base import Model as PredictedModel
from moert.predictors.base import Need, Predictor, Router
from moert.runtime.layer import LayerSpec
from moert.runtime.look_ahead import LookAhead
from moert.runtime.runtime import OffloadRuntime

_CORRECTIONS = ("e_score_correction_bias", "expert_bias")
_HOOKS = "_moert_look_ahead_hooks"

WITHOUT_ROUTERS = "joint"
"""Predicts from the picks alone."""


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
    """Have `runtime` prefetch what is likely to be needed, where experts are read from disk.

    Hooks on the model and its blocks tell the predictor what they are given, until `look_no_more`. A predictor that
    needs routers where none is found makes room for `WITHOUT_ROUTERS`, which goes by the picks alone.

    Raises:
        ConfigError: there is no such predictor, or what it needs is not at hand.
    """
    text = runtime.config.predictor
    kind = None if text == "none" else read_predictor(text)[0]
    if not runtime.reads:
        return
    _check_policy(runtime, kind)
    if kind is None:
        return
    specs = [layer.spec for layer in runtime.layers]
    routers = find_routers(model, specs)
    at_hand = {Need.HIDDEN, Need.TOKEN_IDS}
    if any(router is not None for router in routers):
        at_hand.add(Need.ROUTERS)
    elif Need.ROUTERS in kind.needs:
        warnings.warn(
            f"no router of this model is known, which predictor={text!r} needs: {WITHOUT_ROUTERS!r} predicts instead, "
            "from what was chosen before",
            RuntimeWarning,
            stacklevel=2,
        )
        text = WITHOUT_ROUTERS
    known = predicted_model(model, specs, routers)
    predictor = make_predictor(text, known, at_hand, "in a live run")
    runtime.look_ahead = LookAhead(predictor, runtime.layers, runtime.pipeline, prefetch=runtime.config.prefetch)
    hooks: list[Any] = []
    if runtime.look_ahead.has_passes:
        hooks.append(ForwardWatch(model, functools.partial(_begin, runtime)))
    for path, module in offloaded_modules(model).items():
        block = block_of(model, path)
        if block is not None and routers[module.layer] is not None and type(predictor).enter is not Predictor.enter:
            hooks.append(_EntryHook(block, _Enter(runtime, module.layer)))
    model.__dict__[_HOOKS] = hooks


def _check_policy(runtime: OffloadRuntime, kind: type[Predictor] | None) -> None:
    """Warn where a policy looks ahead and nobody tells it what is there."""
    tokens = max(layer.residency.policy.tokens_ahead for layer in runtime.layers)
    if tokens and (kind is None or not kind.gives_probabilities):
        config = runtime.config
        warnings.warn(
            f"policy={config.policy!r} looks ahead {tokens} tokens, and predictor={config.predictor!r} gives no "
            f"probabilities of what they need: it goes by what has been used; predictor={WITHOUT_ROUTERS!r} tells it",
            RuntimeWarning,
            stacklevel=2,
        )


def predicted_model(
    model: nn.Module, specs: Sequence[LayerSpec], routers: Sequence[Router | None] = ()
) -> PredictedModel:
    """What a predictor is told of `model`."""
    from moert.hf.recorded_model import config_hash  # which imports what imports this

    config = getattr(model, "config", None)
    name = str(getattr(config, "_name_or_path", "") or "").rstrip("/").rpartition("/")[2]
    return PredictedModel(
        num_experts=tuple(spec.num_experts for spec in specs),
        top_k=tuple(spec.top_k for spec in specs),
        routers=tuple(routers),
        name=name,
        config_hash=config_hash(config),
    )


def look_from_forwards(model: nn.Module) -> None:
    """Have blocks whose forward is moert's own tell from there what they are given: torch calls a module with hooks in
    a longer way."""
    model.__dict__[_HOOKS] = [_in_forward(hook) for hook in model.__dict__.get(_HOOKS, ())]


def _in_forward(hook: Any) -> Any:
    if not isinstance(hook, _EntryHook):
        return hook
    block, enter = hook.block(), hook.enter
    forward = None if block is None else vars(block).get("forward")
    if not isinstance(forward, DecoderLayerForward):
        return hook
    hook.remove()
    forward.look = enter
    return _EntryForward(forward)


def look_no_more(model: nn.Module) -> None:
    """Take back what `look_ahead` did to the model."""
    for hook in model.__dict__.pop(_HOOKS, ()):
        hook.remove()


def block_of(model: nn.Module, path: str) -> nn.Module | None:
    """The nearest element of a list of modules that `path` is within: a layer of the model with its attention."""
    names = path.split(".")
    for end in range(len(names) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(names[: end - 1])), nn.ModuleList):
            return model.get_submodule(".".join(names[:end]))
    return None


def _begin(runtime: OffloadRuntime, forward: Forward) -> None:
    """A forward pass of the model begins: tell the predictor."""
    if runtime.look_ahead is None or forward.shape is None:
        return
    if forward.is_new:
        runtime.look_ahead.begin_sequence()
    rows, columns = forward.shape
    ids = None if forward.token_ids is None else forward.token_ids.detach().reshape(-1).cpu().numpy()
    runtime.look_ahead.begin_pass(rows * columns, ids, rows)


class _Enter:
    """Tells the runtime what a block is given, before it runs."""

    only_looks = True

    def __init__(self, runtime: OffloadRuntime, layer: int) -> None:
        self._runtime = runtime
        self._layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_recorded():
            uncompiled(self._look, args, kwargs)
        else:
            self._look(args, kwargs)

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._runtime.enters(self._layer):
            return
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, torch.Tensor) and hidden.is_floating_point() and hidden.dim() > 1 and hidden.is_cpu:
            self._runtime.enter(self._layer, hidden.detach().reshape(-1, hidden.shape[-1]))


class _EntryHook:
    """Has torch call `enter` before a block."""

    def __init__(self, block: nn.Module, enter: _Enter) -> None:
        self.block, self.enter = weakref.ref(block), enter
        self._handle = block.register_forward_pre_hook(enter, with_kwargs=True)

    def remove(self) -> None:
        self._handle.remove()


class _EntryForward:
    """A block's own forward that looks."""

    def __init__(self, forward: DecoderLayerForward) -> None:
        self._forward = forward

    def remove(self) -> None:
        self._forward.look = None
