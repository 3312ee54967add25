"""ARC, the adaptive replacement cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moert.policies._queue import Queue
from moert.policies.base import Policy
from moert.types import ExpertId


class ARC(Policy):
    """Two LRU queues, of experts used once and more often, that share the capacity as ghosts of both teach it.

    Megiddo and Modha, 2003. `T1`, `T2` hold residents, `B1`, `B2` ghosts, and `p` is what `T1` should take. All of an
    event is accounted for before any of it is admitted: hits move to `T2`, and each miss with a ghost moves `p`, by
    ascending id. When a miss is then admitted, who leaves depends on `p` and, where `T1` takes `p` exactly, on whether
    the miss has a ghost in `B2`. The ghosts that are too many are forgotten after the eviction, not before, which
    makes no difference. An expert that was evicted, also by a failed read, leaves a ghost.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._t1 = Queue(self.size)
        self._t2 = Queue(self.size)
        self._b1 = Queue(self.size)
        self._b2 = Queue(self.size)
        self._p = 0.0

    def access(self, event: Sequence[ExpertId]) -> None:
        for expert in event:
            if expert in self._t1:
                self._t1.remove(expert)
                self._t2.push(expert)
            elif expert in self._t2:
                self._t2.renew(expert)
            elif expert in self._b1:
                self._p = min(self._p + max(1.0, self._b2.used / self._b1.used), self.capacity)
            elif expert in self._b2:
                self._p = max(self._p - max(1.0, self._b1.used / self._b2.used), 0.0)

    def admit(self, expert: ExpertId) -> None:
        for ghosts in (self._b1, self._b2):
            if expert in ghosts:
                ghosts.remove(expert)
                self._t2.push(expert)
                return
        size = self.size(expert)
        while self._b1 and self._t1.used + self._b1.used + size > self.capacity:
            self._b1.pop()
        others = self._t1.used + self._b1.used + self._t2.used + size
        while self._b2 and others + self._b2.used > 2 * self.capacity:
            self._b2.pop()
        self._t1.push(expert)

    def evict(self, expert: ExpertId) -> None:
        residents, ghosts = (self._t1, self._b1) if expert in self._t1 else (self._t2, self._b2)
        residents.remove(expert)
        ghosts.push(expert)

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        return self._replaced(self._t1.used > self._p, locked)

    def victim_for(self, expert: ExpertId, locked: Collection[ExpertId]) -> ExpertId:
        return self._replaced(self._t1.used > self._p or (self._t1.used == self._p and expert in self._b2), locked)

    def _replaced(self, from_t1: bool, locked: Collection[ExpertId]) -> ExpertId:
        first, second = (self._t1, self._t2) if from_t1 else (self._t2, self._t1)
        return first.oldest(locked) or second.first(locked)
