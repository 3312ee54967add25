"""Which gate of the fused kernels an experts module has, found by trying: a class's own code is all that tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from moert.hf.adapters import ExpertsAdapter
from moert.hf.own_gate import LARGEST_LIMIT, OwnGate, UnusableGateError
from moert.kernels.gate import ACTIVATIONS, Gate
from moert.kernels.reference import activation, gate

# Parameters that are written in code and not kept in an attribute.
_USUAL_ALPHAS = (1.0, 1.702)
_USUAL_OFFSETS = (0.0, 1.0)

_SIDE = 2.0**-9
"""How far on either side of a limit the gate is tried."""

# Eight roundings of 2**-24 on either side: sigmoid or erf, its argument, two clamps, an offset and two products.
_RELATIVE = 2.0**-20
# 1 + erf(x) and 1 + tanh(x) cancel for negative x, and keep an absolute error of a few roundings.
_CANCELLED = 2.0**-22
_CANCELS_TO = 16.0
# Below it a sigmoid may be flushed to zero.
_TINY = 2.0**-120


@dataclass(frozen=True)
class GateSearch:
    """What was found: exactly one of the two is set."""

    gate: Gate | None
    reason: str | None
    """Why the kernels cannot compute the module's gate, for a user to read."""


def search_gate(experts: ExpertsAdapter | nn.Module, width: int) -> GateSearch:
    """Find the gate that gives, in fp32 on the CPU, what the module's own `_apply_gate` (or `act_fn`) gives.

    The module's own is called on numbers of many magnitudes, on both sides of every number that could be a limit, on
    infinities and NaN. Its parameters are looked for among the numbers that the module, its activation and its
    configuration hold; what they are called does not matter. The result holds for this module alone: another layer of
    the same class may have other limits. Takes milliseconds.

    Args:
        experts: an experts module, or the adapter of one.
        width: F, the columns of the down product's input.
    """
    try:
        own = OwnGate.of(experts, width)
        with own.undisturbed():
            for interleaved in (False, True) if own.gated else (False,):
                found = _try_layout(own, interleaved)
                if found is not None:
                    return GateSearch(found, None)
    except UnusableGateError as unusable:
        return GateSearch(None, str(unusable))
    except Exception as error:  # the class's own code may fail in any way
        return GateSearch(None, f"its gate fails on fp32 numbers on the CPU: {type(error).__name__}: {error}")
    return GateSearch(None, "its gate computes something that moert's kernels do not offer")


def _try_layout(own: OwnGate, interleaved: bool) -> Gate | None:
    gates, ups = _probe(own.limits)
    # Enough rows that each column is tried with several pairs.
    x = own.lay_out(gates, ups, 4, interleaved)
    expected = own.check_pure(x)
    single = own(x[:1])
    coarse = own(x.bfloat16())
    for candidate in _suggest(own, interleaved):
        if (
            _agrees(expected, candidate, x)
            and _agrees(single, candidate, x[:1])
            and _agrees_roughly(coarse, candidate, x.bfloat16())
        ):
            return candidate
    return None


def _suggest(own: OwnGate, interleaved: bool) -> Iterator[Gate]:
    """Gates that the module's may be, from its outputs where one half of the input stays the same."""
    if not own.gated:
        below = _below_zero()
        for name, alpha in _activations_like(own.curve(below, below, False), below, own.numbers):
            yield Gate(name, gated=False, alpha=alpha)
        return
    one = torch.ones(())
    for up_limit in _limits_seen(own, lambda ups: own.curve(one, ups, interleaved)):
        step = min(1.0, up_limit / 2)
        minus, zero, plus = own.curve(one, torch.tensor([-step, 0.0, step]), interleaved).tolist()
        slope = (plus - minus) / (2 * step)
        offset_seen = zero / slope if slope else math.nan
        for offset in dict.fromkeys((*_USUAL_OFFSETS, *own.numbers)):
            factor = step + offset
            if factor and abs(offset - offset_seen) <= 1e-3 * (1 + abs(offset)):
                yield from _suggest_with(own, interleaved, up_limit, offset, torch.tensor(step), factor)


def _suggest_with(
    own: OwnGate, interleaved: bool, up_limit: float, up_offset: float, up: torch.Tensor, factor: float
) -> Iterator[Gate]:
    """The same once the half `up` is known, which multiplies the activations by `factor`."""

    def activations(gates: torch.Tensor) -> torch.Tensor:
        return own.curve(gates, up, interleaved) / factor

    below = _below_zero()
    limits = [(limit, math.inf) for limit in _limits_seen(own, activations)]
    ceiling = activations(torch.tensor([LARGEST_LIMIT])).item()
    limits += [(math.inf, limit) for limit in own.limits if abs(limit - ceiling) <= 1e-5 * limit]
    # tanh and sigmoid have a ceiling of their own.
    limits += [(math.inf, math.inf)]
    for name, alpha in _activations_like(activations(below), below, own.numbers):
        for gate_limit, output_limit in dict.fromkeys(limits):
            yield Gate(name, True, interleaved, alpha, gate_limit, up_limit, up_offset, output_limit)


