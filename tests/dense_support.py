"""Layers for the tests of dense compute, what they must give, and whether moert's kernels gave it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from moert.hf import dense_compute
from moert.kernels import cpu

HALVES = [torch.bfloat16, torch.float16]
# One rounding to the output's dtype, and the last bits of a sum in fp32.
ROUNDING = {torch.bfloat16: 2**-8 * 1.02, torch.float16: 2**-11 * 1.1}


class Calls:
    """Which products moert's kernels were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        right = cpu.linear

        def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            self.rows.append(x.numel() // x.shape[-1])
            return right(x, weight, bias)

        monkeypatch.setattr(dense_compute, "linear", counted)

    def during(self, run: Callable[[], Any]) -> int:
        self.rows.clear()
        run()
        return len(self.rows)


def computed_calls(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> Callable[[Callable[[], Any]], int]:
    """How often the kernel that `module` calls by that name computes, and does not give None, while something runs."""
    kernel, computed = getattr(module, name), []

    def counted(*args: Any) -> torch.Tensor | None:
        y: torch.Tensor | None = kernel(*args)
        computed.append(y is not None)
        return y

    monkeypatch.setattr(module, name, counted)

    def during(run: Callable[[], Any]) -> int:
        computed.clear()
        run()
        return sum(computed)

    return during


def block(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """Two linear layers, one with a bias, and something between them."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(48, 40), nn.SiLU(), nn.Linear(40, 56, bias=False)).to(dtype).requires_grad_(False)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randn(shape).to(dtype)


def exact(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    bias = layer.bias.double() if layer.bias is not None else 0
    return x.double() @ layer.weight.double().T + bias
