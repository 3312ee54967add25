"""Least frequent and recent use: frequency over age."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moert.policies.base import Policy
from moert.types import ExpertId


class LFRU(Policy):
    """Evicts the resident with the least uses / age.

    Uses are all events so far that had it, also from before it was evicted; age is the events since the last of them,
    that one included (as in moe-cache-eval, arXiv 2608.07911, whose clock counts experts where this one counts events,
    so that those of one event are equally old). Of equal ones the least recently used leaves. Ages pass each other, so
    a victim costs a look at every resident. Where sizes differ it is the score per byte that counts.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._events = 0
        self._uses: dict[ExpertId, int] = {}
        self._last: dict[ExpertId, int] = {}
        self._residents: dict[ExpertId, None] = {}

    def access(self, event: Sequence[ExpertId]) -> None:
        self._events += 1
        for expert in event:
            self._uses[expert] = self._uses.get(expert, 0) + 1
            self._last[expert] = self._events

    def admit(self, expert: ExpertId) -> None:
        self._residents[expert] = None

    def evict(self, expert: ExpertId) -> None:
        del self._residents[expert]

    def victim(self, locked: Collection[ExpertId]) -> ExpertId:
        return min((expert for expert in self._residents if expert not in locked), key=self._rank)

    def _rank(self, expert: ExpertId) -> tuple[float, int, ExpertId]:
        last = self._last.get(expert, 0)
        return self._uses.get(expert, 0) / ((self._events - last + 1) * self.size(expert)), last, expert
