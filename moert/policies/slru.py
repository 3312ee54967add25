"""Segmented LRU."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moert.policies._checks import check_share
from moert.policies._queue import Queue
from moert.policies.base import Policy
from moert.types import ExpertId


class SLRU(Policy):
    """Two LRU queues: an expert is on probation until it is used again, then protected (Karedla, Love, Wherry, 1994).

    Evicts from probation. A hit makes an expert the newest of the protected ones; when those take more than their share
    of the capacity, the oldest of them go back on probation as its newest. All hits of an event are promoted before its
    misses come, so several may be sent back in one event.
    """

    def __init__(self, capacity: int, protected: float = 0.8) -> None:
        """`protected` is the share of the capacity that protected experts may take."""
        super().__init__(capacity)
        self._share = check_share("slru", "protected", protected)
        self._probation = Queue(self.size)
        self._protected = Queue(self.size)

    def access(self, event: Sequence[ExpertId]) -> None:
        for expert in event:
            if expert in self._protected:
                self._protected.renew(expert)
            elif expert in self._probation:
                self._probation.remove(expert)
                self._protected.push(expert)
                while self._protected.used > int(self._share * self.capacity):
                    self._probation.push(self._protected.pop())

    def admit(self, expert: ExpertId) -> None:
        self._probation.push(expert)

    def evict(self, expert: ExpertId) -> None:
        (self._probation if expert in self._probation else self._protected).remove(expert)

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        return self._probation.oldest(locked) or self._protected.first(locked)
