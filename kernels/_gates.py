"""On the device: the gate between the up and the down product; `reference.gate` is its meaning.

`GATE` is a `moert.kernels.gate.Gate`, known when a kernel is compiled. Everything is fp32. Only exponentials are taken
from Triton, so that no library of device functions is needed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    size = tl.abs(x)
    decay = tl.exp(-2.0 * size)
    far = (1.0 - decay) / (1.0 + decay)
    # Near 0 the difference above cancels; the series is exact to fp32 below 0.3.
    square = x * x
    near = square * (17.0 / 315.0 + square * (-62.0 / 2835.0))
    near = size * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - near)))
    size = tl.where(size < 0.3, near, far)
    return tl.where(x < 0, -size, size)


@triton.jit
def _erf(x: tl.tensor) -> tl.tensor:
    """A rational function of x, correct to a few units in the last place of fp32 (the one of Eigen and XLA)."""
    square = x * x
    above = 0.0034082910107109506 + square * 0.00022905065861350646
    above = 0.18520832239976145 + square * (0.050955695062380861 + square * above)
    above = x * (1.128379143519084 + square * above)
    below = 0.0010179625278914885 + square * (0.000023547966471313185 - square * 1.1791602954361697e-7)
    below = 0.11098505178285362 + square * (0.014070470171167667 + square * below)
    below = 1.0 + square * (0.49746925110067538 + square * below)
    # From this bound on erf is 1 to fp32. NaN is neither above nor below it.
    y = tl.where(x > 3.832506856900711, 1.0, above / below)
    return tl.where(x < -3.832506856900711, -1.0, y)


@triton.jit
def activation(x: tl.tensor, GATE: tl.constexpr) -> tl.tensor:
    """The activation alone, without halves and limits."""
    if GATE.activation == "silu":
        y = x * _sigmoid(GATE.alpha * x)
    elif GATE.activation == "gelu":
        y = 0.5 * x * (1.0 + _erf(x * 0.7071067811865476))
    elif GATE.activation == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u).
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif GATE.activation == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif GATE.activation == "relu2":
        y = tl.where(x < 0, 0.0, x)
        y = y * y
    elif GATE.activation == "sigmoid":
        y = _sigmoid(x)
    elif GATE.activation == "tanh":
        y = _tanh(x)
    else:
        tl.static_assert(GATE.activation == "identity")
        y = x
    return y


@triton.jit
def _at_most(x: tl.tensor, limit: tl.constexpr) -> tl.tensor:
    """Clamped from above; NaN stays NaN, which a minimum would lose."""
    if limit < 3.4028234663852886e38:
        x = tl.where(x > limit, limit, x)
    return x


@triton.jit
def gated(gates: tl.tensor, ups: tl.tensor, GATE: tl.constexpr) -> tl.tensor:
    """Both halves of a gated expert's up product -> what the down product takes."""
    inner = _at_most(activation(_at_most(gates, GATE.gate_limit), GATE), GATE.output_limit)
    ups = _at_most(ups, GATE.up_limit)
    ups = -_at_most(-ups, GATE.up_limit)
    return inner * (ups + GATE.up_offset)
