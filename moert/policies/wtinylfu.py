"""W-TinyLFU."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moert.policies._checks import check_at_least, check_share
from moert.policies._queue import Queue
from moert.policies.base import Policy
from moert.types import ExpertId


class WTinyLFU(Policy):
    """A small LRU window before a segmented LRU that admits by frequency (Einziger, Friedman, Manes, 2017).

    New experts enter the window. When it is full, the oldest of it and the expert that would leave the main part
    compete: the one that was used more often stays, the resident of the main part where they are equal. Counts are
    halved after `sample` uses for each expert of the capacity, and end at `sample`.

    The sketch of the paper only saves memory; here counts are exact, for there are no more experts than a model has.
    An event counts each of its experts before any of its misses compete.
    """

    def __init__(self, capacity: int, window: float = 0.01, protected: float = 0.8, sample: int = 10) -> None:
        """`window` is a share of the capacity, one expert at least, `protected` one of the main part."""
        super().__init__(capacity)
        self._window_share = check_share("wtinylfu", "window", window)
        self._protected_share = check_share("wtinylfu", "protected", protected)
        self._sample = check_at_least("wtinylfu", "sample", sample, 1)
        self._window = Queue(self.size)
        self._probation = Queue(self.size)
        self._protected = Queue(self.size)
        self._counts: dict[ExpertId, int] = {}
        self._counted = 0

    @property
    def _window_capacity(self) -> int:
        return max(1, int(self._window_share * self.capacity))

    def access(self, event: Sequence[ExpertId]) -> None:
        for expert in event:
            self._count(expert)
            if expert in self._window:
                self._window.renew(expert)
            elif expert in self._protected:
                self._protected.renew(expert)
            elif expert in self._probation:
                self._probation.remove(expert)
                self._protected.push(expert)
                while self._protected.used > int(self._protected_share * (self.capacity - self._window_capacity)):
                    self._probation.push(self._protected.pop())

    def _count(self, expert: ExpertId) -> None:
        self._counts[expert] = min(self._counts.get(expert, 0) + 1, self._sample)
        self._counted += self.size(expert)
        if self._counted >= self._sample * self.capacity:
            self._counts = {other: count // 2 for other, count in self._counts.items() if count > 1}
            self._counted //= 2

    def admit(self, expert: ExpertId) -> None:
        self._window.push(expert)
        while len(self._window) > 1 and self._window.used > self._window_capacity:
            self._probation.push(self._window.pop())

    def evict(self, expert: ExpertId) -> None:
        for queue in (self._window, self._probation, self._protected):
            if expert in queue:
                queue.remove(expert)

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        candidate = self._window.oldest(locked)
        resident = self._probation.oldest(locked) or self._protected.oldest(locked)
        if candidate is None or resident is None:
            found = candidate or resident
            assert found is not None, "every expert is locked"
            return found
        if self._window.used < self._window_capacity:
            return resident
        return resident if self._counts.get(candidate, 0) > self._counts.get(resident, 0) else candidate
