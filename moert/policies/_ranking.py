"""Experts by a key, the lowest at hand."""

from __future__ import annotations

import heapq
from collections.abc import Collection
from typing import NamedTuple

from moert.types import ExpertId


class Rank(NamedTuple):
    """What experts are ranked by: a score, then a number that tells equal ones apart, then their id."""

    score: float
    order: int
    expert: ExpertId


class Ranking:
    """Experts with a rank each. Setting one and finding the lowest is O(log n), amortised."""

    def __init__(self) -> None:
        self._ranks: dict[ExpertId, Rank] = {}
        self._heap: list[Rank] = []
        """Every rank in use, and outdated ones until they come up."""

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, expert: object) -> bool:
        return expert in self._ranks

    def set(self, expert: ExpertId, score: float, order: int = 0) -> None:
        """Rank `expert`, whether it has a rank or not."""
        # What the constructor does, without its Python: this is on the way of every miss.
        rank = tuple.__new__(Rank, (score, order, expert))
        self._ranks[expert] = rank
        heapq.heappush(self._heap, rank)
        if len(self._heap) > 32 + 4 * len(self._ranks):
            self._heap = list(self._ranks.values())
            heapq.heapify(self._heap)

    def remove(self, expert: ExpertId) -> None:
        """Rank `expert` no more."""
        del self._ranks[expert]

    def lowest(self, locked: Collection[ExpertId] = ()) -> Rank | None:
        """The lowest rank of those that are not locked, or None. O(locked ones that are lower * log n)."""
        passed = []
        found = None
        while self._heap:
            rank = self._heap[0]
            if self._ranks.get(rank.expert) is rank:
                if rank.expert not in locked:
                    found = rank
                    break
                passed.append(rank)
            heapq.heappop(self._heap)
        for rank in passed:
            heapq.heappush(self._heap, rank)
        return found
