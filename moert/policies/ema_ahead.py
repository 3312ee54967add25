"""Exponential moving average of use, and what a predictor says of the tokens to come."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Sequence

import numpy as np

from moert.policies._checks import check_at_least, check_share
from moert.policies.ema import EMA
from moert.types import ExpertId


class EMAAhead(EMA):
    """Evicts the resident whose next use is worth least: one counts `discount` to the power of how far away it is.

    How far away is a matter of chance. For each of a layer's next `tokens` events there is the predicted probability
    that it needs the expert; after them the expert's moving average stands for all that follow. With p_i the chance
    of the i-th next event and r the average, the worth is what is expected of discount^(events until the next use):

        V_H = d r / (1 - d (1 - r)),   V_(i-1) = d (p_i + (1 - p_i) V_i),   worth V_0

    So with predictions that are certain it evicts who is needed last, as Belady's MIN does, and is MIN if they reach
    far enough; without any it is `ema`. A sum over the horizon, of discounted chances and the average, has neither
    property: two late uses would outweigh an early one. In one cache for several layers the events of a layer that
    runs sooner are nearer, by its share of a token.

    What was predicted for an event that has come is dropped; where nothing new is told, the rest goes on to count.
    """

    def __init__(self, capacity: int, tokens: int = 4, alpha: float = 0.03, discount: float = 0.5) -> None:
        super().__init__(capacity, alpha)
        self.tokens_ahead = check_at_least("ema_ahead", "tokens", tokens, 1)
        self._discount = check_share("ema_ahead", "discount", discount)
        self._told: dict[int, Sequence[Sequence[float]]] = {}
        """What is to be expected after the event of its layer that comes next."""
        self._chances: dict[int, Sequence[Sequence[float]]] = {}
        """Of each layer's next events; none of them is empty."""
        self._lines: dict[int, tuple[list[float], list[float]]] = {}
        """Since the layer's latest event, what the worth of each of its experts is made of; see `_line`."""
        self._worths: dict[int, dict[ExpertId, float]] = {}
        """Since the layer's latest event."""
        self._ranked: list[tuple[float, int, ExpertId]] = []
        """Residents since the latest event, those that leave first in front, if there are any; some may have left."""
        self._held: dict[int, set[ExpertId]] = {}
        self._now = 0
        """The layer of the latest event."""

    def observe_ahead(self, layer: int, chances: Sequence[Sequence[float]]) -> None:
        self._told[layer] = chances

    def access(self, event: Sequence[ExpertId]) -> None:
        super().access(event)
        if not event:
            return
        layer = self._now = event[0].layer
        chances = self._told.pop(layer, None) or self._chances.get(layer, ())[1:]
        if chances:
            self._chances[layer] = chances
        else:
            self._chances.pop(layer, None)
        self._lines.pop(layer, None)
        self._worths.pop(layer, None)
        self._ranked = []

    def admit(self, expert: ExpertId) -> None:
        super().admit(expert)
        self._held.setdefault(expert.layer, set()).add(expert)
        if self._ranked:
            insort(self._ranked, self._key(expert))

    def evict(self, expert: ExpertId) -> None:
        super().evict(expert)
        self._held[expert.layer].discard(expert)

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        if not self._chances:
            return super().victim(locked)
        if not self._ranked:
            self._ranked = sorted(self._key(expert) for held in self._held.values() for expert in held)
        return next(
            expert for *_, expert in self._ranked if expert in self._held[expert.layer] and expert not in locked
        )

    def wants(self, expert: ExpertId, locked: Collection[ExpertId]) -> bool:
        if not self._chances:
            return super().wants(expert, locked)
        return self._value(expert) > self._value(self.victim(locked))

    def worth(self, expert: ExpertId) -> float | None:
        return self._value(expert) if self._chances else None

    def _value(self, expert: ExpertId) -> float:
        """The worth of keeping `expert`, from 0 to 1; per byte where sizes differ."""
        worths = self._worths.setdefault(expert.layer, {})
        worth = worths.get(expert)
        if worth is None:
            worth = worths[expert] = self._worth(expert)
        if len(self._held) > 1:
            worth *= self._discount ** self._distance(expert.layer)
        return worth

    def _key(self, expert: ExpertId) -> tuple[float, int, ExpertId]:
        return self._value(expert), self._orders.get(expert, 0), expert

    def _worth(self, expert: ExpertId) -> float:
        discount, rate = self._discount, self._sum(expert)
        worth = discount * rate / (1 - discount * (1 - rate))
        if expert.layer in self._chances:
            base, slope = self._line(expert.layer)
            if expert.expert < len(base):
                worth = base[expert.expert] + slope[expert.expert] * worth
            else:
                worth *= discount ** len(self._chances[expert.layer])
        return worth / self.size(expert)

    def _line(self, layer: int) -> tuple[list[float], list[float]]:
        """Of each expert, the two numbers that make V_0 of V_H: all of the recursion's steps are straight lines."""
        line = self._lines.get(layer)
        if line is None:
            chances = np.asarray(self._chances[layer], np.float64)
            base, slope = np.zeros(chances.shape[1]), np.ones(chances.shape[1])
            for row in chances[::-1]:
                missed = self._discount * (1 - row)
                base = self._discount * row + missed * base
                slope = missed * slope
            line = self._lines[layer] = base.tolist(), slope.tolist()
        return line

    def _distance(self, layer: int) -> float:
        """Tokens until the next event of `layer`, less than those until the next one of the layer that runs now."""
        layers = max(*self._events, layer) + 1
        return ((layer - self._now - 1) % layers - layers + 1) / layers
