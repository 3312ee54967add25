"""Blocks of a router and its experts, and nothing else."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from moert.hf.adapters.base import ExpertsAdapter
from moert.hf.experts import OffloadedExperts
from moert.hf.token_router import FoundRouter, find_router
from moert.hf.unchanged import Unchanged


class MoeBlock(NamedTuple):
    """What a block's class computes: experts(x, picks of router(x))."""

    experts: OffloadedExperts
    router: FoundRouter
    gate: nn.Module
    """The router's module."""
    router_name: str
    experts_name: str

    def note(self, parts: Unchanged, block: nn.Module) -> None:
        """Its parts, for as long as `block` is it; see `are_told`."""
        parts.add(block, self.router_name, after=False)
        parts.add(block, self.experts_name, before=False)

    def are_told(self) -> bool:
        """Whether those who look at what the router gives to the experts can be told afterwards, by `tell`."""
        if self.gate._forward_hooks and not self.router.is_complete:
            return False
        hooks = (*self.gate._forward_hooks.values(), *self.experts._forward_pre_hooks.values())
        return not hooks or all(getattr(hook, "only_looks", False) for hook in hooks)

    def tell(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor) -> None:
        """The router has made that of `x` [1, D]: [1, K] twice and [1, E]."""
        gate, experts = self.gate, self.experts
        if not gate._forward_hooks and not experts._forward_pre_hooks:
            return
        outputs = self.router.outputs(ids, weights, logits)
        for hook in list(gate._forward_hooks.values()):
            hook(gate, (x,), outputs)
        for look in list(experts._forward_pre_hooks.values()):
            look(experts, (x, ids, weights.to(self.router.router.weights_dtype)), {})


def find_block(module: nn.Module) -> MoeBlock | None:
    """What `module` is, if its class's code gives its experts what it gives its router, and returns what they do.

    The code is called with stand-ins for the children, which note what they are given. The module is left as it is.
    """
    children = {name: child for name, child in module._modules.items() if child is not None}
    experts = [name for name, child in children.items() if type(child) is OffloadedExperts]
    if len(experts) != 1 or "forward" in vars(module):
        return None
    (experts_name,) = experts
    found: Any = children[experts_name]
    adapter = type(found.adapter)
    if adapter.flatten is not ExpertsAdapter.flatten or adapter.unflatten is not ExpertsAdapter.unflatten:
        return None
    for name, child in children.items():
        router = None if name == experts_name else find_router(child)
        if router is not None:
            try:
                with torch.no_grad():
                    is_it = _is_plain(module, name, experts_name, router)
            except Exception:  # the class's own code may fail in any way
                return None
            return MoeBlock(found, router, child, name, experts_name) if is_it else None
    return None


class _StandIn(nn.Module):
    """Gives what it is told to, and notes what it is given."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output
        self.given: list[tuple[Any, ...]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.given.append((*args, *kwargs.values()))
        return self.output


def _is_plain(module: nn.Module, router_name: str, experts_name: str, router: FoundRouter) -> bool:
    weight, generator = router.router.weight, torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(weight.dtype)

    x, output = normal(1, 1, weight.shape[1]), normal(1, weight.shape[1])
    own: Any = module._modules[router_name]
    routed = type(own).forward(own, x[0])
    stand_ins = {name: _StandIn(None) for name in module._modules}
    stand_ins[router_name].output, stand_ins[experts_name].output = routed, output.clone()
    picks = routed[router.ids], routed[router.weights]
    kept = [pick.clone() for pick in picks]
    stand_in = copy.copy(module)
    stand_in.training = False
    vars(stand_in)["_modules"] = stand_ins
    found = type(module).forward(stand_in, x.clone())
    called = {name for name, child in stand_ins.items() if child.given}
    if called != {router_name, experts_name} or not isinstance(found, torch.Tensor):
        return False
    ((routed_x,), (given, ids, weights)) = stand_ins[router_name].given[0], stand_ins[experts_name].given[0]
    return (
        all(len(stand_ins[name].given) == 1 for name in called)
        and torch.equal(routed_x.reshape(-1), x.reshape(-1))
        and given.shape == (1, weight.shape[1])
        and torch.equal(given, x[0])
        and ids is picks[0]
        and weights is picks[1]
        and all(torch.equal(pick, before) for pick, before in zip(picks, kept, strict=True))
        and found.shape == x.shape
        and found.dtype is output.dtype
        and torch.equal(found[0], output)
    )
