"""What children of a module are replaced by, to see what its class's code does with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


class StandIn(nn.Module):
    """Gives what it is told to, and notes what it is given."""

    def __init__(self, output: Any = None, *, made: Callable[[torch.Tensor], Any] | None = None) -> None:
        """`made` makes the output of the first thing given, in place of one that is always the same."""
        super().__init__()
        self.output = output
        self.given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._made = made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.given.append((args, kwargs))
        return self.output if self._made is None else self._made(self.values[0])

    @property
    def values(self) -> tuple[Any, ...]:
        """All that it was given the last time, in order."""
        args, kwargs = self.given[-1]
        return (*args, *kwargs.values())


def with_children(module: nn.Module, children: Mapping[str, nn.Module | None]) -> nn.Module:
    """The module, not training and with other children; it shares all else with it."""
    stand_in = copy.copy(module)
    stand_in.training = False
    vars(stand_in)["_modules"] = dict(children)
    return stand_in


def same(a: Any, b: torch.Tensor) -> bool:
    """Whether `a` is a tensor of the same numbers in the same dtype and shape."""
    return isinstance(a, torch.Tensor) and a.dtype is b.dtype and a.shape == b.shape and torch.equal(a, b)


class Normal:
    """Random numbers, the same each time."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self._dtype = dtype
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, *shape: int, magnitude: float = 1.0) -> torch.Tensor:
        # HuggingFace's loader may have set another default dtype and device.
        numbers = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return (numbers * magnitude).to(self._dtype)
