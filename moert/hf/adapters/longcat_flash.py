"""LongCat-Flash: the last experts compute nothing, cost no bytes and always hit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from moert.hf.adapters.base import ExpertsAdapter
from moert.kernels.cpu import linear
from moert.kernels.reference import expert_ffn
from moert.runtime.fused import FfnLayout


class LongcatFlash(ExpertsAdapter):
    """`gate_up_proj` has rows for all experts, `down_proj` for the routed ones; ids after those mean "the input"."""

    names = ("gate_up_proj", "down_proj")
    layout = FfnLayout()

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.num_experts = int(self.module.num_routed_experts)
        self.num_identity = int(self.module.zero_expert_num)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return type(module).__name__ == "LongcatFlashExperts" and isinstance(module.down_proj, nn.Parameter)

    def compute(self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return expert_ffn(hidden, weights, self._apply_gate, linear=linear)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        inner: torch.Tensor = self.module.act_fn(gate) * up
        return inner
