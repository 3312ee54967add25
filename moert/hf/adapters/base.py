"""The interface of an adapter: one kind of experts module, seen by its layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moert.errors import UnsupportedModelError
from moert.formats import TensorSpec
from moert.runtime.fused import FfnLayout

PLAIN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class ExpertsAdapter(ABC):
    """Reads one experts module: what an expert's tensors are, and how an expert is computed from them.

    The module itself is the template: its class's own activation and gate are called, so a family that differs there
    needs no code of its own. An adapter never changes the module.
    """

    num_experts: int
    """Experts that have weights."""
    num_identity: int = 0
    """Experts after those that return their input."""

    module: Any
    """The experts module, of whatever class it is."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @classmethod
    @abstractmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether `module` is of this kind."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The stacked parameters, by their path within the module."""

    @abstractmethod
    def compute(self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One expert: [T, D] -> [T, D], not yet weighted by the router. `weights` are as `names` and `specs` say."""

    @property
    def layout(self) -> FfnLayout | None:
        """Which tensors an expert's products take; None where an expert is more than two products and a gate.

        With a layout, and a gate that the kernels have, experts are computed by the fused kernels and not by `compute`.
        """
        return None

    def expert_shape(self, name: str) -> tuple[int, ...]:
        """The shape of one expert's part of the stacked parameter `name`."""
        return tuple(self.stacked(name).shape[1:])

    def stacked(self, name: str) -> nn.Parameter:
        """The parameter `name` as the module holds it, over all experts."""
        parameter: nn.Parameter = self.module.get_parameter(name)
        return parameter

    def expert_views(self, name: str) -> list[torch.Tensor]:
        """The parameter `name`, expert by expert, as views of its storage."""
        shape = self.expert_shape(name)
        flat = self.stacked(name).detach().reshape(-1, *shape)
        return [flat[expert] for expert in range(self.num_experts)]

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """One expert's tensors."""
        return tuple(TensorSpec(name, self.expert_shape(name), self.stacked(name).dtype) for name in self.names)

    def flatten(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the module is called with -> [T, D]."""
        return hidden

    def unflatten(self, output: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """[T, D] -> the shape that the module returns for `hidden`."""
        return output

    def check(self, path: str) -> None:
        """Raise UnsupportedModelError, naming class and reason, where the module is of this kind but cannot be run."""
        for name in self.names:
            parameter = self.stacked(name)
            if parameter.dtype not in PLAIN_DTYPES:
                raise UnsupportedModelError(
                    f"{type(self.module).__name__} at {path!r}: {name} has dtype {parameter.dtype}; "
                    f"moert runs experts in {', '.join(str(dtype) for dtype in PLAIN_DTYPES)}"
                )
