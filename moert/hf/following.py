"""`moert.follow`: a model whose tokens choose the experts that a trace says, whatever its routers say."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from moert.errors import ConfigError, MoertError
from moert.hf.forwards import Forward, ForwardWatch, Rows
from moert.hf.recorded_model import Experts, experts_of
from moert.trace.sequence import NO_EXPERT, Sequence
from moert.trace.trace import TraceLike

Routing = tuple[torch.Tensor, torch.Tensor]
"""Ids and weights of a pass, [T, L, K] both."""


class _Followed:
    """One sequence of the trace, as tensors."""

    def __init__(self, sequence: Sequence) -> None:
        is_there = sequence.experts != NO_EXPERT
        weights = sequence.weights
        if weights is None:
            weights = is_there / np.maximum(is_there.sum(-1, keepdims=True), 1)
        # What names no expert is any one with weight 0, which nobody computes.
        self.ids = torch.from_numpy(np.where(is_there, sequence.experts, 0).astype(np.int64))
        self.weights = torch.from_numpy(np.where(is_there, weights, 0).astype(np.float32))

    def rows(self, first: int, n_tokens: int) -> Routing:
        """Of tokens `first` and on; after the last comes the first again."""
        places = torch.arange(first, first + n_tokens) % len(self.ids)
        return self.ids[places], self.weights[places]


class Following:
    """The hooks of one `follow`."""

    def __init__(self, model: nn.Module, trace: TraceLike) -> None:
        """See `moert.follow`."""
        self._modules = experts_of(model)
        _check(self._modules, trace)
        self._trace = trace
        self._next = 0
        """The sequence of the trace that the next one of the model follows."""
        self._followed: weakref.WeakKeyDictionary[Rows, list[_Followed]] = weakref.WeakKeyDictionary()
        self._routing: dict[torch.device, Routing] = {}
        """Of the pass under way: on the CPU, and wherever a layer has asked for it since; empty between passes."""
        self._handles: list[Any] = []
        self._watch = ForwardWatch(model, self._begin, self._end)
        for path, (module, _, layer) in self._modules.items():
            hook = self._make_hook(path, layer)
            # Before those that record what was chosen.
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))

    def remove(self) -> None:
        """Take the hooks out. Idempotent."""
        self._watch.remove()
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, forward: Forward) -> None:
        self._routing = {}
        if forward.shape is None:
            return
        n_rows, n_tokens = forward.shape
        followed = self._followed.get(forward.rows)
        if followed is None:
            followed = self._followed[forward.rows] = [self._begin_sequence() for _ in range(n_rows)]
        first = forward.rows.n_tokens - n_tokens
        found = [one.rows(first, n_tokens) for one in followed]
        routing = torch.cat([ids for ids, _ in found]), torch.cat([weights for _, weights in found])
        self._routing = {torch.device("cpu"): routing}

    def _end(self, forward: Forward) -> None:
        self._routing = {}

    def _routing_on(self, device: torch.device) -> Routing:
        """Moved once for all layers: a copy for each would have the host wait for a GPU in each."""
        if device not in self._routing:
            ids, weights = self._routing[torch.device("cpu")]
            self._routing[device] = ids.to(device), weights.to(device)
        return self._routing[device]

    def _begin_sequence(self) -> _Followed:
        followed = _Followed(self._trace[self._next % len(self._trace)])
        self._next += 1
        return followed

    def _make_hook(self, path: str, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self._routing:
                raise MoertError(
                    f"{path} runs outside of a forward pass of the model, so nobody knows which token of the trace it "
                    "is at; call the whole model within `with moert.follow(...)`"
                )
            given = {"top_k_index": 1, "top_k_weights": 2}
            own = {name: args[at] if at < len(args) else kwargs[name] for name, at in given.items()}
            routing = self._routing_on(own["top_k_index"].device)
            parts = {name: part[:, layer] for name, part in zip(given, routing, strict=True)}
            if len(own["top_k_index"]) != len(parts["top_k_index"]):
                raise MoertError(
                    f"{path} is given {len(own['top_k_index'])} of the pass's {len(parts['top_k_index'])} tokens, so "
                    "nobody knows which of them these are; such a model cannot follow a trace"
                )
            new = {name: part.to(own[name].device, own[name].dtype) for name, part in parts.items()}
            at_places = {at: new[name] for name, at in given.items() if at < len(args)}
            by_name = {name: new[name] for name, at in given.items() if at >= len(args)}
            return tuple(at_places.get(at, value) for at, value in enumerate(args)), kwargs | by_name

        return hook


def _check(modules: dict[str, Experts], trace: TraceLike) -> None:
    if not len(trace):
        raise ConfigError("the trace has no sequence to follow")
    layers = trace.header.layers
    n_layers = 1 + max(experts.layer for experts in modules.values())
    if len(layers) < n_layers:
        raise ConfigError(
            f"the trace has {len(layers)} layers of experts and the model {n_layers}; follow one of as many or more"
        )
    for path, (_, adapter, layer) in modules.items():
        if layers[layer].num_experts > adapter.num_experts + adapter.num_identity:
            raise ConfigError(
                f"layer {layer} of the trace ({layers[layer].name or 'unnamed'}) has {layers[layer].num_experts} "
                f"experts and {path} {adapter.num_experts}"
            )


@contextmanager
def follow(model: nn.Module, trace: TraceLike) -> Iterator[None]:
    """See `moert.follow`."""
    following = Following(model, trace)
    try:
        yield
    finally:
        following.remove()
