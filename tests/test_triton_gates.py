"""The gate on the device, against `reference.gate` in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from triton_support import DEVICE

from moert.kernels import _gates, reference
from moert.kernels.gate import ACTIVATIONS, Gate

# An exponential that overflows is meant to: 1 / (1 + inf) is 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")

SPECIAL = (0.0, -0.0, 1e-30, -1e-7, 3e-5, 0.29999, 0.30001, -0.3, 7.0, -7.0, 88.0, -88.0, 1e4, -1e4)

GATES = [
    *(Gate(activation=name, gated=gated) for name in ACTIVATIONS for gated in (True, False)),
    Gate(alpha=1.702, gate_limit=7.0, up_limit=7.0, up_offset=1.0),
    Gate(activation="relu", gate_limit=0.5, output_limit=0.25, up_limit=0.0),
    Gate(activation="identity", gate_limit=-1.0, output_limit=-2.0, up_offset=-3.0),
]


@triton.jit
def _apply(gates_ptr, ups_ptr, out_ptr, GATE: tl.constexpr, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    gates = tl.load(gates_ptr + places)
    if GATE.gated:
        out = _gates.gated(gates, tl.load(ups_ptr + places), GATE)
    else:
        out = _gates.activation(gates, GATE)
    tl.store(out_ptr + places, out)


def applied(gate: Gate, gates: torch.Tensor, ups: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(gates), device=DEVICE)
    _apply[(1,)](gates.to(DEVICE), ups.to(DEVICE), out, gate, len(gates))
    return out.cpu()


def wanted(gate: Gate, gates: torch.Tensor, ups: torch.Tensor) -> torch.Tensor:
    both = torch.cat([gates, ups]) if gate.gated else gates
    return reference.gate(gate, both.double())


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_a_gate_is_the_reference(gate: Gate) -> None:
    random = torch.Generator().manual_seed(1)
    gates, ups = 4 * torch.randn(2, 4096, generator=random)
    gates[: len(SPECIAL)] = torch.tensor(SPECIAL)
    # Half of them small, where differences cancel.
    gates[2048:] *= 0.1
    result, exact = applied(gate, gates, ups), wanted(gate, gates, ups)
    # A GELU far below 0 is a difference of numbers near 1, here or in the reference; the others are exact.
    small = 1e-6 if gate.activation.startswith("gelu") else 1e-30
    error = (result.double() - exact).abs()
    others = ups.double().abs() if gate.gated else torch.ones(4096)
    assert (error <= 2e-6 * exact.abs() + small * others).all(), error.max()


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_nan_stays_nan_through_every_limit(gate: Gate) -> None:
    gates = torch.tensor([math.nan, 1.0, math.nan, 1.0])
    ups = torch.tensor([1.0, math.nan, math.nan, 1.0])
    assert applied(gate, gates, ups).isnan().tolist() == wanted(gate, gates, ups).isnan().tolist()


def test_infinities_are_limited() -> None:
    gate = Gate(activation="relu", gate_limit=7.0, up_limit=5.0)
    gates = torch.tensor([math.inf, -math.inf, math.inf, 1.0])
    ups = torch.tensor([math.inf, math.inf, -math.inf, -math.inf])
    assert applied(gate, gates, ups).tolist() == [35.0, 0.0, -35.0, -5.0]