def _below_zero() -> torch.Tensor:
    """Where no limit from above matters and the activations have different shapes."""
    return -torch.arange(1, 25) / 4


def _activations_like(seen: torch.Tensor, at: torch.Tensor, numbers: Iterable[float]) -> Iterator[tuple[str, float]]:
    # Were it silu, -sigmoid(-alpha) at -1.
    part = -seen[at == -1].item()
    alpha_seen = math.log(1 / part - 1) if 0 < part < 1 else math.nan
    alphas = [alpha for alpha in dict.fromkeys((*_USUAL_ALPHAS, *numbers)) if abs(alpha - alpha_seen) <= 1e-3]
    for name in ACTIVATIONS:
        for alpha in alphas if name == "silu" else (1.0,):
            if torch.allclose(activation(Gate(name, alpha=alpha), at.double()), seen, rtol=1e-3, atol=1e-4):
                yield name, alpha


def _limits_seen(own: OwnGate, curve: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
    """The numbers from which on `curve` is flat; infinity where it never is."""
    limits = torch.tensor(own.limits)
    ends = torch.tensor([2, 4]) * LARGEST_LIMIT
    seen = curve(torch.cat([limits * (1 - _SIDE), limits * (1 + _SIDE), ends]))
    top = seen[-1]
    if seen[-2] != top:
        return [math.inf]
    below, above = seen[:-2].view(2, -1)
    flat_from = ((below != top) & (above == top)).tolist()
    return [limit for limit, is_it in zip(own.limits, flat_from, strict=True) if is_it]


def _probe(limits: Iterable[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of a gate and what it is multiplied with, [N] each, that tell gates apart."""
    generator = torch.Generator().manual_seed(0)

    def normal(n: int) -> torch.Tensor:
        return torch.randn(n, generator=generator)

    scales = 10.0 ** torch.arange(-3, 4).repeat_interleave(48)
    shuffled = scales[torch.randperm(len(scales), generator=generator)]
    pairs = [(normal(len(scales)) * scales, normal(len(scales)) * shuffled)]
    magnitudes = torch.tensor([limit * side for limit in limits for side in (1 - _SIDE, 1 + _SIDE)])
    extremes = torch.tensor([0.0, 1e4, 1e8, LARGEST_LIMIT])
    signed = torch.cat([magnitudes, -magnitudes, extremes, -extremes])
    pairs += [(signed, normal(len(signed))), (normal(len(signed)), signed)]
    special = torch.tensor([0.0, 1.0, -1.0, math.inf, -math.inf, math.nan])
    grid = torch.cartesian_prod(special, special)
    pairs.append((grid[:, 0], grid[:, 1]))
    return torch.cat([g for g, _ in pairs]), torch.cat([u for _, u in pairs])


def _parts(how: Gate, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gates, and what their activations are multiplied with."""
    if not how.gated:
        return x, torch.ones_like(x)
    gates, ups = (x[..., 0::2], x[..., 1::2]) if how.interleaved else x.chunk(2, dim=-1)
    return gates, ups.clamp(-how.up_limit, how.up_limit) + how.up_offset


def _agrees(own: torch.Tensor, how: Gate, x: torch.Tensor) -> bool:
    expected = gate(how, x)
    gates, factors = _parts(how, x)
    slack = _TINY * (1 + factors.abs())
    if how.activation.startswith("gelu"):
        slack = slack + _CANCELLED * gates.abs().clamp(max=_CANCELS_TO) * factors.abs()
    return _is_close(own, expected, _RELATIVE * expected.abs() + slack, gates.isnan() | factors.isnan())


def _agrees_roughly(own: torch.Tensor, how: Gate, x: torch.Tensor) -> bool:
    """The same in bf16, where the module's own rounds after each step: it must not take another way there."""
    expected = gate(how, x.float())
    gates, factors = _parts(how, x.float())
    slack = 2.0**-5 * (expected.abs() + gates.abs().clamp(max=_CANCELS_TO) * factors.abs())
    return _is_close(own.float(), expected, slack + _TINY, gates.isnan() | factors.isnan())


def _is_close(own: torch.Tensor, expected: torch.Tensor, slack: torch.Tensor, is_nan: torch.Tensor) -> bool:
    # torch itself makes inf or NaN of gelu(inf), by how many numbers there are.
    finite = expected.isfinite()
    return bool(
        torch.equal(own.isfinite(), finite)
        and own[is_nan].isnan().all()
        and ((own - expected).abs() <= slack)[finite].all()
    )
