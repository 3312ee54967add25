"""Experts in the order in which a router would choose them."""

from __future__ import annotations

import numpy as np
import torch

from moert.kernels import cpu
from moert.kernels.gate_look import GateLook, is_for
from moert.predictors.base import MARGIN, Floats, Prediction, Router


class Looks:
    """What routers made of hidden states lately, layer by layer: kept until somebody asks for scores."""

    def __init__(self) -> None:
        self._logits: dict[int, tuple[Router, torch.Tensor]] = {}
        self._kernels: dict[int, tuple[torch.Tensor, GateLook | None]] = {}
        """Of each layer, the weight that they are for."""

    def look(self, layer: int, router: Router, hidden: torch.Tensor) -> Prediction | None:
        """See `rank`; None where `hidden` is not finite, or of no token."""
        if len(hidden) == 1 and is_for(hidden) and (kernel := self.kernel(layer, router)) is not None:
            return self.note(layer, router, *kernel.best(hidden))
        if not len(hidden):
            return None
        logits = logits_of(router, hidden)
        found = _order(layer, router, logits)
        if found is None:
            self._logits.pop(layer, None)
        else:
            self._logits[layer] = (router, logits)
        return found

    def kernel(self, layer: int, router: Router) -> GateLook | None:
        """What looks at one token at a time; None where it cannot read the router's weight."""
        known = self._kernels.get(layer)
        if known is None or known[0] is not router.weight:
            weight = router.weight
            count = min(len(weight), int(MARGIN * router.top_k))
            made = GateLook(weight, router.bias, router.correction, count) if is_for(weight) else None
            known = self._kernels[layer] = (weight, made)
        return known[1]

    def note(self, layer: int, router: Router, order: list[int], logits: torch.Tensor) -> Prediction | None:
        """What has been found for one token, best first, and what was compared [1, E]; nothing was if not finite."""
        if not order:
            self._logits.pop(layer, None)
            return None
        self._logits[layer] = (router, logits)
        if max(order) < router.num_experts:
            return Prediction(layer, order, list(range(len(order))))
        kept = [(expert, place) for place, expert in enumerate(order) if expert < router.num_experts]
        return Prediction(layer, [expert for expert, _ in kept], [place for _, place in kept])

    def forget(self) -> None:
        """What was looked at is over."""
        self._logits.clear()

    def scores(self, layer: int, num_experts: int) -> Floats | None:
        """[E] of the latest look at `layer`: the best softmax of its logits that any token gives; None without one."""
        if layer not in self._logits:
            return None
        router, logits = self._logits[layer]
        known = logits.float().softmax(1).amax(0)[: router.num_experts].numpy()
        return known if len(known) == num_experts else np.pad(known, (0, num_experts - len(known)))


def rank(layer: int, router: Router, hidden: torch.Tensor) -> Prediction:
    """What `router` makes of `hidden` [T, D]: experts by the best rank that any token gives them.

    None at all where something in `hidden` is not finite.
    """
    return _order(layer, router, logits_of(router, hidden)) or Prediction(layer, [], [])


def logits_of(router: Router, hidden: torch.Tensor) -> torch.Tensor:
    """[T, E] what `router` chooses the highest of."""
    weight = router.weight
    hidden = hidden.to(weight.dtype)
    if weight.dtype in cpu.HALVES:
        logits = cpu.linear(hidden, weight, router.bias)
    else:
        logits = torch.nn.functional.linear(hidden, weight, router.bias)
    if router.correction is not None:
        logits = logits.float().sigmoid() + router.correction
    return logits


def _order(layer: int, router: Router, logits: torch.Tensor) -> Prediction | None:
    n = min(logits.shape[1], int(MARGIN * router.top_k))
    if len(logits) == 1:
        best = logits.topk(n, dim=1)
        # Whatever is not a number comes first, and infinity before all numbers.
        if n and not abs(best.values[0, 0].item()) < float("inf"):
            return None
        (order,) = best.indices.tolist()
        kept = [(expert, place) for place, expert in enumerate(order) if expert < router.num_experts]
        return Prediction(layer, [expert for expert, _ in kept], [place for _, place in kept])
    if not logits.isfinite().all():
        return None
    ranked: dict[int, int] = {}
    for place, experts in enumerate(logits.topk(n, dim=1).indices.t().tolist()):
        for expert in experts:
            if expert < router.num_experts:
                ranked.setdefault(expert, place)
    return Prediction(layer, list(ranked), list(ranked.values()))
