"""Plain torch: what every kernel means, and the CPU path until a faster kernel takes over."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

Activation = Callable[[torch.Tensor], torch.Tensor]


def expert_ffn(
    hidden: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    activation: Activation,
    *,
    up_name: str = "gate_up_proj",
    is_transposed: bool = False,
) -> torch.Tensor:
    """One expert on the rows routed to it.

    Args:
        hidden: [T, D], in the dtype of the weights.
        weights: `up_name` [U, D] and "down_proj" [D, F], or [D, U] and [F, D] if `is_transposed`; optional biases
            under the same names with "_bias" added, [U] and [D].
        activation: [T, U] -> [T, F]; for a gated expert it splits, gates and multiplies.

    Returns:
        [T, D], not yet weighted by the router; new memory.
    """
    inner = activation(_linear(hidden, weights, up_name, is_transposed))
    return _linear(inner, weights, "down_proj", is_transposed)


def _linear(x: torch.Tensor, weights: Mapping[str, torch.Tensor], name: str, is_transposed: bool) -> torch.Tensor:
    if is_transposed:
        y = x @ weights[name]
        return y if f"{name}_bias" not in weights else y + weights[f"{name}_bias"]
    return torch.nn.functional.linear(x, weights[name], weights.get(f"{name}_bias"))
