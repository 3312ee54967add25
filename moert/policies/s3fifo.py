"""S3-FIFO."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain
from typing import NamedTuple

from moert.policies._checks import check_at_least, check_share
from moert.policies._queue import Queue
from moert.policies.base import Policy
from moert.types import ExpertId

MOST_USES = 3


class _Scan(NamedTuple):
    """What evicting `victim` does besides: moves to the main queue, and second chances there, in their order."""

    victim: ExpertId
    promoted: list[ExpertId]
    renewed: list[ExpertId]


class S3FIFO(Policy):
    """A small queue, a main queue and a queue of ghosts, all first in, first out (Yang, Zhang, Qiu, Yue, Rashmi, 2023).

    New experts enter the small queue, those whose ghost is remembered the main one. Uses are counted up to 3, one an
    event. Evicts from the small queue unless the main one is over its share: the oldest goes on to the main queue if it
    was used `threshold` times since it came, else it leaves a ghost and goes. In the main queue the oldest gets another
    round for each use.

    While nothing has been evicted, what the small queue has no room for enters the main one, as in libCacheSim, by the
    same authors; the paper does not say. Locked experts are passed by and stay where they are. The small queue has room
    for one expert at least, so that a cache of few slots works too.
    """

    def __init__(self, capacity: int, small: float = 0.1, ghosts: float = 0.9, threshold: int = 2) -> None:
        """`small` and `ghosts` are shares of the capacity; the main queue has what `small` leaves."""
        super().__init__(capacity)
        self._small_share = check_share("s3fifo", "small", small)
        self._ghost_share = check_share("s3fifo", "ghosts", ghosts, allow_one=True)
        self._threshold = check_at_least("s3fifo", "threshold", threshold, 1)
        self._small = Queue(self.size)
        self._main = Queue(self.size)
        self._ghosts = Queue(self.size)
        self._uses: dict[ExpertId, int] = {}
        self._returning: set[ExpertId] = set()
        """The misses of this event that had a ghost when it began."""
        self._has_evicted = False
        self._scan: _Scan | None = None
        """The last answer of `victim`."""

    @property
    def _small_capacity(self) -> int:
        return max(1, int(self._small_share * self.capacity))

    def access(self, event: Sequence[ExpertId]) -> None:
        self._scan = None
        self._returning.clear()
        for expert in event:
            if expert in self._uses:
                self._uses[expert] = min(self._uses[expert] + 1, MOST_USES)
            elif expert in self._ghosts:
                self._ghosts.remove(expert)
                self._returning.add(expert)

    def admit(self, expert: ExpertId) -> None:
        self._scan = None
        returning = expert in self._returning or expert in self._ghosts
        self._returning.discard(expert)
        if expert in self._ghosts:
            self._ghosts.remove(expert)
        fills = not self._has_evicted and self._small.used >= self._small_capacity
        (self._main if returning or fills else self._small).push(expert)
        self._uses[expert] = 0

    def evict(self, expert: ExpertId) -> None:
        scan, self._scan = self._scan, None
        if scan is not None and scan.victim == expert:
            self._carry_out(scan)
            self._has_evicted = True
        if expert in self._main:
            self._main.remove(expert)
        else:
            self._small.remove(expert)
            self._ghosts.push(expert)
            while self._ghosts.used > int(self._ghost_share * self.capacity):
                self._ghosts.pop()
        del self._uses[expert]

    def _carry_out(self, scan: _Scan) -> None:
        for expert in scan.promoted:
            self._small.remove(expert)
            self._main.push(expert)
            self._uses[expert] = 0
        for expert in scan.renewed:
            self._main.renew(expert)
            self._uses[expert] -= 1

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        scan = None
        if self._main.used > self.capacity - self._small_capacity:
            scan = self._scan_main([], locked)
        scan = scan or self._scan_small(locked)
        assert scan is not None, "every expert is locked"
        self._scan = scan
        return scan.victim

    def _scan_small(self, locked: Collection[ExpertId]) -> _Scan | None:
        promoted: list[ExpertId] = []
        for expert in self._small:
            if expert not in locked:
                if self._uses[expert] < self._threshold:
                    return _Scan(expert, promoted, [])
                promoted.append(expert)
        return self._scan_main(promoted, locked)

    def _scan_main(self, promoted: list[ExpertId], locked: Collection[ExpertId]) -> _Scan | None:
        """The main queue's next victim once `promoted` stand at its end."""
        left: dict[ExpertId, int] = {}
        renewed: list[ExpertId] = []
        new = set(promoted)
        for expert in chain(self._main, promoted):
            if expert not in locked:
                left[expert] = 0 if expert in new else self._uses[expert]
                if left[expert] == 0:
                    return _Scan(expert, promoted, renewed)
                left[expert] -= 1
                renewed.append(expert)
        for expert in renewed:  # grows meanwhile
            if left[expert] == 0:
                return _Scan(expert, promoted, renewed)
            left[expert] -= 1
            renewed.append(expert)
        return None
