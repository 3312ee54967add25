"""First in, first out."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moert.policies._queue import Queue
from moert.policies.base import Policy
from moert.types import ExpertId


class FIFO(Policy):
    """Evicts the resident that was admitted longest ago, however often it is used (Belady, 1966)."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._queue = Queue(self.size)

    def access(self, event: Sequence[ExpertId]) -> None:
        pass

    def admit(self, expert: ExpertId) -> None:
        self._queue.push(expert)

    def evict(self, expert: ExpertId) -> None:
        self._queue.remove(expert)

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        return self._queue.first(locked)
