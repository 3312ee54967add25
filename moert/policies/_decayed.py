"""Policies that evict the expert with the least decayed sum of something."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from moert.policies._ranking import Rank, Ranking
from moert.policies.base import Policy
from moert.types import ExpertId

_TABLED = 64
"""Events for which decays are looked up, as most uses are no further apart; a lookup takes half the time of a power."""


class DecayedSumPolicy(Policy):
    """Keeps a sum for each expert that shrinks by `factor` at each event of its layer; the lowest resident leaves.

    Nothing is touched when it shrinks: each layer counts its events, and residents are ranked by the logarithm of what
    the sum would have to have been before the first of them to be what it is now. So the order within a layer stands
    still between events, and layers are compared by their lowest residents: O(log n) for an event's expert, O(layers)
    for a victim.

    Where sizes differ, it is the sum per byte that counts. Of equal ones the one that was added to longest ago leaves.
    """

    def __init__(self, capacity: int, factor: float, burst: float = 0.0) -> None:
        """`factor` is above 0 and at most 1. What is added g events after the addition before counts 1 - `burst`^g."""
        super().__init__(capacity)
        self._factor = factor
        self._decays = [factor**gap for gap in range(_TABLED)]
        self._shares = [1 - burst**gap for gap in range(_TABLED)]
        self._burst = burst
        self._rate = -math.log(factor)
        self._sums: dict[ExpertId, tuple[float, int]] = {}
        """Each sum as it was after an event, and which event that was."""
        self._orders: dict[ExpertId, int] = {}
        self._events: dict[int, int] = {}
        self._residents: dict[int, Ranking] = {}
        self._unranked: set[ExpertId] = set()
        """Residents that were added to since they were ranked; where nothing is evicted, nothing is ranked."""
        self._order = 0

    def _begin_event(self, layer: int) -> None:
        self._events[layer] = self._events.get(layer, 0) + 1

    def _add(self, expert: ExpertId, amount: float) -> None:
        self._add_all((expert,), expert.layer, amount)

    def _add_all(self, experts: Iterable[ExpertId], layer: int, amount: float) -> None:
        """`amount` to the sum of each of these experts of `layer`, in their order."""
        # One step of every layer passes here, so the loop looks nothing up twice.
        sums, orders, decays, shares = self._sums, self._orders, self._decays, self._shares
        now, order = self._events[layer], self._order
        residents = self._residents.get(layer, ())
        for expert in experts:
            known = sums.get(expert)
            if known is None:
                total = amount
            elif (gap := now - known[1]) < _TABLED:
                total = known[0] * decays[gap] + amount * shares[gap]
            else:
                total = known[0] * self._factor**gap + amount * (1 - self._burst**gap)
            sums[expert] = (total, now)
            order += 1
            orders[expert] = order
            if expert in residents:
                self._unranked.add(expert)
        self._order = order

    def _forget(self, expert: ExpertId) -> None:
        """What `expert` was added to before counts no more."""
        self._sums.pop(expert, None)

    def _sum(self, expert: ExpertId) -> float:
        if expert not in self._sums:
            return 0.0
        total, event = self._sums[expert]
        return total * self._factor ** (self._events[expert.layer] - event)

    def _rank(self, experts: Iterable[ExpertId]) -> None:
        sums, orders, rate, residents = self._sums, self._orders, self._rate, self._residents
        sized = self.sizes is not None
        for expert in experts:
            total, event = sums.get(expert, (0.0, 0))
            if sized:
                total /= self.size(expert)
            ranking = residents.get(expert.layer)
            if ranking is None:
                ranking = residents[expert.layer] = Ranking()
            score = math.log(total) + rate * event if total > 0 else -math.inf
            ranking.set(expert, score, orders.get(expert, 0))

    def admit(self, expert: ExpertId) -> None:
        self._rank((expert,))

    def evict(self, expert: ExpertId) -> None:
        self._unranked.discard(expert)
        self._residents[expert.layer].remove(expert)

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        found = self._lowest(locked)
        assert found is not None, "every resident is locked"
        return found

    def _lowest(self, locked: Collection[ExpertId]) -> ExpertId | None:
        """Who of the residents that are not locked has the lowest sum; None if all are."""
        if self._unranked:
            self._rank(self._unranked)
            self._unranked.clear()
        if len(self._residents) == 1:
            (only,) = self._residents.values()
            found = only.lowest(locked)
            return None if found is None else found.expert
        lowest: Rank | None = None
        for layer, residents in self._residents.items():
            rank = residents.lowest(locked)
            if rank is not None:
                rank = rank._replace(score=rank.score - self._rate * self._events.get(layer, 0))
                if lowest is None or rank < lowest:
                    lowest = rank
        return None if lowest is None else lowest.expert
