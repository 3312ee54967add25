"""Exponential moving average of use, and what a predictor says of the tokens to come."""

from __future__ import annotations

from collections.abc import Collection, Sequence

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
        self._worths: dict[int, dict[ExpertId, float]] = {}
        """Since the layer's latest event."""
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
        self._worths.pop(layer, None)

    def admit(self, expert: ExpertId) -> None:
        super().admit(expert)
        self._held.setdefault(expert.layer, set()).add(expert)

    def evict(self, expert: ExpertId) -> None:
        super().evict(expert)
        self._held[expert.layer].discard(expert)

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        if not self._chances:
            return super().victim(locked)
        free = (expert for held in self._held.values() for expert in held if expert not in locked)
        return min(free, key=lambda expert: (self.worth(expert), self._orders.get(expert, 0), expert))

    def wants(self, expert: ExpertId, locked: Collection[ExpertId]) -> bool:
        if not self._chances:
            return super().wants(expert, locked)
        return self.worth(expert) > self.worth(self.victim(locked))

    def worth(self, expert: ExpertId) -> float:
        """The worth of keeping `expert`, from 0 to 1; per byte where sizes differ."""
        worths = self._worths.setdefault(expert.layer, {})
        worth = worths.get(expert)
        if worth is None:
            worth = worths[expert] = self._worth(expert)
        if len(self._held) > 1:
            worth *= self._discount ** self._distance(expert.layer)
        return worth

    def _worth(self, expert: ExpertId) -> float:
        discount, rate = self._discount, self._sum(expert)
        worth = discount * rate / (1 - discount * (1 - rate))
        for row in reversed(self._chances.get(expert.layer, ())):
            chance = row[expert.expert] if expert.expert < len(row) else 0.0
            worth = discount * (chance + (1 - chance) * worth)
        return worth / self.size(expert)

    def _distance(self, layer: int) -> float:
        """Tokens until the next event of `layer`, less than those until the next one of the layer that runs now."""
        layers = max(*self._events, layer) + 1
        return ((layer - self._now - 1) % layers - layers + 1) / layers
