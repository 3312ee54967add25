"""Least recently used."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from moert.policies._queue import Queue
from moert.policies.base import Policy
from moert.types import ExpertId


class LRU(Policy):
    """Evicts the resident whose last event is longest ago (Denning, 1968).

    The experts of one event are equally recent. Among them hits are taken as older than misses, and of each kind the
    lower id as the older one.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._queue = Queue(self.size)

    def __iter__(self) -> Iterator[ExpertId]:
        """The residents in the order in which they would leave."""
        return iter(self._queue)

    def access(self, event: Sequence[ExpertId]) -> None:
        for expert in event:
            if expert in self._queue:
                self._queue.renew(expert)

    def admit(self, expert: ExpertId) -> None:
        self._queue.push(expert)

    def evict(self, expert: ExpertId) -> None:
        self._queue.remove(expert)

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        return self._queue.first(locked)
