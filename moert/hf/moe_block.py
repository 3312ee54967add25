"""Blocks of a router and its experts, and perhaps an expert that every token has, found by trying."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from moert.hf.adapters.base import ExpertsAdapter
from moert.hf.experts import OffloadedExperts
from moert.hf.norms import settings_of
from moert.hf.shared_expert import FoundShared, at, curve_of, find_shared, is_linear
from moert.hf.stand_ins import Normal, StandIn, same, with_children
from moert.hf.token_router import FoundRouter, find_router
from moert.hf.unchanged import Unchanged
from moert.kernels.cpu import HALVES
from moert.kernels.moe_block import SharedExpert


class MoeBlock(NamedTuple):
    """What a block's class computes: experts(x, picks of router(x)) times a number, plus what shared experts give."""

    experts: OffloadedExperts
    router: FoundRouter
    gate: nn.Module
    """The router's module."""
    router_name: str
    experts_name: str
    shared: FoundShared | None = None
    shared_name: str | None = None
    share_name: str | None = None
    share_curve: torch.Tensor | None = None
    scale: float = 1.0
    others: tuple[int, ...] | None = None
    """Which of the router's outputs come after the block's; None: it returns no tuple."""

    def shared_expert(self, block: Any) -> SharedExpert | None:
        """What the shared experts of `block` compute, with their share."""
        if self.shared is None or self.share_name is None:
            return None if self.shared is None else self.shared.expert
        share = block._modules[self.share_name]
        return self.shared.expert._replace(share=(share.weight, share.bias), share_curve=self.share_curve)

    def note(self, parts: Unchanged, block: nn.Module) -> None:
        """Its parts, for as long as `block` is it; see `are_told`."""
        parts.add_ways(block)
        parts.add_tensors(block)
        parts.add(block, self.router_name, after=False)
        parts.add(block, self.experts_name, before=False)
        if self.shared is not None and self.shared_name is not None:
            parts.add(block, self.shared_name)
            self.shared.note(parts, block.get_submodule(self.shared_name))
        if self.share_name is not None:
            parts.add(block, self.share_name)

    def are_told(self) -> bool:
        """Whether those who look at what the router gives to the experts can be told afterwards, by `tell`."""
        if self.gate._forward_hooks and not self.router.is_complete:
            return False
        hooks = (*self.gate._forward_hooks.values(), *self.experts._forward_pre_hooks.values())
        return not hooks or all(getattr(hook, "only_looks", False) for hook in hooks)

    @property
    def is_watched(self) -> bool:
        """Whether there is anybody to tell."""
        return bool(self.gate._forward_hooks or self.experts._forward_pre_hooks)

    def tell(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor) -> None:
        """The router has made that of `x` [1, D]: [1, K] twice and [1, E]."""
        gate, experts = self.gate, self.experts
        if not self.is_watched:
            return
        outputs = self.router.outputs(ids, weights, logits)
        for hook in list(gate._forward_hooks.values()):
            hook(gate, (x,), outputs)
        for look in list(experts._forward_pre_hooks.values()):
            look(experts, (x, ids, weights.to(self.router.router.weights_dtype)), {})


def find_block(module: nn.Module) -> MoeBlock | None:
    """What `module` is, if its class's code gives its experts what it gives its router, and adds no more to what they
    return than shared experts.

    The code is called with stand-ins for the children, which note what they are given. The module is left as it is.
    """
    children = {name: child for name, child in module._modules.items() if child is not None}
    experts = [name for name, child in children.items() if type(child) is OffloadedExperts]
    if len(experts) != 1 or "forward" in vars(module):
        return None
    (experts_name,) = experts
    found: Any = children.pop(experts_name)
    adapter, dtype = type(found.adapter), found.dtype
    if (
        dtype not in HALVES
        or adapter.flatten is not ExpertsAdapter.flatten
        or adapter.unflatten is not ExpertsAdapter.unflatten
    ):
        return None
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for name, child in children.items():
                extras = _beside_tokens(module, name, child, dtype)
                router = None if extras is None else find_router(child, dtype, extras)
                if router is not None:
                    return _Trial(module, name, experts_name, router).find()
    except Exception:  # the class's own code may fail in any way
        return None
    return None


def _beside_tokens(
    module: nn.Module, name: str, child: nn.Module, dtype: torch.dtype
) -> tuple[torch.Tensor, ...] | None:
    """What the block gives the child beside tokens, if those are tensors of its own; None if it gives it no tokens."""
    weight = child._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        return None
    stand_ins: dict[str, nn.Module | None] = {other: StandIn() for other in module._modules}
    asked = StandIn()
    stand_ins[name] = asked
    with contextlib.suppress(Exception):  # nothing comes of what stand-ins give
        type(module).forward(with_children(module, stand_ins), Normal(dtype)(1, 1, weight.shape[1]))
    if not asked.given:
        return None
    own = [*module._parameters.values(), *module._buffers.values()]
    extras = asked.values[1:]
    return tuple(extras) if all(any(extra is tensor for tensor in own) for extra in extras) else None


