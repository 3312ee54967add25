"""Random replacement."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moert.policies.base import Policy
from moert.types import ExpertId

_MASK = (1 << 64) - 1


class Random(Policy):
    """Evicts any resident that is not locked, each as likely as the others; the same ones for the same `seed`."""

    def __init__(self, capacity: int, seed: int = 0) -> None:
        super().__init__(capacity)
        self._seed = seed
        self._evictions = 0
        self._residents: list[ExpertId] = []
        self._places: dict[ExpertId, int] = {}

    def access(self, event: Sequence[ExpertId]) -> None:
        pass

    def admit(self, expert: ExpertId) -> None:
        self._places[expert] = len(self._residents)
        self._residents.append(expert)

    def evict(self, expert: ExpertId) -> None:
        place, last = self._places.pop(expert), self._residents.pop()
        if last != expert:
            self._residents[place] = last
            self._places[last] = place
        self._evictions += 1

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        # The draws of an eviction depend on its number alone, so that asking again gives the same answer.
        state = _mix(_mix(self._seed & _MASK) + self._evictions)
        while True:
            state = _mix(state)
            expert = self._residents[state * len(self._residents) >> 64]
            if expert not in locked:
                return expert


def _mix(state: int) -> int:
    """The next of SplitMix64 (Steele, Lea, Flood, 2014)."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
    return state ^ (state >> 31)
