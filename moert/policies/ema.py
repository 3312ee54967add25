"""Exponential moving average of use."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moert.policies._checks import check_share
from moert.policies._decayed import DecayedSumPolicy
from moert.types import ExpertId


class EMA(DecayedSumPolicy):
    """Evicts the resident that lately was in the fewest events of its layer.

    At each event of its layer an expert's score moves by `alpha` towards 1 if the event has it and towards 0 if not,
    whether it is resident or not: S <- (1 - alpha) S + alpha [in the event]. Events are forgotten after about 1 / alpha
    others. Of equal scores the least recently used leaves. It wants an expert that scores more than who would leave.
    """

    def __init__(self, capacity: int, alpha: float = 0.03) -> None:
        super().__init__(capacity, 1 - check_share("ema", "alpha", alpha))
        self._alpha = alpha

    def access(self, event: Sequence[ExpertId]) -> None:
        if not event:
            return
        layer = event[0].layer
        self._begin_event(layer)
        self._add_all(event, layer, self._alpha)

    def wants(self, expert: ExpertId, locked: Collection[ExpertId]) -> bool:
        return self.score(expert) > self.score(self.victim(locked))

    def score(self, expert: ExpertId) -> float:
        """The moving average for `expert`, from 0 to 1; per byte where sizes differ."""
        return self._sum(expert) / self.size(expert)
