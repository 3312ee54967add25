"""Least frequently used."""

from __future__ import annotations

from collections.abc import Sequence

from moert.policies._checks import check_share
from moert.policies._decayed import DecayedSumPolicy
from moert.types import ExpertId


class LFU(DecayedSumPolicy):
    """Evicts the resident with the fewest uses, of equal ones the least recently used one.

    Each event is a use of its experts. All uses count, also those from before an expert was last evicted (perfect LFU;
    Breslau, Cao, Fan, Phillips, Shenker, 1999), or with `in_cache` only those since it was admitted, which is what
    libCacheSim calls LFU. With `decay` below 1 a use counts that much less with each later event of its layer, so that
    an expert that was popular once makes room. Where sizes differ it is the uses per byte that count, or the uses
    alone if `per_byte` is false.
    """

    def __init__(self, capacity: int, decay: float = 1.0, in_cache: bool = False, per_byte: bool = True) -> None:
        super().__init__(capacity, check_share("lfu", "decay", decay, allow_one=True))
        self._in_cache = in_cache
        self._per_byte = per_byte
        self._resident: set[ExpertId] = set()

    def access(self, event: Sequence[ExpertId]) -> None:
        if not event:
            return
        self._begin_event(event[0].layer)
        for expert in event:
            if self._in_cache and expert not in self._resident:
                self._forget(expert)
            self._add(expert, 1.0 if self._per_byte else self.size(expert))

    def admit(self, expert: ExpertId) -> None:
        self._resident.add(expert)
        super().admit(expert)

    def evict(self, expert: ExpertId) -> None:
        super().evict(expert)
        self._resident.remove(expert)
        if self._in_cache:
            self._forget(expert)