class _Trial:
    """Calls a block's code with stand-ins for its children."""

    def __init__(self, module: nn.Module, router_name: str, experts_name: str, router: FoundRouter) -> None:
        self._module, self._router = module, router
        self._router_name, self._experts_name = router_name, experts_name
        experts: Any = module._modules[experts_name]
        self._dtype, self._hidden = experts.dtype, router.router.weight.shape[1]
        shared = {name: find_shared(child) for name, child in module._modules.items() if child is not None}
        self._shared = {name: found for name, found in shared.items() if found is not None}
        children: dict[str, Any] = module._modules
        self._shares = [name for name, child in children.items() if is_linear(child) and child.weight.shape[0] == 1]

    def find(self) -> MoeBlock | None:
        first, second = self._run(0), self._run(1)
        if first is None or second is None or first[:2] != second[:2]:
            return None
        called, others, _ = first
        shared = next((name for name in self._shared if name in called), None)
        share = next((name for name in self._shares if name in called), None)
        if called != {self._router_name, self._experts_name} | ({shared, share} - {None}):
            return None
        experts: Any = self._module._modules[self._experts_name]
        gate: Any = self._module._modules[self._router_name]
        curve = None if share is None else curve_of(self._dtype, torch.sigmoid)
        for scale in (1.0, *(float(v) for v in settings_of(self._module).values() if type(v) in (int, float) and v)):
            if all(self._is_sum(run[2], shared, share, curve, scale) for run in (first, second)):
                return MoeBlock(
                    experts,
                    self._router,
                    gate,
                    self._router_name,
                    self._experts_name,
                    None if shared is None else self._shared[shared],
                    shared,
                    share,
                    curve,
                    scale,
                    others,
                )
        return None

    def _run(self, seed: int) -> tuple[set[str], tuple[int, ...] | None, dict[str, torch.Tensor]] | None:
        """The children that are called, which outputs of the router are returned, and what each child gave; None if
        they are not given what they should be."""
        normal, module = Normal(self._dtype, seed), self._module
        x = normal(1, 1, self._hidden)
        gate: Any = module._modules[self._router_name]
        extras = _beside_tokens(module, self._router_name, gate, self._dtype)
        routed = type(gate).forward(gate, x[0], *(extras or ()))
        kept = [pick.clone() for pick in (routed[self._router.ids], routed[self._router.weights])]
        outputs = {name: normal(self._hidden) for name in (self._experts_name, *self._shared)}
        outputs |= {name: normal(1) for name in self._shares}
        stand_ins: dict[str, Any] = {
            name: child if type(child) is nn.Identity else StandIn() for name, child in module._modules.items()
        }
        stand_ins[self._router_name] = StandIn(routed)
        for name, output in outputs.items():
            stand_ins[name] = StandIn(made=_like(output))
        mine = x.clone()
        found = type(module).forward(with_children(module, stand_ins), mine)
        watched = {name: child for name, child in stand_ins.items() if isinstance(child, StandIn)}
        called = {name for name, child in watched.items() if child.given}
        others: tuple[int, ...] | None = None
        if isinstance(found, tuple):
            found, *more = found
            places = [place for one in more for place, output in enumerate(routed) if output is one]
            if len(places) != len(more):
                return None
            others = tuple(places)
        if not called >= {self._router_name, self._experts_name} or any(len(watched[n].given) != 1 for n in called):
            return None
        given, ids, weights = watched[self._experts_name].values
        for name in called:
            tokens, *rest = watched[name].values
            if not torch.equal(tokens.reshape(-1), x.reshape(-1)) or (rest and name in {*self._shared, *self._shares}):
                return None
        if not (
            given.shape == (1, self._hidden)
            and ids is routed[self._router.ids]
            and weights is routed[self._router.weights]
            and all(torch.equal(pick, before) for pick, before in zip((ids, weights), kept, strict=True))
            and torch.equal(mine, x)
            and isinstance(found, torch.Tensor)
            and found.shape == x.shape
            and found.dtype is x.dtype
        ):
            return None
        return called, others, {**outputs, "": found.reshape(-1)}

    def _is_sum(
        self,
        given: dict[str, torch.Tensor],
        shared: str | None,
        share: str | None,
        curve: torch.Tensor | None,
        scale: float,
    ) -> bool:
        output = given[self._experts_name]
        output = output if scale == 1 else output * scale
        if shared is not None:
            added = given[shared]
            if share is not None and curve is not None:
                added = at(curve, given[share]) * added
            output = output + added
        return same(given[""], output)


def _like(output: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The numbers, in the shape of the tokens that come in."""
    return lambda x: output.clone().view(*x.shape[:-1], len(output))
