"""Experts in the order in which a router would choose them."""

from __future__ import annotations

import torch

from moert.kernels import cpu
from moert.predictors.base import Prediction, Router

MARGIN = 1.5
"""Ranks are given for so many times the picks of a token: those just below the choice are next in likelihood."""


def rank(layer: int, router: Router, hidden: torch.Tensor) -> Prediction:
    """What `router` makes of `hidden` [T, D]: experts by the best rank that any token gives them."""
    weight = router.weight
    hidden = hidden.to(weight.dtype)
    if weight.dtype in cpu.HALVES:
        logits = cpu.linear(hidden, weight, router.bias)
    else:
        logits = torch.nn.functional.linear(hidden, weight, router.bias)
    if router.correction is not None:
        logits = logits.float().sigmoid() + router.correction
    n = min(logits.shape[1], int(MARGIN * router.top_k))
    if len(hidden) == 1:
        (order,) = logits.topk(n, dim=1).indices.tolist()
        kept = [(expert, place) for place, expert in enumerate(order) if expert < router.num_experts]
        return Prediction(layer, [expert for expert, _ in kept], [place for _, place in kept])
    ranked: dict[int, int] = {}
    for place, experts in enumerate(logits.topk(n, dim=1).indices.t().tolist()):
        for expert in experts:
            if expert < router.num_experts:
                ranked.setdefault(expert, place)
    return Prediction(layer, list(ranked), list(ranked.values()))
