"""Step-3.7: the standard contract with its own gate, in a class that is not marked for the experts hook."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from moert.hf.adapters.base import ExpertsAdapter
from moert.kernels.cpu import linear
from moert.kernels.reference import expert_ffn
from moert.runtime.fused import FfnLayout


class Step3p7(ExpertsAdapter):
    """Stacked `gate_up_proj` and `down_proj`; the gate clamps after the activation, with a limit for each layer."""

    names = ("gate_up_proj", "down_proj")
    layout = FfnLayout()

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.num_experts = int(self.stacked("down_proj").shape[0])

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return type(module).__name__ == "Step3p7Experts" and isinstance(module.down_proj, nn.Parameter)

    def compute(self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return expert_ffn(hidden, weights, self.module._apply_gate, linear=linear)
