"""Plain torch: what every kernel means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from moert.kernels.gate import Gate

Activation = Callable[[torch.Tensor], torch.Tensor]
Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def expert_ffn(
    hidden: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    activation: Activation,
    *,
    up_name: str = "gate_up_proj",
    is_transposed: bool = False,
    linear: Linear = torch.nn.functional.linear,
) -> torch.Tensor:
    """One expert on the rows routed to it.

    Args:
        hidden: [T, D], in the dtype of the weights.
        weights: `up_name` [U, D] and "down_proj" [D, F], or [D, U] and [F, D] if `is_transposed`; optional biases
            under the same names with "_bias" added, [U] and [D].
        activation: [T, U] -> [T, F]; for a gated expert it splits, gates and multiplies.
        linear: the product with weights that are not transposed; `kernels.cpu.linear` is the faster one.

    Returns:
        [T, D], not yet weighted by the router; new memory.
    """
    product = _transposed_linear if is_transposed else linear
    inner = activation(product(hidden, weights[up_name], weights.get(f"{up_name}_bias")))
    return product(inner, weights["down_proj"], weights.get("down_proj_bias"))


def _transposed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = x @ weight
    return y if bias is None else y + bias


def gate(how: Gate, x: torch.Tensor) -> torch.Tensor:
    """The activation of an expert, gated or not; kernels compute it in fp32 and round once.

    Args:
        how: which.
        x: the up product, [..., 2 * F] for a gated expert, else [..., F]; any floating dtype, which it is computed in.

    Returns:
        [..., F]. A NaN stays a NaN through every clamp.
    """
    if not how.gated:
        return activation(how, x)
    if x.shape[-1] % 2:
        raise ValueError(f"a gated expert needs an even number of columns, not {x.shape[-1]}")
    gates, ups = (x[..., 0::2], x[..., 1::2]) if how.interleaved else x.chunk(2, dim=-1)
    inner = activation(how, gates.clamp(max=how.gate_limit)).clamp(max=how.output_limit)
    return inner * (ups.clamp(-how.up_limit, how.up_limit) + how.up_offset)


def activation(how: Gate, x: torch.Tensor) -> torch.Tensor:
    """The activation alone, without halves and limits: any shape, returned in the same."""
    if how.activation == "silu":
        return x * torch.sigmoid(how.alpha * x)
    return _ACTIVATIONS[how.activation](x)


_ACTIVATIONS: dict[str, Activation] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
