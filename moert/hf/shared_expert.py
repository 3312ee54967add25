"""Experts that every token has: two or three linear layers and a function of single numbers, found by trying."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from moert.hf.own_forward import OwnForward
from moert.hf.stand_ins import Normal, StandIn, same, with_children
from moert.hf.unchanged import Unchanged
from moert.kernels.cpu import HALVES
from moert.kernels.moe_block import SharedExpert
from moert.kernels.projection import Projection

_curves: dict[tuple[torch.dtype, bytes], torch.Tensor] = {}
"""A model's layers have one activation among them, mostly."""


class FoundShared(NamedTuple):
    """What such a module computes, and the names of its linear layers."""

    expert: SharedExpert
    linears: tuple[str, ...]

    def note(self, parts: Unchanged, module: nn.Module) -> None:
        """The parts of `module`, for as long as it is this."""
        for name, child in module._modules.items():
            if child is not None:
                parts.add(module, name)


def find_shared(module: nn.Module) -> FoundShared | None:
    """What `module` computes, if its class's code is down(curve(gate(x)) * other(up(x))), or down(curve(up(x))).

    The code is called with stand-ins for its linear layers. What the curve is does not matter: it is called on every
    number of 16 bits there is. The module is left as it is.
    """
    children: dict[str, Any] = module._modules
    linears = {name: child for name, child in children.items() if is_linear(child)}
    if len(linears) not in (2, 3) or "forward" in vars(module):
        return None
    (dtype, *others) = {child.weight.dtype for child in linears.values()}
    if others or dtype not in HALVES:
        return None
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return _search(module, linears, dtype)
    except Exception:  # the class's own code may fail in any way
        return None


def is_linear(module: Any) -> bool:
    """Whether it is a linear layer that has been taken over."""
    return type(module) is nn.Linear and isinstance(vars(module).get("forward"), OwnForward)


def curve_of(dtype: torch.dtype, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """[65536]: what it makes of each number of 16 bits, by its bits; kept for good."""
    curve = function(_every_number(dtype)).contiguous()
    key = (dtype, hashlib.blake2b(curve.view(torch.int16).numpy().tobytes()).digest())
    return _curves.setdefault(key, curve)


@functools.cache
def _every_number(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.int16).view(dtype)


def _search(module: nn.Module, linears: dict[str, Any], dtype: torch.dtype) -> FoundShared | None:
    down = _last(module, linears, dtype)
    if down is None:
        return None
    into = [name for name in linears if name != down]
    inner, hidden = linears[down].weight.shape[1], linears[down].weight.shape[0]

    def h_of(*given: torch.Tensor) -> torch.Tensor:
        """What `down` is given where the layers before it, or the halves of the only one, give that [n]."""
        outputs = dict(zip(into, given if len(into) == len(given) else (torch.cat(given),), strict=True))
        asked = StandIn(outputs[into[0]])
        stand_ins = {name: StandIn(output[None]) for name, output in outputs.items()}
        _call(module, {**module._modules, **stand_ins, down: asked}, outputs[into[0]][None])
        h: torch.Tensor = asked.values[0]
        return h[0]

    weights: list[Projection] = [(linears[name].weight, linears[name].bias) for name in into]
    if len(into) == 1 and weights[0][0].shape[0] == 2 * inner:
        weights = _halves(*weights[0])
    if any(weight.shape != (inner, hidden) for weight, _ in weights):
        return None
    last = linears[down].weight, linears[down].bias
    if len(weights) == 1:
        curve = curve_of(dtype, h_of)
        return FoundShared(SharedExpert(weights[0], last, curve), tuple(linears))
    for gate, neutral in product((0, 1), (1.0, 0.0)):

        def swapped(a: torch.Tensor, b: torch.Tensor, gate: int = gate) -> torch.Tensor:
            return h_of(*((b, a) if gate else (a, b)))

        curves = _curves_of(dtype, swapped, neutral)
        if curves is not None and all(
            _same_bits(swapped(a, b), at(curves[0], a) * at(curves[1], b)) for a, b in _pairs(dtype)
        ):
            expert = SharedExpert(weights[1 - gate], last, curves[0], weights[gate], curves[1])
            return FoundShared(expert, tuple(linears))
    return None


def _curves_of(
    dtype: torch.dtype, h_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], neutral: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What becomes of the gate and of what it is multiplied with, if 1 becomes of `neutral` there."""
    numbers = _every_number(dtype)
    gates = curve_of(dtype, lambda every: h_of(every, torch.full_like(every, neutral)))
    mantissas, exponents = gates.float().frexp()
    powers = (mantissas == 0.5) & gates.isfinite()
    if not powers.any():
        return None
    # Multiplying with a power of two rounds nothing, but for what gets too small, which mostly stays what it is.
    place = torch.where(powers, (exponents - 1).abs(), 1 << 16).argmin()

    def multiplied(every: torch.Tensor) -> torch.Tensor:
        found, tiny = h_of(numbers[place].expand_as(every), every), torch.finfo(dtype).tiny
        is_lost = (found.abs() <= tiny) & (every.abs() <= 2 * tiny / gates[place].float())
        return torch.where(is_lost, every, found / gates[place])

    return gates, curve_of(dtype, multiplied)


def _last(module: nn.Module, linears: dict[str, Any], dtype: torch.dtype) -> str | None:
    """The layer whose output the module returns, if all others are given what the module is."""
    normal = Normal(dtype)
    stand_ins = {name: StandIn(normal(1, child.weight.shape[0])) for name, child in linears.items()}
    x = normal(1, next(iter(linears.values())).weight.shape[1])
    output = _call(module, {**module._modules, **stand_ins}, x.clone())
    last = [name for name in linears if output is stand_ins[name].output]
    if len(last) != 1 or any(len(stand_in.given) != 1 for stand_in in stand_ins.values()):
        return None
    if any(len(stand_ins[name].values) != 1 for name in linears):
        return None
    if any(not same(stand_ins[name].values[0], x) for name in linears if name != last[0]):
        return None
    return last[0]


def _call(module: nn.Module, children: dict[str, Any], x: torch.Tensor) -> Any:
    return type(module).forward(with_children(module, children), x)


def _halves(weight: torch.Tensor, bias: torch.Tensor | None) -> list[Projection]:
    half = weight.shape[0] // 2
    biases = (None, None) if bias is None else (bias[:half], bias[half:])
    return [(weight[:half], biases[0]), (weight[half:], biases[1])]


def at(curve: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """What the curve makes of them."""
    return curve[numbers.view(torch.int16).to(torch.int64) & 0xFFFF]


@functools.cache
def _pairs(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    normal, numbers = Normal(dtype), _every_number(dtype)
    generator = torch.Generator("cpu").manual_seed(0)
    shuffled = numbers[torch.randperm(len(numbers), generator=generator)]
    return [(numbers, shuffled), (normal(1 << 16), normal(1 << 16)), (numbers, normal(1 << 16, magnitude=30.0))]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    nan = b.isnan()
    if a.dtype is not b.dtype or a.shape != b.shape or not torch.equal(a.isnan(), nan):
        return False
    return torch.equal(a.view(torch.int16)[~nan], b.view(torch.int16)[~nan])
