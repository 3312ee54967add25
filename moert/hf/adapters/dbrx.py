"""DBRX: three stacked matrices of a child module, and hidden states that keep their batch dimension."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from moert.hf.adapters.base import ExpertsAdapter


class Dbrx(ExpertsAdapter):
    """`mlp.w1`, `mlp.v1` and `mlp.w2`, each [E * F, D] with an expert's rows together."""

    names = ("mlp.w1", "mlp.v1", "mlp.w2")

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.num_experts = int(self.module.num_experts)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return type(module).__name__ == "DbrxExperts" and isinstance(module.get_parameter("mlp.w1"), nn.Parameter)

    def expert_shape(self, name: str) -> tuple[int, ...]:
        rows, columns = self.stacked(name).shape
        return (rows // self.num_experts, columns)

    def compute(self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        output: torch.Tensor = self.module.mlp(hidden, *(weights[name] for name in self.names))
        return output

    def flatten(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.reshape(-1, hidden.shape[-1])

    def unflatten(self, output: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return output.view(hidden.shape[0], -1, hidden.shape[-1])
