"""Belady's MIN: the fewest misses where every miss is admitted."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from typing import ClassVar

from moert.errors import ConfigError
from moert.policies._ranking import Ranking
from moert.policies.base import Policy
from moert.types import ExpertId


class Belady(Policy):
    """Evicts the resident whose next event is furthest away (Belady, 1966); it has to be told all events beforehand.

    No policy that admits each miss has fewer misses over a trace, as long as every event fits into the cache and all
    experts take the same room. Where an event does not fit, or sizes differ, it is no bound but a good guess.
    """

    needs_future: ClassVar[bool] = True

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._uses: dict[ExpertId, list[int]] = {}
        """The numbers of the events that have an expert."""
        self._foreseen: list[frozenset[ExpertId]] = []
        self._now = -1
        self._residents = Ranking()

    def foresee(self, events: Iterable[Sequence[ExpertId]]) -> None:
        assert self._now == -1, "the first event has passed"
        for event in events:
            for expert in event:
                self._uses.setdefault(expert, []).append(len(self._foreseen))
            self._foreseen.append(frozenset(event))

    def access(self, event: Sequence[ExpertId]) -> None:
        self._now += 1
        if self._now >= len(self._foreseen) or self._foreseen[self._now] != frozenset(event):
            raise ConfigError(
                f"event {self._now} has {', '.join(map(str, event))}, which is not what was foreseen in "
                f"{len(self._foreseen)} events; a policy that knows the future runs over the trace it was given only"
            )
        for expert in event:
            if expert in self._residents:
                self._residents.set(expert, -self.next_use(expert))

    def next_use(self, expert: ExpertId) -> float:
        """The number of the next event that has `expert` after the present one; infinity if there is none."""
        uses = self._uses.get(expert, [])
        index = bisect_right(uses, self._now)
        return uses[index] if index < len(uses) else math.inf

    def admit(self, expert: ExpertId) -> None:
        self._residents.set(expert, -self.next_use(expert))

    def evict(self, expert: ExpertId) -> None:
        self._residents.remove(expert)

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        furthest = self._residents.lowest(locked)
        assert furthest is not None, "every resident is locked"
        return furthest.expert
