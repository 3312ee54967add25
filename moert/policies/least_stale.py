"""Least-Stale: what this forward pass has used stays."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moert.policies._queue import Queue
from moert.policies.base import Policy
from moert.types import ExpertId


class LeastStale(Policy):
    """Evicts residents that the current forward pass has not used before those that it has (SpecMD, arXiv 2602.03921).

    Both in the order in which they came: a stale one moves behind the others when the pass uses it, and only then; an
    expert that is brought up ahead of its use comes in as used. A pass begins with an event of a layer that is not
    above the last one's. So in a cache of one layer and without prefetching this is LRU; it is meant for a cache of all
    layers whose experts are prefetched, where it keeps what was brought up and not used yet.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._queue = Queue(self.size)
        """The stale ones, then those of this pass."""
        self._last_pass: dict[ExpertId, int] = {}
        self._pass = 0
        self._layer = -1

    def access(self, event: Sequence[ExpertId]) -> None:
        if not event:
            return
        if event[0].layer <= self._layer:
            self._pass += 1
        self._layer = event[0].layer
        for expert in event:
            if self._last_pass.get(expert, self._pass) < self._pass:
                self._queue.renew(expert)
                self._last_pass[expert] = self._pass

    def admit(self, expert: ExpertId) -> None:
        self._queue.push(expert)
        self._last_pass[expert] = self._pass

    def evict(self, expert: ExpertId) -> None:
        self._queue.remove(expert)
        del self._last_pass[expert]

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        return self._queue.first(locked)
