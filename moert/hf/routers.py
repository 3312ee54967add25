"""The products of routers on the CPU: `F.linear` in the code of a class that is no linear layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from moert.hf.rebinding import ReboundForward, names_in, rebind
from moert.hf.stand_ins import same
from moert.kernels.cpu import HALVES

Linear = Callable[..., torch.Tensor]
"""What takes the place of `torch.nn.functional.linear`."""


class RouterForward(ReboundForward):
    """Stands in a router's own `forward`: the class's code, in which `linear` is another."""

    def __init__(self, module: nn.Module, linear: Linear) -> None:
        super().__init__(module, _replaced(type(module).forward, linear))


def router_forward(module: nn.Module, linear: Linear, dtypes: tuple[torch.dtype, ...] = HALVES) -> RouterForward | None:
    """A forward for `module`, if its class calls `F.linear` with its own weight of one of `dtypes` on the CPU, as it is
    or cast to fp32.

    Tried on a copy of it, with a vector of as many numbers as it has rows beside the tokens where it asks for one.
    """
    weight = module._parameters.get("weight")
    if (
        isinstance(module, nn.Linear)
        or weight is None
        or weight.dim() != 2
        or weight.dtype not in dtypes
        or not weight.is_cpu
        or not _replaced(type(module).forward, torch.nn.functional.linear)
    ):
        return None
    shapes = ((2, weight.shape[1]), (1, 2, weight.shape[1]))
    extras: tuple[tuple[torch.Tensor, ...], ...] = ((), (torch.zeros(len(weight), dtype=torch.float32, device="cpu"),))
    if not any(_asks_for_own_product(module, shape, extra) for shape in shapes for extra in extras):
        return None
    return RouterForward(module, linear)


def _replaced(forward: Any, linear: Linear) -> dict[str, Any]:
    """Global names in the function's code -> what stands for them, where it calls a `linear`."""
    names = names_in(forward)
    if "linear" not in names:
        return {}
    functional = _StandIn(torch.nn.functional, linear=linear)
    stand_ins = {id(torch.nn.functional): functional, id(torch.nn): _StandIn(torch.nn, functional=functional)}
    values = {name: forward.__globals__[name] for name in names if name in forward.__globals__}
    return {name: stand_ins[id(value)] for name, value in values.items() if id(value) in stand_ins}


class _StandIn:
    """A module, but for some of its names."""

    def __init__(self, module: ModuleType, **instead: Any) -> None:
        self._module = module
        vars(self).update(instead)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def with_linear(forward: Any, linear: Linear) -> Callable[..., Any]:
    """The code of a router's class, in which `F.linear` is `linear`; takes the module first."""
    return rebind(forward, _replaced(forward, linear))


def _asks_for_own_product(module: nn.Module, shape: tuple[int, ...], extra: tuple[torch.Tensor, ...]) -> bool:
    asked = []

    def watch(input: torch.Tensor, weight: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:  # noqa: A002
        is_own = weight is copied.weight or same(weight, copied.weight.float())
        asked.append(is_own and input.dtype is weight.dtype)
        return torch.nn.functional.linear(input, weight, *rest, **named)

    try:
        copied: Any = copy.deepcopy(module).eval()
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            with_linear(type(module).forward, watch)(
                copied, torch.zeros(shape, dtype=copied.weight.dtype, device="cpu"), *extra
            )
    except Exception:  # the class's own code may fail in any way
        return False
    return any(asked)
