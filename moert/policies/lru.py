"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from moert.policies.base import Policy
from moert.types import ExpertId


class LRU(Policy):
    """Evicts the resident whose last event is longest ago (Denning, 1968).

    The experts of one event are equally recent; among them the lower id is taken as the older one.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order: OrderedDict[ExpertId, None] = OrderedDict()

    def access(self, event: Sequence[ExpertId]) -> None:
        for expert in event:
            if expert in self._order:
                self._order.move_to_end(expert)

    def admit(self, expert: ExpertId) -> None:
        self._order[expert] = None

    def evict(self, expert: ExpertId) -> None:
        del self._order[expert]

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        return next(expert for expert in self._order if expert not in locked)
