"""Plain torch: what every kernel means."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

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
