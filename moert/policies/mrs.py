"""Minus Recent Score, the cache policy of HybriMoE."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from moert.policies._checks import check_at_least, check_share
from moert.policies._decayed import DecayedSumPolicy
from moert.types import ExpertId


class MRS(DecayedSumPolicy):
    """Evicts the resident with the least moving average of router scores (HybriMoE, DAC 2025).

    At each event of a layer S <- alpha TopP(s) + (1 - alpha) S, where TopP keeps the greatest 2 `top_k` of the router's
    probabilities s and takes the others as 0, whether they were chosen or not. With several tokens s is their average;
    the published code looks at the first token only. Where scores are unknown, each expert of the event is taken to
    have an equal share of 1.
    """

    def __init__(self, capacity: int, alpha: float = 0.5, top_k: int = 0) -> None:
        """`top_k` is how many experts one token chooses; 0 takes the smallest event so far for one token's."""
        super().__init__(capacity, 1 - check_share("mrs", "alpha", alpha))
        self._alpha = alpha
        self._top_k = check_at_least("mrs", "top_k", top_k, 0)
        self._smallest_event = 0
        self._scores: dict[int, Sequence[float]] = {}

    def observe_scores(self, layer: int, scores: Sequence[float]) -> None:
        self._scores[layer] = scores

    def access(self, event: Sequence[ExpertId]) -> None:
        if not event:
            return
        layer = event[0].layer
        self._begin_event(layer)
        self._smallest_event = min(self._smallest_event or len(event), len(event))
        scores = self._scores.pop(layer, None)
        if scores is None:
            top = [(expert, 1 / len(event)) for expert in event]
        else:
            kept = heapq.nlargest(
                2 * (self._top_k or self._smallest_event), range(len(scores)), key=lambda index: (scores[index], -index)
            )
            top = [(ExpertId(layer, index), scores[index]) for index in sorted(kept)]
        for expert, score in top:
            self._add(expert, self._alpha * score)
