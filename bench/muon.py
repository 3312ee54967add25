"""Muon: momentum whose every update matrix is made nearly orthogonal, in batches over equal shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Jordan's quintic: it trades convergence to exactly 1 for few steps, and singular values end between about 0.7 and 1.2.
SERIES = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalize(update: Tensor) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices to `update` [N, R, C], by a Newton-Schulz series in bfloat16."""
    x = update.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.transpose(1, 2).contiguous()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = SERIES
    for _ in range(STEPS):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if is_tall else x


class Muon(torch.optim.Optimizer):
    """For parameters of 2 dimensions, or 3 with a batch of matrices first (an expert's fused gate and up count as two).

    The update's root mean square is scaled to that of a typical AdamW update, so one learning rate serves both.
    """

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum"], group["momentum"])
                batch, rows, columns = (1, *update.shape) if update.ndim == 2 else update.shape
                if update.ndim == 3 and rows % 2 == 0 and rows <= columns:
                    batch, rows = 2 * batch, rows // 2
                update = orthogonalize(update.reshape(batch, rows, columns)).view_as(parameter)
                scale = 0.2 * max(rows, columns) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)
        return loss
