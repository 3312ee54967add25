"""Every experts class that goes through transformers' `use_experts_implementation`, whatever its flags."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from moert.errors import UnsupportedModelError
from moert.hf.adapters.base import ExpertsAdapter
from moert.kernels.cpu import linear
from moert.kernels.reference import expert_ffn
from moert.runtime.fused import FfnLayout

KNOWN_FLAGS = {
    "has_gate",
    "has_bias",
    "has_post_expert_norm",
    "is_transposed",
    "is_concatenated",
}


class HookedExperts(ExpertsAdapter):
    """Stacked `gate_up_proj` (or `up_proj`) and `down_proj`, laid out as the class's flags declare.

    Whether gate and up are concatenated or interleaved is the business of the class's own `_apply_gate`, which is
    always called.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.has_gate = bool(module.has_gate)
        self.has_bias = bool(getattr(module, "has_bias", False))
        self.is_transposed = bool(module.is_transposed)
        self.up_name = "gate_up_proj" if self.has_gate else "up_proj"
        self.num_experts = int(self.stacked("down_proj").shape[0])

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        # `down_proj` alone is not enough: inkling's shared experts are stacked too, and are dense weights.
        return (
            hasattr(module, "is_transposed")
            and hasattr(module, "has_gate")
            and hasattr(module, "_apply_gate")
            and isinstance(getattr(module, "down_proj", None), nn.Parameter)
        )

    @property
    def names(self) -> tuple[str, ...]:
        names = (self.up_name, "down_proj")
        return (*names, *(f"{name}_bias" for name in names)) if self.has_bias else names

    @property
    def layout(self) -> FfnLayout | None:
        if getattr(self.module, "has_post_expert_norm", False):
            return None
        return FfnLayout(self.up_name, "down_proj", self.is_transposed)

    def compute(self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        activation = self.module._apply_gate if self.has_gate else self.module.act_fn
        output = expert_ffn(
            hidden, weights, activation, up_name=self.up_name, is_transposed=self.is_transposed, linear=linear
        )
        if getattr(self.module, "has_post_expert_norm", False):
            output = self.module.post_expert_norm(output)
        return output

    def check(self, path: str) -> None:
        where = f"{type(self.module).__name__} at {path!r}"
        # Read by class name, because a flag that appears in a later transformers would change what a forward means.
        flags = {name for name in vars(self.module) if name.startswith(("has_", "is_"))}
        unknown = flags - KNOWN_FLAGS
        if unknown:
            raise UnsupportedModelError(
                f"{where} has the flag {sorted(unknown)[0]!r}, which this version of moert does not know"
            )
        parameters = dict(self.module.named_parameters(recurse=False))
        for name in self.names:
            if name not in parameters:
                raise UnsupportedModelError(f"{where} declares the weight {name!r} but does not have it")
            if parameters[name].shape[0] != self.num_experts:
                raise UnsupportedModelError(
                    f"{where}: {name} has {parameters[name].shape[0]} rows for {self.num_experts} experts"
                )
        super().check(path)
